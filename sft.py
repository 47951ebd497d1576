"""Supervised fine-tuning on a task's demonstrations: completion-only cross-entropy, the same skeleton as grpo.py.

    python sft.py --task arithmetic --out base

makes the base policy that `grpo.py` makes for itself when it is given none. The loss is the mean of -log pi over all
completion tokens of a batch, end tokens included; its denominator is the whole batch's, so micro-batches do not
change it.
"""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from inference import (
    Rollout,
    TokenPolicy,
    append_json,
    check_dtype,
    choose_device,
    evaluate,
    load,
    micro_batches,
    option,
    out_of_memory,
    parser_for,
    require_numbers,
    results_table,
    run_main,
    save,
    start_run,
    write_json,
)
from model_toy import Llama, LlamaConfig, character_tokenizer
from rewards import UserError
from tasks import find_task, load_task


@dataclass(frozen=True)
class SFTConfig:
    """Settings of supervised fine-tuning."""

    task: str = option("arithmetic", "Task whose demonstrations are learned.")
    model: str | None = option(None, "Checkpoint folder to start from. Default: a new toy Llama with random weights.")
    out: str = option("sft_model", "Run folder for the checkpoint and its metrics.")
    seed: int = option(0, "Seed of the weights and of the order of the demonstrations; never of the split.")
    device: str = option("auto", "Device: auto, cuda, mps or cpu.")
    epochs: float = option(3.0, "Passes over the demonstrations.")
    batch_size: int = option(64, "Demonstrations in one optimizer step.")
    micro_batch_tokens: int = option(8192, "Most tokens in one forward and backward pass, padding included.")
    learning_rate: float = option(1.5e-3, "Peak learning rate of AdamW; after the warm-up it falls linearly to 0.")
    warmup_steps: int = option(40, "Steps in which the learning rate rises from 0.")
    weight_decay: float = option(0.01, "Weight decay of AdamW.")
    clip_grad_norm: float = option(1.0, "Largest gradient norm; a longer gradient is scaled down to it.")
    worked: float | None = option(None, "Arithmetic: fraction of demonstrations that show their working. Default: 0.3.")
    wrong: float | None = option(None, "Arithmetic: fraction of the others that stop after one step. Default: 0.95.")
    copies: int | None = option(None, "Arithmetic: demonstrations of each training problem. Default: 8.")
    data: str | None = option(None, "File or folder with the task's records. Default: the hub's.")
    limit: int | None = option(None, "Take at most so many records for each split.")
    dtype: str = option("float32", "Matrix products in float32 or bfloat16; the weights that learn stay in float32.")
    overwrite: bool = option(False, "Replace the run that --out holds.")

    def __post_init__(self):
        require_numbers(
            self, "epochs", "batch_size", "micro_batch_tokens", "learning_rate", "clip_grad_norm", "copies", "limit"
        )
        check_dtype(self.dtype)
        for name in ("worked", "wrong"):
            if getattr(self, name) is not None and getattr(self, name) > 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it is a fraction from 0 to 1")


def new_policy(texts: list[str], seed: int, device: torch.device) -> TokenPolicy:
    """A toy Llama with random weights, and a character tokenizer that knows these texts."""
    tokenizer = character_tokenizer(texts)
    model = Llama(LlamaConfig(vocab_size=len(tokenizer)))
    model.init_weights(torch.Generator().manual_seed(seed))
    return TokenPolicy(model.to(device), tokenizer)


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


def cross_entropy_backward(policy: TokenPolicy, rollout: Rollout, token_budget: int) -> float:
    """Accumulate the gradient of the mean -log pi over the batch's completion tokens, and return the loss in nats."""
    tokens, total = rollout.mask.sum(), 0.0
    for rows in micro_batches(rollout, token_budget):
        logp, _ = policy.log_probs(rollout.select(rows))
        loss = -logp.sum() / tokens
        loss.backward()
        total += loss.item()
    return total


def train(config: SFTConfig) -> TokenPolicy:
    """Learn the task's demonstrations, save the policy in `config.out` and return it."""
    task, device = find_task(config.task), choose_device(config.device)
    if config.model is None and not task.toy:
        raise UserError(f"--task {task.name} needs a --model: a checkpoint folder, or the name of a model on the hub")
    policy = None if config.model is None else load(config.model, device, config.dtype)
    settings = {"worked": config.worked, "wrong": config.wrong, "copies": config.copies}
    settings |= {"data": config.data, "limit": config.limit}
    data = load_task(task, policy is not None and policy.chat, **settings)
    pairs = [(example.prompt, text) for example in data["train"] for text in example.demonstrations]
    if not pairs:
        raise UserError(f"--task {task.name} has no demonstrations to learn from; take another task or other --data")
    if policy is None:
        policy = new_policy([text for pair in pairs for text in pair], config.seed, device)
    out = start_run(config.out, dataclasses.asdict(config), config.overwrite)
    prompts = policy.encode([prompt for prompt, _ in pairs])
    end = policy.tokenizer.eos_token_id
    completions = [
        ids + [end] for ids in policy.tokenizer([text for _, text in pairs], add_special_tokens=False).input_ids
    ]

    room = policy.model.config.max_position_embeddings
    fits = [len(prompt) + len(completion) <= room for prompt, completion in zip(prompts, completions, strict=True)]
    if not all(fits):
        print(f"left out {len(fits) - sum(fits)} of {len(fits)} demonstrations of more than {room} tokens")
        columns = pairs, prompts, completions
        pairs, prompts, completions = ([x for x, fit in zip(column, fits, strict=True) if fit] for column in columns)
    if not pairs:
        raise UserError(f"--model: no demonstration fits into its {room} tokens; take a model that reads longer texts")

    steps = max(1, round(config.epochs * len(pairs) / config.batch_size))
    parameters = list(policy.model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
    bar = tqdm(batches(len(pairs), config.batch_size, steps, config.seed), "sft", total=steps, unit="step")
    start, tokens = time.perf_counter(), 0
    for step, rows in enumerate(bar, 1):
        batch = policy.pack(*([column[i] for i in rows] for column in (prompts, completions, [t for _, t in pairs])))
        optimizer.param_groups[0]["lr"] = learning_rate_at(config, step, steps)
        with out_of_memory("--micro-batch-tokens"):
            loss = cross_entropy_backward(policy, batch, config.micro_batch_tokens)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad_norm).item()
        if not np.isfinite(norm + loss):
            raise UserError(f"step {step}: loss {loss} or gradient {norm} is not finite; lower --learning-rate")
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(batch.mask.sum())
        rate = tokens / (time.perf_counter() - start)
        bar.set_postfix({"loss": f"{loss:.3f}", "tok/s": f"{rate:.0f}"}, refresh=False)
        metrics = {"step": step, "loss": loss, "grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
        append_json(out / "metrics.jsonl", metrics | {"tokens_per_second": rate})
    save(policy, out)
    return policy


def main() -> None:
    config = SFTConfig(**vars(parser_for(SFTConfig, "Supervised fine-tuning on a task's demonstrations.").parse_args()))
    policy, task = train(config), find_task(config.task)
    held_out = load_task(task, policy.chat, data=config.data, limit=config.limit)["held_out"]
    result = evaluate(policy, task, held_out, task.max_new_tokens, samples=4)
    write_json(Path(config.out) / "evaluation.json", {"sft": result})
    print(results_table({config.out: result}))
    print(f"Next: python grpo.py --task {config.task} --model {config.out}")


if __name__ == "__main__":
    run_main(main)
