"""How tokens see each other: attention and its masks, the cache of decoding, texts that rows share, packed tokens.

Shapes: P prompts, B rows, T new tokens, L tokens in the cache after this call, N tokens without any padding,
H attention heads, K key-value heads, D width of a head.
"""

import functools
import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, causal=False):
    """Softmax attention (B, H, T, D) of queries (B, H, T, D) over keys and values (B, K, L, D).

    Query heads that share a key are rows of one product where one token is decoded, else keys are expanded: with
    `enable_gqa` and a mask CUDA has no fused kernel.
    """
    if q.shape[1] > k.shape[1] and q.shape[2] > 1:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    rows = q.view(len(q), k.shape[1], -1, q.shape[3])
    mask = None if mask is None else mask.to(q.dtype)
    if is_written_out(q, k, mask):
        scores = scored(rows * rows.shape[-1] ** -0.5, k)
        return ((scores if mask is None else scores + mask).softmax(-1) @ v).view(q.shape)
    return F.scaled_dot_product_attention(rows, k, v, mask, is_causal=causal).reshape(q.shape)


def scored(rows: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Queries (B, K, S, D) times keys (B, K, L, D): (B, K, S, L)."""
    k = k.contiguous() if k.dtype == torch.bfloat16 else k  # a tenth of sampling: bmm would transpose a copy
    return rows @ k.transpose(2, 3)


def is_written_out(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """On a CPU one token at a time, and short rows with a mask: 0.45 to 0.95 of the fused kernel's time."""
    return q.device.type == "cpu" and (q.shape[2] == 1 or (mask is not None and k.shape[2] <= 512))


def has_varlen(q: torch.Tensor) -> bool:
    """Whether there is a fused kernel for sequences of different lengths: on newer GPUs, in half precision."""
    half = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return half and torch.cuda.get_device_capability(q.device) >= (8, 0)


def varlen(q, k, v, q_ends, k_ends, longest_q: int, longest_k: int) -> torch.Tensor:
    """Causal attention (M, H, D) of S sequences one after the other, queries and keys of which end together.

    The ends (S + 1,) are int32, a 0 before them.
    """
    from torch.nn.attention.varlen import varlen_attn

    named = "enable_gqa" in inspect.signature(varlen_attn).parameters  # before PyTorch 2.12 it is always on
    causal = {"window_size": (-1, 0)} | ({"enable_gqa": True} if named else {})
    return varlen_attn(q, k, v, q_ends, k_ends, longest_q, longest_k, **causal)


def attention_mask(new: int, length: int, key_mask: torch.Tensor | None, device) -> torch.Tensor | None:
    """Mask (B or 1, 1, T, L), 0 where a query may look, else -inf; None where plain causal attention will do."""
    if key_mask is None and (new == 1 or new == length):
        return None
    visible = torch.ones(1, 1, new, length, dtype=torch.bool, device=device).tril(length - new)
    if key_mask is not None:
        # A padding query must see something, or its softmax is 0/0 and the NaN spreads: let it see itself.
        visible = (visible & key_mask[:, None, None, :]) | visible.triu(length - new)
    return additive(visible)


def additive(visible: torch.Tensor) -> torch.Tensor:
    """0 where a bool mask is true, else -inf: what scores are added to."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, -torch.inf)


class Shared:
    """`count` texts, each the beginning of several rows, and in each layer their keys and values (count, K, L, D).

    `group` (B,) names the text of each row, `key_mask` (count, L) is true on real tokens.
    """

    def __init__(self, count: int, group: torch.Tensor, layers: Sequence = (), key_mask: torch.Tensor | None = None):
        self.count, self.layers = count, layers
        self.mask = None if key_mask is None else additive(key_mask)[:, None, None]
        self.regroup(group)

    def regroup(self, group: torch.Tensor) -> None:
        """Take other rows. Each text gets as many slots as the one with the most rows, so some may stay empty."""
        sizes = torch.bincount(group, minlength=self.count)
        self.group, self.shape = group, (len(sizes), int(sizes.max()))
        order, within = group.argsort(stable=True), torch.empty_like(group)
        within[order] = torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group[order]]
        slots = group * self.shape[1] + within
        as_they_stand = torch.equal(slots, torch.arange(self.shape[0] * self.shape[1], device=group.device))
        self.slots = None if as_they_stand else slots

    def repeat(self, x: torch.Tensor) -> torch.Tensor:
        """What belongs to the texts (count, ...), for each of their rows (B, ...); the backward pass is a sum.

        It never adds up rows by index, which is slower, and on a GPU done in another order every time.
        """
        x = x[:, None].expand(-1, self.shape[1], *x.shape[1:]).flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)  # each at most once

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (B, K, S, D) side by side, one matrix for each text and head: (count, K, slots * S, D)."""
        if self.slots is not None:
            x = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:]).index_copy(0, self.slots, x)
        return x.unflatten(0, self.shape).transpose(1, 2).flatten(2, 3)

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `fold`."""
        x = x.unflatten(2, (self.shape[1], -1)).transpose(1, 2).flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)


def attention_with(texts: list[tuple], q, k, v, mask: torch.Tensor | None) -> torch.Tensor:
    """`attention` (B, H, T, D) over texts that rows share as well as over their own keys and values (B, K, L, D).

    `texts` are triples of a `Shared`, its keys and its values (count, K, L, D).
    """
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    rows = q.unflatten(1, heads).flatten(2, 3) * q.shape[-1] ** -0.5  # (B, K, H / K * T, D)
    scores = []
    for text, keys, _ in texts:
        score = text.fold(rows) @ keys.transpose(2, 3)
        scores.append(text.unfold(score if text.mask is None else score + text.mask.to(score.dtype)))
    own = scored(rows, k)
    scores.append(own if mask is None else own + mask.repeat(1, 1, heads[1], 1).to(own.dtype))
    wide = torch.promote_types(v.dtype, torch.float32)
    weights = torch.cat(scores, -1).softmax(-1, wide).to(v.dtype).split([x.shape[-1] for x in scores], -1)
    seen = weights[-1] @ v
    for (text, _, value), weight in zip(texts, weights, strict=False):
        seen = seen + text.unfold(text.fold(weight) @ value)
    return seen.unflatten(2, (heads[1], -1)).flatten(1, 2)


class Cache:
    """Keys and values of every layer, (B, K, L, D) each, and before them those of texts that rows share.

    It grows by concatenation, which autograd can follow, or, if `share` made room, in place (the sampler).
    """

    share_from, share_fixed_from = 64, 256  # tokens from which a text is shared, not repeated

    def __init__(self, num_layers: int):
        self.layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers
        self.shared: list[Shared] = []
        self.key_mask: torch.Tensor | None = None  # (B, L) of what was repeated for the rows; None: all is real
        self.length = 0
        self.room = 0
        self.place: torch.Tensor | None = None  # (1,) int64, where the next token goes, if rows are fixed

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, K, T, D) keys and values to a layer; returns all of its rows, or of fixed ones all room."""
        if not self.room:
            if self.layers[layer] is not None:
                key, value = (torch.cat(pair, 2) for pair in zip(self.layers[layer], (key, value), strict=True))
            self.layers[layer] = (key, value)
            return key, value
        if self.layers[layer] is None:
            self.layers[layer] = tuple(x.new_zeros(*x.shape[:2], self.room, x.shape[3]) for x in (key, value))
        end = self.length + key.shape[2] if self.place is None else self.room
        for buffer, new in zip(self.layers[layer], (key, value), strict=True):
            if self.place is None:
                buffer[:, :, self.length : end] = new
            else:
                buffer.index_copy_(2, self.place, new)
        return tuple(buffer[:, :, :end] for buffer in self.layers[layer])

    def share(self, group: torch.Tensor, room: int = 0, key_mask: torch.Tensor | None = None, fixed=False) -> None:
        """Go on with rows of which `group` (B,) names the one so far that each continues.

        A long text stays where it is and is read once for all its rows, which halves the time of attention after 256
        tokens that 16 rows share; a short one is repeated, which saves small operations: in a graph on a GPU, after 128
        tokens, 20 to 30 % of decoding. `key_mask` (rows so far, L) is true on real tokens; the rows get space for
        `room` more. With `fixed`, every token sees all of that space, masked: no step depends on a number of the host.
        """
        for shared in self.shared:
            shared.regroup(shared.group[group])
        if self.length < (self.share_fixed_from if fixed else self.share_from):
            self.key_mask = None if key_mask is None else key_mask[group]
            rows = Shared(len(self.layers[0][0]), group)
            repeated = [tuple(rows.repeat(x) for x in pair) for pair in self.layers]
            self.layers = [tuple(F.pad(x, (0, 0, 0, room)) for x in pair) for pair in repeated]
            self.room = self.length + room if room else 0
        else:
            self.shared.append(Shared(len(self.layers[0][0]), group, self.layers, key_mask))
            self.layers, self.length, self.room = [None] * len(self.layers), 0, room
        if fixed:
            self.place = torch.full((1,), self.length, device=group.device)

    def visible(self) -> torch.Tensor:
        """The mask (B or 1, 1, 1, L) of the next token of fixed rows, 0 where it may look, else -inf."""
        seen = torch.arange(self.room, device=self.place.device) <= self.place
        if self.key_mask is not None:
            seen = seen & F.pad(self.key_mask, (0, self.room - self.key_mask.shape[1]), value=True)
        mask = additive(seen.view(-1, 1, 1, self.room))
        return mask if self.layers[0] is None else mask.to(self.layers[0][0].dtype)  # once, not in every layer

    def advance(self, new: int) -> None:
        """Count `new` tokens, which all layers have."""
        if self.place is None:
            self.length += new
        else:
            self.place.add_(new)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows (int64 indices, ascending); in place, one layer after the other: there are never two."""
        for shared in self.shared:
            shared.regroup(shared.group[rows])
        self.key_mask = None if self.key_mask is None else self.key_mask[rows]
        used = self.length if self.place is None else self.room
        for i, pair in enumerate(self.layers):
            if pair is not None:
                self.layers[i] = tuple(buffer[: len(rows)] for buffer in pair)
                for buffer, kept in zip(pair, self.layers[i], strict=True):
                    kept[:, :, :used] = buffer[:, :, :used].index_select(0, rows)


def spare(count: int, device: torch.device, least: int = 64) -> int:
    """How many idle tokens go with so many, on a CPU: that their sum be one of few numbers, multiples of `least`.

    For each number of rows oneDNN writes its kernels anew: a tenth of the time of the toy's fine-tuning, and small
    pieces of memory that last among the large ones.
    """
    return -count % max(least, 2 ** (count.bit_length() - 5)) if device.type == "cpu" else 0


class Packed:
    """Attention over packed tokens: those of P prompts, one after the other, then those of B completions.

    A prompt sees itself, a completion its own prompt and itself. What all prompts begin with, `common` tokens, stands
    before all else, once. `prompts` (P,) and `completions` (B,) are numbers of tokens, `group` (B,) names the prompt of
    each completion. Only here do rows have one width, and not in `unpadded`. The last `idle` tokens see nothing, and
    nothing sees them: see `spare`.
    """

    def __init__(self, prompts: torch.Tensor, completions: torch.Tensor, group: torch.Tensor, common: int = 0):
        self.common, prompts = common, prompts - common
        self.lengths, self.sizes = (prompts, completions), [int(prompts.sum()), int(completions.sum())]
        self.rows = Shared(len(prompts), group)
        # Which slots of (P, L) and of (B, T), padded on the right, are real.
        self.real = [
            torch.arange(int(lengths.max()), device=group.device) < lengths[:, None]
            for lengths in (prompts, completions)
        ]
        self.slots = [None if real.all() else real.flatten().nonzero()[:, 0] for real in self.real]
        self.texts = [Shared(1, torch.zeros_like(rows)) for rows in (prompts, group)] if common else []
        # The tokens that predict one: the last of each prompt, and those of the completions; then idle ones.
        self.tokens, self.asked = common + sum(self.sizes), len(prompts) + self.sizes[1]
        more = spare(self.asked, group.device)
        self.idle = more + spare(self.tokens + more, group.device)
        last = torch.arange(common + self.sizes[0], self.tokens + more, device=group.device)
        self.asking = torch.cat([common + prompts.cumsum(0) - 1, last])

    @functools.cached_property
    def mask(self) -> torch.Tensor:
        """What completions see of their prompts and of themselves, (B, 1, T, L + T)."""
        before = self.rows.repeat(self.real[0])[:, None].expand(-1, self.real[1].shape[1], -1)
        own = torch.ones_like(before[..., :1]).expand(-1, -1, before.shape[1]).tril()
        return additive(torch.cat([before, own], 2))[:, None]

    @functools.cached_property
    def end_mask(self) -> torch.Tensor:
        """What the ends of prompts see of them, (P, 1, 1, L)."""
        return additive(self.real[0])[:, None, None]

    @functools.cached_property
    def prompt_mask(self) -> torch.Tensor | None:
        """What prompts see of themselves after the common tokens, (1, 1, L, L); None: plain causal attention."""
        length, device = self.real[0].shape[1], self.real[0].device
        return torch.full((1, 1, length, length), -torch.inf, device=device).triu(1) if self.common else None

    @functools.cached_property
    def sequences(self) -> tuple[torch.Tensor, ...]:
        """For `varlen`: ends of prompts, of completions, and of both together, and these' real slots of (B, L + T)."""
        prompts, completions = self.lengths
        both = prompts[self.rows.group] + completions
        real = torch.cat([self.rows.repeat(self.real[0]), self.real[1]], 1)
        ends = (F.pad(lengths.cumsum(0), (1, 0)).int() for lengths in (prompts, completions, both))
        return *ends, real.flatten().nonzero()[:, 0]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What queries (N, H, D), or those of `asking` (M, H, D), see of keys and values (N, K, D): like queries."""
        rows, whole = len(q), (len(q) == len(k))  # whole: every token asks
        q, k, v = q[: self.tokens if whole else self.asked], k[: self.tokens], v[: self.tokens]
        see = self.unpadded if has_varlen(q) and not self.common and self.sizes[1] else self.padded
        return torch.cat([*see(q, k, v, whole), q.new_zeros(rows - len(q), *q.shape[1:])])

    def padded(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, whole: bool) -> list[torch.Tensor]:
        """What the queries see, in parts, by attention over rows of one width."""
        seen, first = [], [x[: self.common].transpose(0, 1)[None] for x in (q, k, v)]  # (1, heads, common, D)
        if whole and self.common:
            seen.append(attention(*first, causal=True)[0].transpose(0, 1))
        own = self.pad(k, 0), self.pad(v, 0)  # of the prompts
        if whole:
            seen.append(self.unpad(self.attend(0, first[1:], self.pad(q, 0), *own, self.prompt_mask), 0))
        else:
            ends = q[: len(own[0]), :, None]
            seen.append(self.attend(0, first[1:], ends, *own, self.end_mask)[:, :, 0])
        k, v = (torch.cat([self.rows.repeat(x), self.pad(y, 1)], 2) for x, y in zip(own, (k, v), strict=True))
        return [*seen, self.unpad(self.attend(1, first[1:], self.pad(q, 1), k, v, self.mask), 1)]

    def unpadded(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, whole: bool) -> list[torch.Tensor]:
        """The same by a kernel that sees no padding: of equal lengths 2 % of an update, 6 % of its memory."""
        prompts, completions, both, slots = self.sequences
        longest, width = (real.shape[1] for real in self.real)
        count = self.sizes[0] if whole else len(prompts) - 1
        ends, most = (prompts, longest) if whole else (torch.arange(count + 1, device=q.device, dtype=torch.int32), 1)
        first = varlen(q[:count], k[: self.sizes[0]], v[: self.sizes[0]], ends, prompts, most, longest)
        k, v = (torch.cat([self.rows.repeat(self.pad(x, 0)), self.pad(x, 1)], 2) for x in (k, v))
        k, v = (x.transpose(1, 2).flatten(0, 1).index_select(0, slots) for x in (k, v))  # each at most once
        return [first, varlen(q[count:], k, v, completions, both, width, longest + width)]

    def attend(self, part: int, first: list[torch.Tensor], q, k, v, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of the rows of a part over `first`, the keys and values of what all prompts begin with, too.

        Short rows read it where it is, in half the time that a copy for each of them takes; long ones in 1.1 times.
        """
        if not self.common:
            return attention(q, k, v, mask, causal=mask is None)
        if q.shape[2] <= q.shape[3]:
            return attention_with([(self.texts[part], *first)], q, k, v, mask)
        k, v = (torch.cat([x.expand(len(y), -1, -1, -1), y], 2) for x, y in zip(first, (k, v), strict=True))
        return attention(q, k, v, F.pad(mask, (self.common, 0)))

    def pad(self, x: torch.Tensor, part: int) -> torch.Tensor:
        """Of tokens (N, heads, D) the prompts (part 0) as (P, heads, L, D) or the completions (part 1), zero-padded."""
        x = x[self.common : self.common + self.sizes[0]] if part == 0 else x[len(x) - self.sizes[1] :]
        real, slots = self.real[part], self.slots[part]
        if slots is not None:
            x = x.new_zeros(real.numel(), *x.shape[1:]).index_copy(0, slots, x)
        return x.unflatten(0, real.shape).transpose(1, 2)

    def unpad(self, x: torch.Tensor, part: int) -> torch.Tensor:
        """The inverse of `pad`."""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.slots[part] is None else x.index_select(0, self.slots[part])
