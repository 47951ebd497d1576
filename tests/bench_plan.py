"""What `grpo.py --dry-run` says of a step's peak memory, against the peak that was measured.

    python tests/bench_plan.py

A toy, a small model of 30 million weights and one of 135 million, random weights, in float32 and bfloat16, with and
without gradient checkpointing, all in one pass over the model and in several; two steps each (sampling, reference,
update) in a process of its own. Prints a table.
"""

import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_main import describe, load_before, machine, table
from bench_sampler import NEVER, random_policy, random_prompts

import commands
import runs
from grpo import GRPOConfig, update
from model_toy import LlamaConfig
from plan import plan
from policy import frozen, score_rollout

CPU = torch.device("cpu")
SIZES = {
    "toy": (64, 128, 512, 4, 4, 4),
    "small": (8192, 512, 1408, 8, 8, 8),
    "135M": (49152, 576, 1536, 30, 9, 3),
}
WORK = {  # prompts, group, tokens of a prompt, of a completion, of a pass: all in one pass, and in several
    "toy": ((13, 16, 10, 32, 8192), (32, 16, 10, 32, 8192)),
    "small": ((4, 8, 32, 64, 8192), (24, 8, 32, 64, 8192)),
    "135M": ((1, 8, 32, 32, 8192), (5, 8, 32, 32, 600)),
}


def measured(name: str, passes: str, dtype: str, checkpointing: bool) -> tuple[float, float]:
    """Bytes that were planned for a step and measured over two: in the first, AdamW has no moments yet."""
    commands.keep_memory()
    prompts, group, length, width, budget = WORK[name][passes == "several"]
    policy = random_policy(LlamaConfig(*SIZES[name]))
    policy.end_ids, policy.model.checkpointing, policy.dtype = [NEVER], checkpointing, getattr(torch, dtype)
    config = GRPOConfig(max_new_tokens=width, micro_batch_tokens=budget)
    settings = {"micro_batch_tokens": budget, "inner_updates": 1, "reference": 1, "samplers": [], "device": CPU}
    planned = plan(policy, prompts * group, prompts, length, width, **settings)
    peak = planned.peak - planned.parts["weights"][0]  # which the process holds already
    reference, optimizer = frozen(policy), runs.adamw(policy.model, weight_decay=0.0)
    questions = random_prompts(policy.model.config, prompts, length, False)
    for step in range(2):
        rollout = policy.sample(questions, group, (0, step, 0), width)
        ref_logp = score_rollout(reference, rollout, budget)
        advantages = torch.randn(prompts, group, generator=torch.Generator().manual_seed(step))
        update(policy, reference, optimizer, rollout, advantages, ref_logp, config)
    return peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def main() -> None:
    if sys.argv[1:]:
        return print(json.dumps(measured(*sys.argv[1:4], sys.argv[4] == "yes")))
    heads = ["model", "passes", "dtype", "checkpointing", "planned", "measured", "planned / measured", "within 15 %"]
    load, rows = load_before(), [heads]
    for what in itertools.product(SIZES, ("one", "several"), ("float32", "bfloat16"), ("no", "yes")):
        command = [sys.executable, __file__, *what]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        said, was = json.loads(output.splitlines()[-1])
        share = said / was
        sizes = [f"{said / 1e9:.2f} GB", f"{was / 1e9:.2f} GB", f"{share:.2f}"]
        rows.append([*what, *sizes, "yes" if abs(share - 1) <= 0.15 else "NO"])
    print(f"{table(rows)}\n\n{describe(machine(torch.get_num_threads(), load))}")


if __name__ == "__main__":
    main()
