"""Supervised fine-tuning on a task's demonstrations: completion-only cross-entropy, the same skeleton as grpo.py.

    python sft.py --task arithmetic --out base

makes the base policy that `grpo.py` makes for itself when it is given none. The loss is the mean of -log pi over all
completion tokens of a batch, end tokens included; its denominator is the whole batch's, so micro-batches do not
change it.
"""

import dataclasses
import itertools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

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
    load,
    load_state,
    micro_batches,
    option,
    out_of_memory,
    parse_settings,
    require_numbers,
    results_table,
    run_main,
    save,
    save_state,
    start_run,
    write_json,
)
from model_toy import Autoencoder, AutoencoderConfig, Llama, LlamaConfig, character_tokenizer
from rewards import UserError
from tasks import find_task, load_task


@dataclass
class Progress:
    """Where a run stands, besides weights and optimizer."""

    step: int = 0


@dataclass(frozen=True)
class SFTConfig:
    """Settings of supervised fine-tuning."""

    task: str = option("arithmetic", "Task whose demonstrations are learned.")
    model: str | None = option(None, "Checkpoint folder to start from. Default: a new toy Llama with random weights.")
    out: str = option("sft_model", "Run folder for the checkpoint and its metrics.")
    seed: int = option(0, "Seed of the weights and of the order of the demonstrations; never of the split.")
    device: str = option("auto", "Device: auto, cuda, mps or cpu.")
    epochs: float | None = option(
        None, "Passes over the demonstrations. Default: 3; 100 for odd_even, three times that for an autoencoder."
    )
    batch_size: int = option(64, "Demonstrations in one optimizer step.")
    micro_batch_tokens: int = option(8192, "Most tokens in one forward and backward pass, padding included.")
    learning_rate: float | None = option(
        None, "Peak rate of AdamW; after the warm-up it falls linearly to 0. Default: 1.5e-3; 1e-3 for an autoencoder."
    )
    warmup_steps: int = option(40, "Steps in which the learning rate rises from 0.")
    weight_decay: float = option(0.01, "Weight decay of AdamW.")
    clip_grad_norm: float = option(1.0, "Largest gradient norm; a longer gradient is scaled down to it.")
    worked: float | None = option(None, "Arithmetic: fraction of demonstrations that show their working. Default: 0.3.")
    wrong: float | None = option(None, "Arithmetic: fraction of the others that stop after one step. Default: 0.95.")
    copies: int | None = option(None, "Arithmetic: demonstrations of each training problem. Default: 8.")
    even_data_ratio: float | None = option(
        None, "Odd_even: fraction of the even sums that are demonstrated. Default: 0."
    )
    policy: str = option("transformer", "What is made without --model: transformer or autoencoder (odd_even only).")
    data: str | None = option(None, "File or folder with the task's records. Default: the hub's.")
    limit: int | None = option(None, "Take at most so many records for each split.")
    dtype: str = option("float32", "Matrix products in float32 or bfloat16; the weights that learn stay in float32.")
    gradient_checkpointing: bool = option(False, "Less memory: compute activations again in the backward pass.")
    eval_every: int = option(1000, "Measure the loss on up to 500 validation demonstrations every so many steps.")
    save_every: int = option(1000, "Save the state to resume from every so many steps.")
    resume: bool = option(False, "Continue the run in --out from its newest saved state.")
    overwrite: bool = option(False, "Replace the run that --out holds.")

    def __post_init__(self):
        require_numbers(
            self, "epochs", "batch_size", "micro_batch_tokens", "learning_rate", "clip_grad_norm", "copies", "limit",
            "eval_every", "save_every",
        )  # fmt: skip
        check_dtype(self.dtype)
        check_policy(self.policy)
        for name in ("worked", "wrong", "even_data_ratio"):
            if getattr(self, name) is not None and getattr(self, name) > 1:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {getattr(self, name)}; it is a fraction from 0 to 1")


def new_policy(texts: list[str], seed: int, device: torch.device, kind: str = "transformer") -> Policy:
    """A toy with random weights: a Llama and a character tokenizer that knows these texts, or an autoencoder.

    The autoencoder's inputs are the integers up to the largest in the texts.
    """
    if kind == "autoencoder":
        numbers = 1 + max(int(digits) for text in texts for digits in re.findall("[0-9]{1,4}", text))
        model = Autoencoder(AutoencoderConfig(numbers))
    else:
        tokenizer = character_tokenizer(texts)
        model = Llama(LlamaConfig(vocab_size=len(tokenizer)))
    model.init_weights(torch.Generator().manual_seed(seed))
    return GaussianPolicy(model.to(device)) if kind == "autoencoder" else TokenPolicy(model.to(device), tokenizer)


def learning_rate_at(config: SFTConfig, step: int, steps: int) -> float:
    """Linear warm-up, and linear decay that would reach 0 one step after the last; `step` counts from 1."""
    return config.learning_rate * min(step / max(1, config.warmup_steps), (steps - step + 1) / steps)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of each step's batch: shuffled passes over `count` rows, one after the other."""
    rng = np.random.Generator(np.random.Philox(seed))
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[:size]
        order = order[size:]


def cross_entropy(policy: Policy, rollout: Rollout, token_budget: int, learn: bool) -> float:
    """The mean of -log pi over the batch's completion tokens, in nats; with `learn` its gradient is accumulated."""
    tokens, total = rollout.mask.sum(), 0.0
    with torch.set_grad_enabled(learn):
        for rows in micro_batches(rollout, token_budget):
            logp, _ = policy.log_probs(rollout.select(rows))
            loss = -logp.sum() / tokens
            if learn:
                loss.backward()
            total += loss.item()
    return total


def with_defaults(config: SFTConfig) -> SFTConfig:
    """The settings with what the task and the kind of policy decide where nothing is given."""
    small = config.policy == "autoencoder"
    epochs = config.epochs or find_task(config.task).epochs * (3 if small else 1)
    return dataclasses.replace(config, epochs=epochs, learning_rate=config.learning_rate or (1e-3 if small else 1.5e-3))


def prepare(config: SFTConfig) -> tuple[Policy, tuple[list, list, list], list[list]]:
    """The policy to start from, and the training and up to 500 validation demonstrations as columns for `pack`."""
    task, device = find_task(config.task), choose_device(config.device)
    if config.model is None and not task.toy:
        raise UserError(f"--task {task.name} needs a --model: a checkpoint folder, or the name of a model on the hub")
    policy = None if config.model is None else load(config.model, device, config.dtype)
    if policy:
        check_kind(policy, config.policy, config.model)
    settings = {"worked": config.worked, "wrong": config.wrong, "copies": config.copies}
    settings |= {"data": config.data, "limit": config.limit, "even_data_ratio": config.even_data_ratio}
    data = load_task(task, policy is not None and policy.chat, **settings)
    if policy is None:
        texts = [text for example in data["train"] for text in (example.prompt, *example.demonstrations)]
        texts = [example.prompt for example in data["train"]] if config.policy == "autoencoder" else texts
        policy = new_policy(texts, config.seed, device, config.policy)
    policy.model.checkpointing = config.gradient_checkpointing
    train = policy.demonstrations(data["train"])
    validation = [column[:500] for column in policy.demonstrations(data["validation"])]
    if not train[0] or not validation[0]:
        raise UserError(f"--task {task.name} has no demonstrations that fit the model; take other --data or a --model")
    return policy, train, validation


def train(config: SFTConfig) -> Policy:
    """Learn the task's demonstrations, save the policy in `config.out` and return it."""
    config = with_defaults(config)
    policy, train, validation = prepare(config)
    out = Path(config.out)
    if not config.resume:
        start_run(config.out, dataclasses.asdict(config), config.overwrite)

    steering = policy.pack(*validation)
    steps = max(1, round(config.epochs * len(train[0]) / config.batch_size))
    parameters = list(policy.model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
    progress = Progress()
    if config.resume and (out / "resume").exists():
        progress = load_state(out, policy.model, optimizer, Progress)
    else:
        (out / "metrics.jsonl").unlink(missing_ok=True)  # of a run that stopped before its first state
    rest = itertools.islice(batches(len(train[0]), config.batch_size, steps, config.seed), progress.step, None)
    bar = tqdm(desc="sft", initial=progress.step, total=steps, unit="step")
    start, tokens = time.perf_counter(), 0
    with bar, Interrupt() as interrupt:
        for rows in rest:
            progress.step += 1
            batch = policy.pack(*([column[i] for i in rows] for column in train))
            optimizer.param_groups[0]["lr"] = learning_rate_at(config, progress.step, steps)
            with out_of_memory("--micro-batch-tokens"):
                loss = cross_entropy(policy, batch, config.micro_batch_tokens, learn=True)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad_norm).item()
            if not np.isfinite(norm + loss):
                what = f"step {progress.step}: loss {loss} or gradient {norm} is not finite"
                raise UserError(f"{what}; lower --learning-rate")
            optimizer.step()
            optimizer.zero_grad()
            tokens += int(batch.mask.sum())
            rate = tokens / (time.perf_counter() - start)
            metrics = {"step": progress.step, "loss": loss, "grad_norm": norm, "tokens_per_second": rate}
            metrics["learning_rate"] = optimizer.param_groups[0]["lr"]
            if progress.step % config.eval_every == 0 or progress.step == steps:
                with out_of_memory("--micro-batch-tokens"):
                    metrics["validation_loss"] = cross_entropy(policy, steering, config.micro_batch_tokens, learn=False)
                bar.write(f"step {progress.step}: validation loss {metrics['validation_loss']:.4f} nats per token")
            append_json(out / "metrics.jsonl", metrics)
            if progress.step % config.save_every == 0 or progress.step == steps or interrupt.signal:
                save_state(out, progress.step, policy.model, optimizer, dataclasses.asdict(progress))
            bar.set_postfix({"loss": f"{loss:.3f}", "tok/s": f"{rate:.0f}"}, refresh=False)
            bar.update()
            if interrupt.signal:
                interrupt.leave(progress.step)
    save(policy, out)
    return policy


# What --resume may change; everything else is part of what the run is.
MAY_CHANGE = {
    "out",
    "resume",
    "overwrite",
    "device",
    "eval_every",
    "save_every",
    "micro_batch_tokens",
    "clip_grad_norm",
}


def main() -> None:
    config = parse_settings(SFTConfig, "Supervised fine-tuning on a task's demonstrations.", MAY_CHANGE)
    policy, task = train(config), find_task(config.task)
    data = load_task(task, policy.chat, data=config.data, limit=config.limit)
    width = min(task.max_new_tokens, policy.model.max_length // 2)  # a short context must hold a question, too
    held_out = policy.fitting({"held_out": data["held_out"]}, width)["held_out"]
    with out_of_memory("--batch-size"):
        result = evaluate(policy, task, held_out, width, samples=4, batch_rows=config.batch_size)
    write_json(Path(config.out) / "evaluation.json", {"last": result})
    print(results_table({config.out: result}))
    kind = " --policy autoencoder" if isinstance(policy, GaussianPolicy) else ""
    print(f"Next: python grpo.py --task {config.task} --model {config.out}{kind}")


if __name__ == "__main__":
    run_main(main, resumable=True)
