"""What was sampled: rollouts, how they are cut into passes over a model, and how attention sees their packed tokens.

Shapes: P prompts, G completions of each, B = P * G rows (prompt-major), L prompt tokens after left padding,
T completion tokens after right padding, N tokens without any padding, H heads, K key-value heads, D width of a head.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from model_toy import attention


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
        return [ids[:size] for ids, size in zip(self.actions.tolist(), self.mask.sum(1).tolist(), strict=True)]


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


def pass_tokens(prompts: Sequence[int], lengths: Sequence[int], layout: str) -> int:
    """Tokens that one scoring pass computes, from the tokens of its prompts and completions (see `TokenPolicy`)."""
    if layout == "packed":
        return sum(prompts) + sum(lengths)
    if layout == "shared":
        return len(prompts) * max(prompts) + len(lengths) * max(lengths)
    return len(lengths) * (max(prompts) + max(lengths))


def micro_batches(rollout: Rollout, token_budget: int, layout: str = "packed") -> list[torch.Tensor]:
    """Cut the rows into micro-batches of at most `token_budget` tokens as the layout computes them; row indices.

    Groups are sorted by length, longest first (so that memory runs out at once or not at all), and stay whole where
    they fit. A group less than half as long as the longest of a large micro-batch starts a new one, to save padding.
    """
    lengths, prompt_lengths = rollout.mask.sum(1).tolist(), rollout.prompt_mask.sum(1).tolist()
    members: dict[int, list[int]] = {}
    for row, group in enumerate(rollout.group.tolist()):
        members.setdefault(group, []).append(row)
    units = []  # (tokens of the longest completion, tokens of the prompt, rows)
    for group, rows in members.items():
        width, prompt = max(lengths[row] for row in rows), prompt_lengths[group]
        whole = pass_tokens([prompt], [lengths[row] for row in rows], layout) <= token_budget
        fit = len(rows) if whole else max(1, token_budget // (prompt + width))
        units += [(width, prompt, rows[i : i + fit]) for i in range(0, len(rows), fit)]
    batches: list[list[int]] = []
    prompts, longest = [], 0
    for width, prompt, rows in sorted(units, key=lambda unit: -unit[0]):
        joined = (batches[-1] if batches else []) + rows
        tokens = pass_tokens([*prompts, prompt], [lengths[row] for row in joined], layout)
        padded = 2 * width < longest and 4 * tokens > token_budget
        if not batches or tokens > token_budget or padded:
            batches.append([])
            prompts, longest = [], width
        batches[-1] += rows
        prompts.append(prompt)
    return [torch.tensor(sorted(rows), device=rollout.mask.device) for rows in batches]


class Packed:
    """Attention over packed tokens: first the tokens of P prompts, one after the other, then those of B completions.

    A prompt sees itself, a completion its own prompt and itself. `prompts` (P,) and `completions` (B,) are numbers of
    tokens, `group` (B,) names the prompt of each completion. Only here, between projections, do rows have one width.
    """

    def __init__(self, prompts: torch.Tensor, completions: torch.Tensor, group: torch.Tensor):
        self.group, self.sizes = group, [int(prompts.sum()), int(completions.sum())]
        first, width = torch.arange(len(prompts), device=group.device), len(group) // len(prompts)
        self.even = torch.equal(group, first.repeat_interleave(width))  # each prompt has as many rows as the others
        # Which slots of (P, L) and of (B, T), padded on the right, are real.
        self.real = [
            torch.arange(int(lengths.max()), device=group.device) < lengths[:, None]
            for lengths in (prompts, completions)
        ]
        self.slots = [None if real.all() else real.flatten().nonzero()[:, 0] for real in self.real]
        before = self.of_rows(self.real[0])[:, None].expand(-1, self.real[1].shape[1], -1)
        visible = torch.cat([before, torch.ones_like(before[..., :1]).expand(-1, -1, before.shape[1]).tril()], 2)
        self.mask = torch.zeros(visible.shape, device=group.device).masked_fill(~visible, -torch.inf)[:, None]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What queries (N, H, D) see of keys and values (N, K, D): (N, H, D)."""
        (q_prompt, q), (k_prompt, k), (v_prompt, v) = map(self.pad, (q, k, v))
        k, v = torch.cat([self.of_rows(k_prompt), k], 2), torch.cat([self.of_rows(v_prompt), v], 2)
        seen = [attention(q_prompt, k_prompt, v_prompt, causal=True), attention(q, k, v, self.mask)]
        seen = [x.transpose(1, 2).flatten(0, 1) for x in seen]
        return torch.cat([x if i is None else x.index_select(0, i) for x, i in zip(seen, self.slots, strict=True)])

    def pad(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Tokens (N, heads, D) as prompts (P, heads, L, D) and completions (B, heads, T, D), zeros at padding."""
        parts = list(x.split(self.sizes))
        for i, (real, slots) in enumerate(zip(self.real, self.slots, strict=True)):
            if slots is not None:
                parts[i] = x.new_zeros(real.numel(), *x.shape[1:]).index_copy(0, slots, parts[i])
            parts[i] = parts[i].view(*real.shape, *x.shape[1:]).transpose(1, 2)
        return parts

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """What belongs to the prompts (P, ...), repeated for their rows (B, ...)."""
        if self.even:  # its backward pass is a sum, 10 % of attention faster than adding up rows by index
            return x[:, None].expand(-1, len(self.group) // len(x), *x.shape[1:]).flatten(0, 1)
        return x.index_select(0, self.group)
