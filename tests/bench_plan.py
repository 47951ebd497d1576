"""What `grpo.py --dry-run` says of a step's peak memory, against the peak that was measured.

    python tests/bench_plan.py

A toy, a small model of 30 million weights and one of 135 million, random weights, float32, with and without gradient
checkpointing; one step each (sampling, reference, update) in a process of its own. Prints a table.
"""

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
STEPS = {  # sizes, prompts, group, tokens of a prompt, tokens of a completion
    "toy": ((64, 128, 512, 4, 4, 4), 32, 16, 10, 32),
    "small": ((8192, 512, 1408, 8, 8, 8), 4, 8, 32, 64),
    "135M": ((49152, 576, 1536, 30, 9, 3), 1, 8, 32, 32),
}


def one(name: str, checkpointing: bool) -> tuple[float, float]:
    """Bytes that were planned and measured for one step in this process."""
    commands.keep_memory()
    sizes, prompts, group, length, width = STEPS[name]
    policy = random_policy(LlamaConfig(*sizes))
    policy.end_ids, policy.model.checkpointing = [NEVER], checkpointing
    config = GRPOConfig(max_new_tokens=width, micro_batch_tokens=8192)
    budget = config.micro_batch_tokens
    settings = {"micro_batch_tokens": budget, "inner_updates": 1, "reference": 1, "samplers": [], "device": CPU}
    planned = plan(policy, prompts * group, prompts, length, width, **settings)
    peak = planned.peak - planned.parts["weights"][0]  # which the process holds already
    reference, optimizer = frozen(policy), runs.adamw(policy.model, weight_decay=0.0)
    rollout = policy.sample(random_prompts(policy.model.config, prompts, length, False), group, (0, 0, 0), width)
    ref_logp = score_rollout(reference, rollout, budget)
    advantages = torch.randn(prompts, group, generator=torch.Generator().manual_seed(0))
    update(policy, reference, optimizer, rollout, advantages, ref_logp, config)
    return peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def main() -> None:
    if sys.argv[1:]:
        print(json.dumps(one(sys.argv[1], sys.argv[2] == "checkpointing")))
        return
    load, rows = load_before(), [["model", "checkpointing", "planned", "measured", "planned / measured", "within 15 %"]]
    for name in STEPS:
        for way in ("no", "checkpointing"):
            command = [sys.executable, __file__, name, way]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            planned, measured = json.loads(output.splitlines()[-1])
            share = planned / measured
            sizes = [f"{planned / 1e9:.2f} GB", f"{measured / 1e9:.2f} GB", f"{share:.2f}"]
            rows.append([name, "yes" if way != "no" else "no", *sizes, "yes" if abs(share - 1) <= 0.15 else "NO"])
    print(f"{table(rows)}\n\n{describe(machine(torch.get_num_threads(), load))}")


if __name__ == "__main__":
    main()
