"""What was sampled: rollouts, and how they are cut into passes over a model.

Shapes: P prompts, G completions of each, B = P * G rows (prompt-major), L prompt tokens after left padding,
T completion tokens after right padding.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


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
