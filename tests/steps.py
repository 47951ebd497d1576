"""Steps (3) to (6) on a rollout that a test or a benchmark has made, as `train_step` takes them."""

import torch

from grpo import GRPOConfig, group_advantages, mixed_advantages, update
from policy import Policy, score_rollout
from rewards import Rewards, Scores
from rollouts import Rollout


def update_on(
    policy: Policy, reference: Policy | None, optimizer, rollout: Rollout, rewards: torch.Tensor, config: GRPOConfig
) -> dict[str, float]:
    """Advantages of rewards (P, G), the reference's log-probabilities, and the inner updates; returns the metrics."""
    row = config.resolved_algorithm
    if row.combine == "each":
        scores = Scores(rewards[..., None].double(), torch.ones(1, dtype=torch.float64))
        advantages = mixed_advantages(scores, row).to(policy.device, rewards.dtype)
    else:
        advantages = group_advantages(rewards.to(policy.device), row.advantage, k=row.k)
    ref_logp = score_rollout(reference, rollout, config.micro_batch_tokens) if reference else None
    metrics = update(policy, reference, optimizer, rollout, advantages, ref_logp, config)
    assert metrics.pop("micro_batch_tokens") == config.micro_batch_tokens
    return metrics


def rewards_of(mix: dict, examples: list, rollout: Rollout, **inputs) -> tuple[torch.Tensor, dict[str, float]]:
    """Total rewards (P, G) and metrics of a mix {name: (function, weight)}."""
    scores, metrics = Rewards(mix, inputs)(examples, rollout, {})
    return scores.total, metrics
