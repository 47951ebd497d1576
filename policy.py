"""What acts and is scored: rollouts, and policies with two verbs, `sample` and `log_probs`, side by side.

Shapes: P prompts, G completions of each, B = P * G rows (prompt-major), L prompt tokens after left padding,
T completion tokens after right padding, V vocabulary, C hidden size.
"""

import contextlib
import copy
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model_toy import Autoencoder, Llama
from rewards import to_number
from runs import UserError, printable
from tasks import Example


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

    def to(self, device: torch.device) -> "Rollout":
        """The rollout with every tensor on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)}
        return dataclasses.replace(self, **tensors)

    @property
    def completion_ids(self) -> list[list[int]]:
        """The sampled ids of each row, its end token included."""
        return [ids[keep].tolist() for ids, keep in zip(self.actions.cpu(), self.mask.cpu(), strict=True)]


def join(rollouts: Sequence[Rollout]) -> Rollout:
    """One rollout of several, padded to the widest."""

    def stack(name: str, left: bool = False) -> torch.Tensor:
        tensors = [getattr(rollout, name) for rollout in rollouts]
        gaps = [max(tensor.shape[1] for tensor in tensors) - tensor.shape[1] for tensor in tensors]
        return torch.cat([F.pad(x, (gap, 0) if left else (0, gap)) for x, gap in zip(tensors, gaps, strict=True)])

    starts = np.cumsum([0] + [len(rollout.prompts) for rollout in rollouts]).tolist()
    return Rollout(
        **{name: stack(name, left=True) for name in ("prompts", "prompt_mask")},
        **{name: stack(name) for name in ("actions", "mask", "sampler_logp")},
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
    units = []  # (tokens of the longest completion, prompt tokens, rows)
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

    def __init__(self, model: Llama, tokenizer, temperature=1.0, end_ids: Sequence[int] = (), exploration_noise=0.0):
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
            if unknown in ids and unknown not in special:
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
            if len(kept[name]) < len(examples):
                out = f"{len(examples) - len(kept[name])} of {len(examples)} left out"
                print(f"{name}: {out}, their questions have more than {room} tokens")
            if not kept[name]:
                raise UserError(f"--max-new-tokens {max_new_tokens} leaves no room for any question; lower it")
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
        return Rollout(
            prompts=torch.tensor([[self.pad_id] * (length - len(ids)) + ids for ids in prompts]),
            prompt_mask=torch.tensor([[False] * (length - len(ids)) + [True] * len(ids) for ids in prompts]),
            group=torch.arange(len(prompts)),
            actions=torch.tensor([ids + [self.pad_id] * (width - len(ids)) for ids in completions]),
            mask=torch.tensor([[True] * len(ids) + [False] * (width - len(ids)) for ids in completions]),
            sampler_logp=torch.zeros(len(completions), width),
            truncated=torch.tensor([ids[-1] not in self.end_ids for ids in completions]),
            texts=texts,
        ).to(self.device)

    def sample(
        self, examples: list[Example], group_size: int, key: Sequence[int], max_new_tokens: int,
        greedy: bool = False, first: int = 0, explore: bool = True,
    ) -> Rollout:  # fmt: skip
        """Draw `group_size` completions of each example; key is (seed, step, draw), `first` numbers the first prompt.

        Each prompt is prefilled once and its cache repeated for its group. Greedy takes the likeliest token, whatever
        the temperature. There is no exploration noise if greedy, nor without `explore`. Raises FloatingPointError if
        the model's log-probabilities are not finite.
        """
        encoded = self.encode([example.prompt for example in examples])
        longest, room = max(map(len, encoded)), self.model.max_length
        if longest + max_new_tokens > room:
            what = f"a question of {longest} tokens and {max_new_tokens} more do not fit into the model's {room}"
            raise UserError(f"{what}; lower --max-new-tokens, or ask something shorter")
        packed = self.pack(encoded, [[self.pad_id]] * len(encoded), [""] * len(encoded))  # completions follow
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
        shared = share_prompts and len(rollout.group) > len(rollout.prompts)
        shared = shared and not self.model.checkpointing  # which would extend the cache a second time, backward
        with self.autocast():
            hidden = (self.shared_hidden if shared else self.joined_hidden)(rollout)  # (B, T, C)
            picked, spread = self.score_tokens(hidden[rollout.mask], rollout.actions[rollout.mask])
        blank = picked.new_zeros(rollout.actions.shape)
        return blank.masked_scatter(rollout.mask, picked), blank.masked_scatter(rollout.mask, spread)

    def exact_kl(self, reference: "TokenPolicy", rollout: Rollout) -> None:
        """None: summed over all texts it has no closed form, so it is estimated from the log-probabilities."""

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
        actions = torch.tensor(completions, dtype=torch.float32, device=self.device)
        return self.rollout(torch.tensor(prompts, device=self.device), 1, actions, texts)

    def rollout(self, prompts: torch.Tensor, group_size: int, actions: torch.Tensor, texts: list[str]) -> Rollout:
        """A rollout of prompts (P, 2) and of actions (B, 1), `group_size` for each prompt; all there is is real."""
        return Rollout(
            prompts=prompts,
            prompt_mask=torch.ones_like(prompts, dtype=torch.bool),
            group=torch.arange(len(prompts), device=self.device).repeat_interleave(group_size),
            actions=actions,
            mask=torch.ones_like(actions, dtype=torch.bool),
            sampler_logp=torch.zeros_like(actions),
            truncated=torch.zeros(len(actions), dtype=torch.bool, device=self.device),
            texts=texts,
        )

    @torch.no_grad()
    def sample(
        self, examples: list[Example], group_size: int, key: Sequence[int], max_new_tokens: int,
        greedy: bool = False, first: int = 0, explore: bool = True,
    ) -> Rollout:  # fmt: skip
        """Draw `group_size` numbers for each example by inverse CDF, as in `TokenPolicy.sample`; greedy is the mean.

        `max_new_tokens` and `explore` change nothing: the noise is the policy.
        """
        pairs = torch.tensor(self.encode([example.prompt for example in examples]), device=self.device)
        mean = self.model(pairs).repeat_interleave(group_size)
        uniforms = row_uniforms(key, range(first, first + len(pairs)), group_size, 1)[:, 0]
        normal = torch.special.ndtri(uniforms).to(mean)
        actions = (mean if greedy else mean + self.exploration_noise * normal)[:, None]
        rollout = self.rollout(pairs, group_size, actions, [f"{value:.4f}" for value in actions[:, 0].tolist()])
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

    def exact_kl(self, reference: "GaussianPolicy", rollout: Rollout) -> torch.Tensor:
        """KL (B, 1) towards a reference of the same noise, in closed form and without gradient."""
        with torch.no_grad():
            return (self.means(rollout) - reference.means(rollout)).square() / (2 * self.exploration_noise**2)


Policy = TokenPolicy | GaussianPolicy


def frozen(policy: Policy) -> Policy:
    """A copy of a policy that does not learn, with weights in the dtype of its matrix products."""
    reference = copy.copy(policy)
    reference.model = copy.deepcopy(policy.model).requires_grad_(False)
    for weight in reference.model.parameters():  # not the buffers: rotary frequencies need their float32
        weight.data = weight.data.to(policy.dtype)
    reference.model.checkpointing = False
    return reference


def score_rollout(policy: Policy, rollout: Rollout, token_budget: int) -> torch.Tensor:
    """Log-probabilities (B, T) of a rollout under the policy as it is now, without gradient, in micro-batches."""
    dtype = torch.promote_types(next(policy.model.parameters()).dtype, torch.float32)
    logp = torch.zeros(rollout.mask.shape, dtype=dtype, device=policy.device)
    with torch.no_grad():
        for rows in micro_batches(rollout, token_budget):
            part = rollout.select(rows)
            logp[rows, : part.mask.shape[1]] = policy.log_probs(part)[0]
    return logp


def mean_log_probs(policy: Policy, rollout: Rollout, token_budget: int) -> torch.Tensor:
    """Mean log-probability per token (B,) of each completion under the policy as it is now, without gradient."""
    batches = micro_batches(rollout, token_budget)
    parts = [rollout.select(rows) for rows in batches]
    with torch.no_grad():
        means = torch.cat([policy.log_probs(part)[0].sum(1) / part.mask.sum(1) for part in parts])
    return means[torch.cat(batches).argsort()]
