"""Rollouts and micro-batches; sampler and scorer are in test_oracle_sampler.py."""

import numpy as np
import pytest
import torch

from policy import Rollout, micro_batches


def rollout_of(prompt_lengths: list[int], lengths: list[list[int]]) -> Rollout:
    """A rollout with these prompt lengths and, for each prompt, these completion lengths."""
    group = torch.tensor([p for p, row in enumerate(lengths) for _ in row])
    flat = torch.tensor([length for row in lengths for length in row])
    prompt_mask = torch.arange(max(prompt_lengths)) >= max(prompt_lengths) - torch.tensor(prompt_lengths)[:, None]
    mask = torch.arange(int(flat.max())) < flat[:, None]
    return Rollout(
        prompts=prompt_mask.long(),
        prompt_mask=prompt_mask,
        group=group,
        actions=mask.long(),
        mask=mask,
        sampler_logp=mask.float(),
        truncated=torch.zeros(len(group), dtype=torch.bool),
        texts=[""] * len(group),
    )


def tokens_of(part: Rollout) -> int:
    """What a micro-batch costs with its padding: each prompt once, each completion at the longest one's width."""
    return part.prompts.numel() + part.actions.numel()


@pytest.mark.parametrize("seed", range(30))
def test_micro_batches_cover_each_row_once_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    prompts, group_size = int(rng.integers(1, 9)), int(rng.integers(1, 9))
    prompt_lengths = rng.integers(1, 30, prompts).tolist()
    lengths = rng.geometric(rng.uniform(0.03, 0.5), (prompts, group_size)).tolist()
    rollout = rollout_of(prompt_lengths, lengths)
    budget = int(rng.integers(1, 400))
    batches = micro_batches(rollout, budget)
    assert sorted(torch.cat(batches).tolist()) == list(range(prompts * group_size))
    widths = []
    for rows in batches:
        part = rollout.select(rows)
        assert tokens_of(part) <= budget or len(rows) == 1
        widths.append(max(max(lengths[group]) for group in rollout.group[rows].tolist()))
    assert widths == sorted(widths, reverse=True)  # the longest first
    for group, row in enumerate(lengths):
        if prompt_lengths[group] + group_size * max(row) <= budget:
            assert sum((rollout.group[rows] == group).any().item() for rows in batches) == 1  # whole


def test_micro_batches_by_hand():
    """Groups of 2 rows, prompts of 4: the longest first, 2 * 4 + 4 * 10 tokens for two groups in one pass."""
    rollout = rollout_of([4, 4, 4, 4], [[3, 2], [10, 1], [8, 9], [6, 6]])

    def rows(budget: int) -> list[list[int]]:
        return [batch.tolist() for batch in micro_batches(rollout, budget)]

    assert rows(1000) == [[2, 3, 4, 5, 6, 7], [0, 1]]  # 3 is less than half of 10
    assert rows(72) == [[2, 3, 4, 5, 6, 7], [0, 1]]  # 3 * 4 + 6 * 10
    assert rows(71) == [[2, 3, 4, 5], [0, 1, 6, 7]]  # 3 is not less than half of 6
    assert rows(48) == [[2, 3, 4, 5], [0, 1, 6, 7]]
    assert rows(47) == [[2, 3], [4, 5, 6, 7], [0, 1]]
    assert rows(43) == [[2, 3], [4, 5], [0, 1, 6, 7]]  # the middle one took 2 * 4 + 4 * 9
    assert rows(24) == [[2, 3], [4, 5], [6, 7], [0, 1]]
    assert rows(23) == [[2], [3], [4, 5], [6, 7], [0, 1]]  # the longest group takes 4 + 2 * 10
    assert rows(1) == [[2], [3], [4], [5], [6], [7], [0], [1]]
