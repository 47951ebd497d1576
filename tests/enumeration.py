"""A world so small that every completion can be listed: expectations become sums, and nothing is left to chance.

Vocabulary 3, of which token 0 ends a completion; at most 2 tokens; so 7 completions, of length 1 and 2. The policy is a
table of logits for the first token and for the second after each first, in float64. `python tests/enumeration.py`
prints the table of biases of tests/README.md.
"""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo import Algorithm, group_advantages, policy_loss  # noqa: E402
from policy import log_distribution  # noqa: E402

VOCABULARY, LENGTH, END = 3, 2, 0
COMPLETIONS = [(END,), *itertools.product((1, 2), range(VOCABULARY))]
MASK = torch.tensor([[True, len(completion) == 2] for completion in COMPLETIONS])
TRUNCATED = torch.tensor([completion[-1] != END for completion in COMPLETIONS])
REWARDS = torch.tensor([0.9, 0.1, 1.0, 0.3, 0.4, 0.0, 0.6], dtype=torch.float64)  # of each completion, for one prompt


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


def expected_reward(logits: torch.Tensor, rewards: torch.Tensor = REWARDS, noise: float = 0.0) -> torch.Tensor:
    return (log_probs(logits, noise).sum(1).exp() * rewards).sum()


def gradient_of(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def expected_loss(
    logits: list[torch.Tensor], rewards: list[torch.Tensor], group_size: int, algorithm: Algorithm, noise: float = 0.0
) -> torch.Tensor:
    """The expectation of `policy_loss` at ratio 1 over all rollouts: for each prompt a table of logits and a group.

    The gradient of the sum is the expected gradient, as each rollout's probability enters as a number.
    """
    scores = [log_probs(table, noise) for table in logits]
    total = 0.0
    groups = itertools.product(range(len(COMPLETIONS)), repeat=group_size)
    for picks in itertools.product(list(groups), repeat=len(logits)):
        logp = torch.cat([score[list(pick)] for score, pick in zip(scores, picks, strict=True)])
        rows = [i for pick in picks for i in pick]
        mask = MASK[rows] & ~TRUNCATED[rows, None] if algorithm.mask_truncated else MASK[rows]
        given = torch.stack([reward[list(pick)] for reward, pick in zip(rewards, picks, strict=True)])
        advantages = group_advantages(given, algorithm.advantage, k=algorithm.k).flatten()
        loss, _ = policy_loss(logp, logp.detach(), advantages, mask, algorithm)
        total = total + logp.detach().sum().exp() * loss
    return total


def bias(algorithm: Algorithm, seeds: range = range(5)) -> list[tuple[float, float]]:
    """For each seed, the angle in degrees from the expected reward's gradient to the expected step, and their ratio.

    Two prompts, groups of two; the ratio of lengths is relative to the unbiased one, (G - 1) / G / max_new_tokens.
    """
    results = []
    for seed in seeds:
        logits = [table_of_logits(2 * seed + i).requires_grad_() for i in (0, 1)]
        rewards = [REWARDS, 0.5 * REWARDS.flip(0)]  # the second prompt's rewards have half the spread
        mean_reward = sum(map(expected_reward, logits, rewards)) / 2
        truth = torch.cat([x.flatten() for x in torch.autograd.grad(mean_reward, logits)])
        loss = expected_loss(logits, rewards, 2, algorithm)
        step = -torch.cat([x.flatten() for x in torch.autograd.grad(loss, logits)])
        cosine = (step @ truth / step.norm() / truth.norm()).clamp(-1, 1)
        results.append((cosine.arccos().rad2deg().item(), (step.norm() / truth.norm() * 2 * LENGTH).item()))
    return results


def bias_row(advantage: str, aggregate: str) -> str:
    """A line of the table of biases of tests/README.md."""
    angles, lengths = zip(*bias(replace(Algorithm(), advantage=advantage, aggregate=aggregate)), strict=True)
    spread = f"{min(angles):.1f} to {max(angles):.1f}°" if max(angles) > 1e-4 else "0°"
    return f"| `{advantage}` | `{aggregate}` | {spread} | {min(lengths):.2f} to {max(lengths):.2f} |"


def main() -> None:
    print("| advantage | aggregate | angle to the true gradient | length, relative |\n| --- | --- | --- | --- |")
    for advantage in ("centered", "leave_one_out", "group", "batch_std"):
        for aggregate in ("constant", "sequence_mean", "token_mean"):
            print(bias_row(advantage, aggregate))


if __name__ == "__main__":
    main()
