"""Supervised fine-tuning on a task's demonstrations: completion-only cross-entropy, the same loop as grpo.py.

    python sft.py --task arithmetic --out base

makes the base policy that `grpo.py` makes for itself when it is given none. The loss is the mean of -log pi over all
completion tokens of a batch, end tokens included; its denominator is the whole batch's, so micro-batches do not
change it.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import commands
import ranks
import runs
import states
from checkpoints import choose_device, introduce, is_toy, make_ready, new_policy, open_policy, save
from commands import NotFinite, UserError, option, out_of_memory
from inference import evaluate, results_table
from policy import Policy
from rollouts import Rollout, micro_batches
from runs import Run, RunSettings
from tasks import TASKS, find_task, load_task


def cross_entropy(
    policy: Policy, rollout: Rollout, copies: torch.Tensor, token_budget: int, learn: bool = True,
    tokens: float | None = None,
) -> float:  # fmt: skip
    """The mean of -log pi over completion tokens, in nats, as if each row were there `copies` (B,) times.

    Of all ranks together, over `tokens`, or their number. `learn` accumulates the gradient of this rank's rows.
    """
    tokens, total = tokens or sum(ranks.gather(count_tokens(rollout, copies))), 0.0
    batches = micro_batches(rollout, token_budget, policy.layout)
    if learn:
        ranks.keep_step(policy.model, len(batches), lambda: policy.log_probs(rollout.select(batches[-1]))[0])
    with torch.set_grad_enabled(learn):
        for rows in batches:
            logp, _ = policy.log_probs(rollout.select(rows), entropy=False)
            loss = -(logp.sum(1) * copies[rows]).sum() / tokens
            if learn:
                loss.backward()
            total += loss.item()
    return sum(ranks.gather(total))


def count_tokens(rollout: Rollout, copies: torch.Tensor) -> int:
    """The completion tokens of rows that are there so often."""
    return int((rollout.mask.sum(1) * copies).sum())


def learning_rate_at(config: "SFTConfig", step: int, steps: int) -> float:
    """Linear warm-up, and linear decay that would reach 0 one step after the last; `step` counts from 1."""
    return config.learning_rate * min(step / max(1, config.warmup_steps), (steps - step + 1) / steps)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Numbers of the prompts of each step's batch: shuffled passes over `count` of them, one after the other."""
    rng = np.random.Generator(np.random.Philox(seed))
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[:size]
        order = order[size:]


@dataclass(kw_only=True)
class SFTRun(Run):
    """A run of fine-tuning on demonstrations: a rollout with one row for equal ones, and their numbers (B,)."""

    name = "sft"
    shown = ("loss",)

    demonstrations: tuple[Rollout, torch.Tensor]
    validation: tuple[Rollout, torch.Tensor]
    prompts: Iterator[np.ndarray]  # of the batches that are left


def train_step(run: SFTRun, step: int) -> dict[str, float]:
    """One optimizer step on the next batch; returns what was measured."""
    config, start, (rollout, copies) = run.config, time.perf_counter(), run.demonstrations
    chosen = torch.isin(rollout.group, torch.from_numpy(next(run.prompts)).to(rollout.group.device))
    rows = ranks.own(chosen.nonzero()[:, 0])
    batch, copies = rollout.select(rows), copies[rows]
    rate = run.optimizer.param_groups[0]["lr"] = learning_rate_at(config, step, run.last_step)
    with run.unbroken(), out_of_memory("--micro-batch-tokens"):
        tokens = sum(ranks.gather(count_tokens(batch, copies)))
        loss = run.within_memory(functools.partial(cross_entropy, tokens=tokens), run.policy, batch, copies)
        ranks.add_gradients(list(run.policy.model.parameters()))
        if not math.isfinite(loss):
            raise NotFinite(f"the loss is {loss}", sum(ranks.gather(batch.records()), []))
        norm = runs.descend(run.optimizer, config.clip_grad_norm, batch)
        speed = tokens / (time.perf_counter() - start)
        return run.record({"loss": loss, "grad_norm": norm, "tokens_per_second": speed, "learning_rate": rate})


def validate(run: SFTRun, step: int) -> dict[str, float]:
    """The loss on the validation demonstrations, by which --patience counts."""
    rollout, copies = run.validation
    rows = ranks.own(torch.arange(len(copies), device=copies.device))
    with out_of_memory("--micro-batch-tokens"), ranks.whole(run.policy.model):
        part = (rollout.select(rows), copies[rows], run.config.micro_batch_tokens)
        loss = cross_entropy(run.policy, *part, learn=False)
    run.note_score(step, -loss)
    run.say(f"step {step}: validation loss {loss:.4f} nats per token")
    return {"validation_loss": loss}


def train(config: "SFTConfig") -> Policy:
    """Learn the task's demonstrations, save the policy as it is at the end in `config.out`, and return it."""
    run = prepare(config)
    with run:
        for step in run.steps():
            metrics = run.attempt(train_step, step)
            if run.is_due(step, run.config.eval_every):
                metrics |= validate(run, step)
            run.log(step, metrics)
    ranks.every(lambda: save(run.policy, run.out))
    return run.policy


@dataclass(frozen=True)
class SFTConfig(RunSettings):
    """Settings of sft.py."""

    task: Literal[*TASKS] = option("arithmetic", "Task whose demonstrations are learned.", "model and data")
    worked: float | None = option(None, "Arithmetic: share with working. Default: 0.3.", "model and data", at_most=1)
    wrong: float | None = option(None, "Arithmetic: share of others wrong. Default: 0.95.", "model and data", at_most=1)
    copies: int | None = option(None, "Arithmetic: so many a problem. Default: 8.", "model and data", above_zero=True)
    even_data_ratio: float | None = option(None, "Odd_even: even sums shown. Default: 0.", "model and data", at_most=1)
    batch_size: int = option(64, "Prompts a step, each with its demonstrations.", "algorithm", above_zero=True)
    learning_rate: float | None = option(
        None, "Peak. Default: the task's; autoencoder 1e-3; 1e-5 if no toy.", "algorithm", above_zero=True
    )
    warmup_steps: int = option(40, "Steps in which the learning rate rises from 0.", "algorithm")
    weight_decay: float = option(0.01, "Weight decay of AdamW.", "algorithm")
    epochs: float | None = option(None, "Default: the task's.", "how long", above_zero=True, may_change=False)
    eval_every: int = option(1000, "Measure the validation loss every so many steps.", "how long", above_zero=True)
    save_every: int = option(1000, "Save a state to resume from every so many steps.", "run folder", above_zero=True)
    out: str = option("sft_model", "Checkpoint, metrics and states.", "run folder")


def prepare(config: SFTConfig) -> SFTRun:
    """Make or load the policy to start from, and open the run folder, or restore it with --resume."""
    task, small = find_task(config.task), config.policy == "autoencoder"
    epochs = config.epochs or task.epochs * (3 if small else 1)
    policy = open_policy(config, task)
    rate = (1e-3 if small else task.learning_rate) if is_toy(policy) else 1e-5
    config = dataclasses.replace(config, epochs=epochs, learning_rate=config.learning_rate or rate)
    names = ("data", "worked", "wrong", "copies", "even_data_ratio", "shots")
    settings = {name: getattr(config, name) for name in names}
    data = load_task(task, policy is not None and policy.chat, **settings)
    if policy is None:
        texts = [example.prompt for example in data["train"]]
        texts += [] if small else [text for example in data["train"] for text in example.demonstrations]
        policy = new_policy(texts, config.seed, choose_device(config.device), config.policy)
    introduce(policy, config, data["train"][0].prompt)
    make_ready(policy, config)
    demonstrations = {name: policy.demonstrations(data[name][: config.limit]) for name in ("train", "validation")}
    if None in demonstrations.values():
        raise UserError(f"--task {task.name} has no demonstrations that fit the model; take other --data or a --model")
    count = len(demonstrations["train"][0].prompts)
    if min(count, config.batch_size, len(demonstrations["validation"][1])) < ranks.WORLD:
        raise UserError(f"{ranks.WORLD} processes need a --batch-size, and demonstrations, of as many at least")
    states.start_run(config, revision=getattr(policy, "revision", None))
    if config.shard:
        ranks.shard(policy.model)
    states.pin(config, model=states.digest_of(policy.model), data=states.digest_of(data=data))
    steps = max(1, round(config.epochs * count / config.batch_size))
    run = SFTRun(
        config=config, policy=policy, optimizer=runs.adamw(policy.model, config.weight_decay), last_step=steps,
        demonstrations=demonstrations["train"], validation=demonstrations["validation"], prompts=iter(()),
    )  # fmt: skip
    run.restore()
    taken = run.position.step + bool(run.position.updated)
    run.prompts = itertools.islice(batches(count, config.batch_size, steps, config.seed), taken, None)
    return run


def toy(config) -> Path:
    """The folder OUT/base with the toy that fine-tuning makes there, or has made before a run was stopped."""
    base = Path(config.out) / "base"
    if not config.resume or not (base / "model.safetensors").exists():
        begun = config.resume and (base / "run.json").exists()
        same = {name: getattr(config, name) for name in ("task", "seed", "device", "policy")}
        train(SFTConfig(out=str(base), **same, resume=begun, overwrite=True))
    return base


EXAMPLES = """the commonest:
  python sft.py --task arithmetic --out base
  python sft.py --task gsm8k --model Qwen/Qwen2.5-0.5B --learning-rate 1e-5 --out qwen_sft
  python sft.py --out base --resume"""


def main() -> None:
    config = runs.parse_settings(SFTConfig, "Supervised fine-tuning on a task's demonstrations.", EXAMPLES)
    policy, task = train(config), find_task(config.task)
    data = load_task(task, policy.chat, config.limit, config.shots, data=config.data)
    width = min(task.max_new_tokens, policy.model.max_length // 2)  # a short context must hold a question, too
    held_out = policy.fitting({"held_out": data["held_out"]}, width)["held_out"]
    with out_of_memory("--batch-size"), ranks.whole(policy.model):
        result = evaluate(policy, task, held_out, width, samples=4, batch_rows=config.batch_size)
    if ranks.FIRST:
        commands.write_json(Path(config.out) / "evaluation.json", {"last": result})
    print(results_table({config.out: result}))
    print(f"Next: python grpo.py --task {config.task} --model {config.out} --policy {config.policy}")


if __name__ == "__main__":
    commands.run_main(main, resumable=True)
