"""Policies (sampler and scorer side by side), load / save, evaluation, and the question-answering command.

Shapes: P prompts, G completions of each, B = P * G rows (prompt-major), L prompt tokens after left padding,
T completion tokens after right padding, V vocabulary, C hidden size.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from model_toy import Autoencoder, AutoencoderConfig, HubModel, Llama, LlamaConfig
from rewards import UserError, answer_format, apply_reward, extract_answer, to_number
from tasks import Example, Task, find_task, load_task, pose

# --- Policies -------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """Sampled completions and the prompts they belong to; ids are carried, text is never tokenized again."""

    prompts: torch.Tensor  # (P, L) int64, padded on the left
    prompt_mask: torch.Tensor  # (P, L) bool, true on real tokens
    group: torch.Tensor  # (B,) int64, the prompt of each row
    actions: torch.Tensor  # (B, T) int64 completion ids, padded on the right
    mask: torch.Tensor  # (B, T) bool, true up to and including the end token
    sampler_logp: torch.Tensor  # (B, T) float32 or wider, the sampler's own log-probabilities
    truncated: torch.Tensor  # (B,) bool, cut by the length limit
    texts: list[str]  # (B,) completions without special tokens

    def select(self, rows: torch.Tensor) -> "Rollout":
        """The rollout of some rows (int64 indices), with only their prompts and no more padding than they need."""
        prompts, group = torch.unique(self.group[rows], return_inverse=True)
        start = int(self.prompt_mask[prompts].any(0).int().argmax())
        width = int(self.mask[rows].sum(1).max())
        return Rollout(
            prompts=self.prompts[prompts, start:],
            prompt_mask=self.prompt_mask[prompts, start:],
            group=group,
            actions=self.actions[rows, :width],
            mask=self.mask[rows, :width],
            sampler_logp=self.sampler_logp[rows, :width],
            truncated=self.truncated[rows],
            texts=[self.texts[row] for row in rows.tolist()],
        )

    @property
    def completion_ids(self) -> list[list[int]]:
        """The sampled ids of each row, its end token included."""
        return [ids[keep].tolist() for ids, keep in zip(self.actions.cpu(), self.mask.cpu(), strict=True)]


def join(rollouts: Sequence[Rollout]) -> Rollout:
    """One rollout of several, padded to the widest."""

    def widen(name: str, left: bool) -> torch.Tensor:
        tensors = [getattr(rollout, name) for rollout in rollouts]
        width = max(tensor.shape[1] for tensor in tensors)
        gaps = [width - tensor.shape[1] for tensor in tensors]
        sides = [(gap, 0) if left else (0, gap) for gap in gaps]
        return torch.cat([torch.nn.functional.pad(t, side) for t, side in zip(tensors, sides, strict=True)])

    starts = np.cumsum([0] + [len(rollout.prompts) for rollout in rollouts]).tolist()
    return Rollout(
        **{name: widen(name, left=True) for name in ("prompts", "prompt_mask")},
        **{name: widen(name, left=False) for name in ("actions", "mask", "sampler_logp")},
        group=torch.cat([rollout.group + start for rollout, start in zip(rollouts, starts, strict=False)]),
        truncated=torch.cat([rollout.truncated for rollout in rollouts]),
        texts=[text for rollout in rollouts for text in rollout.texts],
    )


def micro_batches(rollout: Rollout, token_budget: int) -> list[torch.Tensor]:
    """Cut the rows into micro-batches of at most `token_budget` tokens, padding included; returns row indices.

    Groups are sorted by length, longest first (so that memory runs out at once or not at all), and stay whole where
    they fit. A group less than half as long as the longest of its micro-batch starts a new one, to save padding.
    """
    lengths, prompt_lengths = rollout.mask.sum(1).tolist(), rollout.prompt_mask.sum(1).tolist()
    members: dict[int, list[int]] = {}
    for row, group in enumerate(rollout.group.tolist()):
        members.setdefault(group, []).append(row)
    units = []  # (completion tokens, prompt tokens, rows)
    for group, rows in members.items():
        width, prompt = max(lengths[row] for row in rows), prompt_lengths[group]
        fit = len(rows) if prompt + len(rows) * width <= token_budget else max(1, token_budget // (prompt + width))
        units += [(width, prompt, rows[i : i + fit]) for i in range(0, len(rows), fit)]
    batches: list[list[int]] = []
    longest = widest = prompts = 0
    for width, prompt, rows in sorted(units, key=lambda unit: -unit[0]):
        widest = max(widest, prompt)
        tokens = (prompts + 1) * widest + (len(batches[-1]) + len(rows)) * longest if batches else 0
        if not batches or tokens > token_budget or 2 * width < longest:
            batches.append([])
            longest, widest, prompts = width, prompt, 0
        batches[-1] += rows
        prompts += 1
    return [torch.tensor(sorted(rows), device=rollout.mask.device) for rows in batches]


def row_uniforms(key: Sequence[int], prompts: Sequence[int], group_size: int, length: int) -> torch.Tensor:
    """Uniforms (B, T) float64 in the open interval (0, 1), a Philox stream per row: key is (seed, step, draw).

    A row's numbers follow from its own coordinates alone, so nothing else in the batch can change them.
    """
    streams = [
        np.random.Philox(np.random.SeedSequence([*key, prompt, completion])).random_raw(length)
        for prompt in prompts
        for completion in range(group_size)
    ]
    # 52 bits and a half step: both ends of the interval stay out of reach, and the sum is exact in float64.
    return torch.from_numpy(((np.stack(streams) >> np.uint64(12)) + 0.5) * 2.0**-52)


def log_distribution(logits: torch.Tensor, temperature: float, noise: float = 0.0) -> torch.Tensor:
    """log_softmax(logits / temperature) over the last dimension, in float32 or wider; sampler and scorer share it.

    With `noise` it is the log of the mixture (1 - noise) * softmax + noise / V.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    if not noise:
        return log_probs
    uniform = torch.full_like(log_probs, math.log(noise / log_probs.shape[-1]))
    return torch.logaddexp(log_probs + math.log1p(-noise), uniform)


def inverse_cdf(log_probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token (B,) whose slice of the cumulative distribution (B, V) holds the uniform (B,).

    The sum runs in float64. The token is the first whose cumulative weight exceeds u * total, so never one of
    probability 0; rounding of u * total up to the total itself gives the last token that has any weight.
    """
    cumulative = log_probs.exp().to(uniform.device).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    token = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total, right=False)
    token = torch.minimum(token, last).clamp(max=log_probs.shape[1] - 1)[:, 0]  # NaN must not give index V either
    return token.to(log_probs.device)


class TokenPolicy:
    """A language model and its tokenizer: `sample` draws completions, `log_probs` scores them.

    Both use the same temperature and exploration noise, the full vocabulary and float32 from the logits on.
    """

    drop_below = 0.9  # compact the batch once fewer rows than this are still decoding
    chunk_logits = 2**24  # most logits at once while scoring: 64 MiB in float32
    dtype = torch.float32  # of the matrix products

    def __init__(
        self, model: Llama, tokenizer, temperature: float = 1.0, end_ids: Sequence[int] = (), exploration_noise=0.0
    ):
        self.model, self.tokenizer = model, tokenizer
        self.temperature, self.exploration_noise = temperature, exploration_noise
        self.end_ids = sorted({tokenizer.eos_token_id, *end_ids} - {None})
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_ids[0]

    @property
    def chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode(self, prompts: list[str | list[dict]]) -> list[list[int]]:
        """Token ids of plain prompts, or of message lists through the chat template; raises UserError."""
        encoded = []
        for prompt in prompts:
            text = prompt
            if not isinstance(prompt, str):
                text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
            unknown, special = self.tokenizer.unk_token_id, {self.tokenizer.bos_token_id, *self.end_ids, self.pad_id}
            if unknown in ids and unknown not in special | {None}:
                encoding = self.tokenizer(text, return_offsets_mapping=True)
                spans = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
                strange = sorted({text[start:end] for i, (start, end) in spans if i == unknown})
                shown = printable(" ".join(strange))
                raise UserError(f"question {printable(text)!r}: the tokenizer does not know {shown}; leave it out")
            if not ids:
                raise UserError("the question is empty; ask something, as in 'What is (4 - 9) * 6?'")
            encoded.append(ids)
        return encoded

    def fitting(self, splits: dict[str, list[Example]], max_new_tokens: int) -> dict[str, list[Example]]:
        """The examples whose prompts leave room for a completion; says how many do not, raises UserError if none."""
        room, kept = self.model.max_length - max_new_tokens, {}
        for name, examples in splits.items():
            lengths = map(len, self.encode([example.prompt for example in examples]))
            kept[name] = [example for example, length in zip(examples, lengths, strict=True) if length <= room]
            out = len(examples) - len(kept[name])
            if out:
                print(f"{name}: {out} of {len(examples)} left out, their questions have more than {room} tokens")
            if not kept[name]:
                raise UserError(
                    f"--max-new-tokens is {max_new_tokens}, which leaves no room for any question; lower it"
                )
        return kept

    def demonstrations(self, examples: list[Example]) -> tuple[list[list[int]], list[list[int]], list[str]]:
        """Prompt ids, completion ids with the end token, and texts of all demonstrations that fit."""
        pairs = [(example.prompt, text) for example in examples for text in example.demonstrations]
        prompts = self.encode([prompt for prompt, _ in pairs])
        texts, end = [text for _, text in pairs], self.tokenizer.eos_token_id
        end = self.end_ids[0] if end is None else end
        ids = self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
        rows = list(zip(prompts, [row + [end] for row in ids], texts, strict=True))
        room = self.model.max_length
        kept = [row for row in rows if len(row[0]) + len(row[1]) <= room]
        if len(kept) < len(rows):
            print(f"left out {len(rows) - len(kept)} of {len(rows)} demonstrations of more than {room} tokens")
        return tuple(map(list, zip(*kept, strict=True))) if kept else ([], [], [])

    def pack(self, prompts: list[list[int]], completions: list[list[int]], texts: list[str]) -> Rollout:
        """A rollout of given completions (ids, each with its end token), one for each prompt, on the device."""
        length, width = max(map(len, prompts)), max(map(len, completions))
        rollout = Rollout(
            prompts=torch.tensor([[self.pad_id] * (length - len(ids)) + ids for ids in prompts]),
            prompt_mask=torch.tensor([[False] * (length - len(ids)) + [True] * len(ids) for ids in prompts]),
            group=torch.arange(len(prompts)),
            actions=torch.tensor([ids + [self.pad_id] * (width - len(ids)) for ids in completions]),
            mask=torch.tensor([[True] * len(ids) + [False] * (width - len(ids)) for ids in completions]),
            sampler_logp=torch.zeros(len(completions), width),
            truncated=torch.tensor([ids[-1] not in self.end_ids for ids in completions]),
            texts=texts,
        )
        return on_device(rollout, self.device)

    def sample(
        self,
        examples: Sequence[Example],
        group_size: int,
        key: Sequence[int],
        max_new_tokens: int,
        greedy: bool = False,
        first: int = 0,
        explore: bool = True,
    ) -> Rollout:
        """Draw `group_size` completions of each example; key is (seed, step, draw), `first` the first prompt's number.

        Each prompt is prefilled once and its cache repeated for its group. Greedy takes the likeliest token and ignores
        the temperature; greedy and without `explore` there is no exploration noise. Raises
        FloatingPointError if the model's log-probabilities are not finite.
        """
        encoded = self.encode([example.prompt for example in examples])
        longest, room = max(map(len, encoded)), self.model.max_length
        if longest + max_new_tokens > room:
            what = f"a question of {longest} tokens and {max_new_tokens} more do not fit into the model's {room}"
            raise UserError(f"{what}; lower --max-new-tokens, or ask something shorter")
        packed = self.pack(encoded, [[self.pad_id]] * len(encoded), [""] * len(encoded))
        group = packed.group.repeat_interleave(group_size)
        uniforms = row_uniforms(key, range(first, first + len(encoded)), group_size, max_new_tokens)
        uniforms = uniforms if self.device.type == "mps" else uniforms.to(self.device)  # mps has no float64
        choose = (lambda log_probs, _: log_probs.argmax(-1)) if greedy else inverse_cdf
        noise = self.exploration_noise if explore and not greedy else 0.0
        prompt, cache = self.prompt_inputs(packed), self.model.new_cache()
        key_mask = None if prompt["key_mask"] is None else packed.prompt_mask[group]
        lengths = packed.prompt_mask.sum(1)[group]
        with torch.inference_mode(), self.autocast():
            hidden = self.model(packed.prompts, **prompt, cache=cache)[group, -1]  # (B, C)
            cache = cache.select(group, room=max_new_tokens - 1)
            decoded = self.decode(hidden, cache, lengths, key_mask, uniforms, choose, noise)
        if not decoded[2].isfinite().all():
            raise FloatingPointError("the model's log-probabilities are not finite")
        width = int(decoded[1].sum(1).max())
        actions, mask, logp = (x[:, :width].clone() for x in decoded)  # autograd takes no tensor of inference mode
        last = actions.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
        truncated = ~torch.isin(last, torch.tensor(self.end_ids, device=self.device))
        rollout = dataclasses.replace(
            packed, group=group, actions=actions, mask=mask, sampler_logp=logp, truncated=truncated
        )
        rollout.texts = self.tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        return rollout

    def decode(self, hidden, cache, positions, key_mask, uniforms, choose: Callable, noise: float):
        """Decode up to T tokens for each row: ids (B, T), mask (B, T), log-probabilities (B, T) float32 or wider.

        `hidden` (B, C) predicts the first token, which stands at `positions` (B,); `choose` turns log-probabilities
        (rows, V) and uniforms (rows,) into tokens. Ended rows are dropped from the batch, a tenth of it at a time.
        """
        actions = torch.full(uniforms.shape, self.pad_id, device=self.device)
        mask = torch.zeros_like(actions, dtype=torch.bool)
        logp = torch.zeros(actions.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=self.device)
        ends = torch.tensor(self.end_ids, device=self.device)
        rows = torch.arange(len(actions), device=self.device)  # the rows that are still in the batch
        going = torch.ones_like(rows, dtype=torch.bool)  # those of them that have not ended
        for t in range(actions.shape[1]):
            distribution = log_distribution(self.model.logits(hidden), self.temperature, noise)
            token = choose(distribution, uniforms[rows.to(uniforms.device), t])
            actions[rows, t], mask[rows, t] = token, going
            logp[rows, t] = distribution.gather(1, token[:, None])[:, 0]
            going = going & ~torch.isin(token, ends)
            left = int(going.sum())
            if t + 1 == actions.shape[1] or not left:
                return actions.where(mask, self.pad_id), mask, logp.where(mask, 0.0)
            if left < self.drop_below * len(going):
                keep = going.nonzero()[:, 0]
                rows, token, positions, going = rows[keep], token[keep], positions[keep], going[keep]
                cache, key_mask = cache.select(keep), None if key_mask is None else key_mask[keep]
            if key_mask is not None:
                key_mask = torch.cat([key_mask, torch.ones_like(key_mask[:, :1])], 1)
            hidden = self.model(token[:, None], positions[:, None], cache, key_mask)[:, 0]
            positions = positions + 1

    def log_probs(self, rollout: Rollout, share_prompts: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (B, T) of the sampled ids, float32 or wider, with gradient; exact entropies (B, T) in nats.

        Both are 0 at padding. The entropy carries no gradient. With `share_prompts`, groups of several rows take one
        pass over the prompt and one over the completions; otherwise prompt and completion go in one uncached pass.
        """
        shared = share_prompts and len(rollout.group) > len(rollout.prompts) and not self.model.checkpointing
        with self.autocast():
            hidden = (self.shared_hidden if shared else self.joined_hidden)(rollout)  # (B, T, C)
            picked, spread = self.score_tokens(hidden[rollout.mask], rollout.actions[rollout.mask])
        blank = picked.new_zeros(rollout.actions.shape)
        return blank.masked_scatter(rollout.mask, picked), blank.masked_scatter(rollout.mask, spread)

    def score_tokens(self, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (N,) of ids (N,) and entropies (N,), from hidden states (N, C).

        The vocabulary's (N, V) never exists as a whole if it is large: the tokens go in chunks, whose logits are made
        again in the backward pass.
        """

        def score(hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with self.autocast(cache_enabled=False):  # else all chunks sum their gradient in one bfloat16 copy
                logits = self.model.logits(hidden)
            distribution = log_distribution(logits, self.temperature, self.exploration_noise)
            with torch.no_grad():
                entropy = torch.special.entr(distribution.exp()).sum(-1)
            return distribution.gather(1, ids[:, None])[:, 0], entropy

        size = max(1, self.chunk_logits // self.model.config.vocab_size)
        if len(ids) <= size:
            return score(hidden, ids)
        chunks = zip(hidden.split(size), ids.split(size), strict=True)
        parts = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))

    def autocast(self, **options) -> contextlib.AbstractContextManager:
        """Matrix products in `dtype`; weights stay as they are, and all that follows the logits is float32."""
        low = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, **options) if low else contextlib.nullcontext()

    def prompt_inputs(self, rollout: Rollout) -> dict[str, torch.Tensor | None]:
        """Positions that count real tokens only, and the padding mask where there is padding."""
        positions = (rollout.prompt_mask.cumsum(1) - 1).clamp(min=0)
        return {"positions": positions, "key_mask": None if rollout.prompt_mask.all() else rollout.prompt_mask}

    def completion_inputs(self, rollout: Rollout) -> dict[str, torch.Tensor | None]:
        """The same for all completion tokens but the last, which predicts nothing: (B, T - 1) and (B, L + T - 1)."""
        offsets = torch.arange(rollout.actions.shape[1] - 1, device=rollout.actions.device)
        positions = rollout.prompt_mask.sum(1)[rollout.group, None] + offsets
        real = rollout.prompt_mask[rollout.group]
        key_mask = None if real.all() else torch.cat([real, torch.ones_like(positions, dtype=torch.bool)], 1)
        return {"positions": positions, "key_mask": key_mask}

    def shared_hidden(self, rollout: Rollout) -> torch.Tensor:
        """Hidden states (B, T, C) that predict the completion: each prompt once, then its rows against its cache."""
        cache = self.model.new_cache()
        last = self.model(rollout.prompts, **self.prompt_inputs(rollout), cache=cache)[:, -1:][rollout.group]
        if rollout.actions.shape[1] == 1:
            return last
        cache = cache.select(rollout.group)
        rest = self.model(rollout.actions[:, :-1], **self.completion_inputs(rollout), cache=cache)
        return torch.cat([last, rest], 1)

    def joined_hidden(self, rollout: Rollout) -> torch.Tensor:
        """The same hidden states from one uncached pass over prompt and completion together."""
        prompt, completion = self.prompt_inputs(rollout), self.completion_inputs(rollout)
        ids = torch.cat([rollout.prompts[rollout.group], rollout.actions[:, :-1]], 1)
        positions = torch.cat([prompt["positions"][rollout.group], completion["positions"]], 1)
        hidden = self.model(ids, positions, key_mask=completion["key_mask"])
        return hidden[:, rollout.prompts.shape[1] - 1 :]


class GaussianPolicy:
    """An autoencoder as a policy: a completion is one real number, normal around the network's output.

    The action (B, 1) stands where a language model has token ids. `exploration_noise` is the standard deviation;
    temperature, end tokens and truncation do not apply.
    """

    chat = False
    dtype = torch.float32
    end_ids: tuple[int, ...] = ()

    def __init__(self, model: Autoencoder, exploration_noise: float = 0.5):
        if not exploration_noise > 0:
            raise UserError("--exploration-noise is the autoencoder's standard deviation; it must be above 0")
        self.model, self.exploration_noise = model, exploration_noise

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """The two integers of each question; raises UserError."""
        pairs = [list(map(int, re.findall(r"[0-9]{1,9}", prompt))) for prompt in prompts]
        for prompt, pair in zip(prompts, pairs, strict=True):
            if len(pair) != 2 or max(pair) >= self.model.config.numbers:
                reads = f"an autoencoder reads two integers from 0 to {self.model.config.numbers - 1}"
                raise UserError(f"question {printable(prompt)!r}: {reads}; ask for those, or take another --model")
        return pairs

    def fitting(self, splits: dict[str, list[Example]], max_new_tokens: int) -> dict[str, list[Example]]:
        return splits

    def demonstrations(self, examples: list[Example]) -> tuple[list[list[int]], list[list[float]], list[str]]:
        """Prompts, actions and texts of all demonstrations; raises UserError for one that is no number."""
        pairs = [(example.prompt, text) for example in examples for text in example.demonstrations]
        values = [to_number(text) for _, text in pairs]
        if None in values:
            raise UserError("--policy autoencoder learns numbers, which this task's demonstrations are not")
        return self.encode([prompt for prompt, _ in pairs]), [[value] for value in values], [text for _, text in pairs]

    def pack(self, prompts: list[list[int]], completions: list[list[float]], texts: list[str]) -> Rollout:
        """A rollout of given actions, one for each prompt, on the device."""
        actions = torch.tensor(completions, dtype=torch.float32)
        rollout = Rollout(
            prompts=torch.tensor(prompts),
            prompt_mask=torch.ones(len(prompts), 2, dtype=torch.bool),
            group=torch.arange(len(prompts)),
            actions=actions,
            mask=torch.ones_like(actions, dtype=torch.bool),
            sampler_logp=torch.zeros_like(actions),
            truncated=torch.zeros(len(prompts), dtype=torch.bool),
            texts=texts,
        )
        return on_device(rollout, self.device)

    @torch.no_grad()
    def sample(
        self,
        examples: Sequence[Example],
        group_size: int,
        key: Sequence[int],
        max_new_tokens: int,
        greedy: bool = False,
        first: int = 0,
        explore: bool = True,
    ) -> Rollout:
        """Draw `group_size` numbers for each example by inverse CDF, as in `TokenPolicy.sample`; greedy is the mean.

        `max_new_tokens` and `explore` change nothing: the noise is the policy.
        """
        pairs = self.encode([example.prompt for example in examples])
        packed = self.pack(pairs, [[0.0]] * len(pairs), [""] * len(pairs))
        group = packed.group.repeat_interleave(group_size)
        mean = self.model(packed.prompts)[group]
        uniforms = row_uniforms(key, range(first, first + len(pairs)), group_size, 1)[:, 0]
        normal = torch.special.ndtri(uniforms).to(mean)
        actions = (mean if greedy else mean + self.exploration_noise * normal)[:, None]
        rows = {"mask": packed.mask, "truncated": packed.truncated, "sampler_logp": packed.sampler_logp}
        rows = {name: value[group] for name, value in rows.items()}
        texts = [f"{value:.4f}" for value in actions[:, 0].tolist()]
        rollout = dataclasses.replace(packed, group=group, actions=actions, texts=texts, **rows)
        rollout.sampler_logp = self.log_probs(rollout)[0]
        if not rollout.sampler_logp.isfinite().all():
            raise FloatingPointError("the model's log-probabilities are not finite")
        return rollout

    def log_probs(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-densities (B, 1) of the actions, with gradient, and entropies (B, 1) in nats."""
        sigma = self.exploration_noise
        score = (rollout.actions - self.means(rollout)) / sigma
        logp = -score.square() / 2 - math.log(sigma * math.sqrt(2 * math.pi))
        return logp, torch.full_like(logp, math.log(sigma * math.sqrt(2 * math.pi * math.e))).detach()

    def means(self, rollout: Rollout) -> torch.Tensor:
        return self.model(rollout.prompts)[rollout.group, None]

    def kl(self, reference: "GaussianPolicy", rollout: Rollout) -> torch.Tensor:
        """KL (B, 1) towards a reference of the same noise, in closed form and without gradient."""
        with torch.no_grad():
            return (self.means(rollout) - reference.means(rollout)).square() / (2 * self.exploration_noise**2)


Policy = TokenPolicy | GaussianPolicy


def on_device(rollout: Rollout, device: torch.device) -> Rollout:
    """The rollout with every tensor on `device`."""
    tensors = {name: value.to(device) for name, value in vars(rollout).items() if torch.is_tensor(value)}
    return dataclasses.replace(rollout, **tensors)


# --- Checkpoints and run folders ------------------------------------------------------------------------------------


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under another name, then fsync and rename it: there is never half a file at `path`."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: dict) -> None:
    atomic_write(path, lambda partial: partial.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path: Path) -> dict:
    """The JSON object in a file; raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore the file or make the run again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; restore the file or make the run again")
    return value


def save_weights(path: Path, model: Llama | HubModel) -> None:
    """Write the weights as safetensors, without what is tied to another weight."""
    weights = {name: value.contiguous() for name, value in model.weights().items()}
    atomic_write(path, lambda partial: save_file(weights, partial, metadata={"format": "pt"}))


def load_weights(path: Path, model: Llama | HubModel) -> None:
    """Read weights into the model, from a file or from the shards that an index names; raises UserError."""
    paths = [path]
    if path.suffix == ".json":
        names = read_json(path).get("weight_map")
        names = sorted(set(names.values())) if isinstance(names, dict) else []
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise UserError(f"{path} names no files beside it; restore the checkpoint")
        paths = [path.parent / name for name in names]
    weights = {}
    for part in paths:
        weights |= load_tensors(part)
    try:
        model.load_weights(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit its config.json ({first}); restore the checkpoint") from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; raises UserError."""
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore the file or make the run again") from error


def save(policy: Policy, folder: Path) -> None:
    """Write a standard checkpoint: config.json, generation_config.json, tokenizer files, model.safetensors last.

    An autoencoder's has its config.json and its weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(policy, GaussianPolicy):
        write_json(folder / "config.json", policy.model.config.to_json())
        save_weights(folder / "model.safetensors", policy.model)
        return
    policy.tokenizer.save_pretrained(folder)
    ends = policy.end_ids if len(policy.end_ids) > 1 else policy.end_ids[0]
    ids = {"eos_token_id": ends, "pad_token_id": policy.pad_id, "bos_token_id": policy.tokenizer.bos_token_id}
    ours = isinstance(policy.model, Llama)
    values = policy.model.config.to_json() if ours else policy.model.model.config.to_dict()
    write_json(folder / "config.json", values | ids)
    write_json(folder / "generation_config.json", {"do_sample": True} | ids)
    save_weights(folder / "model.safetensors", policy.model)


def find_checkpoint(name: str | Path, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local one, or the hub's model of that name, downloaded; raises UserError."""
    folder = Path(name)
    if folder.is_dir() and any(folder.iterdir()):
        return folder
    make = f"no saved model in {str(name)!r}; make one with: python grpo.py --task arithmetic --out {name}"
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise UserError(f"--model: {make}")
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.model", "*.txt", "*.jinja", *["*.safetensors"] * weights]  # no pickle, no code
    try:
        return Path(snapshot_download(str(name), allow_patterns=kinds))
    except Exception as error:  # the hub's errors have no common base: name, network, permission, disk
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--model: {make}; or, if it is a model of the hub: {first}") from error


def load_model(folder: Path, weights: bool = True) -> Llama | HubModel:
    """The model of a checkpoint, in float32: `Llama` where that computes it, else that of `transformers`.

    Without `weights` it stands on PyTorch's meta device, which has sizes and no numbers. Raises UserError naming
    the file that is missing, damaged or of a kind that cannot be used. No code of the checkpoint's is run and no
    pickle is read.
    """
    values = read_json(folder / "config.json")
    file = folder / "model.safetensors"
    if not file.is_file() and (folder / "model.safetensors.index.json").is_file():
        file = folder / "model.safetensors.index.json"
    if weights and not file.is_file():
        mend = "restore the file, make the run again, or convert the checkpoint to safetensors"
        raise UserError(f"--model: {folder} lacks model.safetensors; {mend}")
    try:
        config = LlamaConfig.from_json(values)
        with torch.device("cpu" if weights else "meta"):
            model = Llama(config)
    except (ArithmeticError, AttributeError, TypeError, ValueError, RuntimeError) as unfit:
        return load_hub_model(folder, unfit, weights)
    if weights:
        load_weights(file, model)
    return model


def load_hub_model(folder: Path, unfit: Exception, weights: bool = True) -> HubModel:
    """The checkpoint's model as `transformers` computes it, since `Llama` does not, for the reason `unfit`."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of names in its next version
    options = {"dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    try:
        if not weights:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            with torch.device("meta"):
                return HubModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
        absent = [*report["missing_keys"], *report["mismatched_keys"]]
        if absent:  # the library would leave them at random
            raise ValueError(f"no fitting weights for {absent[0]} in the files")
        return HubModel(model)
    except Exception as error:  # each of the library's models finds its own faults with a config
        first = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "give a checkpoint of a causal language model, as transformers or this program writes it"
        raise UserError(f"{folder / 'config.json'}: {unfit}; transformers: {first}; {mend}") from error


def load_tokenizer(folder: Path, model_type: str, vocab_size: int):
    """The tokenizer of a checkpoint; raises UserError."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"--model: {folder} lacks {name}; restore the file or make the run again")
    kind = read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    try:
        generic = kind in ("PreTrainedTokenizerFast", "TokenizersBackend")
        if generic and model_type == "llama":  # as the toy's; AutoTokenizer takes two seconds to import
            from transformers import PreTrainedTokenizerFast as Loader
        else:
            from transformers import AutoTokenizer as Loader
        tokenizer = Loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # the tokenizers library raises a bare Exception for a damaged file
        raise UserError(f"{folder / 'tokenizer.json'} cannot be read ({error}); restore the file") from error
    if largest >= vocab_size:
        raise UserError(f"{folder / 'tokenizer.json'} has more tokens than config.json; restore the file")
    return tokenizer


def check_policy(name: str) -> None:
    """Raise UserError for a kind of policy that is not offered."""
    if name not in ("transformer", "autoencoder"):
        raise UserError(f"--policy: {name!r} is not offered; there is transformer, autoencoder")


def check_kind(policy: Policy, kind: str, model: str) -> None:
    """Raise UserError if the checkpoint `model` holds another kind of policy than the one that is asked for."""
    found = "autoencoder" if isinstance(policy, GaussianPolicy) else "transformer"
    if found != kind:
        raise UserError(f"--model: {model} is no {kind}; add --policy {found}")


def check_dtype(name: str) -> None:
    """Raise UserError for a dtype that is not offered: float16 would need its loss scaled."""
    if name not in ("float32", "bfloat16"):
        raise UserError(f"--dtype: {name!r} is not offered; there is float32, bfloat16")


def load(
    name: str | Path,
    device: torch.device | str,
    dtype: str = "float32",
    temperature: float = 1.0,
    exploration_noise: float | None = None,
) -> Policy:
    """The policy of a checkpoint folder or of a model of the hub; raises UserError.

    Weights are float32; `dtype` is that of the matrix products. On the device `meta` they are neither fetched nor read.
    """
    device = torch.device(device)
    weights = device.type != "meta"
    folder = find_checkpoint(name, weights)
    if (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == "autoencoder":
        return load_autoencoder(folder, device, exploration_noise)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            raise UserError(f"--model: {folder} lacks {file}; restore the file or make the run again")
    model = load_model(folder, weights)
    tokenizer = load_tokenizer(folder, model.config.model_type, model.config.vocab_size)
    generation = folder / "generation_config.json"
    sources = [read_json(folder / "config.json"), read_json(generation) if generation.is_file() else {}]
    ends = [source.get("eos_token_id") for source in sources]
    ends = [i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None]
    if not {tokenizer.eos_token_id, *ends} - {None}:
        raise UserError(f"{folder / 'config.json'} names no eos_token_id, so no completion could end; add it")
    policy = TokenPolicy(model.to(device), tokenizer, temperature, ends, exploration_noise or 0.0)
    policy.dtype = getattr(torch, dtype)
    return policy


def load_autoencoder(folder: Path, device: torch.device, exploration_noise: float | None) -> GaussianPolicy:
    """The Gaussian policy of an autoencoder's checkpoint, with noise 0.5 unless it is given; raises UserError."""
    try:
        model = Autoencoder(AutoencoderConfig.from_json(read_json(folder / "config.json")))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}; restore the file or make the run again") from error
    if device.type != "meta":
        load_weights(folder / "model.safetensors", model)
    return GaussianPolicy(model.to(device), *([] if exploration_noise is None else [exploration_noise]))


def start_run(folder: str, settings: dict, overwrite: bool, **more) -> Path:
    """Make a run folder with its run.json; raises UserError if it already holds a run and may not be overwritten."""
    out = Path(folder)
    if settings["model"] is not None and Path(settings["model"]).resolve() == out.resolve():
        raise UserError(f"--out: {folder!r} is --model itself, which the run would replace; name another folder")
    if not overwrite and any((out / name).exists() for name in ("run.json", "config.json", "metrics.jsonl")):
        mend = "--resume continues it, --overwrite replaces it" if "resume" in settings else "--overwrite replaces it"
        raise UserError(f"--out: {folder!r} already holds a run; {mend}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder!r} cannot be made ({error.strerror}); name another folder") from error
    for name in ("metrics.jsonl", "samples.jsonl", "evaluation.json", "model.safetensors"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "resume", ignore_errors=True)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    machine = {"python": sys.version.split()[0], "threads": torch.get_num_threads(), "git_commit": commit}
    write_json(out / "run.json", {"settings": settings, **more, "versions": versions, **machine})
    return out


def append_json(path: Path, *values: dict) -> None:
    """Append a line of JSON for each value."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def save_state(
    out: Path,
    step: int,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    progress: dict,
    reference: Llama | None = None,
) -> None:
    """Write all that continuing after `step` needs to out/resume/STEP, then point to it; the newest two stay.

    The folder is written under another name and renamed, so that a state is there whole or not at all. Randomness is a
    function of seed and step, so no generator's state is among it. `reference` is given if training changes it.
    The best checkpoint so far is kept by a hard link.
    """
    folder, partial = out / "resume" / f"{step:06d}", out / "resume" / ".partial"
    for old in (folder, partial):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    names = [name for name, _ in model.named_parameters()]
    moments = {f"{names[i]} {key}": x for i, s in optimizer.state_dict()["state"].items() for key, x in s.items()}
    save_weights(partial / "weights.safetensors", model)
    atomic_write(partial / "optimizer.safetensors", lambda path: save_file(moments, path))
    if reference is not None:
        save_weights(partial / "reference.safetensors", reference)
    write_json(partial / "progress.json", progress)
    if (out / "model.safetensors").exists():
        try:
            os.link(out / "model.safetensors", partial / "best.safetensors")
        except OSError:  # a file system without hard links
            shutil.copyfile(out / "model.safetensors", partial / "best.safetensors")
    os.replace(partial, folder)
    atomic_write(out / "resume" / "latest", lambda path: path.write_text(folder.name))
    for old in sorted(path for path in (out / "resume").iterdir() if path.is_dir())[:-2]:
        shutil.rmtree(old)


def load_state(
    out: Path, model: Llama, optimizer: torch.optim.Optimizer, progress: type, reference: Llama | None = None
):
    """Restore the newest saved state and return its progress; metrics and samples after it are cut off.

    Raises UserError, before any file is changed, for a state that is missing or damaged.
    """
    try:
        name = (out / "resume" / "latest").read_text(encoding="utf-8")
        if not re.fullmatch("[0-9]{6,12}", name):
            raise ValueError("resume/latest names no state")
        folder = out / "resume" / name
        stored = read_json(folder / "progress.json")
        if stored.keys() != progress.__dataclass_fields__.keys() or stored["step"] != int(name):
            raise ValueError("progress.json is not of this step")
        values = progress(**stored)
        for field in dataclasses.fields(progress):
            if not isinstance(getattr(values, field.name), field.type):
                raise ValueError(f"{field.name} in progress.json is not of type {field.type}")
        load_weights(folder / "weights.safetensors", model)
        if reference is not None:
            load_weights(folder / "reference.safetensors", reference)
        moments = load_tensors(folder / "optimizer.safetensors")
        state = optimizer.state_dict()
        for i, (name, weight) in enumerate(model.named_parameters()):
            if values.step:
                state["state"][i] = {key: moments[f"{name} {key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                if not state["state"][i]["exp_avg"].shape == state["state"][i]["exp_avg_sq"].shape == weight.shape:
                    raise ValueError(f"the moments of {name} have the wrong shape")
        optimizer.load_state_dict(state)
        logs = [name for name in ("metrics.jsonl", "samples.jsonl") if (out / name).exists()]
        kept = {name: lines_until(out / name, values.step) for name in logs}
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"--resume: the state in {out} is damaged ({error}); use --overwrite to start again") from error
    for name, text in kept.items():
        atomic_write(out / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    if (folder / "best.safetensors").exists():
        atomic_write(out / "model.safetensors", lambda path: shutil.copyfile(folder / "best.safetensors", path))
    return values


def lines_until(path: Path, step: int) -> str:
    """The whole lines of a metrics file up to and including a step."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)


def choose_device(name: str) -> torch.device:
    """`auto` takes cuda, then mps, then cpu; raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: {name!r} is not here; leave the flag out, or use cpu") from error
    return device


@dataclass(frozen=True)
class Plan:
    """What a training step needs, estimated: bytes by part with the flag that lowers them, and operations."""

    parts: dict[str, tuple[float, str]]  # name: bytes, the flag that lowers it
    operations: float
    device_bytes: float | None  # what the device has free, or None where it does not say

    @property
    def peak(self) -> float:
        """Bytes at the larger of the two moments: sampling (cache) and update (gradients, activations, logits)."""
        size = {name: number for name, (number, _) in self.parts.items()}
        kept = size["weights"] + size["optimizer"] + size["reference"]
        return kept + max(size["cache"], size["gradients"] + size["activations"] + size["logits"])

    def table(self) -> str:
        lines = [f"{name:<12} {number / 1e9:8.2f} GB   {flag}" for name, (number, flag) in self.parts.items()]
        have = "unknown" if self.device_bytes is None else f"{self.device_bytes / 1e9:.2f} GB"
        lines += [f"{'peak, about':<12} {self.peak / 1e9:8.2f} GB   free on the device: {have}"]
        lines += [f"{'a step':<12} {self.operations / 1e12:8.2f} tera floating-point operations at full length"]
        if self.device_bytes is not None and self.peak > self.device_bytes:
            _, (number, flag) = max(self.parts.items(), key=lambda part: part[1][0])
            lines.append(f"does not fit: begin with the largest part, {flag}")
        return "\n".join(lines)


def plan(policy: TokenPolicy, rows: int, prompts: int, prompt_tokens: int, max_new_tokens: int, **settings) -> Plan:
    """The memory and work of a step of `rows` completions of `prompts` prompts, at full length, the process aside.

    `settings`: micro_batch_tokens, inner_updates, reference (how many frozen copies), device. Activations are
    counted per token and layer as what the backward pass of a Llama keeps: about ten vectors of the hidden size and
    four of the intermediate size.
    """
    model, config = policy.model, policy.model.config
    weights, low = sum(weight.numel() for weight in model.parameters()), policy.dtype != torch.float32
    layers, hidden = config.num_hidden_layers, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = (getattr(config, "head_dim", None) or hidden // config.num_attention_heads) * heads
    tokens = prompts * prompt_tokens + rows * max_new_tokens
    batch = min(tokens, max(settings["micro_batch_tokens"], prompt_tokens + max_new_tokens))
    layer = batch * (10 * hidden + 4 * inner) * (3 if low else 4)
    activations = layers * batch * hidden * 4 + layer if model.checkpointing else layers * layer
    whole = getattr(model, "full_logits", False)
    logits = 4 * 4 * batch * config.vocab_size if whole else 4 * 4 * min(policy.chunk_logits, batch * config.vocab_size)
    updates = (8 if model.checkpointing else 6) * settings["inner_updates"]
    parts = {
        "weights": (4 * weights, "a smaller --model"),
        "optimizer": (8 * weights, "a smaller --model"),
        "reference": ((2 if low else 4) * weights * settings["reference"], "--dtype bfloat16, or --beta 0"),
        "cache": (
            (4 if low else 8) * layers * width * rows * (prompt_tokens + max_new_tokens),
            "--batch-size, --num-generations or --max-new-tokens",
        ),
        "gradients": (4 * weights, "a smaller --model"),
        "activations": (activations, "--gradient-checkpointing, then --micro-batch-tokens"),
        "logits": (logits, "--micro-batch-tokens" if whole else "bounded by chunks"),
    }
    return Plan(parts, weights * tokens * (2 + 2 * settings["reference"] + updates), free_bytes(settings["device"]))


def free_bytes(device: torch.device) -> float | None:
    """Bytes that are free on a device, or None where it does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # not Linux
        return None


# --- Evaluation -----------------------------------------------------------------------------------------------------


def wilson(right: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a proportion (Wilson 1927)."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share = right / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low, high = (centre - spread) / (1 + z * z / total), (centre + spread) / (1 + z * z / total)
    return max(low, 0.0), min(high, 1.0)  # rounding may step over an end


def pass_at_k(total: int, right: int, k: int) -> float:
    """Probability that k of `total` samples, `right` of them correct, hold a correct one (Codex, arXiv 2107.03374)."""
    return 1 - math.comb(total - right, k) / math.comb(total, k)


def bootstrap(values: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """95 % percentile interval of the mean over problems, resampled with a fixed seed."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def known_means(table: dict[str, list[float | None]]) -> dict[str, float]:
    """The mean of what is not None under each name, without the names under which nothing is known."""
    known = {name: [value for value in values if value is not None] for name, values in table.items()}
    return {name: statistics.fmean(values) for name, values in known.items() if values}


def sampled_results(task: Task, means: dict[str, float], scores: np.ndarray) -> dict[str, float]:
    """The means of several samples a problem, and of their scores (problems, samples) the interval and pass@k."""
    result, samples = {f"sampled_{name}": value for name, value in means.items()}, scores.shape[1]
    if len(scores):
        name = f"sampled_{task.score}"
        result[f"{name}_low"], result[f"{name}_high"] = bootstrap(scores.mean(1))
    for k in (2**i for i in range(1, samples.bit_length() * (task.score == "accuracy"))):
        passed = np.array([pass_at_k(samples, int(right), k) for right in scores.sum(1)])
        result[f"pass@{k}"] = float(passed.mean())
        result[f"pass@{k}_low"], result[f"pass@{k}_high"] = bootstrap(passed)
    return result


def evaluate(
    policy: Policy,
    task: Task,
    examples: list[Example],
    max_new_tokens: int,
    samples: int = 0,
    seed: int = 0,
    batch_rows: int = 512,
    outputs: list[dict] | None = None,
) -> dict[str, float]:
    """Greedy accuracy with its interval, and with `samples` > 0 accuracy and pass@k at the policy's temperature.

    A task whose score is no accuracy has the mean of that instead, and no pass@k. Each completion and what was measured
    of it is appended to `outputs`, where it is given.
    """

    def measure(group_size: int, greedy: bool) -> tuple[dict[str, float], np.ndarray]:
        """Mean of every measure, and the scores (problems, group_size)."""
        table: dict[str, list[float]] = {name: [] for name in (*task.metrics, "length", "truncated")}
        size = max(1, batch_rows // group_size)
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            rollout = policy.sample(part, group_size, (seed, 0, 0), max_new_tokens, greedy, start, explore=False)
            rows = [example for example in part for _ in range(group_size)]
            for name, function in task.metrics.items():
                table[name] += apply_reward(name, function, rows, rollout)
            table["length"] += rollout.mask.sum(1).tolist()
            table["truncated"] += rollout.truncated.tolist()
            for i, (example, text) in enumerate(zip(rows, rollout.texts, strict=True)):
                if outputs is not None:
                    measured = {name: values[i - len(rows)] for name, values in table.items()}
                    question = {"question": example.question, **example.columns}
                    outputs.append(question | {"greedy": greedy, "completion": text} | measured)
        means = known_means(table)
        filled = [means[task.score] if value is None else value for value in table[task.score] if task.score in means]
        return means, np.array(filled).reshape(-1, group_size)

    means, scores = measure(1, greedy=True)
    result = {"problems": len(examples), **means}
    for name in [name for name in means if name in (task.score, "lenient")]:
        shares = name in ("accuracy", "lenient")  # of problems, each right or wrong
        interval = wilson(means[name] * len(examples), len(examples)) if shares else bootstrap(scores.mean(1))
        result[f"{name}_low"], result[f"{name}_high"] = interval
    return result | sampled_results(task, *measure(samples, greedy=False)) if samples else result


# --- Command line ---------------------------------------------------------------------------------------------------


def option(default, text: str):
    """A field of a settings class with its one sentence of help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def parser_for(settings: type, description: str):
    """An argument parser with a flag per field of a settings class, whose mistakes are one line and exit status 2."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message):
            self.exit(2, f"{self.prog}: error: {message}; --help lists the flags\n")

    return Parser(settings, description=description, allow_abbrev=False)


def parse_settings(settings: type, description: str, may_change: set[str]):
    """Settings from the command line; with --resume, those of the run folder, of which flags may change some."""
    parser = parser_for(settings, description)
    arguments = parser.parse_args()
    if arguments.resume:
        path = Path(arguments.out) / "run.json"
        if not path.is_file():
            raise UserError(f"--resume: {arguments.out!r} holds no run; leave out --resume to start one")
        stored = read_json(path).get("settings")
        known = settings.__dataclass_fields__
        if not isinstance(stored, dict) or "task" not in stored or not stored.keys() <= known.keys():
            raise UserError(f"--resume: {path} does not hold the settings of such a run; start again with --overwrite")
        stored = {name: field.default for name, field in known.items()} | stored  # an older run lacks newer settings
        parser.set_defaults(**stored | {"out": arguments.out, "resume": True, "overwrite": False})
        arguments = parser.parse_args()
        changed = sorted(name for name in stored.keys() - may_change if getattr(arguments, name) != stored[name])
        if changed:
            given = {name: "left out" if stored[name] is None else stored[name] for name in changed}
            old = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
            raise UserError(f"--resume: the run in {arguments.out!r} was made with {old}; leave the flag out")
    return settings(**vars(arguments))


def require_numbers(settings, *names: str) -> None:
    """Raise UserError for the first number that is negative or not finite, or zero and among `names`."""
    for name, value in vars(settings).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            bound = "above 0" if name in names else "0 or above"
            if not 0 <= value < math.inf or (value == 0 and name in names):
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {bound}")
            if value >= 2**63:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be below 2**63")


class Interrupt:
    """Notes SIGINT and SIGTERM, so that the loop can finish its step and save; a second one acts at once."""

    def __enter__(self):
        self.signal, self.previous = 0, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.signal = number
        tqdm.write("finishing the step, then saving; once more stops at once", file=sys.stderr)
        self.__exit__()

    def leave(self, step: int) -> None:
        """Say how to continue the run that was saved after `step`, and exit with the signal's usual status."""
        print(f"saved after step {step}; continue with: {continue_command()}", file=sys.stderr)
        sys.exit(128 + self.signal)

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def out_of_memory(flags: str):
    """Turn running out of memory into a UserError that names the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise UserError(f"out of memory; lower {flags}") from error


def continue_command() -> str:
    return "python " + shlex.join([*sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])


def run_main(main: Callable[[], int | None], resumable: bool = False) -> None:
    """Run a command: mistakes become one line on stderr and exit status 2, an interrupt its usual status."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal without the character must not stop a run

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, interrupt)
    status = 2
    try:
        sys.exit(main())
    except UserError as error:
        message = str(error)  # it may quote a completion
    except FloatingPointError as error:
        message = f"{error}; restore the checkpoint, or train with a lower --learning-rate"
    except OSError as error:
        message = f"{error.filename or 'output'}: {error.strerror}; free space, or give a folder that can be written"
    except KeyboardInterrupt as error:
        message = f"interrupted; continue with: {continue_command()}" if resumable else "interrupted"
        status = 128 + (error.args[0] if error.args else signal.SIGINT)
    print(f"{Path(sys.argv[0]).name}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(status)


def printable(text: str) -> str:
    """The text with control, format and other invisible characters escaped, line breaks kept: safe for a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class InferenceConfig:
    """Settings of `inference.py`."""

    model: list[str] = option(["saved_model"], "Checkpoint folders; several are shown side by side.")
    samples: int = option(1, "Completions to draw for each question.")
    temperature: float | None = option(
        None, "Sampling temperature; 0 is greedy. Default: 0 for one completion, else 1."
    )
    max_new_tokens: int | None = option(None, "Longest completion, in tokens. Default: the task's.")
    eval: bool = option(False, "Evaluate on the held-out problems of --task instead of answering a question.")
    task: str = option("arithmetic", "Task whose question format and held-out problems are used.")
    data: str | None = option(None, "File or folder with the task's records. Default: the hub's.")
    limit: int | None = option(None, "Evaluate on the first so many problems only.")
    report: str | None = option(None, "With --eval: write the results to this file, as JSON.")
    outputs: str | None = option(
        None, "With --eval: write every completion and its scores to this file, as JSON Lines."
    )
    batch_size: int = option(512, "With --eval: completions that are sampled at once.")
    seed: int = option(0, "Seed of the sampler.")
    device: str = option("auto", "Device: auto, cuda, mps or cpu.")
    dtype: str = option("float32", "Matrix products in float32 or bfloat16.")

    def __post_init__(self):
        check_dtype(self.dtype)
        require_numbers(self, "samples", "max_new_tokens", "limit", "batch_size")
        if self.temperature is not None and 0 < self.temperature < 1e-3:
            raise UserError(f"--temperature is {self.temperature}; it must be 0 (greedy) or from 0.001 up")


def show_answer(text: str, tagged: bool = True) -> str:
    """A completion for the terminal: the working, an arrow, the answer, where the task asks for one in tags."""
    answer = extract_answer(text) if tagged else None
    if answer is None:
        return printable(text) + "  (no <answer>...</answer> at the end)" * tagged
    working = text.partition("<answer>")[0].strip()
    return printable(f"{working}  →  {answer}" if working else f"→  {answer}")


def answer_question(config: InferenceConfig, question: str, policies: dict[str, Policy]) -> None:
    task = find_task(config.task)
    greedy = config.temperature == 0 or (config.temperature is None and config.samples == 1)
    for name, policy in policies.items():
        example = pose(task, Example(question), policy.chat)
        width = config.max_new_tokens or task.max_new_tokens
        rollout = policy.sample([example], config.samples, (config.seed, 0, 0), width, greedy=greedy)
        if len(policies) > 1:
            print(f"{name}:")
        for text in rollout.texts:
            print(show_answer(text, tagged=task.metrics.get("format") is answer_format))


def compare(config: InferenceConfig, load_one: Callable[[str], Policy]) -> None:
    """Evaluate the policies on the held-out problems, one in memory at a time, and print a table."""
    task = find_task(config.task)
    results = {}
    for name in config.model:
        policy = load_one(name)
        examples = load_task(task, policy.chat, data=config.data)["held_out"][: config.limit]
        width = config.max_new_tokens or task.max_new_tokens
        examples = policy.fitting({"held_out": examples}, width)["held_out"]
        samples = 0 if config.temperature == 0 else max(config.samples, 4)
        outputs: list[dict] = []
        results[name] = evaluate(policy, task, examples, width, samples, config.seed, config.batch_size, outputs)
        if config.outputs:
            append_json(Path(config.outputs), *({"model": name, **output} for output in outputs))
    print(results_table(results))
    if config.report:
        settings = {
            "task": task.name,
            "samples": samples,
            "seed": config.seed,
            "temperature": 1.0 if config.temperature is None else config.temperature,
        }
        write_json(Path(config.report), {"settings": settings, "results": results})


def show_number(name: str, value: float) -> str:
    """A measure as text: a share as per cent, anything else with four digits."""
    return f"{value:.4g}" if name == "problems" or name.endswith(("length", "error", "reward")) else f"{value:.1%}"


def results_table(results: dict[str, dict[str, float]]) -> str:
    """Evaluation results as text, a line per measure and a column per policy, with the 95 % intervals."""

    def cell(result: dict[str, float], key: str) -> str:
        if key not in result:
            return "–"
        low, high = (show_number(key, result.get(f"{key}_{end}", math.nan)) for end in ("low", "high"))
        return show_number(key, result[key]) + (f" [{low}, {high}]" if f"{key}_low" in result else "")

    keys = [
        key
        for key in {key: 0 for result in results.values() for key in result}
        if key != "step" and not key.endswith(("_low", "_high"))
    ]
    greedy = [key if key.startswith(("problems", "sampled", "pass")) else f"greedy {key}" for key in keys]
    names = [key.replace("_", " ") for key in greedy]
    columns = [["", *names]] + [[name, *(cell(result, key) for key in keys)] for name, result in results.items()]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main() -> int:
    parser = parser_for(InferenceConfig, "Ask a trained policy a question, or evaluate it on held-out problems.")
    parser.add_argument(
        "question", nargs="?", help="The question; without it, one question a line from standard input."
    )
    arguments = vars(parser.parse_args())
    question = arguments.pop("question")
    config = InferenceConfig(**arguments)
    if config.eval and question is not None:
        raise UserError(f"--eval takes no question, but there is {question!r}; leave out the one or the other")
    device = choose_device(config.device)
    find_task(config.task)
    for path in filter(None, (config.report, config.outputs)):
        if not config.eval:
            raise UserError(f"--report and --outputs go with --eval; leave {path!r} out, or add --eval")
        if Path(path).exists() or not Path(path).parent.is_dir():
            what = "exists" if Path(path).exists() else "is in a folder that is not there"
            raise UserError(f"{path} {what}; name another file")
    temperature = config.temperature or 1.0
    load_one = functools.partial(load, device=device, dtype=config.dtype, temperature=temperature)
    folders = [find_checkpoint(name) for name in config.model]
    policies = {} if config.eval else dict(zip(config.model, map(load_one, folders), strict=True))
    with out_of_memory("--batch-size with --eval, --samples without, or --max-new-tokens"):
        if config.eval:
            compare(config, load_one)
        elif question is not None:
            answer_question(config, question, policies)
        else:
            return answer_lines(config, policies)
    return 0


def answer_lines(config: InferenceConfig, policies: dict[str, Policy]) -> int:
    """Answer one question a line from standard input; a bad one is named and skipped. Returns the exit status."""
    status = 0
    if sys.stdin.isatty():
        print("Type a question, such as: What is (4 - 9) * 6?  (end with Ctrl-D)", file=sys.stderr)
    for line in filter(None, map(str.strip, sys.stdin)):
        try:
            answer_question(config, line, policies)
        except UserError as error:
            print(f"inference.py: error: {error}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    run_main(main)
