"""A run that is killed again and again, against the one that never was: equal bit for bit, or something was lost.

    python tests/bench_faults.py [--kills 100]
    python tests/bench_faults.py --cost          the share of a run's time that saving takes, at the default interval
    python tests/bench_faults.py --ranks         seconds of a step of the main job by one and by two processes

SIGKILL at random instants from the start of the process to its end, every fifth one aimed at a moment of a save; then
`--resume`, until the run has come to its end. Compared are weights, optimizer, metrics (without the clock's), samples
and evaluation. A process that had ended by itself is no kill: what it has made is compared, and the run begins again
from nothing for the kills that are left.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
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
from checkpoints import new_policy, save

RUN = [
    *("--task", "arithmetic", "--rewards", "char_length=1", "--ideal-length", "5"),
    *("--batch-size", "4", "--num-generations", "4", "--max-new-tokens", "8", "--eval-limit", "6", "--device", "cpu"),
    *("--num-inner-updates", "2", "--ref-update-every", "3", "--steps", "12", "--eval-every", "3", "--save-every", "2"),
]
KILLS_OF_ONE_RUN = 4
TENSORS = [f"{name}.safetensors" for name in ("weights", "optimizer", "reference")]
MOMENTS = [".", *TENSORS, "position.json", "checksums.json"]  # of a save, by what has just appeared


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
    files = ["model.safetensors", "evaluation.json"]
    files += [f"resume/000012/{name}" for name in (*TENSORS, "position.json")]
    return logs | {name: (out / name).read_bytes() for name in files}


def half_done(out: Path) -> set:
    """What a save that is under way, or was cut short, has left: its folder as it last changed, a state too many."""
    partial, kept = out / "resume" / ".partial", sorted((out / "resume").glob("[0-9]*"))
    found = {tuple(kept)} if len(kept) > 2 else set()
    with contextlib.suppress(FileNotFoundError):
        found.add(partial.stat().st_mtime_ns)
    return found


def wait_for_a_save(process: subprocess.Popen, out: Path, rng: random.Random) -> None:
    """Until a moment of one of the next saves, if it comes to that: just after a file of it has appeared."""
    moment, left, begun = rng.choice(MOMENTS), rng.randrange(3), False
    before = half_done(out)  # by an earlier kill: gone before the next save begins
    while process.poll() is None:
        under_way = bool(half_done(out) - before)
        left -= begun and not under_way
        begun = under_way
        if left <= 0 and begun and (out / "resume" / ".partial" / moment).exists():
            return time.sleep(rng.uniform(0, 0.004))  # a save takes the toy about 0.02 s
        time.sleep(0.0002)
    return None


def survive(base: Path, out: Path, seed: int, seconds: float, kills: int = KILLS_OF_ONE_RUN) -> tuple[list[dict], int]:
    """What a run that was killed so often has made, each time that it came to its end, and the kills inside a save.

    `seconds` is how long one takes that is not killed; the first is made in out/0, one that begins again in out/1.
    """
    rng, outcomes, killed, inside = random.Random(seed), [], 0, 0
    out.mkdir()
    while True:
        run = out / str(len(outcomes))
        more, before = ["--resume"] if (run / "run.json").exists() else [], half_done(run)
        with open(out / "said", "w") as said:
            process = subprocess.Popen(command(base, run, *more), stdout=said, stderr=said)
        if killed < kills:
            if (seed * kills + killed) % 5 == 0:
                wait_for_a_save(process, run, rng)
            else:
                time.sleep(rng.uniform(0.3, 1.0) * seconds)
            process.kill()
        if process.wait() == -signal.SIGKILL:
            killed += 1
            inside += bool(half_done(run) - before)
            continue
        assert process.returncode == 0, (out / "said").read_text()
        outcomes.append(outcome(run))
        if killed == kills:
            return outcomes, inside


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

        def end(seed: int) -> tuple[list[bool], int]:
            outcomes, inside = survive(base, folder / str(seed), seed, seconds)
            if any(found != whole for found in outcomes):
                shutil.copytree(folder / str(seed), Path(tempfile.gettempdir()) / f"lost-{seed}")
            return [found == whole for found in outcomes], inside

        runs = -(-kills // KILLS_OF_ONE_RUN)
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(end, range(runs)))
    equal = [same for each, _ in results for same in each]
    inside = sum(number for _, number in results)
    print(f"{runs * KILLS_OF_ONE_RUN} kills of a living process, {inside} inside a save")
    print(f"{sum(equal)} of {len(equal)} runs that came to their end equal to the one that was never killed")
    sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    main()
