"""A world so small that every completion can be listed: expectations become sums, and nothing is left to chance.

Vocabulary 3, of which token 0 ends a completion; at most 2 tokens; so 7 completions, of length 1 and 2. The policy is a
table of logits for the first token and for the second after each first, in float64. `python tests/enumeration.py`
prints the tables of biases of tests/README.md.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from algorithms import pairwise_advantages  # noqa: E402
from grpo import (  # noqa: E402
    ALGORITHMS,
    Algorithm,
    correction_weight,
    loss_denominator,
    mixed_advantages,
    policy_loss,
    row_mean,
)
from policy import log_distribution  # noqa: E402
from rewards import Scores  # noqa: E402

VOCABULARY, LENGTH, END = 3, 2, 0
COMPLETIONS = [(END,), *itertools.product((1, 2), range(VOCABULARY))]
MASK = torch.tensor([[True, len(completion) == 2] for completion in COMPLETIONS])
TRUNCATED = torch.tensor([completion[-1] != END for completion in COMPLETIONS])
REWARDS = torch.tensor([0.9, 0.1, 1.0, 0.3, 0.4, 0.0, 0.6], dtype=torch.float64)  # of each completion, for one prompt
ENDED = 0.1 * (~TRUNCATED).double()
PARTS = torch.stack([REWARDS - ENDED, ENDED], -1)  # the same (7, 2) from two functions, one of which is for the end


class Wide(Scores):
    """Scores whose total stays in float64: rounded to float32, the sums below would be off by 1e-8."""

    @property
    def total(self) -> torch.Tensor:
        return (self.filled * self.weights).sum(-1)


def table_of_logits(seed: int) -> torch.Tensor:
    """Logits (4, 3): row 0 for the first token, row a for the token after the first token a."""
    return torch.randn(1 + VOCABULARY, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_probs(logits: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """Log-probabilities (7, 2) of the tokens of each completion, 0 at padding."""
    distribution = log_distribution(logits, 1.0, noise)
    zero = logits.new_zeros(())
    return torch.stack(
        [
            torch.stack([distribution[0, first], distribution[first, rest[0]] if rest else zero])
            for first, *rest in COMPLETIONS
        ]
    )


def entropies(logits: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """Entropies (7, 2) of what each token was drawn from, without gradient; at padding anything."""
    distribution = log_distribution(logits.detach(), 1.0, noise)
    spread = -(distribution.exp() * distribution).sum(-1)
    return torch.stack([torch.stack([spread[0], spread[first]]) for first, *_ in COMPLETIONS])


def expected_reward(logits: torch.Tensor, rewards: torch.Tensor = REWARDS, noise: float = 0.0) -> torch.Tensor:
    return (log_probs(logits, noise).sum(1).exp() * rewards).sum()


def gradient_of(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def all_rollouts(prompts: int, group_size: int) -> torch.Tensor:
    """Which completion each row is, in each of the N possible rollouts (N, P, G)."""
    rows = list(itertools.product(range(len(COMPLETIONS)), repeat=prompts * group_size))
    return torch.tensor(rows).view(-1, prompts, group_size)


@cache  # they do not depend on the policy, and batches are too many to go through for each
def all_advantages(rewards: tuple, group_size: int, algorithm: Algorithm) -> torch.Tensor:
    """`mixed_advantages` (N, P, G) of all rollouts; rewards by prompt, completion and function, as nested tuples."""
    given = torch.tensor(rewards, dtype=torch.float64)  # (P, 7, F)
    prompts, weights = range(len(given)), given.new_ones(given.shape[-1])
    rollouts = [torch.stack([given[p, picks[p]] for p in prompts]) for picks in all_rollouts(len(given), group_size)]
    return torch.stack([mixed_advantages(Wide(values, weights), algorithm) for values in rollouts])


def advantages_of(rewards: list[torch.Tensor], logp: torch.Tensor, mask: torch.Tensor, algorithm: Algorithm):
    """Advantages (N, B) of all rollouts with log-probabilities logp (N, B, 2)."""
    tables = [reward.view(len(COMPLETIONS), -1) for reward in rewards]  # (7, F) each
    hashable = tuple(tuple(map(tuple, table.tolist())) for table in tables)
    cells = ("advantage", "combine", "k")  # no others matter, and what is kept serves all rows that have these
    kept = replace(Algorithm(surrogate="reinforce"), **{name: getattr(algorithm, name) for name in cells})
    advantages = all_advantages(hashable, logp.shape[1] // len(rewards), kept)
    if algorithm.advantage == "pairwise":
        mean_logp = torch.vmap(row_mean)(logp.detach(), mask)[..., 0].view_as(advantages)
        strength = algorithm.preference_strength
        advantages = torch.vmap(lambda *pair: pairwise_advantages(*pair, strength))(advantages, mean_logp)
    return advantages.flatten(1)


def expected_loss(
    logits: list[torch.Tensor], rewards: list[torch.Tensor], group_size: int, algorithm: Algorithm, noise: float = 0.0,
    old: list[torch.Tensor] | None = None, sampler: list[torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """The expectation of `policy_loss` over all rollouts: for each prompt a table of logits and a group.

    Rewards are (7,), or (7, F) of F functions. Ratios start from the tables `old`, without which they are 1; rollouts
    come from the tables `sampler`, or else from those. The gradient of the expectation by `logits` is the expected
    gradient, as each rollout's probability enters as a number.
    """
    picks = all_rollouts(len(logits), group_size)
    rows = picks.flatten(1)

    def score(tables: list[torch.Tensor]) -> torch.Tensor:  # (N, B, 2)
        every = [log_probs(table, noise)[picks[:, p]] for p, table in enumerate(tables)]
        return torch.stack(every, 1).flatten(1, 2)

    logp = score(logits)
    old_logp = logp.detach() if old is None else score(old).detach()
    sampled = old_logp if sampler is None else score(sampler).detach()
    mask = MASK[rows]
    weight = torch.ones_like(old_logp)
    if algorithm.correction != "none":
        log_rho = (old_logp - sampled).flatten(0, 1)
        weight = correction_weight(log_rho, mask.flatten(0, 1), algorithm).view_as(weight)
    advantages = advantages_of(rewards, logp, mask, algorithm)
    if algorithm.mask_truncated:
        mask = mask & ~TRUNCATED[rows, None]
    denominators = torch.tensor([max(1, loss_denominator(part, algorithm.aggregate, LENGTH)) for part in mask])

    entropy = torch.stack([entropies(table, noise)[picks[:, p]] for p, table in enumerate(logits)], 1).flatten(1, 2)

    def loss_of(logp, old_logp, advantages, mask, denominator, weight, entropy) -> torch.Tensor:
        return policy_loss(logp, old_logp, advantages, mask, algorithm, None, denominator, weight, entropy)[0]

    losses = torch.vmap(loss_of)(logp, old_logp, advantages, mask, denominators, weight, entropy)
    return (sampled.sum((1, 2)).exp() * losses).sum()


def older(logits: torch.Tensor, seed: int, distance: float) -> torch.Tensor:
    """The table of a policy at a fixed distance from that of `logits`: so much of another table is added to it."""
    return logits.detach() + distance * table_of_logits(100 + seed)


def bias(
    algorithm: Algorithm, seeds: range = range(5), stale: str = "", distance: float = 0.5
) -> list[tuple[float, float]]:
    """For each seed, the angle in degrees from the expected reward's gradient to the expected step, and their ratio.

    Two prompts, groups of two; the ratio of lengths is relative to the unbiased one, (G - 1) / G / max_new_tokens.
    Where `stale` is "old" the ratio starts from an older policy, which sampled; where it is "sampler" an older policy
    sampled and the ratio is 1.
    """
    results = []
    for seed in seeds:
        logits = [table_of_logits(2 * seed + i).requires_grad_() for i in (0, 1)]
        rewards = [PARTS, 0.5 * PARTS.flip(0)]  # the second prompt's rewards have half the spread
        mean_reward = sum(expected_reward(*pair) for pair in zip(logits, [r.sum(1) for r in rewards], strict=True)) / 2
        truth = torch.cat([x.flatten() for x in torch.autograd.grad(mean_reward, logits)])
        tables = {stale: [older(table, 2 * seed + i, distance) for i, table in enumerate(logits)]} if stale else {}
        loss = expected_loss(logits, rewards, 2, algorithm, **tables)
        step = -torch.cat([x.flatten() for x in torch.autograd.grad(loss, logits)])
        cosine = (step @ truth / step.norm() / truth.norm()).clamp(-1, 1)
        results.append((cosine.arccos().rad2deg().item(), (step.norm() / truth.norm() * 2 * LENGTH).item()))
    return results


def angles(algorithm: Algorithm, stale: str = "", distance: float = 0.5) -> str:
    """The least and the largest of the seeds' angles."""
    given = [angle for angle, _ in bias(algorithm, stale=stale, distance=distance)]
    return f"{min(given):.1f} to {max(given):.1f}°" if max(given) > 1e-4 else "0°"


def bias_row(advantage: str, aggregate: str) -> str:
    """A line of the table of biases of tests/README.md, by advantage and aggregate."""
    algorithm = replace(Algorithm(), advantage=advantage, aggregate=aggregate)
    lengths = [length for _, length in bias(algorithm)]
    return f"| `{advantage}` | `{aggregate}` | {angles(algorithm)} | {min(lengths):.2f} to {max(lengths):.2f} |"


def algorithm_row(name: str) -> str:
    """A line of the table by algorithm: without a KL term, and passk for the best of two, as groups are of two."""
    algorithm = replace(ALGORITHMS[name], beta=0.0, k=2)
    return f"| `{name}` | {angles(algorithm)} | {angles(algorithm, 'old', 0.1)} | {angles(algorithm, 'old')} |"


CORRECTIONS = {
    "none": {},
    "truncate, token": {"correction": "truncate"},
    "mask, token": {"correction": "mask"},
    "truncate, sequence": {"correction": "truncate", "correction_level": "sequence"},
    "mask, sequence": {"correction": "mask", "correction_level": "sequence"},
    "no bound, token": {"correction": "truncate", "correction_high": 1e9},
    "no bound, sequence": {"correction": "truncate", "correction_level": "sequence", "correction_high": 1e9},
}


def correction_row(name: str) -> str:
    """A line of the table by correction, of grpo's cells and of rloo's."""
    rows = [replace(ALGORITHMS[row], beta=0.0, **CORRECTIONS[name]) for row in ("grpo", "rloo")]
    return f"| {name} | {angles(rows[0], 'sampler')} | {angles(rows[1], 'sampler')} |"


def tables() -> Iterator[str]:
    """The lines of the three tables, in the order of tests/README.md."""
    yield "| advantage | aggregate | angle to the true gradient | length, relative |\n| --- | --- | --- | --- |"
    for advantage in ("centered", "leave_one_out", "group", "batch_std"):
        for aggregate in ("constant", "sequence_mean", "token_mean"):
            yield bias_row(advantage, aggregate)
    yield "\n| algorithm | at ratio 1 | ratio to a policy 0.1 away | 0.5 away |\n| --- | --- | --- | --- |"
    yield from map(algorithm_row, ALGORITHMS)
    yield "\n| correction | `grpo` | `rloo` |\n| --- | --- | --- |"
    yield from map(correction_row, CORRECTIONS)


if __name__ == "__main__":
    for line in tables():
        print(line)
