"""GRPO (DeepSeekMath, arXiv 2402.03300), group-relative policy optimization, in plain PyTorch.

    python grpo.py --task arithmetic

One step, numbered as in `train_step`:

1. take P training prompts;
2. sample G completions of each from the policy, with their token ids;
3. reward every completion;
4. advantage: each reward minus its group's mean, over its group's standard deviation;
5. score the completions under the frozen reference policy;
6. update: ascend the clipped ratio times the advantage, minus beta times the KL towards the reference.

Deviations from the paper: (a) rewards come from rules, no reward model is learned; (b) the reference stays the initial
policy, unless --ref-update-every asks for the paper's outer iterations; (c) the std is unbiased and has 1e-4 added; a
group of equal rewards, 0 / 0 in the paper, has advantage exactly 0; (d) the learning rate warms up, then is constant.

The other algorithms (Dr. GRPO, DAPO, GSPO, CISPO, RLOO, ...) are rows of the table in algorithms.py: same steps, other
cells. Settings, and what a run holds and prepares, are in grpo_run.py; `ranks` does nothing with a single process.

Shapes: P prompts, G completions each, B = P * G rows in prompt-major order (row p * G + g), T completion tokens.
Rewards and advantages are (P, G) until the loss; log-probabilities are (B, T), masked where a row has ended.
"""

import math
import statistics
import sys
import time
from collections import Counter

import numpy as np
import torch

import commands
import explain
import ranks
import runs
from algorithms import ALGORITHMS as ALGORITHMS  # for who compares with a row
from algorithms import Algorithm, correction_weight, max_at_k, pairwise_of_all
from checkpoints import save
from commands import NotFinite, UserError, out_of_memory
from grpo_run import GRPOConfig, GRPORun, evaluate_run, own_groups, prepare, rates, report
from inference import measure_rollout, show_number
from plan import dry_run
from policy import Policy, mean_log_probs, score_rollout
from rewards import Scores
from rollouts import Rollout, join, micro_batches
from tasks import Example, take_prompts


def is_flat(rewards: torch.Tensor) -> torch.Tensor:
    """Which groups (P,) have equal rewards: by comparison, since the std of equal numbers need not round to 0."""
    return rewards.amax(1) == rewards.amin(1)


def moments(rewards: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and std (P, 1; over n - 1) of each group of rewards (P, G), and the rows (P, G) bool they are taken over.

    Those are the rows with `known` 1, since a filled-in value is no observation. If these are all equal, or fewer than
    two, they are all rows: else the std would be 0, and the advantage of a filled-in row its distance over 1e-4.
    """
    seen = known == 1
    low, high = rewards.where(seen, math.inf).amin(1), rewards.where(seen, -math.inf).amax(1)
    seen = seen | (low >= high)[:, None]
    count, mean = seen.sum(1, keepdim=True), rewards.where(seen, math.nan).nanmean(1, keepdim=True)
    std = ((rewards - mean).square().where(seen, 0.0).sum(1, keepdim=True) / (count - 1)).sqrt()
    return mean, std, seen


def group_advantages(
    rewards: torch.Tensor, scale: str = "group", known: torch.Tensor | None = None, k: int = 4
) -> torch.Tensor:
    """Advantages (P, G) of rewards R (P, G) by `scale`, the cell `advantage` of the table.

    With the group's mean m and std s: `group` (R - m) / (s + 1e-4) (DeepSeekMath, section 4.1.2, but for the 1e-4);
    `batch_std` (R - m) / (std of all + 1e-4); `centered` R - m (Dr. GRPO, section 3.2); `leave_one_out` R - mean of
    the others (RLOO, eq. 7); `batch_mean` R - mean of all rows (REINFORCE); `max_rl` (R - m) / m (MaxRL, arXiv
    2602.02710); `max_at_k` as in algorithms.py; `pairwise` R - m, of which `pairwise_advantages` reads only the order.
    A group of equal rewards is exactly 0, save under `batch_mean`. `known` (P, G) is the share of a reward's terms that
    is not filled in (`Scores.known`): m and s are those of `moments`; a row with none is 0, or NaN under `pairwise`.
    Raises ValueError for a group of fewer than two, UserError for a reward below 0 under `max_rl`.
    """
    known = torch.ones_like(rewards) if known is None else known
    batch_mean, batch_std, _ = moments(rewards.reshape(1, -1), known.reshape(1, -1))
    if scale == "batch_mean":  # the one baseline that is not the group's
        return torch.where(known == 0, 0.0, rewards - batch_mean)
    if rewards.shape[1] < 2:
        raise ValueError(f"a group of {rewards.shape[1]} has no spread; sample at least 2 completions a prompt")
    mean, std, seen = moments(rewards, known)
    advantages = rewards - mean
    if scale == "group":
        advantages = advantages / (std + 1e-4)
    elif scale == "batch_std":
        advantages = advantages / (batch_std + 1e-4)
    elif scale == "leave_one_out":  # R - mean of the others = (R - mean) * G / (G - 1), of those that are in the mean
        count = seen.sum(1, keepdim=True, dtype=rewards.dtype)
        advantages = advantages * torch.where(seen, count / (count - 1), 1.0)
    elif scale == "max_rl":
        if rewards.min() < 0:
            raise UserError(f"--advantage max_rl divides by a mean; there is a reward of {rewards.min():g}, below 0")
        advantages = advantages / mean
    elif scale == "max_at_k":
        advantages = max_at_k(rewards, k)
    elif scale not in ("centered", "pairwise"):
        raise ValueError(f"no scale {scale!r}")
    advantages = torch.where(is_flat(rewards)[:, None], 0.0, advantages)
    silent = math.nan if scale == "pairwise" else 0.0  # neither a winner nor a loser
    return torch.where(known == 0, silent, advantages)


def kl_penalty(
    logp: torch.Tensor, ref_logp: torch.Tensor, estimator: str = "k3", ratio: torch.Tensor | None = None
) -> torch.Tensor:
    """KL estimate (B, T) in nats, from log-probabilities of tokens sampled from the policy (Schulman 2020).

    With d = log ref - log pi: `k1` -d; `k2` d^2 / 2; `k3` exp(d) - d - 1 >= 0 (DeepSeekMath, eq. 4); `k3_unbiased`
    ratio * k3 with gradient through the ratio (DeepSeek-V3.2, arXiv 2512.02556). In the last two d is clamped at 20
    from above, lest exp overflows; beyond, only a ratio has a gradient. On-policy, by token ratio, k2 and k3_unbiased
    have the mean gradient of KL(pi || ref), k3 that of KL(ref || pi), k1 none (tests/test_oracle_enumeration.py).
    """
    d = ref_logp - logp
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    d = d.clamp(max=20.0)
    return {"k3": 1.0, "k3_unbiased": ratio}[estimator] * (d.exp() - d - 1)


def row_mean(per_token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over each row's tokens, at each of them (B, T); `per_token` is 0 at padding."""
    return (per_token.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(per_token)


def surrogate(log_ratio, advantage, logp, mask, algorithm: Algorithm) -> torch.Tensor:
    """The policy term of the loss per token (B, T); log_ratio, logp and mask are (B, T), advantage (B, 1).

    At ratio 1, as in the first inner update, its gradient, summed over a row, is that of `reinforce`.
    """
    if algorithm.surrogate == "reinforce":
        return -advantage * logp
    ratio = log_ratio.exp()
    if algorithm.surrogate == "sapo":  # fades on both sides (SAPO, arXiv 2511.20347)
        steepness = torch.where(advantage > 0, torch.ones_like(advantage), 1.05)
        return -4 / steepness * torch.sigmoid(steepness * (ratio - 1)) * advantage
    if algorithm.surrogate == "geometric":  # bounds each token's log-ratio before the mean (GMPO, arXiv 2507.20673)
        above, below = log_ratio.clamp(max=algorithm.epsilon_high), log_ratio.clamp(min=-algorithm.epsilon)
        return -row_mean(torch.where(advantage > 0, above, below), mask).exp() * advantage
    if algorithm.surrogate == "dppo":  # bounds the token's probability, so that rare ones may move (arXiv 2602.04879)
        low, high = bounded(log_ratio, advantage, logp, algorithm)
        return -torch.where(low | high, 0.0, ratio) * advantage
    clipped = ratio.clamp(1 - algorithm.epsilon, 1 + algorithm.epsilon_high)
    if algorithm.surrogate == "cispo":  # caps the weight and keeps the gradient (MiniMax-M1, eq. 4)
        return -clipped.detach() * advantage * logp
    capped = ratio.clamp(max=algorithm.cap or math.inf)  # (dual clip, arXiv 1912.09729)
    return -torch.minimum(capped * advantage, clipped * advantage)  # min for A < 0 too (PPO, eq. 7)


def loss_denominator(mask: torch.Tensor, aggregate: str, max_new_tokens: int) -> int:
    """What the loss of these rows, mask (B, T), is divided by: B rows, their tokens, or B * max_new_tokens.

    Taken once over all rows of an optimizer step, so that the gradient does not depend on the micro-batches
    (DeepSeekMath, eq. 3; DAPO, eq. 8; Dr. GRPO, section 3.2).
    """
    rows, tokens = len(mask), int(mask.sum())
    return {"sequence_mean": rows, "token_mean": tokens, "constant": rows * max_new_tokens}[aggregate]


def policy_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, algorithm: Algorithm,
    ref_logp: torch.Tensor | None = None, denominator: float | None = None, weight: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """The loss, a scalar, and `loss_metrics` (DeepSeekMath, eq. 3; the cells say what differs).

    logp, old_logp, ref_logp (B, T) are log-probabilities of the sampled tokens under the policy, the policy that the
    first inner update started from, and the reference; advantages (B,); mask (B, T) bool. What stands at padding
    changes nothing. `denominator` is `loss_denominator` of the whole optimizer step; without one these rows, of width
    T, are taken to be all. `weight` (B, T) multiplies the surrogate, and no other term. An entropy bonus needs the
    policy's exact `entropy` (B, T) at each token.
    """
    # Masked before exp: whatever stands at padding must not become inf * 0 = NaN.
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    logp, advantage = torch.where(mask, logp, 0.0), advantages[:, None]
    token_log_ratio = log_ratio
    if algorithm.ratio == "sequence":
        log_ratio = row_mean(log_ratio, mask)  # (GSPO, eq. 7)
    per_token = surrogate(log_ratio, advantage, logp, mask, algorithm)
    if algorithm.off_policy_limit:  # drops rows with A < 0 that are rarer already (DeepSeek-V3.2, arXiv 2512.02556)
        near = -row_mean(token_log_ratio.detach(), mask) <= algorithm.off_policy_limit
        per_token = torch.where(near | (advantage >= 0), per_token, 0.0)
    if weight is not None:
        per_token = per_token * weight
    if algorithm.anchor:  # a pull towards the old policy (Kimi K2, arXiv 2507.20534)
        per_token = per_token + algorithm.anchor / 2 * token_log_ratio.square()
    if algorithm.entropy_bonus:  # on-policy, E[(logp + H) * gradient of logp] = -gradient of H; the + H is a baseline
        excess = (logp + torch.where(mask, entropy, 0.0)).detach()  # of logp over its mean, which is -H
        per_token = per_token + algorithm.entropy_bonus * excess * logp
    if ref_logp is not None:
        ref_logp = torch.where(mask, ref_logp, 0.0)
        kl = kl_penalty(logp, ref_logp, algorithm.kl_estimator, log_ratio.exp())
        per_token = per_token + algorithm.beta * kl
    per_row = torch.where(mask, per_token, 0.0).sum(1)  # (B,)
    if algorithm.aggregate == "sequence_mean":
        per_row = per_row / mask.sum(1).clamp(min=1)
    if denominator is None:
        denominator = loss_denominator(mask, algorithm.aggregate, mask.shape[1])
    return per_row.sum() / denominator, loss_metrics(logp, ref_logp, log_ratio, advantage, mask, algorithm)


@torch.no_grad()
def bounded(log_ratio, advantage, logp, algorithm: Algorithm) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (B, T) whose gradient the surrogate's lower and its upper bound remove; `dppo` masks by this, too."""
    if algorithm.surrogate == "clip":
        change = log_ratio.exp() - 1
    elif algorithm.surrogate == "geometric":
        change = log_ratio
    elif algorithm.surrogate == "dppo":
        change = logp.exp() * (1 - (-log_ratio).exp())  # pi - pi_old
    else:  # cispo bounds the weight alone, sapo and reinforce nothing
        change = torch.zeros_like(log_ratio)
    low = (advantage < 0) & (change < -algorithm.epsilon)
    over_cap = (advantage < 0) & (log_ratio > math.log(algorithm.cap or math.inf))
    return low, over_cap | ((advantage > 0) & (change > algorithm.epsilon_high))


@torch.no_grad()
def loss_metrics(logp, ref_logp, log_ratio, advantage, mask, algorithm: Algorithm) -> dict[str, torch.Tensor]:
    """Sums over tokens of the KL and of what the bounds took the gradient from; and the largest ratio."""
    low, high = bounded(log_ratio, advantage, logp, algorithm)
    metrics = {"tokens": mask.sum(), "ratio_max": torch.where(mask, log_ratio.exp(), 0.0).max()}
    metrics |= {"clip_low": (mask & low).sum(), "clip_high": (mask & high).sum()}
    if ref_logp is not None:
        metrics |= {"kl": kl_penalty(logp, ref_logp).sum(), "kl_k1": kl_penalty(logp, ref_logp, "k1").sum()}
        metrics["kl_clamped"] = (ref_logp - logp > 20).sum()
    return metrics


def mixed_advantages(scores: Scores, algorithm: Algorithm) -> torch.Tensor:
    """Advantages (P, G) of the total reward or, by `combine` each, of each function apart, then summed by weight.

    The latter (GDPO, arXiv 2601.05242): each function is normalised in its group, as by `group`, before its weight
    applies; then `batch_std` divides the sum by its std over all rows, and `centered` leaves it.
    """
    if algorithm.combine == "sum":
        return group_advantages(scores.total, algorithm.advantage, scores.known, algorithm.k)
    given = (~scores.values.isnan()).double()
    parts = [group_advantages(scores.filled[..., i], "group", given[..., i]) for i in range(len(scores.weights))]
    total = (torch.stack(parts, -1) * scores.weights).sum(-1)
    if algorithm.advantage == "batch_std":
        total = total / (moments(total.view(1, -1), scores.known.view(1, -1))[1] + 1e-4)
    return total


def train_step(run: GRPORun, step: int) -> dict[str, float]:
    """One step of GRPO; the numbers are those at the top of this file. Returns what was measured."""
    config, algorithm, policy = run.config, run.config.resolved_algorithm, run.policy
    clock = [time.perf_counter()]  # the start, then the end of sampling, scoring and updating
    run.optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, step / max(1, config.warmup_steps))
    with out_of_memory("--batch-size, --num-generations or --max-new-tokens"), ranks.whole(policy.model):
        examples = take_prompts(run.data["train"], step, config.batch_size, config.seed)  # (1)
        rollout = run.sample_groups(examples, (config.seed, step, 0))  # (2)
        scores, metrics = ranks.first(run.rewards, examples, rollout, run.position.reward_state)  # (3)
        metrics |= measure_rollout(rollout, scores.total, examples, run.task)
        metrics["zero_std_groups"] = flat_groups(scores, algorithm).float().mean().item()
        if algorithm.max_resample:
            rollout, scores, counts = replace_flat_groups(run, step, examples, rollout, scores)
            metrics |= counts
    clock.append(time.perf_counter())
    with run.unbroken(), out_of_memory("--micro-batch-tokens"):
        advantages = mixed_advantages(scores, algorithm)  # (4)
        own, advantages = own_groups(rollout, advantages.float().to(policy.device))  # this rank's; alone, all
        ref_logp = run.within_memory(score_rollout, run.reference, own) if run.reference else None  # (5)
        clock.append(time.perf_counter())
        # run.config, since (5) has lowered its micro_batch_tokens if memory was short
        metrics |= update(policy, run.reference, run.optimizer, own, advantages, ref_logp, run.config)  # (6)
        clock.append(time.perf_counter())
        if config.ref_update_every and step % config.ref_update_every == 0:
            run.reference.model.load_state_dict(policy.model.state_dict())
        run.lower_micro_batch_tokens(metrics.pop("micro_batch_tokens"))
        return run.record(metrics | rates(rollout, metrics, config, clock))


def flat_groups(scores: Scores, algorithm: Algorithm) -> torch.Tensor:
    """Which groups (P,) have equal rewards before the overlong penalty (DAPO, section 3.2, looks at accuracy alone)."""
    judged = slice(0, -1 if algorithm.overlong_buffer else None)  # the penalty stands last
    scores = Scores(scores.values[..., judged], scores.weights[judged])
    parts = scores.filled * scores.weights if algorithm.combine == "each" else scores.total[..., None]
    return is_flat(parts.float()).all(1)


def replace_flat_groups(run: GRPORun, step: int, examples: list[Example], rollout: Rollout, scores: Scores):
    """A rollout and its scores with other groups in the place of flat ones, and counts of all that was sampled.

    Groups of equal rewards teach nothing: they are replaced by groups of fresh prompts, at most `max_resample` times
    (dynamic sampling: DAPO, section 3.2); what is flat in the last draw stays. The other metrics are the first draw's,
    whose prompts nothing has selected; `samples` and `tokens` count all draws.
    """
    config, algorithm = run.config, run.config.resolved_algorithm
    kept, missing, used, counts = [], config.batch_size, set(map(id, examples)), Counter()
    for draw in range(algorithm.max_resample + 1):
        if draw:
            fresh = take_prompts(run.data["train"], step, config.batch_size, config.seed, draw)
            examples = sorted(fresh, key=lambda example: id(example) in used)[:missing]  # new ones first
            used |= set(map(id, examples))
            rollout = run.sample_groups(examples, (config.seed, step, draw))
            scores, _ = ranks.first(run.rewards, examples, rollout, run.position.reward_state)
        counts.update(samples=len(rollout.texts), tokens=int(rollout.mask.sum()))
        keep = ~flat_groups(scores, algorithm) | (draw == algorithm.max_resample)
        if keep.any():
            rows = keep.repeat_interleave(config.num_generations).nonzero()[:, 0].to(run.policy.device)
            kept.append((rollout.select(rows), scores[keep]))
        missing -= int(keep.sum())
        if not missing:
            break
    rollouts, parts = zip(*kept, strict=True)
    return join(rollouts), Scores(torch.cat([part.values for part in parts]), scores.weights), counts


def loss_mask(rollout: Rollout, algorithm: Algorithm) -> torch.Tensor:
    """The tokens (B, T) that the loss is made of; a row that is left out stays in its group's mean."""
    return (rollout.mask & ~rollout.truncated[:, None]) if algorithm.mask_truncated else rollout.mask


def high_entropy_tokens(policy: Policy, rollout: Rollout, algorithm: Algorithm, budget: int) -> torch.Tensor | None:
    """The tokens (B, T) of the loss with the highest entropy, a share `top_entropy` of all; None if that is all.

    The policy decides where it is uncertain: rewards act there only (arXiv 2506.01939), save through a row's ratio
    (`sequence`, `geometric`), which moves all its tokens. One threshold for the optimizer batch of all ranks.
    """
    if algorithm.top_entropy == 1:
        return None
    with ranks.whole(policy.model):
        entropy = score_rollout(policy, rollout, budget, entropy=True)
    everywhere = torch.cat(ranks.gather(entropy[loss_mask(rollout, algorithm)].cpu())).numpy()
    if not len(everywhere):  # all rows are truncated, and masked
        return torch.zeros_like(rollout.mask)
    return entropy >= np.quantile(everywhere, 1 - algorithm.top_entropy)


def loss_weight(
    rollout: Rollout, old_logp: torch.Tensor, high_entropy: torch.Tensor | None, algorithm: Algorithm
) -> torch.Tensor | None:
    """What multiplies the surrogate of each token (B, T): an importance weight, and 0 where rewards do not act."""
    weight = None if high_entropy is None else high_entropy.to(old_logp.dtype)
    if algorithm.correction != "none":
        rho = correction_weight(old_logp - rollout.sampler_logp, rollout.mask, algorithm)
        weight = rho if weight is None else weight * rho
    return weight


def update(
    policy: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer, rollout: Rollout,
    advantages: torch.Tensor, ref_logp: torch.Tensor | None, config: GRPOConfig,
) -> dict[str, float]:  # fmt: skip
    """Take the inner updates on a rollout, given advantages (P, G) and ref_logp (B, T); returns the metrics.

    Each inner update is one optimizer step over all rows, in as many micro-batches as memory asks for; `descend` takes
    it and clears the gradient. With several ranks the rows are this one's, denominators and gradients those of all.
    """
    algorithm, order, budget = config.resolved_algorithm, advantages, config.micro_batch_tokens
    share = loss_denominator(loss_mask(rollout, algorithm), algorithm.aggregate, config.max_new_tokens)
    denominator = max(1, sum(ranks.gather(share)))  # rows, tokens or rows * max_new_tokens, of all ranks
    high_entropy, budget = runs.within_memory(high_entropy_tokens, (policy, rollout, algorithm), budget, optimizer)
    old_logp, losses, norms, all_sums, all_peaks = None, [], [], Counter(), {}
    for _ in range(config.num_inner_updates):
        if algorithm.advantage == "pairwise":  # of the rewards' order, and of the policy as it is now
            with ranks.whole(policy.model):
                mean_logp, budget = runs.within_memory(mean_log_probs, (policy, rollout), budget, optimizer)
            advantages = pairwise_of_all(order, mean_logp, algorithm.preference_strength)
        given = (policy, reference, rollout, advantages, ref_logp, old_logp, high_entropy, algorithm, denominator)
        (old_logp, sums, peaks, bad), budget = runs.within_memory(backward, given, budget, optimizer)
        ranks.add_gradients(list(policy.model.parameters()))
        sums, peaks = ranks.total(sums), ranks.largest(peaks)
        losses.append(sums.pop("loss"))
        if not math.isfinite(losses[-1]):
            raise NotFinite(f"the loss is {losses[-1]}", sum(ranks.gather(bad), []))
        norms.append(runs.descend(optimizer, config.clip_grad_norm, rollout))
        all_sums.update(sums)
        all_peaks = {name: max(value, all_peaks.get(name, 0.0)) for name, value in peaks.items()}
    tokens = max(1, all_sums.pop("tokens"))  # none where all rows are truncated, and masked
    means = {name: value / tokens for name, value in all_sums.items()}
    means |= {"loss": statistics.fmean(losses), "grad_norm": statistics.fmean(norms), "micro_batch_tokens": budget}
    return means | all_peaks | {"learning_rate": optimizer.param_groups[0]["lr"]}


def backward(
    policy: Policy, reference: Policy | None, rollout: Rollout, advantages: torch.Tensor, ref_logp: torch.Tensor | None,
    old_logp: torch.Tensor | None, high_entropy: torch.Tensor | None, algorithm: Algorithm, denominator: float,
    token_budget: int,
) -> tuple[torch.Tensor, dict[str, float], dict[str, float], list[dict]]:  # fmt: skip
    """Add up the gradient of the loss over a rollout, in micro-batches of at most `token_budget` tokens.

    Returns old_logp (B, T), sums, largest values, and the rows whose loss is not finite. In the first inner update
    `old_logp` is None, and becomes the policy's own, so that the ratio is exactly 1. Rewards act on the `high_entropy`
    tokens (B, T), or on all.
    """
    first, sums, peaks, bad = old_logp is None, Counter(), {"ratio_max": 0.0, "sampler_gap": 0.0}, []
    batches = micro_batches(rollout, token_budget, policy.layout)
    ranks.keep_step(policy.model, len(batches), lambda: policy.log_probs(rollout.select(batches[-1]))[0])
    for rows in batches:
        part = rollout.select(rows)
        width = part.mask.shape[1]
        logp, entropy = policy.log_probs(part)
        if first:  # the ratio starts from the policy as it is, at exactly 1
            old_logp = logp.new_zeros(rollout.mask.shape) if old_logp is None else old_logp
            old_logp[rows, :width] = logp.detach()
        old, ref, high = (None if x is None else x[rows, :width] for x in (old_logp, ref_logp, high_entropy))
        advantage = advantages.flatten()[rows]  # row p * G + g
        mask = loss_mask(part, algorithm)
        weight = loss_weight(part, old, high, algorithm)
        loss, stats = policy_loss(logp, old, advantage, mask, algorithm, ref, denominator, weight, entropy)
        loss.backward()
        stats |= {"loss": loss, "entropy": entropy[mask].sum(), "sampler_gap": (part.sampler_logp - old).abs().max()}
        stats["sampler_kl"] = (part.sampler_logp - old)[mask].sum()
        if weight is not None:
            stats["weight"] = weight[mask].sum()
        if reference and (exact_kl := policy.exact_kl(reference, part)) is not None:  # of a Gaussian policy
            stats["kl"] = exact_kl.sum()
        for name in peaks:
            peaks[name] = max(peaks[name], stats.pop(name).item())
        for name, value in stats.items():
            sums[name] += value.item()
        if not loss.isfinite():
            strange = ~torch.where(part.mask, logp, 0.0).isfinite().all(1)
            bad += part.records(strange if strange.any() else None)
    return old_logp, sums, peaks, bad


def train(config: GRPOConfig) -> GRPORun:
    """Train a policy with GRPO and return the run: its last policy in `run.policy`, the best one in `config.out`."""
    run = prepare(config)
    with run:
        if run.position.best_step is None:  # nothing measured yet
            run.log(0, validate(run, 0))
        for step in run.steps():
            metrics = run.attempt(train_step, step)  # (1) to (6)
            if run.is_due(step, run.config.eval_every):
                metrics |= validate(run, step)  # keeps the best checkpoint
            run.log(step, metrics)  # metrics.jsonl, progress bar, warnings, states to resume from
    return run


def validate(run: GRPORun, step: int) -> dict[str, float]:
    """Evaluate on the validation problems, keep the best checkpoint, and show the group of one question.

    The best is the one that scores best when sampled, as it is trained: greedy accuracy is high long before the policy
    has made up its mind.
    """
    config, name = run.config, run.scored_task.score
    result = evaluate_run(run, run.policy, "validation", samples=2, seed=config.seed)
    score = result.get(f"sampled_{name}", -math.inf)
    if run.note_score(step, score):
        run.keep_best(lambda: save(run.policy, run.out))
    greedy, sampled = show_number(name, result.get(name, -math.inf)), show_number(name, score)
    run.say(f"step {step}: validation {name} {greedy} greedy, {sampled} sampled")
    with ranks.whole(run.policy.model):
        run.show_group(step)
    return {f"validation_{name}": value for name, value in result.items()}


EXAMPLES = """the commonest:
  python grpo.py --task arithmetic
  python grpo.py --task arithmetic --model saved_model/base --algorithm dapo --out dapo
  python grpo.py --resume --steps 80"""


def main() -> None:
    config = runs.parse_settings(GRPOConfig, "Train a policy with GRPO.", EXAMPLES)
    if config.dry_run:
        return print(dry_run(config))
    if config.trace:
        return print(f"\n{explain.page(prepare(config), sys.modules[__name__])}")
    start = time.perf_counter()
    report(train(config))
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    commands.run_main(main, resumable=True)
