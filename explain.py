"""One step of GRPO for one question, shown instead of taken: `python grpo.py ... --trace`.

The numbers (1) to (6) are those of grpo.py, whose functions do the mathematics here, too.
"""

from types import ModuleType

import torch

from algorithms import pairwise_advantages
from commands import printable
from policy import TokenPolicy, score_rollout
from tasks import take_prompts


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as text, the last column as it is, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = [[*map(str.rjust, row[:-1], widths), row[-1]] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def page(run, mathematics: ModuleType) -> str:
    """The step of a run of grpo.py for the first question of its first step, without an update; `mathematics` is grpo.

    A token is asked for more (up) where the loss falls as its log-probability rises: minus the derivative of the loss
    by it is above 0. The numbers in that column are this derivative, times the tokens of its completion.
    """
    config, algorithm, policy = run.config, run.config.resolved_algorithm, run.policy
    (example,) = take_prompts(run.data["train"], 1, 1, config.seed)
    rollout = run.sampler.sample([example], config.num_generations, (config.seed, 1, 0), config.max_new_tokens)
    scores, _ = run.rewards([example], rollout, {})
    rewards = scores.total
    advantages = mathematics.mixed_advantages(scores, algorithm).float().to(policy.device)
    advantages, loss, logp, ref_logp, pull = not_descended(run, rollout, advantages, mathematics)
    lengths = rollout.mask.sum(1)
    names = [f"{name} x {weight:g}" for name, (_, weight) in run.rewards.mix.items()]
    table = [["", *names, "total", "advantage", "tokens", "completion"]]
    for i, text in enumerate(rollout.texts):
        parts = ["none" if value.isnan() else f"{value:.3g}" for value in scores.values[0, i]]
        numbers = [f"{rewards[0, i]:.3f}", f"{advantages[0, i]:+.3f}", str(int(lengths[i]))]
        table.append([str(i + 1), *parts, *numbers, printable(text).replace("\n", "\\n")])
    flat = "" if advantages.any() else "\nall rewards are equal: this group teaches nothing"
    sections = [
        f"(1) the question\n{printable(example.question)}",
        f"(2) {config.num_generations} completions, (3) their rewards, (4) advantages ({algorithm.advantage})\n"
        f"{aligned(table)}{flat}",
        f"(5) the reference and (6) the loss ({config.algorithm}: {loss.item():.6f}), not descended, token by token",
    ]
    ends = {"the worst": int(rewards.argmin()), "the best": int(rewards.argmax())}
    shown = {"one": 0, "another": len(rollout.texts) - 1} if flat else ends
    for title, i in shown.items():
        tokens = token_rows(policy, rollout, i, logp, ref_logp, pull, mathematics)
        sections.append(f"{title}, completion {i + 1}, advantage {advantages[0, i]:+.3f}\n{aligned(tokens)}")
    return "\n\n".join(sections)


def not_descended(run, rollout, advantages: torch.Tensor, mathematics: ModuleType) -> tuple:
    """The first inner update, not taken: advantages, loss, log-probabilities (B, T), the reference's, and its pull."""
    algorithm, policy, budget = run.config.resolved_algorithm, run.policy, run.config.micro_batch_tokens
    ref_logp = score_rollout(run.reference, rollout, budget) if run.reference else None
    old_logp, entropy = score_rollout(policy, rollout, budget), score_rollout(policy, rollout, budget, entropy=True)
    if algorithm.advantage == "pairwise":
        mean_logp = (old_logp.sum(1) / rollout.mask.sum(1)).view_as(advantages)
        advantages = pairwise_advantages(advantages, mean_logp, algorithm.preference_strength)
    logp, mask = old_logp.clone().requires_grad_(), mathematics.loss_mask(rollout, algorithm)
    whole = max(1, mathematics.loss_denominator(mask, algorithm.aggregate, run.config.max_new_tokens))
    high_entropy = mathematics.high_entropy_tokens(policy, rollout, algorithm, budget)
    weight = mathematics.loss_weight(rollout, old_logp, high_entropy, algorithm)
    given = (logp, old_logp, advantages.flatten(), mask, algorithm, ref_logp, whole, weight, entropy)
    loss, _ = mathematics.policy_loss(*given)
    return advantages, loss, old_logp, ref_logp, torch.autograd.grad(-loss, logp)[0]


def token_rows(policy, rollout, i: int, logp, ref_logp, pull, mathematics: ModuleType) -> list[list[str]]:
    """A line for each token of completion i: what policy and reference think of it, and what the loss asks."""
    rows = [["log policy", "log reference", "ratio", "KL", "asks", "", "token"]]
    tokens = rollout.texts[i : i + 1]
    if isinstance(policy, TokenPolicy):
        tokens = [policy.tokenizer.decode([token]) for token in rollout.completion_ids[i]]
    kl = None if ref_logp is None else mathematics.kl_penalty(logp[i], ref_logp[i])
    for t, token in enumerate(tokens):
        row = [f"{logp[i, t]:.4f}", "–", "1.000", "–"]  # before an update the ratio is 1
        if ref_logp is not None:
            row[1], row[3] = f"{ref_logp[i, t]:.4f}", f"{kl[t]:.5f}"
        asked = round(pull[i, t].item() * len(tokens), 4) + 0.0  # no minus zero
        row += [f"{asked:+.4f}", "up" if asked > 0 else "down" if asked < 0 else "nothing"]
        rows.append([*row, printable(token).replace("\n", "\\n")])
    return rows
