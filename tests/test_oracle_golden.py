"""Ten updates of every algorithm in float64, on committed ids, against committed figures.

`python tests/test_oracle_golden.py` adds the figures of new rows to tests/golden.json; with --all it computes all of
them again, for a change that is meant to change them. The sampled ids in that file stay.
"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).with_name("golden.json")
sys.path.insert(0, str(FILE.parent.parent))

from steps import update_on  # noqa: E402

from grpo import ALGORITHMS, GRPOConfig  # noqa: E402
from model_toy import Llama, LlamaConfig, character_tokenizer  # noqa: E402
from policy import TokenPolicy  # noqa: E402

pytestmark = pytest.mark.math

ROLLOUTS, P, G, LENGTH = 5, 2, 4, 8


def wave_policy(phase: float) -> TokenPolicy:
    """A policy whose weights are a sine: the same on every machine, whatever its random numbers."""
    tokenizer = character_tokenizer(["(0123456789)+-*=;?"])
    model = Llama(LlamaConfig(len(tokenizer), 16, 24, 2, 4, 2)).double()
    start = phase
    with torch.no_grad():
        for weight in model.parameters():
            wave = torch.sin(12.9898 * torch.arange(start, start + weight.numel(), dtype=torch.float64) ** 1.5)
            weight.copy_((1 + 0.2 * wave if weight.dim() == 1 else 0.4 * wave).view(weight.shape))
            start += weight.numel()
    return TokenPolicy(model, tokenizer, temperature=0.9)


def figures(name: str, rollouts: list[dict]) -> dict[str, list[float]]:
    """Loss, gradient norm and KL of each rollout's two inner updates (their means), and the weights' final norm."""
    policy, reference = wave_policy(0.0), wave_policy(0.25)
    config = GRPOConfig(
        algorithm=name, beta=0.05, num_inner_updates=2, micro_batch_tokens=100, max_new_tokens=LENGTH, kl_estimator="k3"
    )
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    results = {"loss": [], "grad_norm": [], "kl": []}
    for given in rollouts:
        prompts = [ids for ids in given["prompts"] for _ in range(G)]
        rollout = policy.pack(prompts, given["completions"], [""] * len(prompts))
        rollout = dataclasses.replace(
            rollout,
            prompts=rollout.prompts[::G],
            prompt_mask=rollout.prompt_mask[::G],
            group=torch.arange(P).repeat_interleave(G),
            questions=[""] * P,
        )
        rewards = torch.tensor(given["rewards"], dtype=torch.float64)
        metrics = update_on(policy, reference, optimizer, rollout, rewards, config)
        for key, values in results.items():
            values.append(metrics[key])
    weights = torch.cat([weight.detach().flatten() for weight in policy.model.parameters()])
    return results | {"weights": [weights.norm().item(), weights.sum().item()]}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_ten_updates_are_the_committed_ones(name):
    golden = json.loads(FILE.read_text())
    assert name in golden["figures"], "a new row: python tests/test_oracle_golden.py adds its figures"
    result = figures(name, golden["rollouts"])
    for key, values in golden["figures"][name].items():
        assert result[key] == pytest.approx(values, rel=1e-9, abs=1e-9), key


def sample_rollouts() -> list[dict]:
    """The ids to commit, once: sampled from the policy at its start, with rewards that differ within each group."""
    from tasks import Example

    policy, rollouts = wave_policy(0.0), []
    for step in range(ROLLOUTS):
        examples = [Example(f"({step}+3)*{step + 2}="), Example(f"{step}-7=")]
        rollout = policy.sample(examples, G, (0, step, 0), LENGTH)
        prompts = [ids[keep].tolist() for ids, keep in zip(rollout.prompts, rollout.prompt_mask, strict=True)]
        rewards = [[round(((step + 1) * (3 * p + 5 * g + 1) % 7) / 6, 3) for g in range(G)] for p in range(P)]
        rollouts.append({"prompts": prompts, "completions": rollout.completion_ids, "rewards": rewards})
    return rollouts


def main() -> None:
    golden = json.loads(FILE.read_text()) if FILE.exists() else {"rollouts": sample_rollouts(), "figures": {}}
    rollouts, kept = golden["rollouts"], {} if "--all" in sys.argv else golden["figures"]
    lines = [f"    {json.dumps(rollout)}" for rollout in rollouts]
    rows = [f'    "{name}": {json.dumps(kept.get(name) or figures(name, rollouts))}' for name in ALGORITHMS]
    parts = ['{\n  "rollouts": [', ",\n".join(lines), '  ],\n  "figures": {', ",\n".join(rows), "  }\n}\n"]
    FILE.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
