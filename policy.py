"""What acts and is scored: policies with two verbs, `sample` and `log_probs`, side by side.

Shapes: P prompts, G completions of each, B = P * G rows (prompt-major), L prompt tokens after left padding,
T completion tokens after right padding, V vocabulary, C hidden size.
"""

import contextlib
import copy
import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import ranks
from attention import Packed, Shared, spare
from commands import UserError, printable
from linear import can_prepack, prepacked
from model_toy import Llama
from policy_gaussian import GaussianPolicy
from rollouts import Rollout, checked, micro_batches, row_uniforms
from tasks import Example


def log_distribution(logits: torch.Tensor, temperature: float, noise: float = 0.0) -> torch.Tensor:
    """log_softmax(logits / temperature) over the last dimension, in float32 or wider; sampler and scorer share it.

    With `noise` it is the log of the mixture (1 - noise) * softmax + noise / V.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if temperature == 1 else logits / temperature  # a twentieth of an update on a GPU
    log_probs = torch.log_softmax(logits, dim=-1)
    if not noise:
        return log_probs
    uniform = torch.full_like(log_probs, math.log(noise / log_probs.shape[-1]))
    return torch.logaddexp(log_probs + math.log1p(-noise), uniform)


def most_logits(device: torch.device) -> int:
    """How many logits may exist at once: in float32 a 64th of the device's memory, whatever of it is free."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 256
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 256
    except (AttributeError, OSError, ValueError):  # not everywhere
        return 2**24


def running(x: torch.Tensor) -> torch.Tensor:
    """Cumulative sums of rows (B, N), too short to vary on a GPU, where `--deterministic` refuses every cumsum."""
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(-1)
    torch.use_deterministic_algorithms(False)
    try:
        return x.cumsum(-1)
    finally:
        torch.use_deterministic_algorithms(True)


def inverse_cdf(log_probs: torch.Tensor, uniform: torch.Tensor, block: int = 256) -> torch.Tensor:
    """The token (B,) whose slice of the cumulative distribution (B, V) holds the uniform (B,).

    Sums run in float64, over blocks of the vocabulary and then within one. The token is the first whose cumulative
    weight exceeds u * total, so never one of probability 0; rounding of u * total up to the total itself gives the
    last token that has any weight.
    """

    def first_above(cumulative: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        total = cumulative[:, -1:].contiguous()
        index = torch.searchsorted(cumulative, goal, right=True)
        last = torch.searchsorted(cumulative, total, right=False)
        return torch.minimum(index, last).clamp(max=cumulative.shape[1] - 1)  # NaN must not give an index too large

    weights = log_probs.exp().to(uniform.device)
    if weights.shape[1] <= block:
        cumulative = running(weights.double())
        return first_above(cumulative, uniform[:, None] * cumulative[:, -1:])[:, 0].to(log_probs.device)
    blocks = F.pad(weights, (0, -weights.shape[1] % block)).unflatten(1, (-1, block))  # (B, V / block, block)
    sums = blocks.sum(-1, dtype=torch.float64)
    ends = running(sums)
    goal = uniform[:, None] * ends[:, -1:]
    chosen = first_above(ends, goal)
    before = (ends - sums).gather(1, chosen)
    inside = running(blocks[torch.arange(len(blocks), device=blocks.device), chosen[:, 0]].double())
    token = (chosen * block + first_above(inside, goal - before))[:, 0].clamp(max=weights.shape[1] - 1)
    return token.to(log_probs.device)


def replayed(step: Callable[[], None], device: torch.device | None) -> Iterator[None]:
    """Make a step with each `next`; on a GPU, if it is given, the second is captured, and that graph replayed.

    A CUDA graph launches the hundreds of kernels of a token at once, which took most of the time: sampling takes 0.15
    to 0.2 of it (0.5 billion weights, 64 and 512 rows). The step as it is, the first, loads what its kernels need.
    """
    step()
    yield
    if device:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
        step = graph.replay
    while True:
        step()
        yield


class TokenPolicy:
    """A language model and its tokenizer: `sample` draws completions, `log_probs` scores them.

    Both use the same temperature and exploration noise, the full vocabulary and float32 from the logits on.
    """

    look_every: int | None = None  # tokens between two looks for ended rows; None: 8 on a GPU, else 1
    drop_below: float | None = None  # compact the batch once fewer rows than this would stay; None: 0.9, of a graph 0.5
    chunk_logits: int | None = None  # most logits at once while scoring; None: a 64th of the memory, in float32
    dtype = torch.float32  # of the matrix products
    revision: str | None = None  # of a model of the hub
    thinking: bool | None = None  # whether a chat template that can asks for it; None: as the template does

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

    @property
    def captures(self) -> bool:
        """Whether a step of decoding becomes a CUDA graph: of a Llama that is whole, on a GPU."""
        return isinstance(self.model, Llama) and not ranks.is_sharded(self.model) and self.device.type == "cuda"

    def encode(self, prompts: list[str | list[dict]]) -> list[list[int]]:
        """Token ids of plain prompts, or of message lists through the chat template; raises UserError."""
        encoded, unknown = [], self.tokenizer.unk_token_id
        special = {self.tokenizer.bos_token_id, *self.end_ids, self.pad_id}
        for prompt in prompts:
            text = prompt if isinstance(prompt, str) else self.render(prompt)
            ids = self.tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
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

    def render(self, messages: list[dict], ask: bool = True) -> str:
        """Messages through the chat template, with `ask` up to where an answer begins; raises UserError."""
        options = {} if self.thinking is None else {"enable_thinking": self.thinking}
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, **options)
        except Exception as error:  # a template may raise anything
            first = (str(error).splitlines() or [type(error).__name__])[0]
            mend = "give another file as --chat-template, or none"
            raise UserError(f"the chat template fails ({printable(first)}); {mend}") from error

    def end_of_turn(self) -> list[int]:
        """The special token with which the chat template ends an answer, if there is one."""
        said = "4c2e7"
        text = self.render([{"role": "user", "content": "1"}, {"role": "assistant", "content": said}], ask=False)
        ids = self.tokenizer(text.rpartition(said)[2], add_special_tokens=False).input_ids
        added = self.tokenizer.added_tokens_decoder
        return [i for i in ids if i in added and added[i].special][:1]

    def show_prompt(self, prompt: str | list[dict]) -> str:
        """A prompt token by token, for the terminal."""
        (ids,) = self.encode([prompt])
        tokens = "|".join(printable(self.tokenizer.decode([i])).replace("\n", "\\n") for i in ids)
        return f"the first prompt, {len(ids)} tokens: {tokens}"

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
                what = f"--max-new-tokens {max_new_tokens} leaves no room for any question"
                raise UserError(f"{what}; lower it, or --shots")
        return kept

    def demonstrations(self, examples: list[Example]) -> tuple[Rollout, torch.Tensor] | None:
        """A rollout of all demonstrations that fit, equal ones once, and how often each occurs (B,); None if none."""
        counts = Counter((group, text) for group, example in enumerate(examples) for text in example.demonstrations)
        if not counts:
            return None
        groups, texts = map(list, zip(*counts, strict=True))
        end = self.end_ids[0] if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id
        ids = [row + [end] for row in self.tokenizer(texts, add_special_tokens=False).input_ids]
        rollout = self.pack(self.encode([example.prompt for example in examples]), ids, texts, groups)
        rollout.questions = [example.question for example in examples]
        copies, room = torch.tensor(list(counts.values()), device=self.device), self.model.max_length
        fits = rollout.prompt_mask.sum(1)[rollout.group] + rollout.mask.sum(1) <= room
        if not fits.all():
            out = int(copies.sum() - copies[fits].sum())
            print(f"left out {out} of {int(copies.sum())} demonstrations of more than {room} tokens")
        return (rollout.select(fits.nonzero()[:, 0]), copies[fits]) if fits.any() else None

    def pack(
        self, prompts: list[list[int]], completions: list[list[int]], texts: list[str], group: list[int] | None = None
    ) -> Rollout:
        """A rollout of given completions (ids, each with its end token), on the device.

        `group` is the prompt of each completion; without it, they are as many as prompts and in the same order.
        """
        length, width = max(map(len, prompts)), max(map(len, completions))
        return Rollout(
            prompts=torch.tensor([[self.pad_id] * (length - len(ids)) + ids for ids in prompts]),
            prompt_mask=torch.tensor([[False] * (length - len(ids)) + [True] * len(ids) for ids in prompts]),
            group=torch.tensor(range(len(prompts)) if group is None else group),
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

        Each prompt is prefilled once, what all begin with once for all, and its cache shared by its group. Greedy takes
        the likeliest token, whatever the temperature. There is no exploration noise if greedy, nor without `explore`.
        Raises NotFinite if the log-probabilities are not finite.
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
        # Weights are cast once, not at each token: by `prepacked`, or in a copy, or (sharded ones) by autocast.
        cast = can_prepack(self.model, self.dtype) or self.dtype == torch.float32 or ranks.is_sharded(self.model)
        actor = self if cast else frozen(self)
        # Inference mode saves 6 to 15 % of sampling; what is sharded, or from elsewhere, may keep tensors for training.
        own = isinstance(self.model, Llama) and not ranks.is_sharded(self.model)
        quiet = torch.inference_mode() if own else torch.no_grad()
        with quiet, self.autocast(), prepacked(actor.model, len(group), self.dtype):
            cache = actor.model.new_cache()
            hidden, key_mask = actor.prefill(packed, cache)  # (P, C)
            cache.share(group, max_new_tokens - 1, key_mask, fixed=self.captures)
            decoded = actor.decode(hidden[group], cache, packed.prompt_mask.sum(1)[group], uniforms, choose, noise)
        width = int(decoded[1].sum(1).max())
        actions, mask, logp = (x[:, :width].clone() for x in decoded)  # ordinary tensors, which autograd takes
        last = actions.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
        truncated = ~torch.isin(last, torch.tensor(self.end_ids, device=self.device))
        rollout = dataclasses.replace(
            packed, group=group, actions=actions, mask=mask, sampler_logp=logp, truncated=truncated
        )
        rollout.texts = self.tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        rollout.questions = [example.question for example in examples]
        return checked(rollout)

    def prefill(self, rollout: Rollout, cache) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read the prompts into an empty cache, and once what all of them begin with.

        Returns the hidden states (P, C) at their ends, and the mask of the own tokens that the cache then ends with.
        """
        ids, real = rollout.prompts, rollout.prompt_mask
        common = 0 if self.model.windowed else rollout.common
        positions = (real.cumsum(1) - 1).clamp(min=0)  # real tokens only
        if common:
            first = torch.arange(common, device=ids.device)[None]
            self.model(ids[:1][real[:1]][None, :common], first, cache)
            cache.share(torch.zeros_like(ids[:, 0]))
            real = real & (positions >= common)
            own = real.any(0)
            ids, positions, real = ids[:, own], positions[:, own], real[:, own]
        key_mask = None if real.all() else real
        return self.model(ids, positions, cache, key_mask)[:, -1], key_mask

    def decode(self, hidden, cache, positions, uniforms, choose: Callable, noise: float):
        """Decode up to T tokens for each row: ids (B, T), mask (B, T), log-probabilities (B, T) float32 or wider.

        `hidden` (B, C) predicts the first token, which stands at `positions` (B,); `choose` turns log-probabilities
        (rows, V) and uniforms (rows,) into tokens. Ended rows are dropped from the batch, a tenth of it at a time; on a
        CPU a few stay, by `spare`; on a GPU, which would have to wait for the count, only every eighth token looks, and
        where a graph has to be captured again half of the batch goes at a time. For it a step changes all in place.
        """
        actions = torch.full(uniforms.shape, self.pad_id, device=self.device)
        mask = torch.zeros_like(actions, dtype=torch.bool)
        logp = torch.zeros(actions.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=self.device)
        ends = torch.tensor(self.end_ids, device=self.device)
        # Of each row that is still in the batch: its next cell of (B, T), its last token, and whether it goes on.
        cell = torch.arange(len(actions), device=self.device) * actions.shape[1]
        token, going = torch.zeros_like(cell), torch.ones_like(cell, dtype=torch.bool)
        graph_device = self.device if self.captures else None
        look_every = self.look_every or (8 if self.device.type == "cuda" else 1)
        drop_below = (0.5 if graph_device else 0.9) if self.drop_below is None else self.drop_below

        def draw(hidden: torch.Tensor) -> None:
            distribution = log_distribution(self.logits(hidden), self.temperature, noise)
            token.copy_(choose(distribution, uniforms.take(cell.to(uniforms.device))))
            actions.view(-1).index_copy_(0, cell, token)
            mask.view(-1).index_copy_(0, cell, going)
            logp.view(-1).index_copy_(0, cell, distribution.gather(1, token[:, None])[:, 0])
            going.logical_and_((token[:, None] != ends).all(1))
            cell.add_(1)

        def step() -> None:
            hidden = self.model(token[:, None], positions[:, None], cache)[:, 0]
            positions.add_(1)
            draw(hidden)

        draw(hidden)
        steps = replayed(step, graph_device)
        for t in range(actions.shape[1] - 1):
            left = int(going.sum()) if t % look_every == 0 else len(going)
            if not left:
                break
            left += spare(left, self.device, least=1)
            if left < drop_below * len(going):
                keep = going.byte().argsort(descending=True, stable=True)[:left].sort()[0]
                cell, token, positions, going = (x[keep] for x in (cell, token, positions, going))
                steps = None  # gives back the memory of its graph
                cache.select(keep)
                steps = replayed(step, graph_device)
            next(steps)
        return actions.where(mask, self.pad_id), mask, logp.where(mask, 0.0)

    @property
    def layout(self) -> str:
        """How a scoring pass lays out its tokens: `packed` (real and a few idle ones) if it can, else padded.

        Padded, each prompt is computed once and `shared` by its rows through a cache, or `joined` with each row where
        gradient checkpointing would extend the cache a second time, or where ranks with a part of the weights each must
        call the model equally often. `windowed` is shared, but for what all prompts begin with: between that and the
        rest of a prompt padding would take places of the window.
        """
        if isinstance(self.model, Llama):
            return "packed"
        if self.model.checkpointing or ranks.is_sharded(self.model):
            return "joined"
        return "windowed" if self.model.windowed else "shared"

    def log_probs(self, rollout: Rollout, entropy: bool = True, layout: str | None = None):
        """Log-probabilities (B, T) of the sampled ids, float32 or wider, with gradient; exact entropies (B, T) in nats.

        Both are 0 at padding. The entropy carries no gradient, and is None unless it is asked for.
        """
        by_layout = {"packed": self.packed_hidden, "joined": self.joined_hidden}  # the other two share
        with self.autocast():
            hidden = by_layout.get(layout or self.layout, self.shared_hidden)(rollout)  # (N, C), of the real tokens
            picked, spread = self.score_tokens(hidden, rollout.actions[rollout.mask], entropy)
        blank = picked.new_zeros(rollout.actions.shape)
        logp = blank.masked_scatter(rollout.mask, picked)
        return logp, blank.masked_scatter(rollout.mask, spread) if entropy else None

    def exact_kl(self, reference: "TokenPolicy", rollout: Rollout) -> None:
        """None: summed over all texts it has no closed form, so it is estimated from the log-probabilities."""

    def score_tokens(self, hidden: torch.Tensor, ids: torch.Tensor, entropy: bool = True):
        """Log-probabilities (N,) of ids (N,), and entropies (N,) if asked for, from hidden states (N, C).

        The vocabulary's (N, V) never exists as a whole if it is large: the tokens go in chunks, whose logits are made
        again in the backward pass. On a CPU what follows the logits of a single chunk goes in pieces of 16 MB, since
        larger ones are fresh memory each time: 8 % of the update of `small`. (Of many they would leave gaps.)
        """
        spreads, vocabulary = [], self.model.config.vocab_size

        def score(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            distribution = log_distribution(logits, self.temperature, self.exploration_noise)
            if entropy and len(spreads) < len(parts):  # not again in the backward pass
                spreads.append(torch.special.entr(distribution.detach().exp()).sum(-1))
            return distribution.gather(1, ids[:, None])[:, 0]

        size = max(1, (self.chunk_logits or most_logits(self.device)) // vocabulary)
        if len(hidden) <= size:
            piece = max(1, 2**22 // vocabulary) if self.device.type == "cpu" else size
            parts = list(zip(self.logits(hidden).split(piece), ids.split(piece), strict=True))
            picked = [score(*part) for part in parts]
        else:
            parts = list(zip(hidden.split(size), ids.split(size), strict=True))
            picked = [checkpoint(lambda x, y: score(self.logits(x), y), *part, use_reentrant=False) for part in parts]
        return torch.cat(picked), torch.cat(spreads) if entropy else None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., C), float32 or wider, the output layer's product included.

        What this product loses in bfloat16 sets sampler and scorer apart (MiniMax-M1, arXiv 2506.13585, section 3.2).
        On a GPU, beside bfloat16, its factors keep 10 bits (TF32; bfloat16 has 7), which is 7 times as fast as all 23.
        """
        with torch.autocast(self.device.type, enabled=False):
            return self.model.logits(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in `dtype`; weights stay as they are, and logits and all that follows are float32."""
        if self.device.type == "cuda":  # for the backward pass that follows, too
            torch.set_float32_matmul_precision("highest" if self.dtype == torch.float32 else "high")
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        kept = not (ranks.is_sharded(self.model) and torch.is_grad_enabled())  # casts, which would be of all weights
        return torch.autocast(self.device.type, self.dtype, cache_enabled=kept)

    def completion_positions(self, rollout: Rollout) -> torch.Tensor:
        """Positions (B, T - 1) of all completion tokens but the last, which predicts nothing."""
        offsets = torch.arange(rollout.actions.shape[1] - 1, device=rollout.actions.device)
        return rollout.prompt_mask.sum(1)[rollout.group, None] + offsets

    def packed_hidden(self, rollout: Rollout) -> torch.Tensor:
        """Hidden states (N, C) that predict the N completion tokens, row by row; the model sees no padding."""
        real, common, inputs = rollout.prompt_mask, rollout.common, rollout.mask[:, 1:]  # the last predicts nothing
        packed = Packed(real.sum(1), inputs.sum(1), rollout.group, common)
        places = real.cumsum(1) - 1
        own, first = real & (places >= common), torch.arange(common, device=real.device)
        ids = [rollout.prompts[0][real[0]][:common], rollout.prompts[own], rollout.actions[:, :-1][inputs]]
        positions = [first, places[own], self.completion_positions(rollout)[inputs]]
        ids, positions = (F.pad(torch.cat(x), (0, packed.idle)) for x in (ids, positions))
        hidden = self.model.packed(ids, positions, packed, packed.asking)[: packed.asked]  # ends of prompts come first
        hidden = torch.cat([packed.rows.repeat(hidden[: len(real)]), hidden[len(real) :]])
        source = torch.arange(len(inputs), device=real.device)[:, None].repeat(1, rollout.actions.shape[1])
        source[:, 1:][inputs] = torch.arange(len(inputs), len(hidden), device=real.device)  # who predicts which token
        return hidden.index_select(0, source[rollout.mask])

    def shared_hidden(self, rollout: Rollout) -> torch.Tensor:
        """The same from padded rows: each prompt once, then its rows against its cache."""
        cache = self.model.new_cache()
        hidden, key_mask = self.prefill(rollout, cache)
        hidden = Shared(len(hidden), rollout.group).repeat(hidden)[:, None]
        if rollout.actions.shape[1] > 1:
            cache.share(rollout.group, key_mask=key_mask)
            rest = self.model(rollout.actions[:, :-1], self.completion_positions(rollout), cache)
            hidden = torch.cat([hidden, rest], 1)
        return hidden[rollout.mask]

    def joined_hidden(self, rollout: Rollout) -> torch.Tensor:
        """The same from one uncached pass over padded rows of prompt and completion together."""
        real, later = rollout.prompt_mask[rollout.group], self.completion_positions(rollout)
        ids = torch.cat([rollout.prompts[rollout.group], rollout.actions[:, :-1]], 1)
        positions = torch.cat([(real.cumsum(1) - 1).clamp(min=0), later], 1)
        key_mask = None if real.all() else torch.cat([real, torch.ones_like(later, dtype=torch.bool)], 1)
        hidden = self.model(ids, positions, key_mask=key_mask)
        return hidden[:, rollout.prompts.shape[1] - 1 :][rollout.mask]


Policy = TokenPolicy | GaussianPolicy


def frozen(policy: Policy) -> Policy:
    """A copy of a policy that does not learn, the weights of its matrix products in their dtype.

    All else, the output layer too, stays float32, as it is where autocast computes with the policy's own weights, so
    that both give the same log-probabilities to the bit.
    """
    low = policy.dtype != torch.float32
    memo = {  # what deepcopy finds here it takes as the copy
        id(module.weight): torch.nn.Parameter(module.weight.detach().to(policy.dtype))
        for module in policy.model.modules()
        if low and isinstance(module, torch.nn.Linear) and module is not policy.model.output_layer
    }
    reference = copy.copy(policy)
    reference.model = copy.deepcopy(policy.model, memo)
    reference.model.requires_grad_(False).checkpointing = False
    return reference


def score_rollout(policy: Policy, rollout: Rollout, token_budget: int, entropy: bool = False) -> torch.Tensor:
    """Log-probabilities (B, T), or entropies, of a rollout under the policy as it is now, without gradient."""
    dtype = torch.promote_types(next(policy.model.parameters()).dtype, torch.float32)
    scores = torch.zeros(rollout.mask.shape, dtype=dtype, device=policy.device)
    with torch.no_grad():
        for rows in micro_batches(rollout, token_budget, policy.layout):
            part = rollout.select(rows)
            logp, spread = policy.log_probs(part, entropy)
            scores[rows, : part.mask.shape[1]] = spread if entropy else logp
    return scores


def mean_log_probs(policy: Policy, rollout: Rollout, token_budget: int) -> torch.Tensor:
    """Mean log-probability per token (B,) of each completion under the policy as it is now, without gradient."""
    return score_rollout(policy, rollout, token_budget).sum(1) / rollout.mask.sum(1)
