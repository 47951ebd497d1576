"""Peak memory of one GRPO update with a large vocabulary: logits in chunks, and all at once.

    python tests/bench_memory.py

A Llama of about 30 million weights with a vocabulary of 50,000, 4 prompts x 8 completions of 256 tokens, in one
micro-batch with a frozen reference; beside it what `grpo.py --dry-run` estimates. Each way runs in a process of its
own, whose peak resident memory is read from the system at its end. Prints a table and writes
results/bench_memory.json.
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_main import ROOT, describe, load_before, machine, table, write
from bench_sampler import IdsPolicy
from steps import update_on

from grpo import GRPOConfig
from model_toy import Llama, LlamaConfig, character_tokenizer
from plan import plan
from rollouts import Rollout

P, G, PROMPT, LENGTH, VOCABULARY = 4, 8, 32, 256, 50_000
WAYS = {  # name: most logits at once, gradient checkpointing
    "full logits": (10**12, False),
    "logits in chunks": (2**24, False),
    "chunks and checkpointing": (2**24, True),
}


def peak() -> float:
    """Peak resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def one(way: str) -> dict:
    """One update in this process."""
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
    model = Llama(LlamaConfig(VOCABULARY, **sizes, num_key_value_heads=2))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    policy = IdsPolicy(model, character_tokenizer(["1"]))
    policy.chunk_logits, model.checkpointing = WAYS[way]
    reference = copy.copy(policy)
    reference.model = copy.deepcopy(model).requires_grad_(False)
    rollout = Rollout(
        prompts=torch.randint(VOCABULARY, (P, PROMPT), generator=generator),
        prompt_mask=torch.ones(P, PROMPT, dtype=torch.bool),
        group=torch.arange(P).repeat_interleave(G),
        actions=torch.randint(VOCABULARY, (P * G, LENGTH), generator=generator),
        mask=torch.ones(P * G, LENGTH, dtype=torch.bool),
        sampler_logp=torch.zeros(P * G, LENGTH),
        truncated=torch.zeros(P * G, dtype=torch.bool),
        texts=[""] * (P * G),
    )
    rewards = torch.rand(P, G, generator=generator)
    config = GRPOConfig(micro_batch_tokens=10**6, max_new_tokens=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    settings = {
        "micro_batch_tokens": 10**6,
        "inner_updates": 1,
        "reference": True,
        "samplers": [],
        "device": torch.device("cpu"),
    }
    planned = plan(policy, P * G, P, PROMPT, LENGTH, **settings)
    held = planned.parts["weights"][0] + planned.parts["reference"][0]  # which the process holds already
    estimate, before, start = (planned.peak - held) / 1e9, peak(), time.perf_counter()
    metrics = update_on(policy, reference, optimizer, rollout, rewards, config)
    weights = sum(weight.numel() for weight in model.parameters())
    result = {"peak_gb": peak(), "before_gb": before, "seconds": time.perf_counter() - start, "weights": weights}
    return result | {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"], "estimated_gb": estimate}


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of one update with a large vocabulary.")
    parser.add_argument("--way", choices=WAYS, help="Run one way in this process and print it as JSON.")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench_memory.json", help="File to write.")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(one(arguments.way)))
        return
    load, results = load_before(), {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way]
        results[way] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    full = results["full logits"]
    rows = [
        [
            "way",
            "peak",
            "of it before the update",
            "of full logits",
            "target",
            "met",
            "--dry-run says",
            "seconds",
            "grad norm",
        ]
    ]
    for way, result in results.items():
        share = result["peak_gb"] / full["peak_gb"]
        target = ["", ""] if way == "full logits" else ["<= 50 %", "yes" if share <= 0.5 else "no"]
        cells = [f"{result['peak_gb']:.2f} GB", f"{result['before_gb']:.2f} GB", f"{share:.0%}", *target]
        said = f"{result['estimated_gb']:.2f} GB" if way != "full logits" else ""
        rows.append([way, *cells, said, f"{result['seconds']:.0f}", f"{result['grad_norm']:.6f}"])
    values = {"machine": machine(torch.get_num_threads(), load), "ways": results}
    print(f"{table(rows)}\n\n{full['weights']:,} weights; {describe(values['machine'])}")
    write(arguments.out, values)


if __name__ == "__main__":
    main()
