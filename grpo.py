"""GRPO (DeepSeekMath, arXiv 2402.03300), group-relative policy optimization, in plain PyTorch.

    python grpo.py --task arithmetic

One step, numbered as in `train_step` and `update`:

1. take P training prompts;
2. sample G completions of each from the policy, with their token ids;
3. reward every completion;
4. advantage: each reward minus its group's mean, over its group's standard deviation;
5. score the completions under the frozen reference policy;
6. update: ascend the clipped ratio times the advantage, minus beta times the KL towards the reference.

Deviations from the paper: (a) rewards come from rules, no reward model is learned; (b) one iteration, the reference is
the policy at the start and stays; (c) a group of equal rewards has advantage exactly 0, not 0 divided by an epsilon;
(d) the learning rate is constant after a warm-up.

Shapes: P prompts, G completions each, B = P * G rows in prompt-major order (row p * G + g), T completion tokens.
Rewards and advantages are (P, G) until the update; tokens are (B, T).
"""

import copy
import dataclasses
import shlex
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import plot_metrics
import sft
from inference import (
    Interrupt,
    Rollout,
    TokenPolicy,
    append_json,
    choose_device,
    continue_command,
    evaluate,
    load,
    load_state,
    micro_batches,
    option,
    out_of_memory,
    parse_settings,
    printable,
    read_json,
    require_numbers,
    results_table,
    run_main,
    save,
    save_state,
    start_run,
    write_json,
)
from rewards import RewardFunction, UserError, apply_reward, parse_rewards
from tasks import Example, Task, find_task, load_task


@dataclass(frozen=True)
class Algorithm:
    """One row of the table of algorithms: what makes the loss."""

    epsilon: float = 0.2  # the ratio is clipped below 1 - epsilon
    epsilon_high: float = 0.2  # and above 1 + epsilon_high
    beta: float = 0.04  # weight of the KL term


ALGORITHMS = {"grpo": Algorithm()}


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of `grpo.py`."""

    task: str = option("arithmetic", "Task to train on.")
    model: str | None = option(None, "Checkpoint folder to start from. Default: a toy, fine-tuned first into OUT/base.")
    out: str = option("saved_model", "Run folder: best checkpoint, metrics, samples, figures, states to resume from.")
    seed: int = option(0, "Seed of prompts and sampling (and of the toy's fine-tuning); never of the split.")
    device: str = option("auto", "Device: auto, cuda, mps or cpu.")
    steps: int = option(40, "Steps; one step is one rollout.")
    batch_size: int = option(32, "Prompts in one step (P).")
    num_generations: int = option(16, "Completions of each prompt (G).")
    num_inner_updates: int = option(1, "Optimizer steps on each rollout.")
    micro_batch_tokens: int = option(16384, "Most tokens in one forward and backward pass, padding included.")
    learning_rate: float = option(1e-4, "Learning rate of AdamW after the warm-up.")
    warmup_steps: int = option(5, "Steps in which the learning rate rises from 0.")
    clip_grad_norm: float = option(1.0, "Largest gradient norm; a longer gradient is scaled down to it.")
    algorithm: str = option("grpo", "Row of the table of algorithms.")
    beta: float | None = option(None, "Weight of the KL term; 0 loads no reference. Default: the algorithm's.")
    epsilon: float | None = option(None, "The ratio is clipped below 1 - epsilon. Default: the algorithm's.")
    epsilon_high: float | None = option(None, "The ratio is clipped above 1 + this. Default: the algorithm's.")
    temperature: float = option(1.0, "Sampling temperature, of the policy and of the reference alike.")
    max_new_tokens: int | None = option(None, "Longest completion, in tokens. Default: the task's.")
    rewards: str | None = option(None, "NAME=WEIGHT,... or FILE.py:FUNCTION=WEIGHT. Default: the task's mix.")
    eval_every: int = option(5, "Evaluate on the validation problems every so many steps.")
    patience: int | None = option(
        None, "Stop after so many evaluations without a better validation accuracy (sampled)."
    )
    kl_limit: float | None = option(None, "Stop when the KL towards the reference, in nats per token, exceeds this.")
    save_every: int = option(10, "Save the state to resume from every so many steps.")
    resume: bool = option(False, "Continue the run in --out from its newest saved state.")
    overwrite: bool = option(False, "Replace the run that --out holds.")

    def __post_init__(self):
        require_numbers(
            self, "steps", "batch_size", "num_inner_updates", "micro_batch_tokens", "learning_rate", "clip_grad_norm",
            "max_new_tokens", "eval_every", "patience", "kl_limit", "save_every",
        )  # fmt: skip
        if self.num_generations < 2:
            raise UserError(f"--num-generations is {self.num_generations}; a group needs at least 2 to be compared")
        if self.temperature < 1e-3:
            raise UserError(f"--temperature is {self.temperature}; it must be 0.001 or above")
        if self.algorithm not in ALGORITHMS:
            raise UserError(f"--algorithm: no algorithm {self.algorithm!r}; there is {', '.join(ALGORITHMS)}")
        if self.kl_limit is not None and not self.resolved_algorithm.beta:
            raise UserError("--kl-limit needs a reference to measure the KL to; give a --beta above 0")

    @property
    def resolved_algorithm(self) -> Algorithm:
        """The algorithm's row with the cells that flags override."""
        cells = {field.name: getattr(self, field.name) for field in dataclasses.fields(Algorithm)}
        given = {name: value for name, value in cells.items() if value is not None}
        return dataclasses.replace(ALGORITHMS[self.algorithm], **given)


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Advantages (P, G) of rewards (P, G): (R - mean) / (std + 1e-4), unbiased std (DeepSeekMath, section 4.1.2).

    A group of equal rewards is exactly 0. Raises ValueError for fewer than two completions in a group.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"a group of {rewards.shape[1]} has no spread; sample at least 2 completions a prompt")
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    flat = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return torch.where(flat, 0.0, (rewards - mean) / (std + 1e-4))


def kl_penalty(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """KL estimate k3 (B, T) in nats from log-probabilities of tokens sampled from the policy: exp(d) - d - 1 >= 0.

    d = log ref - log pi, clamped at 20 from above, the side where exp overflows (Schulman 2020; DeepSeekMath, eq. 4).
    """
    d = (ref_logp - logp).clamp(max=20.0)
    return d.exp() - d - 1


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    algorithm: Algorithm,
    ref_logp: torch.Tensor | None = None,
    denominator: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss (DeepSeekMath, eq. 3), a scalar, and sums over tokens for the metrics.

    logp, old_logp, ref_logp (B, T) are log-probabilities of the sampled tokens under the policy, the policy that the
    first inner update started from, and the reference; advantages (B,); mask (B, T) bool. What stands at padding
    changes nothing. The sum over rows is divided by `denominator`, the number of rows of the whole optimizer step.
    """
    # Masked before exp: whatever stands at padding must not become inf * 0 = NaN.
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio = log_ratio.exp()
    advantage = advantages[:, None]
    clipped = ratio.clamp(1 - algorithm.epsilon, 1 + algorithm.epsilon_high)
    per_token = -torch.minimum(ratio * advantage, clipped * advantage)  # min for A < 0 too (PPO, eq. 7)
    stats = {
        "tokens": mask.sum(),
        "clip_low": (mask & (advantage < 0) & (ratio < 1 - algorithm.epsilon)).sum(),
        "clip_high": (mask & (advantage > 0) & (ratio > 1 + algorithm.epsilon_high)).sum(),
    }
    if ref_logp is not None:
        kl = kl_penalty(torch.where(mask, logp, 0.0), torch.where(mask, ref_logp, 0.0))
        per_token = per_token + algorithm.beta * kl
        stats |= {"kl": kl.detach().sum(), "kl_clamped": (mask & (ref_logp - logp > 20)).sum()}
    rows = torch.where(mask, per_token, 0.0).sum(1) / mask.sum(1)
    return rows.sum() / (len(rows) if denominator is None else denominator), stats | {"ratio_max": ratio.detach().max()}


def take_prompts(examples: list[Example], step: int, count: int, seed: int) -> list[Example]:
    """The prompts of a step (from 1): passes over all examples, each in an order that follows from seed and pass."""
    chosen, orders = [], {}
    for i in range((step - 1) * count, step * count):
        epoch = i // len(examples)
        if epoch not in orders:
            stream = np.random.Philox(np.random.SeedSequence([seed, epoch]))
            orders[epoch] = np.random.Generator(stream).permutation(len(examples))
        chosen.append(examples[orders[epoch][i % len(examples)]])
    return chosen


def compute_rewards(
    mix: dict[str, tuple[RewardFunction, float]], examples: list[Example], rollout: Rollout, group_size: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """Weighted total rewards (P, G) float32 on the CPU, and each function's mean and std; raises UserError.

    None is replaced by the function's mean over the group's other rows, and drops out where the group has no value.
    """
    rows = [example for example in examples for _ in range(group_size)]
    total, means = torch.zeros(len(examples), group_size), {}
    for name, (function, weight) in mix.items():
        values = apply_reward(name, function, rows, rollout)
        values = torch.tensor([float("nan") if v is None else v for v in values]).view(-1, group_size)
        values = torch.where(values.isnan(), values.nanmean(1, keepdim=True), values)
        means[f"reward/{name}"] = values.nanmean().item()
        means[f"reward_std/{name}"] = values[~values.isnan()].std().item()
        total += weight * values.nan_to_num(0.0)
    return total, means


def descend(policy: TokenPolicy, optimizer: torch.optim.Optimizer, loss: float, largest: float) -> float:
    """Take an optimizer step along the clipped gradient and return its norm before clipping.

    Raises FloatingPointError, before the optimizer moves, if the loss or the gradient is not finite.
    """
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), largest).item()
    if not np.isfinite(loss + norm):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return norm


def update(
    policy: TokenPolicy,
    reference: TokenPolicy | None,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantages: torch.Tensor,
    config: GRPOConfig,
) -> dict[str, float]:
    """Score a rollout under the reference and take the inner updates on it; returns the metrics.

    advantages (B,).
    """
    start = time.perf_counter()
    batches = micro_batches(rollout, config.micro_batch_tokens)
    parts = [rollout.select(rows) for rows in batches]
    with torch.no_grad():
        ref_logps = [reference.log_probs(part)[0] if reference else None for part in parts]  # (5)
    scored = time.perf_counter()
    old_logps: list[torch.Tensor] = []
    sums, gap, norms, losses, ratio_max = Counter(), 0.0, [], [], 0.0
    for inner in range(config.num_inner_updates):  # (6)
        losses.append(0.0)
        for i, (rows, part) in enumerate(zip(batches, parts, strict=True)):
            logp, entropy = policy.log_probs(part)
            if inner == 0:  # the scorer's own values, so the ratio starts at exactly 1
                old_logps.append(logp.detach())
                gap = max(gap, (part.sampler_logp - old_logps[i]).abs().max().item())
            loss, stats = policy_loss(
                logp,
                old_logps[i],
                advantages[rows],
                part.mask,
                config.resolved_algorithm,
                ref_logps[i],
                len(advantages),
            )
            loss.backward()
            losses[-1] += loss.item()
            ratio_max = max(ratio_max, stats.pop("ratio_max").item())
            sums.update({name: value.item() for name, value in stats.items()} | {"entropy": entropy.sum().item()})
        norms.append(descend(policy, optimizer, losses[-1], config.clip_grad_norm))
    tokens = sums.pop("tokens")
    return {
        **{name: value / tokens for name, value in sums.items()},
        **{"loss": statistics.fmean(losses), "grad_norm": statistics.fmean(norms)},
        **{"ratio_max": ratio_max, "sampler_gap": gap, "learning_rate": optimizer.param_groups[0]["lr"]},
        **{"seconds_score": scored - start, "seconds_update": time.perf_counter() - scored},
    }


def rollout_metrics(rollout: Rollout, rewards: torch.Tensor, rows: list[Example], task: Task) -> dict[str, float]:
    """What is measured on the sampled completions, before any update."""
    lengths = rollout.mask.sum(1).float()
    measures = {"accuracy": task.accuracy, **task.metrics}
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        **{name: statistics.fmean(apply_reward(name, f, rows, rollout)) for name, f in measures.items()},
        "zero_std_groups": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "truncated": rollout.truncated.float().mean().item(),
        **{"length": lengths.mean().item(), "length_min": lengths.min().item(), "length_max": lengths.max().item()},
    }


WARNINGS = {  # shown once a run, each in a sentence that names the flag that helps
    "truncated": (
        lambda m: m["truncated"] >= 0.9,
        "9 in 10 completions are cut by the length limit, so hardly any is rewarded: raise --max-new-tokens",
    ),
    "flat": (
        lambda m: m["zero_std_groups"] == 1 and m["accuracy"] < 1,
        "in every group all rewards are equal, so there is nothing to learn from: raise --num-generations or "
        "--temperature, or start from a --model that is right now and then",
    ),
    "format": (
        lambda m: m.get("format") == 0,
        "no completion has the format of an answer: teach it first, with sft.py, and give the result as --model",
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
    best_accuracy: float = -1.0
    stale: int = 0  # evaluations since the best one
    stopped: str | None = None  # why training ended early
    warned: list = dataclasses.field(default_factory=list)


@dataclass
class Run:
    """A training run: policies, data, and the folder that it writes to."""

    config: GRPOConfig
    task: Task
    out: Path
    policy: TokenPolicy
    reference: TokenPolicy | None
    optimizer: torch.optim.Optimizer
    data: dict[str, list[Example]]
    mix: dict[str, tuple[RewardFunction, float]]
    progress: Progress

    @property
    def max_new_tokens(self) -> int:
        return self.config.max_new_tokens or self.task.max_new_tokens


def prepare(config: GRPOConfig) -> Run:
    """Check the settings, make or load the base policy, and open the run folder, or restore it with --resume."""
    task, device, out = find_task(config.task), choose_device(config.device), Path(config.out)
    mix, settings = parse_rewards(config.rewards or task.rewards), dataclasses.asdict(config)
    policy = load(config.model, device, config.temperature) if config.model else None
    old = None
    if config.resume:
        stored = read_json(out / "run.json")
        old = stored["settings"]
        write_json(out / "run.json", stored | {"settings": settings})
    else:
        if policy is None and not config.overwrite and (out / "base").exists():
            raise UserError(f"--out: {str(out / 'base')!r} exists; start from it with --model, or give --overwrite")
        start_run(config.out, settings, config.overwrite, algorithm=dataclasses.asdict(config.resolved_algorithm))
    if policy is None:
        if not config.resume or not (out / "base" / "model.safetensors").exists():
            base = {"task": config.task, "seed": config.seed, "device": config.device, "overwrite": True}
            sft.train(sft.SFTConfig(out=str(out / "base"), **base))
        policy = load(out / "base", device, config.temperature)
    data = load_task(task, policy.chat)
    reference = None
    if config.resolved_algorithm.beta > 0:
        frozen = copy.deepcopy(policy.model).requires_grad_(False)
        reference = TokenPolicy(frozen, policy.tokenizer, config.temperature, policy.end_ids)
    optimizer = torch.optim.AdamW(policy.model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    run = Run(config, task, out, policy, reference, optimizer, data, mix, Progress())
    if config.resume and (out / "resume").exists():
        run.progress = load_state(out, policy.model, optimizer, Progress)
        if any(old[name] != settings[name] for name in ("steps", "patience", "kl_limit")):
            run.progress.stopped = None
    else:
        before = evaluate(policy, task, data["held_out"], run.max_new_tokens, samples=4)
        write_json(out / "evaluation.json", {"base": {"step": 0, **before}})
    return run


def train_step(run: Run, step: int) -> dict[str, float]:
    """One step of GRPO; the numbers are those at the top of this file."""
    config, policy = run.config, run.policy
    start = time.perf_counter()
    run.optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, step / max(1, config.warmup_steps))
    examples = take_prompts(run.data["train"], step, config.batch_size, config.seed)  # (1)
    key = (config.seed, step, 0)
    try:
        with out_of_memory("--batch-size, --num-generations or --max-new-tokens"):
            rollout = policy.sample(examples, config.num_generations, key, run.max_new_tokens)  # (2)
        sampled = time.perf_counter()
        rewards, means = compute_rewards(run.mix, examples, rollout, config.num_generations)  # (3)
        advantages = group_advantages(rewards).flatten().to(policy.device)  # (4)
        with out_of_memory("--micro-batch-tokens"):
            learned = update(policy, run.reference, run.optimizer, rollout, advantages, config)  # (5), (6)
    except FloatingPointError as error:
        mend = "the states saved before it are kept: use --resume with a lower --learning-rate"
        raise UserError(f"step {step}: not finite ({error}); {mend}") from error
    rows = [example for example in examples for _ in range(config.num_generations)]
    measured = rollout_metrics(rollout, rewards, rows, run.task)
    tokens, seconds = int(rollout.mask.sum()), time.perf_counter() - start
    speed = {"seconds_sample": sampled - start, "seconds": seconds}
    speed |= {"tokens_per_second": tokens / seconds, "tokens_per_second_sample": tokens / (sampled - start)}
    speed["tokens_per_second_score"] = tokens / learned["seconds_score"] if run.reference else 0.0
    speed["tokens_per_second_update"] = tokens * config.num_inner_updates / learned["seconds_update"]
    return {"step": step, **measured, **means, **learned, **speed}


def validate(run: Run, step: int, bar: tqdm) -> dict[str, float]:
    """Evaluate on the validation problems, keep the best checkpoint, and show the same three questions each time.

    The best is the one that is right most often when sampled, as it is trained: greedy accuracy is high long before
    the policy has made up its mind.
    """
    config, progress, examples = run.config, run.progress, run.data["validation"]
    result = evaluate(run.policy, run.task, examples, run.max_new_tokens, samples=2, seed=config.seed)
    progress.stale += 1
    if result["sampled_accuracy"] > progress.best_accuracy:
        progress.best_step, progress.best_accuracy, progress.stale = step, result["sampled_accuracy"], 0
        save(run.policy, run.out)
    shown = examples[:3]
    rollout = run.policy.sample(shown, 1, (config.seed, 0, 0), run.max_new_tokens)
    rewards = compute_rewards(run.mix, shown, rollout, 1)[0][:, 0].tolist()
    accuracies = f"{result['accuracy']:.1%} greedy, {result['sampled_accuracy']:.1%} sampled"
    bar.write(f"step {step}: validation accuracy {accuracies}; the same three questions, sampled:")
    for example, text, reward in zip(shown, rollout.texts, rewards, strict=True):
        line = {"step": step, "prompt": example.prompt, "completion": text, "reward": reward}
        append_json(run.out / "samples.jsonl", line)
        bar.write(f"  {printable(example.question)}  {printable(text)}  reward {reward:.1f}")
    return {f"validation_{name}": value for name, value in result.items()}


def save_progress(run: Run) -> None:
    save_state(run.out, run.progress.step, run.policy.model, run.optimizer, dataclasses.asdict(run.progress))


def reason_to_stop(config: GRPOConfig, progress: Progress, metrics: dict[str, float]) -> str | None:
    """Why training ends early, in words, or None."""
    if config.patience is not None and progress.stale >= config.patience:
        return f"no better validation accuracy in {progress.stale} evaluations (--patience)"
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
    progress = run.progress
    print(f"{config.algorithm}: {config.resolved_algorithm}")
    bar = tqdm(desc="grpo", initial=progress.step, total=config.steps, unit="step")
    with bar, Interrupt() as interrupt:
        if progress.best_accuracy < 0:  # nothing measured yet
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
            shown = {"reward": metrics["reward"], "acc": metrics["accuracy"], "kl": metrics.get("kl", float("nan"))}
            speed = {"tok/s": f"{metrics['tokens_per_second']:.0f}"}
            bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()} | speed)
            bar.update()
    if interrupt.signal:
        save_progress(run)
        print(f"saved after step {progress.step}; continue with: {continue_command()}", file=sys.stderr)
        sys.exit(128 + interrupt.signal)
    if progress.stopped:
        print(f"stopped after step {progress.step}: {progress.stopped}")
    return run


def report(run: Run) -> None:
    """Evaluate on the held-out problems, print before and after, draw the figures, say what to try next."""
    config, progress, out = run.config, run.progress, run.out
    held_out, width = run.data["held_out"], run.max_new_tokens
    results = read_json(out / "evaluation.json")
    last = {"step": progress.step, **evaluate(run.policy, run.task, held_out, width, samples=4)}
    best = last
    if progress.best_step != progress.step:
        policy = load(out, run.policy.device, config.temperature)
        best = {"step": progress.best_step, **evaluate(policy, run.task, held_out, width, samples=4)}
    results |= {"best": best, "last": last}
    write_json(out / "evaluation.json", results)
    print(f"\n{len(held_out)} held-out problems, before and after (95 % intervals):")
    print(results_table({f"{name} (step {result['step']})": result for name, result in results.items()}))
    figures = plot_metrics.plot([out], out)
    print(f"\nbest checkpoint and metrics: {out}   figures: {', '.join(map(str, figures))}")
    start = config.model or str(out / "base")
    print(f"""Next:
  python inference.py {shlex.quote(held_out[0].question)} --model {config.out}
  python inference.py {shlex.quote(held_out[0].question)} --model {start} {config.out} --samples 4
  python grpo.py --task {config.task} --model {start} --out another_run --rewards answer_exact=1""")


# What --resume may change; everything else is part of what the run is.
MAY_CHANGE = {
    *("out", "resume", "overwrite", "device", "steps", "eval_every", "save_every", "patience", "kl_limit"),
    *("learning_rate", "micro_batch_tokens", "clip_grad_norm"),
}


def main() -> None:
    config = parse_settings(GRPOConfig, "Train a policy with GRPO.", MAY_CHANGE)
    start = time.perf_counter()
    report(train(config))
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    run_main(main, resumable=True)
