"""What was sampled: rollouts, and how they are cut into passes over a model.

Shapes: P prompts, G completions of each, B = P * G rows (prompt-major), L prompt tokens after left padding,
T completion tokens after right padding.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from attention import Cache
from commands import NotFinite


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
    questions: list[str] = field(default_factory=list)  # (P,), or none where nothing is trained

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
            questions=[self.questions[prompt] for prompt in prompts.tolist() if self.questions],
        )

    def records(self, chosen: torch.Tensor | None = None) -> list[dict]:
        """Question and completion of all rows, or of chosen ones (B,) bool, as samples.jsonl keeps them."""
        rows = range(len(self.texts)) if chosen is None else chosen.nonzero()[:, 0].tolist()
        groups, questions = self.group.tolist(), dict(enumerate(self.questions))
        return [{"question": questions.get(groups[row]), "completion": self.texts[row]} for row in rows]

    def to(self, device: torch.device) -> "Rollout":
        """The rollout with every tensor on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)}
        return dataclasses.replace(self, **tensors)

    @functools.cached_property
    def common(self) -> int:
        """How many tokens all prompts begin with, each leaving at least one of its own; 0 where that saves little."""
        shortest = int(self.prompt_mask.sum(1).min()) - 1
        if len(self.prompts) == 1 or shortest < Cache.share_from:
            return 0
        starts = self.prompts.shape[1] - self.prompt_mask.sum(1)
        columns = starts[:, None] + torch.arange(shortest, device=starts.device)
        equal = (self.prompts.gather(1, columns) == self.prompts[0].gather(0, columns[0])).all(0)
        count = int(equal.cumprod(0).sum())
        return count if count >= Cache.share_from else 0

    @property
    def completion_ids(self) -> list[list[int]]:
        """The sampled ids of each row, its end token included."""
        return [ids[:size] for ids, size in zip(self.actions.tolist(), self.mask.sum(1).tolist(), strict=True)]


def checked(rollout: Rollout) -> Rollout:
    """The rollout, if the sampler's log-probabilities are finite; raises NotFinite with the rows where they are not."""
    strange = ~rollout.sampler_logp.isfinite().all(1)
    if strange.any():
        raise NotFinite("the model's log-probabilities are not finite", rollout.records(strange))
    return rollout


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
        questions=[question for rollout in rollouts for question in rollout.questions],
    )


def pass_tokens(prompts: Sequence[int], lengths: Sequence[int], layout: str, common: int = 0) -> int:
    """Tokens that one scoring pass computes, from the tokens of its prompts and completions (see `TokenPolicy`).

    Of each prompt those that it has beyond the `common` ones, which are computed once; idle tokens are not counted.
    """
    rows = len(lengths) * max(lengths)
    return {
        "packed": common + sum(prompts) + sum(lengths),
        "shared": common + len(prompts) * max(prompts) + rows,
        "windowed": len(prompts) * (common + max(prompts)) + rows,
        "joined": len(lengths) * (common + max(prompts)) + rows,
    }[layout]


def micro_batches(rollout: Rollout, token_budget: int, layout: str = "packed") -> list[torch.Tensor]:
    """Cut the rows into micro-batches of at most `token_budget` tokens as the layout computes them; row indices.

    Groups are sorted by length, longest first (so that memory runs out at once or not at all), and stay whole where
    they fit. A group less than half as long as the longest of a large micro-batch starts a new one, to save padding.
    """
    common, lengths = rollout.common, rollout.mask.sum(1).tolist()
    prompt_lengths = (rollout.prompt_mask.sum(1) - common).tolist()
    members: dict[int, list[int]] = {}
    for row, group in enumerate(rollout.group.tolist()):
        members.setdefault(group, []).append(row)
    units = []  # (tokens of the longest completion, tokens of the prompt, rows)
    for group, rows in members.items():
        width, prompt = max(lengths[row] for row in rows), prompt_lengths[group]
        whole = pass_tokens([prompt], [lengths[row] for row in rows], layout, common) <= token_budget
        once, each = (0, common + prompt + width) if layout == "joined" else (common + prompt, width)
        fit = len(rows) if whole else max(1, (token_budget - once) // each)
        units += [(width, prompt, rows[i : i + fit]) for i in range(0, len(rows), fit)]
    units.sort(key=lambda unit: -unit[0])
    batches, prompts, longest = [[]], [], units[0][0]
    for width, prompt, rows in units:
        tokens = pass_tokens([*prompts, prompt], [lengths[row] for row in batches[-1] + rows], layout, common)
        padded = 2 * width < longest and 4 * tokens > token_budget
        if prompts and (tokens > token_budget or padded):
            batches.append([])
            prompts, longest = [], width
        batches[-1] += rows
        prompts.append(prompt)
    return [torch.tensor(sorted(rows), device=rollout.mask.device) for rows in batches]


def row_uniforms(key: Sequence[int], prompts: Sequence[int], group_size: int, length: int) -> torch.Tensor:
    """Uniforms (B, T) float64 in the open interval (0, 1); key is (seed, step, draw).

    Each row is a stream of SplitMix64 (Steele, Lea and Flood 2014), begun at a number that Philox draws for its
    prompt: it follows from the row's own coordinates alone, so nothing else in the batch can change it.
    """
    streams = [np.random.Philox(np.random.SeedSequence([*key, prompt])).random_raw(group_size) for prompt in prompts]
    z = np.concatenate(streams)[:, None] + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    # 52 bits and a half step: both ends of the interval stay out of reach, and the sum is exact in float64.
    return torch.from_numpy(((z >> np.uint64(12)) + 0.5) * 2.0**-52)
