"""A run that is killed again and again, against the one that never was: equal bit for bit, or something was lost.

    python tests/bench_faults.py [--kills 100]
    python tests/bench_faults.py --cost          the share of a run's time that saving takes, at the default interval
    python tests/bench_faults.py --ranks         seconds of a step of the main job by one and by two processes

SIGKILL at random instants from the start of the process to its end, every fifth one inside a save; then `--resume`,
until the run has come to its end. Compared are weights, optimizer, metrics (without the clock's), samples and
evaluation.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_main import ROOT

import grpo
import runs
from checkpoints import save
from sft import new_policy

RUN = [
    *("--task", "arithmetic", "--rewards", "char_length=1", "--ideal-length", "5"),
    *("--batch-size", "4", "--num-generations", "4", "--max-new-tokens", "8", "--eval-limit", "6", "--device", "cpu"),
    *("--num-inner-updates", "2", "--ref-update-every", "3", "--steps", "12", "--eval-every", "3", "--save-every", "2"),
]
KILLS_OF_ONE_RUN = 4


def tiny(folder: Path) -> Path:
    """A checkpoint of a toy with random weights."""
    save(new_policy([string.printable], 0, torch.device("cpu")), folder)
    return folder


def command(base: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "grpo.py"), *RUN, "--model", str(base), "--out", str(out), *more]


def outcome(out: Path) -> dict[str, object]:
    """What a run has made, without what a clock says."""
    logs = {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [json.loads(line) for line in (out / name).read_text().splitlines()]
        logs[name] = [{key: x for key, x in row.items() if "second" not in key} for row in rows]
    files = ["model.safetensors", "evaluation.json", "resume/000012/weights.safetensors"]
    files += [
        "resume/000012/optimizer.safetensors",
        "resume/000012/reference.safetensors",
        "resume/000012/position.json",
    ]
    return logs | {name: (out / name).read_bytes() for name in files}


def kill_in_a_save(process: subprocess.Popen, out: Path) -> None:
    """Kill the process while it writes a state, if it comes to that."""
    partial = out / "resume" / ".partial"
    while process.poll() is None and not partial.exists():
        time.sleep(0.0002)
    process.kill()


def survive(base: Path, out: Path, seed: int, seconds: float, kills: int = KILLS_OF_ONE_RUN) -> dict[str, object]:
    """The outcome of a run that was killed so often; `seconds` is how long one takes that is not."""
    rng, more = random.Random(seed), []
    for kill in range(kills):
        process = subprocess.Popen(command(base, out, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if (seed * kills + kill) % 5 == 0:
            kill_in_a_save(process, out)
        else:
            time.sleep(rng.uniform(0.3, 1.0) * seconds)
            process.kill()
        process.wait()
        more = ["--resume"] if (out / "run.json").exists() else []
    last = subprocess.run(command(base, out, *more), capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    return outcome(out)


def cost() -> str:
    """What saving takes of 20 steps of the main job, in this process."""
    real, saving = runs.save_state, []

    def save_state(*given) -> None:
        start = time.perf_counter()
        real(*given)
        saving.append(time.perf_counter() - start)

    runs.save_state, grpo.report = save_state, lambda run: None
    with tempfile.TemporaryDirectory() as name:
        base = tiny(Path(name) / "base")
        run = grpo.prepare(grpo.GRPOConfig(model=str(base), out=f"{name}/run", steps=20, eval_limit=1, eval_every=20))
        start = time.perf_counter()
        with run:
            for step in run.steps():
                run.log(step, run.attempt(grpo.train_step, step))
        whole = time.perf_counter() - start
    return f"{len(saving)} states in 20 steps: {sum(saving):.2f} of {whole:.1f} s, {sum(saving) / whole:.1%}"


def step_times() -> str:
    """Median seconds of eight steps of the main job by one process with one and two threads, and by two with one."""
    told = []
    with tempfile.TemporaryDirectory() as name:
        base = tiny(Path(name) / "base")
        for processes, threads in ((1, 1), (1, 2), (2, 1)):
            out = Path(name) / f"{processes}-{threads}"
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            flags = ["--steps", "9", "--eval-limit", "2", "--eval-every", "99", "--model", str(base), "--out", str(out)]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            subprocess.run([*start, str(ROOT / "grpo.py"), *flags], check=True, capture_output=True, env=environment)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            seconds = statistics.median(line["seconds"] for line in lines[2:])
            told.append(f"{processes} x {threads} threads: {seconds:.2f} s a step")
    return "\n".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--ranks", action="store_true")
    arguments = parser.parse_args()
    if arguments.cost:
        return print(cost())
    if arguments.ranks:
        return print(step_times())
    kills = arguments.kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, start = tiny(folder / "base"), time.perf_counter()
        subprocess.run(command(base, folder / "whole"), check=True, capture_output=True)
        seconds, whole = time.perf_counter() - start, outcome(folder / "whole")

        def equal(seed: int) -> bool:
            found = survive(base, folder / str(seed), seed, seconds) == whole
            if not found:
                shutil.copytree(folder / str(seed), Path(tempfile.gettempdir()) / f"lost-{seed}")
            return found

        runs = -(-kills // KILLS_OF_ONE_RUN)
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(equal, range(runs)))
    print(f"{sum(results)} of {runs} runs equal to the one that was never killed, {runs * KILLS_OF_ONE_RUN} kills")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
