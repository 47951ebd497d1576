"""GRPO (DeepSeekMath, arXiv 2402.03300), group-relative policy optimization, in plain PyTorch.

    python grpo.py --task arithmetic

One step, numbered as in `train_step`, `sample_groups` and `update`:

1. take P training prompts;
2. sample G completions of each from the policy, with their token ids;
3. reward every completion;
4. advantage: each reward minus its group's mean, over its group's standard deviation;
5. score the completions under the frozen reference policy;
6. update: ascend the clipped ratio times the advantage, minus beta times the KL towards the reference.

Deviations from the paper: (a) rewards come from rules, no reward model is learned; (b) the reference is the policy at
the start and stays, unless --ref-update-every asks for the paper's outer iterations; (c) a group of equal rewards has
advantage exactly 0, not 0 divided by an epsilon; (d) the learning rate is constant after a warm-up.

The other algorithms (Dr. GRPO, DAPO, GSPO, CISPO, RLOO, pairwise) are rows of `ALGORITHMS`: same steps, other cells.

Shapes: P prompts, G completions each, B = P * G rows in prompt-major order (row p * G + g), T completion tokens.
Rewards and advantages are (P, G) until the update; tokens are (B, T).
"""

import copy
import dataclasses
import inspect
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from tqdm import tqdm

import plot_metrics
import sft
from inference import (
    GaussianPolicy,
    Interrupt,
    Policy,
    Rollout,
    TokenPolicy,
    append_json,
    check_dtype,
    check_kind,
    check_policy,
    choose_device,
    evaluate,
    join,
    known_means,
    load,
    load_state,
    micro_batches,
    option,
    out_of_memory,
    parse_settings,
    plan,
    printable,
    read_json,
    require_numbers,
    results_table,
    run_main,
    save,
    save_state,
    show_number,
    start_run,
    write_json,
)
from rewards import (
    LEVELS,
    Judge,
    RewardFunction,
    UserError,
    accepted,
    apply_reward,
    parse_rewards,
    soft_overlong,
    text_of,
)
from tasks import Example, Task, find_task, load_task


@dataclass(frozen=True)
class Algorithm:
    """One row of the table of algorithms; every cell is a flag too. Raises UserError for an unknown value."""

    advantage: Literal["group", "batch", "none", "leave_one_out", "pairwise"] = "group"
    ratio: Literal["token", "sequence"] = "token"
    surrogate: Literal["clip", "cispo", "plain"] = "clip"
    epsilon: float = 0.2  # the ratio is clipped below 1 - epsilon
    epsilon_high: float = 0.2  # and above 1 + epsilon_high
    aggregate: Literal["sequence", "token", "constant"] = "sequence"
    beta: float = 0.04  # weight of the KL term
    kl_estimator: Literal["k2", "k3", "k3_unbiased"] = "k3"
    max_resample: int = 0  # dynamic sampling: how often a step replaces its flat groups
    overlong_buffer: float = 0.0  # soft overlong penalty: the last share of max_new_tokens, in which it grows to -1
    preference_strength: float = 2.0  # s in pairwise's -log sigmoid(s * difference)

    def __post_init__(self):
        if self.kl_estimator == "k1":
            why = "the gradient of k1 is exactly 0 in expectation, so as a loss it is noise (it is logged as kl_k1)"
            raise UserError(f"--kl-estimator: {why}; take k2, k3 or k3_unbiased")
        for field in dataclasses.fields(self):
            value, offered = getattr(self, field.name), get_args(field.type)
            if offered and value not in offered:
                flag = field.name.replace("_", "-")
                raise UserError(f"--{flag}: {value!r} is not offered; there is {', '.join(offered)}")
        if self.overlong_buffer > 1:
            raise UserError(f"--overlong-buffer is {self.overlong_buffer}, a share of --max-new-tokens: at most 1")
        if self.advantage == "pairwise" and (self.surrogate, self.aggregate) != ("plain", "sequence"):
            raise UserError(
                "--advantage pairwise weighs mean log-probabilities; add --surrogate plain --aggregate sequence"
            )


ALGORITHMS = {
    "grpo": Algorithm(),
    "dr_grpo": Algorithm(advantage="none", aggregate="constant", beta=0.0),
    "dapo": Algorithm(epsilon_high=0.28, aggregate="token", beta=0.0, max_resample=3, overlong_buffer=0.2),
    "gspo": Algorithm(ratio="sequence", epsilon=3e-4, epsilon_high=4e-4, beta=0.0),
    "cispo": Algorithm(surrogate="cispo", epsilon=1.0, epsilon_high=4.0, aggregate="token", beta=0.0),
    "rloo": Algorithm(advantage="leave_one_out", aggregate="constant", beta=0.0),
    "pairwise": Algorithm(advantage="pairwise", surrogate="plain", beta=0.0),
}


def cell(text: str):
    """A setting that overrides a cell of the algorithm's row."""
    return option(None, f"{text}. Default: the algorithm's.")


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of `grpo.py`."""

    task: str = option("arithmetic", "Task to train on.")
    model: str | None = option(
        None, "Checkpoint folder, or model of the hub. Default: a toy, fine-tuned into OUT/base."
    )
    data: str | None = option(None, "File or folder with the task's records. Default: the hub's.")
    limit: int | None = option(None, "Take at most so many records for each split.")
    out: str = option("saved_model", "Run folder: best checkpoint, metrics, samples, figures, states to resume from.")
    seed: int = option(0, "Seed of prompts and sampling (and of the toy's fine-tuning); never of the split.")
    device: str = option("auto", "Device: auto, cuda, mps or cpu.")
    dtype: str = option("float32", "Matrix products in float32 or bfloat16; the weights that learn stay in float32.")
    gradient_checkpointing: bool = option(False, "Less memory: compute activations again in the backward pass.")
    steps: int = option(40, "Steps; one step is one rollout.")
    batch_size: int = option(32, "Prompts in one step (P).")
    num_generations: int = option(16, "Completions of each prompt (G).")
    num_inner_updates: int = option(1, "Optimizer steps on each rollout.")
    micro_batch_tokens: int = option(16384, "Most tokens in one forward and backward pass, padding included.")
    learning_rate: float = option(1e-4, "Learning rate of AdamW after the warm-up.")
    warmup_steps: int = option(5, "Steps in which the learning rate rises from 0.")
    clip_grad_norm: float = option(1.0, "Largest gradient norm; a longer gradient is scaled down to it.")
    algorithm: str = option("grpo", f"Row of the table of algorithms: {', '.join(ALGORITHMS)}.")
    advantage: str | None = cell("Scale of the advantages: group, batch, none, leave_one_out, or pairwise")
    ratio: str | None = cell("The ratio of each token, or of the whole sequence")
    surrogate: str | None = cell("What the ratio does: clip, cispo, or plain (nothing)")
    epsilon: float | None = cell("The ratio is clipped below 1 - epsilon")
    epsilon_high: float | None = cell("The ratio is clipped above 1 + this")
    aggregate: str | None = cell("Tokens are averaged per sequence, per token of the batch, or over a constant length")
    beta: float | None = cell("Weight of the KL term; 0 loads no reference")
    kl_estimator: str | None = cell("Estimator of the KL term: k2, k3 or k3_unbiased")
    max_resample: int | None = cell("Replace groups of equal rewards by fresh prompts, at most so often in a step")
    overlong_buffer: float | None = cell("Share of --max-new-tokens in which a penalty grows to -1; 0 is off")
    preference_strength: float | None = cell("Strength s of a pairwise preference")
    ref_update_every: int | None = option(None, "Take the policy as new reference every so many steps. Default: never.")
    temperature: float = option(1.0, "Sampling temperature, of the policy and of the reference alike.")
    policy: str = option("transformer", "What is made without --model: transformer or autoencoder (odd_even only).")
    exploration_noise: float | None = option(
        None,
        "Share of a uniform distribution over the vocabulary mixed into the policy; for an autoencoder, its standard "
        "deviation. Default: 0, and 0.5.",
    )
    even_bonus: float | None = option(None, "What even_bonus gives, and even_adaptive at first. Default: 0.2.")
    max_new_tokens: int | None = option(None, "Longest completion, in tokens. Default: the task's.")
    rewards: str | None = option(None, "NAME=WEIGHT,... or FILE.py:FUNCTION=WEIGHT. Default: the task's mix.")
    ideal_length: int | None = option(
        None, "What char_length and token_length aim at. Default: 200 characters, 50 tokens."
    )
    scorer: str | None = option(
        None, "Checkpoint or model of the hub for the perplexity reward. Default: the policy as it was at the start."
    )
    judge_url: str | None = option(
        None,
        "OpenAI-compatible endpoint of the judge reward, as in http://localhost:8000/v1; its key is JUDGE_API_KEY.",
    )
    judge_model: str = option("default", "Name of the judge's model, as the endpoint knows it.")
    judge_scale: int = option(1, "The judge's best score: 1 (right or wrong) or 2 (in part, too).")
    eval_every: int = option(5, "Evaluate on the validation problems every so many steps.")
    patience: int | None = option(None, "Stop after so many evaluations without a better validation score (sampled).")
    kl_limit: float | None = option(None, "Stop when the KL towards the reference, in nats per token, exceeds this.")
    save_every: int = option(10, "Save the state to resume from every so many steps.")
    resume: bool = option(False, "Continue the run in --out from its newest saved state.")
    overwrite: bool = option(False, "Replace the run that --out holds.")
    dry_run: bool = option(False, "Say what a step will need in memory and work, and stop.")

    def __post_init__(self):
        if self.num_generations < 2:
            raise UserError(f"--num-generations is {self.num_generations}; a group needs at least 2 to be compared")
        if not self.temperature >= 1e-3:
            raise UserError(f"--temperature is {self.temperature}; it must be 0.001 or above")
        require_numbers(
            self, "steps", "batch_size", "num_inner_updates", "micro_batch_tokens", "learning_rate", "clip_grad_norm",
            "max_new_tokens", "eval_every", "limit", "patience", "kl_limit", "save_every", "ref_update_every",
            "ideal_length", "even_bonus",
        )  # fmt: skip
        check_dtype(self.dtype)
        if self.algorithm not in ALGORITHMS:
            raise UserError(f"--algorithm: no algorithm {self.algorithm!r}; there is {', '.join(ALGORITHMS)}")
        check_policy(self.policy)
        if self.policy == "autoencoder" and self.exploration_noise == 0:
            raise UserError("--exploration-noise is the autoencoder's standard deviation; it must be above 0")
        if self.policy == "transformer" and (self.exploration_noise or 0.0) >= 1:
            raise UserError(f"--exploration-noise is {self.exploration_noise}, a share; it must be below 1")
        if self.judge_url is not None and not self.judge_url.startswith(("http://", "https://")):
            raise UserError(f"--judge-url is {self.judge_url!r}; it begins with http:// or https://")
        if self.judge_scale not in LEVELS:
            raise UserError(f"--judge-scale is {self.judge_scale}; it is one of {', '.join(map(str, LEVELS))}")
        row = self.resolved_algorithm
        needs = dict.fromkeys(("kl_limit", "ref_update_every", "kl_estimator"), (row.beta > 0, "a --beta above 0"))
        needs |= dict.fromkeys(("epsilon", "epsilon_high"), (row.surrogate != "plain", "--surrogate clip or cispo"))
        needs["preference_strength"] = (row.advantage == "pairwise", "--advantage pairwise")
        for name, (there, what) in needs.items():
            if getattr(self, name) is not None and not there:
                raise UserError(f"--{name.replace('_', '-')} does nothing without {what}; leave it out, or give both")

    @property
    def resolved_algorithm(self) -> Algorithm:
        """The algorithm's row with the cells that flags override."""
        cells = {field.name: getattr(self, field.name) for field in dataclasses.fields(Algorithm)}
        given = {name: value for name, value in cells.items() if value is not None}
        return dataclasses.replace(ALGORITHMS[self.algorithm], **given)


def group_advantages(rewards: torch.Tensor, scale: str = "group") -> torch.Tensor:
    """Advantages (P, G) of rewards (P, G): each reward minus its group's mean, over what `scale` names.

    `group`: the group's unbiased std + 1e-4 (DeepSeekMath, section 4.1.2); `batch`: that of all rows; `none`: 1
    (Dr. GRPO, section 3.2); `leave_one_out`: (G - 1) / G, so that the baseline is the mean of the others (RLOO, eq. 7).
    A group of equal rewards is exactly 0. Raises ValueError for fewer than two completions in a group.
    """
    size = rewards.shape[1]
    if size < 2:
        raise ValueError(f"a group of {size} has no spread; sample at least 2 completions a prompt")
    if scale == "group":
        divisor = rewards.std(1, keepdim=True) + 1e-4
    elif scale == "batch":
        divisor = rewards.std() + 1e-4
    else:
        divisor = {"none": 1.0, "leave_one_out": (size - 1) / size}[scale]
    return torch.where(is_flat(rewards)[:, None], 0.0, (rewards - rewards.mean(1, keepdim=True)) / divisor)


def is_flat(rewards: torch.Tensor) -> torch.Tensor:
    """Which groups (P,) have equal rewards: by comparison, since the std of equal numbers need not round to 0."""
    return rewards.amax(1) == rewards.amin(1)


def pairwise_advantages(rewards: torch.Tensor, mean_logp: torch.Tensor, strength: float) -> torch.Tensor:
    """Advantages (P, G) that make the `plain` loss follow a preference of winners over losers, without gradient.

    Winners W have the largest reward (P, G) of their group, L are the others. The objective is the mean over the groups
    with both of the mean over pairs of -log sigmoid(strength * (mean_logp[w] - mean_logp[l])), mean_logp (P, G) being
    mean log-probabilities per token (Bradley-Terry; DPO, arXiv 2305.18290, without reference). Its derivative by
    mean_logp, times minus the number of rows since the loss takes their mean, is the advantage.
    """
    wins = rewards == rewards.amax(1, keepdim=True)
    pairs = (wins[:, :, None] & ~wins[:, None, :]).to(mean_logp.dtype)  # (P, G, G): winner, loser
    share = pairs / pairs.sum((1, 2), keepdim=True).clamp(min=1) / (~is_flat(rewards)).sum().clamp(min=1)
    difference = mean_logp.detach()[:, :, None] - mean_logp.detach()[:, None, :]
    pull = strength * torch.sigmoid(-strength * difference) * share
    return rewards.numel() * (pull.sum(2) - pull.sum(1))


def kl_penalty(
    logp: torch.Tensor, ref_logp: torch.Tensor, estimator: str = "k3", ratio: torch.Tensor | None = None
) -> torch.Tensor:
    """KL estimate (B, T) in nats, from log-probabilities of tokens sampled from the policy (Schulman 2020).

    With d = log ref - log pi: `k1` -d; `k2` d^2 / 2; `k3` exp(d) - d - 1 >= 0 (DeepSeekMath, eq. 4); `k3_unbiased`
    ratio * k3 with gradient through the ratio (DeepSeek-V3.2, arXiv 2512.02556). In the last two d is clamped at 20
    from above, where exp would overflow. As a loss k2 and k3_unbiased pull towards KL(pi || ref), k3 towards
    KL(ref || pi), k1 nowhere.
    """
    d = ref_logp - logp
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    d = d.clamp(max=20.0)
    return {"k3": 1.0, "k3_unbiased": ratio}[estimator] * (d.exp() - d - 1)


def loss_denominator(mask: torch.Tensor, aggregate: str, max_new_tokens: int) -> int:
    """What the loss of these rows, mask (B, T), is divided by: B rows, their tokens, or B * max_new_tokens.

    Taken once over all rows of an optimizer step, so that the gradient does not depend on the micro-batches
    (DeepSeekMath, eq. 3; DAPO, eq. 8; Dr. GRPO, section 3.2).
    """
    return {"sequence": len(mask), "token": int(mask.sum()), "constant": len(mask) * max_new_tokens}[aggregate]


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    algorithm: Algorithm,
    ref_logp: torch.Tensor | None = None,
    denominator: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, a scalar, and sums over tokens for the metrics (DeepSeekMath, eq. 3; the cells say what differs).

    logp, old_logp, ref_logp (B, T) are log-probabilities of the sampled tokens under the policy, the policy that the
    first inner update started from, and the reference; advantages (B,); mask (B, T) bool. What stands at padding
    changes nothing. `denominator` is `loss_denominator` of the whole optimizer step; default: these rows, width T.
    """
    # Masked before exp: whatever stands at padding must not become inf * 0 = NaN.
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    logp, lengths = torch.where(mask, logp, 0.0), mask.sum(1, keepdim=True).clamp(min=1)
    if algorithm.ratio == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(log_ratio)  # the mean (GSPO, eq. 7)
    ratio, advantage = log_ratio.exp(), advantages[:, None]
    low, high = 1 - algorithm.epsilon, 1 + algorithm.epsilon_high
    clipped = ratio.clamp(low, high)
    if algorithm.surrogate == "clip":
        per_token = -torch.minimum(ratio * advantage, clipped * advantage)  # min for A < 0 too (PPO, eq. 7)
    else:
        weight = clipped.detach() if algorithm.surrogate == "cispo" else 1.0  # MiniMax-M1, eq. 4
        per_token = -weight * advantage * logp
    killed = mask & (algorithm.surrogate == "clip")  # cispo caps the weight and keeps the gradient
    stats = {
        "tokens": mask.sum(),
        "clip_low": (killed & (advantage < 0) & (ratio < low)).sum(),
        "clip_high": (killed & (advantage > 0) & (ratio > high)).sum(),
        "ratio_max": torch.where(mask, ratio.detach(), 0.0).max(),
    }
    if ref_logp is not None:
        ref_logp = torch.where(mask, ref_logp, 0.0)
        per_token = per_token + algorithm.beta * kl_penalty(logp, ref_logp, algorithm.kl_estimator, ratio)
        stats |= {"kl": kl_penalty(logp.detach(), ref_logp).sum(), "kl_k1": (logp.detach() - ref_logp).sum()}
        stats["kl_clamped"] = (ref_logp - logp > 20).sum()
    per_row = torch.where(mask, per_token, 0.0).sum(1)
    per_row = per_row / lengths[:, 0] if algorithm.aggregate == "sequence" else per_row
    if denominator is None:
        denominator = loss_denominator(mask, algorithm.aggregate, mask.shape[1])
    return per_row.sum() / denominator, stats


def take_prompts(examples: list[Example], step: int, count: int, seed: int, draw: int = 0) -> list[Example]:
    """The prompts of a step (from 1): passes over all examples, each in its own order, by seed, pass and draw."""
    chosen, orders = [], {}
    for i in range((step - 1) * count, step * count):
        epoch = i // len(examples)
        if epoch not in orders:
            stream = np.random.Philox(np.random.SeedSequence([seed, epoch, draw]))
            orders[epoch] = np.random.Generator(stream).permutation(len(examples))
        chosen.append(examples[orders[epoch][i % len(examples)]])
    return chosen


def compute_rewards(
    mix: dict[str, tuple[RewardFunction, float]],
    examples: list[Example],
    rollout: Rollout,
    group_size: int,
    inputs: dict | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Weighted total rewards (P, G) float32 on the CPU, and each function's mean and std; raises UserError.

    `inputs` goes to every function by keyword, besides the examples' columns. None is replaced by the function's mean
    over the group's other rows, and drops out where the group has no value.
    """
    rows = [example for example in examples for _ in range(group_size)]
    # In float64 until the end: rounding must not tell rewards apart that are equal, or a flat group comes alive.
    total, means = torch.zeros(len(examples), group_size, dtype=torch.float64), {}
    for name, (function, weight) in mix.items():
        values = [float("nan") if v is None else v for v in apply_reward(name, function, rows, rollout, **inputs or {})]
        values = torch.tensor(values, dtype=torch.float64).view(-1, group_size)
        if values.isnan().any() or "endpoint" in inspect.signature(function).parameters:
            means[f"missing/{name}"] = values.isnan().double().mean().item()
        values = torch.where(values.isnan(), values.nanmean(1, keepdim=True), values)
        total += weight * values.nan_to_num(0.0)
        known = values[~values.isnan()]
        if len(known) > 1:
            means |= {f"reward/{name}": known.mean().item(), f"reward_std/{name}": known.std().item()}
    return total.float(), means


def descend(policy: Policy, optimizer: torch.optim.Optimizer, loss: float, largest: float) -> float:
    """Take an optimizer step along the clipped gradient and return its norm before clipping.

    Raises FloatingPointError, before the optimizer moves, if the loss or the gradient is not finite.
    """
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), largest).item()
    if not np.isfinite(loss + norm):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return norm


def mean_log_probs(policy: Policy, batches: list[torch.Tensor], parts: list[Rollout]) -> torch.Tensor:
    """Mean log-probability per token (B,) of each completion under the policy as it is now, without gradient."""
    with torch.no_grad():
        means = torch.cat([policy.log_probs(part)[0].sum(1) / part.mask.sum(1) for part in parts])
    return means[torch.cat(batches).argsort()]


def update(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    rewards: torch.Tensor,
    config: GRPOConfig,
) -> dict[str, float]:
    """Turn rewards (P, G) into advantages and take the inner updates on a rollout; returns the metrics."""
    start, algorithm = time.perf_counter(), config.resolved_algorithm
    rewards, pairwise = rewards.to(policy.device), algorithm.advantage == "pairwise"
    advantages = None if pairwise else group_advantages(rewards, algorithm.advantage).flatten()  # (4)
    batches = micro_batches(rollout, config.micro_batch_tokens)
    parts = [rollout.select(rows) for rows in batches]
    with torch.no_grad():
        ref_logps = [reference.log_probs(part)[0] if reference else None for part in parts]  # (5)
    scored = time.perf_counter()
    denominator = loss_denominator(rollout.mask, algorithm.aggregate, config.max_new_tokens)
    old_logps: list[torch.Tensor] = []
    sums, gap, norms, losses, ratio_max = Counter(), 0.0, [], [], 0.0
    for inner in range(config.num_inner_updates):  # (6)
        losses.append(0.0)
        if pairwise:
            means = mean_log_probs(policy, batches, parts).view_as(rewards)
            advantages = pairwise_advantages(rewards, means, algorithm.preference_strength).flatten()
        for i, (rows, part) in enumerate(zip(batches, parts, strict=True)):
            logp, entropy = policy.log_probs(part)
            if inner == 0:  # the scorer's own values, so the ratio starts at exactly 1
                old_logps.append(logp.detach())
                gap = max(gap, (part.sampler_logp - old_logps[i]).abs().max().item())
            loss, stats = policy_loss(
                logp, old_logps[i], advantages[rows], part.mask, algorithm, ref_logps[i], denominator
            )
            if reference and isinstance(policy, GaussianPolicy):
                stats["kl"] = policy.kl(reference, part).sum()
            loss.backward()
            losses[-1] += loss.item()
            ratio_max = max(ratio_max, stats.pop("ratio_max").item())
            sums.update({name: value.item() for name, value in stats.items()} | {"entropy": entropy.sum().item()})
        norms.append(descend(policy, optimizer, losses[-1], config.clip_grad_norm))
    seconds, tokens = time.perf_counter() - scored, sums.pop("tokens")
    return {
        **{name: value / tokens for name, value in sums.items()},
        **{"loss": statistics.fmean(losses), "grad_norm": statistics.fmean(norms)},
        **{"ratio_max": ratio_max, "sampler_gap": gap, "learning_rate": optimizer.param_groups[0]["lr"]},
        **{"seconds_score": scored - start, "seconds_update": seconds, "tokens_per_second_update": tokens / seconds},
        "tokens_per_second_score": rollout.mask.sum().item() / (scored - start) if reference else 0.0,
    }


def rollout_metrics(rollout: Rollout, rewards: torch.Tensor, examples: list[Example], task: Task) -> dict[str, float]:
    """What is measured on the sampled completions and their rewards (P, G), before any update."""
    rows = [example for example in examples for _ in range(rewards.shape[1])]
    lengths = rollout.mask.sum(1).float()
    metrics = {name: function for name, function in task.metrics.items() if name != "reward"}  # which is measured
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        **known_means({name: apply_reward(name, f, rows, rollout) for name, f in metrics.items()}),
        "zero_std_groups": is_flat(rewards).float().mean().item(),
        "truncated": rollout.truncated.float().mean().item(),
        **{"length": lengths.mean().item(), "length_min": lengths.min().item(), "length_max": lengths.max().item()},
    }


WARNINGS = {  # shown once a run, each in a sentence that names the flag that helps
    "truncated": (
        lambda m: m["truncated"] >= 0.9,
        "9 in 10 completions are cut by the length limit, so hardly any is rewarded: raise --max-new-tokens",
    ),
    "flat": (
        lambda m: m["zero_std_groups"] == 1 and m.get("accuracy", 0) < 1,
        "in every group all rewards are equal, so there is nothing to learn from: raise --num-generations or "
        "--temperature, or start from a --model that is right now and then",
    ),
    "format": (
        lambda m: m.get("format") == 0,
        "no completion has the format of an answer: teach it first, with sft.py, and give the result as --model",
    ),
    "judge": (
        lambda m: m.get("missing/judge") == 1,
        "the judge scored no completion, so its reward is left out: is the endpoint of --judge-url up, and does it "
        "know --judge-model and JUDGE_API_KEY?",
    ),
    "kl": (
        lambda m: m.get("kl", 0) > 1,
        "the policy runs away from the reference (KL above 1 nat per token): lower --learning-rate or raise --beta",
    ),
}


@dataclass
class Progress:
    """Where a run stands: everything but weights and optimizer that continuing it needs."""

    step: int = 0
    best_step: int = 0
    best_score: float = -math.inf
    stale: int = -1  # evaluations since the best one; -1 before the first
    stopped: str | None = None  # why training ended early
    warned: list = dataclasses.field(default_factory=list)
    state: dict = dataclasses.field(default_factory=dict)  # of adaptive rewards


@dataclass
class Run:
    """A training run: policies, data, and the folder that it writes to."""

    config: GRPOConfig
    task: Task
    out: Path
    policy: Policy
    reference: Policy | None
    optimizer: torch.optim.Optimizer
    data: dict[str, list[Example]]
    mix: dict[str, tuple[RewardFunction, float]]
    inputs: dict  # what rewards get by keyword, besides the examples' columns
    progress: Progress

    @property
    def refreshed(self) -> torch.nn.Module | None:
        """The reference's model if steps change it, so that it belongs to the state."""
        return self.reference.model if self.config.ref_update_every else None


def frozen(policy: Policy) -> Policy:
    """A copy of a policy that does not learn, with weights in the dtype of its matrix products."""
    reference = copy.copy(policy)
    reference.model = copy.deepcopy(policy.model).requires_grad_(False)
    for weight in reference.model.parameters():  # not the buffers: rotary frequencies need their float32
        weight.data = weight.data.to(policy.dtype)
    reference.model.checkpointing = False
    return reference


def frozen_scorer(policy: TokenPolicy, token_budget: int, same_tokens: bool) -> Callable[..., list[float]]:
    """What rewards know as `scorer`: mean log-probability per token of completions under a policy that does not learn.

    With `same_tokens` the sampled ids are scored as they are; another model's tokenizer reads the text again, and what
    exceeds its context is cut off.
    """
    policy = copy.copy(policy)
    policy.temperature, policy.exploration_noise = 1.0, 0.0

    def scorer(prompts, completions, completion_ids) -> list[float]:
        ids = completion_ids
        if not same_tokens:
            texts = [text_of(completion) for completion in completions]
            ids = [row or policy.end_ids[:1] for row in policy.tokenizer(texts, add_special_tokens=False).input_ids]
        if not policy.chat:
            prompts = [text_of(prompt) for prompt in prompts]
        prompts, room, first = policy.encode(prompts), policy.model.max_length, {}
        ids = [row[: max(1, room - len(prompt))] for row, prompt in zip(ids, prompts, strict=True)]
        rollout = policy.pack([prompt[-(room - 1) :] for prompt in prompts], ids, [""] * len(ids))
        group = [first.setdefault(tuple(prompt), i) for i, prompt in enumerate(prompts)]  # equal prompts share a pass
        rollout.group = torch.tensor(group, device=policy.device)
        batches = micro_batches(rollout, token_budget)
        return mean_log_probs(policy, batches, [rollout.select(rows) for rows in batches]).tolist()

    return scorer


def inputs_asked(config: GRPOConfig, mix: dict[str, tuple[RewardFunction, float]]) -> set[str]:
    """The parameters of the mix's functions; raises UserError for a flag that they lack or that none of them reads."""
    asked = {name for function, _ in mix.values() for name in inspect.signature(function).parameters}
    flags = {"scorer": "scorer", "judge_url": "endpoint", "ideal_length": "ideal_length", "even_bonus": "even_bonus"}
    for flag, name in flags.items():
        if getattr(config, flag) is not None and name not in asked:
            raise UserError(f"--{flag.replace('_', '-')} does nothing with --rewards {config.rewards}; leave it out")
    if "endpoint" in asked and config.judge_url is None:
        raise UserError("--rewards judge needs --judge-url; give it, or other --rewards, as in overlap=1")
    return asked


def reward_inputs(config: GRPOConfig, asked: set[str], policy: Policy, reference: Policy | None) -> dict:
    """What reward functions get by the name of a parameter, besides the examples' columns; raises UserError."""
    numbers = {"ideal_length": config.ideal_length, "even_bonus": config.even_bonus}
    inputs = {name: value for name, value in numbers.items() if value is not None}
    if "scorer" in asked:
        base = reference if reference and not config.ref_update_every else None
        if config.scorer:
            base = load(config.scorer, policy.device, config.dtype)
        if not isinstance(base or policy, TokenPolicy):
            raise UserError("--rewards perplexity needs a language model as its scorer; an autoencoder is none")
        inputs["scorer"] = frozen_scorer(base or frozen(policy), config.micro_batch_tokens, not config.scorer)
    if "endpoint" in asked:
        key = os.environ.get("JUDGE_API_KEY", "")
        inputs["endpoint"] = Judge(config.judge_url, config.judge_model, config.judge_scale, key)
    return inputs


NOISE = {"transformer": 0.0, "autoencoder": 0.5}  # the exploration noise of each kind of policy, unless it is given


def check_columns(config: GRPOConfig, mix: dict[str, tuple[RewardFunction, float]], example: Example) -> None:
    """Raise UserError for a function that asks for what neither the task's examples nor the run have."""
    there = {"prompts", "completions", "completion_ids", "scorer", "endpoint", "state", *example.columns}
    there |= {name for name in ("ideal_length", "even_bonus") if getattr(config, name) is not None}
    for name, (function, _) in mix.items():
        for asked in inspect.signature(function).parameters.values():
            by_name = asked.kind in (asked.POSITIONAL_OR_KEYWORD, asked.KEYWORD_ONLY)
            if by_name and asked.default is asked.empty and asked.name not in there:
                has = ", ".join(example.columns)
                raise UserError(f"--rewards: {name} needs the column {asked.name!r}; --task {config.task} has {has}")


def total_reward(mix: dict[str, tuple[RewardFunction, float]], inputs: dict) -> RewardFunction:
    """The mix as one function, by which policies are compared where a task has no accuracy.

    None where one of the functions has no value, so that an outage is no bad score.
    """

    def reward(**given) -> list[float | None]:
        total: list[float | None] = [0.0] * len(given["completions"])
        for function, weight in mix.values():
            values = function(**given, **accepted(function, inputs | {"state": {}}))
            pairs = zip(total, values, strict=True)
            total = [None if value is None or part is None else part + weight * value for part, value in pairs]
        return total

    return reward


def base_policy(config: GRPOConfig, out: Path, device: torch.device, **sampling) -> Policy:
    """The toy that supervised fine-tuning makes in OUT/base, or has made there before a resumed run was stopped."""
    if not config.resume or not (out / "base" / "model.safetensors").exists():
        begun = config.resume and (out / "base" / "resume" / "latest").exists()
        base = {"task": config.task, "seed": config.seed, "device": config.device, "policy": config.policy}
        sft.train(sft.SFTConfig(out=str(out / "base"), **base, resume=begun, overwrite=True))
    return load(out / "base", device, config.dtype, **sampling)


def prepare(config: GRPOConfig) -> Run:
    """Check the settings, make or load the base policy, and open the run folder, or restore it with --resume."""
    task, device, out = find_task(config.task), choose_device(config.device), Path(config.out)
    config = dataclasses.replace(
        config, rewards=config.rewards or task.rewards, max_new_tokens=config.max_new_tokens or task.max_new_tokens,
        exploration_noise=NOISE[config.policy] if config.exploration_noise is None else config.exploration_noise,
    )  # fmt: skip
    algorithm, settings = config.resolved_algorithm, dataclasses.asdict(config)
    mix = parse_rewards(config.rewards)
    asked = inputs_asked(config, mix)
    if algorithm.overlong_buffer:
        mix["overlong-penalty"] = (soft_overlong(config.max_new_tokens, algorithm.overlong_buffer), 1.0)
    sampling = {"temperature": config.temperature, "exploration_noise": config.exploration_noise or None}
    if config.model is None and not task.toy:
        raise UserError(f"--task {task.name} needs a --model: a checkpoint folder, or the name of a model on the hub")
    policy = load(config.model, device, config.dtype, **sampling) if config.model else None
    if policy:
        check_kind(policy, config.policy, config.model)
    data = load_task(task, policy is not None and policy.chat, data=config.data, limit=config.limit)
    check_columns(config, mix, data["train"][0])
    if config.resume:
        stored = read_json(out / "run.json")
    else:
        if policy is None and not config.overwrite and (out / "base").exists():
            raise UserError(f"--out: {str(out / 'base')!r} exists; start from it with --model, or give --overwrite")
        start_run(config.out, settings, config.overwrite, algorithm=dataclasses.asdict(algorithm))
    policy = policy or base_policy(config, out, device, **sampling)
    policy.model.checkpointing = config.gradient_checkpointing
    data = policy.fitting(data, config.max_new_tokens)
    reference = frozen(policy) if algorithm.beta > 0 else None
    inputs = reward_inputs(config, asked, policy, reference)
    if task.score != "accuracy":
        task = dataclasses.replace(task, metrics={"reward": total_reward(mix, inputs), **task.metrics})
    optimizer = torch.optim.AdamW(policy.model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    run = Run(config, task, out, policy, reference, optimizer, data, mix, inputs, Progress())
    if config.resume and (out / "resume").exists():
        run.progress = load_state(out, policy.model, optimizer, Progress, run.refreshed)
        if any(stored["settings"].get(name) != settings[name] for name in ("steps", "patience", "kl_limit")):
            run.progress.stopped = None
    else:
        before = measure(run, policy, "held_out", samples=4)
        write_json(out / "evaluation.json", {"base": {"step": 0, **before}})
    if config.resume:  # now that the state has turned out whole
        write_json(out / "run.json", stored | {"settings": settings})
    return run


def sample_groups(run: Run, step: int) -> tuple[Rollout, torch.Tensor, dict[str, float]]:
    """A step's rollout, its rewards (P, G) and what was measured on it.

    Groups of equal rewards teach nothing: they are replaced by groups of fresh prompts, at most `max_resample` times
    (dynamic sampling: DAPO, section 3.2), and what is flat in the last draw stays. Measured is the first draw, whose
    prompts nothing has selected; `samples` and `tokens` count all draws.
    """
    config, last_draw = run.config, run.config.resolved_algorithm.max_resample
    kept, missing, counts, used = [], config.batch_size, Counter(), set()
    for draw in range(last_draw + 1):
        examples = take_prompts(run.data["train"], step, config.batch_size, config.seed, draw)
        examples = sorted(examples, key=lambda example: id(example) in used)[:missing]  # (1), new ones first
        used |= set(map(id, examples))
        key = (config.seed, step, draw)
        rollout = run.policy.sample(examples, config.num_generations, key, config.max_new_tokens)  # (2)
        inputs = run.inputs | {"state": run.progress.state}
        rewards, means = compute_rewards(run.mix, examples, rollout, config.num_generations, inputs)  # (3)
        run.progress.state = plain_state(run.progress.state)
        if draw == 0:
            measured = rollout_metrics(rollout, rewards, examples, run.task) | means
        counts.update(samples=rewards.numel(), tokens=int(rollout.mask.sum()))
        keep = ~is_flat(rewards) | (draw == last_draw)
        if keep.any():
            rows = keep.repeat_interleave(config.num_generations).nonzero()[:, 0].to(run.policy.device)
            kept.append((rollout.select(rows), rewards[keep]))
        missing -= int(keep.sum())
        if not missing:
            break
    rollouts, rewards = zip(*kept, strict=True)
    return join(rollouts), torch.cat(rewards), measured | counts


def plain_state(state: dict) -> dict:
    """The state of adaptive rewards as it will be read back when the run is resumed; raises UserError."""
    try:
        return json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--rewards: a reward left in its state what JSON cannot hold ({error}); keep numbers"
        ) from error


def train_step(run: Run, step: int) -> dict[str, float]:
    """One step of GRPO; the numbers are those at the top of this file."""
    config, start = run.config, time.perf_counter()
    run.optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, step / max(1, config.warmup_steps))
    try:
        with out_of_memory("--batch-size, --num-generations or --max-new-tokens"):
            rollout, rewards, measured = sample_groups(run, step)  # (1) to (3)
        sampled = time.perf_counter()
        with out_of_memory("--micro-batch-tokens"):
            learned = update(run.policy, run.reference, run.optimizer, rollout, rewards, config)  # (4) to (6)
    except FloatingPointError as error:
        mend = "the states saved before it are kept: use --resume with a lower --learning-rate"
        raise UserError(f"step {step}: not finite ({error}); {mend}") from error
    if config.ref_update_every and step % config.ref_update_every == 0:
        run.reference.model.load_state_dict(run.policy.model.state_dict())
    tokens, seconds = measured["tokens"], time.perf_counter() - start
    speed = {"seconds_sample": sampled - start, "seconds": seconds}
    speed |= {"tokens_per_second": tokens / seconds, "tokens_per_second_sample": tokens / (sampled - start)}
    return {"step": step, **measured, **learned, **speed}


def validate(run: Run, step: int, bar: tqdm) -> dict[str, float]:
    """Evaluate on the validation problems, keep the best checkpoint, and show the same three questions each time.

    The best is the one that scores best when sampled, as it is trained: greedy accuracy is high long before the policy
    has made up its mind.
    """
    config, progress, examples = run.config, run.progress, run.data["validation"]
    result = measure(run, run.policy, "validation", samples=2, seed=config.seed)
    score, progress.stale = result.get(f"sampled_{run.task.score}", -math.inf), progress.stale + 1
    if score > progress.best_score or progress.stale == 0:  # the first is kept in any case
        progress.best_step, progress.best_score, progress.stale = step, score, 0
        save(run.policy, run.out)
    shown = examples[:3]
    rollout = run.policy.sample(shown, 1, (config.seed, 0, 0), config.max_new_tokens, explore=False)
    inputs = run.inputs | {"state": copy.deepcopy(progress.state)}  # to look on changes nothing
    rewards = compute_rewards(run.mix, shown, rollout, 1, inputs)[0][:, 0].tolist()
    numbers = [show_number(run.task.score, value) for value in (result.get(run.task.score, -math.inf), score)]
    scores = f"{run.task.score} {numbers[0]} greedy, {numbers[1]} sampled"
    bar.write(f"step {step}: validation {scores}; the same three questions, sampled:")
    for example, text, reward in zip(shown, rollout.texts, rewards, strict=True):
        line = {"step": step, "prompt": example.prompt, "completion": text, "reward": reward}
        append_json(run.out / "samples.jsonl", line)
        bar.write(f"  {printable(example.question)}  {printable(text)}  reward {reward:.1f}")
    return {f"validation_{name}": value for name, value in result.items()}


def measure(run: Run, policy: Policy, split: str, samples: int, seed: int = 0) -> dict[str, float]:
    """Evaluate a policy on a split, as many rows at once as a step samples; raises UserError."""
    config = run.config
    rows = config.batch_size * config.num_generations
    with out_of_memory("--batch-size, --num-generations or --max-new-tokens"):
        return evaluate(
            policy, run.task, run.data[split], config.max_new_tokens, samples=samples, seed=seed, batch_rows=rows
        )


def save_progress(run: Run) -> None:
    progress = dataclasses.asdict(run.progress)
    save_state(run.out, run.progress.step, run.policy.model, run.optimizer, progress, run.refreshed)


def reason_to_stop(config: GRPOConfig, progress: Progress, metrics: dict[str, float]) -> str | None:
    """Why training ends early, in words, or None."""
    if config.patience is not None and progress.stale >= config.patience:
        return f"no better validation score in {progress.stale} evaluations (--patience)"
    if config.kl_limit is not None and metrics.get("kl", 0) > config.kl_limit:
        return f"KL {metrics['kl']:.3f} is above --kl-limit {config.kl_limit}"
    return None


def warn_once(progress: Progress, metrics: dict[str, float], bar: tqdm) -> None:
    """Say in a plain sentence what is sick about a step, each thing once a run."""
    for name, (is_sick, sentence) in WARNINGS.items():
        if name not in progress.warned and is_sick(metrics):
            progress.warned.append(name)
            bar.write(f"warning: step {metrics['step']}: {sentence}", file=sys.stderr)


def train(config: GRPOConfig) -> Run:
    """Train a policy with GRPO and return the run: its last policy in `run.policy`, the best one in `config.out`."""
    run = prepare(config)
    config, progress = run.config, run.progress
    print(f"{config.algorithm}: {config.resolved_algorithm}")
    bar = tqdm(desc="grpo", initial=progress.step, total=config.steps, unit="step")
    with bar, Interrupt() as interrupt:
        if progress.stale < 0:  # nothing measured yet
            append_json(run.out / "metrics.jsonl", {"step": 0, **validate(run, 0, bar)})
            save_progress(run)
        while progress.step < config.steps and progress.stopped is None and not interrupt.signal:
            progress.step += 1
            metrics = train_step(run, progress.step)
            if progress.step % config.eval_every == 0 or progress.step == config.steps:
                metrics |= validate(run, progress.step, bar)
            append_json(run.out / "metrics.jsonl", metrics)
            warn_once(progress, metrics, bar)
            progress.stopped = reason_to_stop(config, progress, metrics)
            if progress.step % config.save_every == 0 or progress.step == config.steps or progress.stopped:
                save_progress(run)
            shown = {"reward": metrics["reward"], run.task.score: metrics[run.task.score]}
            shown |= {"kl": metrics["kl"]} if run.reference else {}
            speed = {"tok/s": f"{metrics['tokens_per_second']:.0f}"}
            bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()} | speed)
            bar.update()
    if interrupt.signal:
        save_progress(run)
        interrupt.leave(progress.step)
    if progress.stopped:
        print(f"stopped after step {progress.step}: {progress.stopped}")
    return run


def report(run: Run) -> None:
    """Evaluate on the held-out problems, print before and after, draw the figures, say what to try next."""
    config, progress, out = run.config, run.progress, run.out
    held_out = run.data["held_out"]
    results = read_json(out / "evaluation.json")
    last = {"step": progress.step, **measure(run, run.policy, "held_out", samples=4)}
    best = last
    if progress.best_step != progress.step:
        policy = load(out, run.policy.device, config.dtype, config.temperature)
        best = {"step": progress.best_step, **measure(run, policy, "held_out", samples=4)}
    results |= {"best": best, "last": last}
    write_json(out / "evaluation.json", results)
    print(f"\n{len(held_out)} held-out problems, before and after (95 % intervals):")
    print(results_table({f"{name} (step {result['step']})": result for name, result in results.items()}))
    figures = plot_metrics.plot([out], out)
    print(f"\nbest checkpoint and metrics: {out}   figures: {', '.join(map(str, figures))}")
    start = config.model or str(out / "base")
    asked = [shlex.quote(held_out[0].question), *(["--task", config.task] if config.task != "arithmetic" else [])]
    again = ["--task", config.task, "--model", start, "--out", "another_run", "--algorithm", "dr_grpo"]
    kept = {name: getattr(config, name) for name in ("data", "policy", "rewards", "judge_url")}
    defaults = {"data": None, "policy": "transformer", "rewards": run.task.rewards, "judge_url": None}
    again += [
        word
        for name, value in kept.items()
        if value != defaults[name]
        for word in (f"--{name.replace('_', '-')}", value)
    ]
    print(f"""Next:
  python inference.py {" ".join(asked)} --model {config.out}
  python inference.py {" ".join(asked)} --model {start} {config.out} --samples 4
  python grpo.py {shlex.join(again)}""")


# What --resume may change; everything else is part of what the run is.
MAY_CHANGE = {
    *("out", "resume", "overwrite", "dry_run", "device", "steps", "eval_every", "save_every", "patience", "kl_limit"),
    "judge_url",
    *("learning_rate", "micro_batch_tokens", "clip_grad_norm"),
}


def dry_run(config: GRPOConfig) -> str:
    """What a step will need, for the model, the data and the settings as they are; nothing is written."""
    task = find_task(config.task)
    if config.model is None:
        raise UserError("--dry-run needs a --model to measure")
    device = choose_device(config.device)
    policy = load(config.model, torch.device("meta"), config.dtype)
    policy.model.checkpointing = config.gradient_checkpointing
    width = config.max_new_tokens or task.max_new_tokens
    data = policy.fitting(load_task(task, policy.chat, data=config.data, limit=config.limit), width)
    longest = max(map(len, policy.encode([example.prompt for example in data["train"]])))
    if not isinstance(policy, TokenPolicy):
        raise UserError("--dry-run is for language models; an autoencoder needs next to nothing")
    asked = inputs_asked(config, parse_rewards(config.rewards or task.rewards))
    alone = config.ref_update_every or config.resolved_algorithm.beta == 0  # so that the scorer is no reference
    copied = "scorer" in asked and bool(alone or config.scorer)
    estimate = plan(
        policy, config.batch_size * config.num_generations, config.batch_size, longest, width,
        micro_batch_tokens=config.micro_batch_tokens, inner_updates=config.num_inner_updates,
        reference=(config.resolved_algorithm.beta > 0) + copied, device=device,
    )  # fmt: skip
    return estimate.table()


def main() -> None:
    config = parse_settings(GRPOConfig, "Train a policy with GRPO.", MAY_CHANGE)
    if config.dry_run:
        print(dry_run(config))
        return
    start = time.perf_counter()
    report(train(config))
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    run_main(main, resumable=True)
