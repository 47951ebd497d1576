"""Time and memory of the whole `python grpo.py --task arithmetic`, and of one answer of `inference.py`.

    python tests/bench_main.py

runs the command in an empty folder, as a user would, prints a table and writes results/bench_main.json. Flags that
this program does not know go to grpo.py (`--steps 3`). Nothing else should be running on the machine.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "What is (4 - 9) * 6?"
IMPORTS = [sys.executable, "-c", "import torch, transformers"]
# measure: (what it is, unit, most that is allowed)
TARGETS = {
    "wall": ("the whole command (aim: 90 s)", "s", 120.0),
    "sft": ("until the base policy is saved: start, data, SFT", "s", None),
    "grpo": ("GRPO's part: all that comes after the base policy", "s", 75.0),
    "grpo_steps": ("of that, the GRPO steps", "s", None),
    "peak": ("peak memory", "GB", 1.5),
    "inference": ("one answer of inference.py", "s", None),
    "imports": ("`import torch, transformers` alone", "s", None),
    "inference_ratio": ("one answer over the imports", "x", 2.0),
}


def load_before() -> float:
    """How many processes were running in the last minute; warns if the machine is not idle."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: the machine is busy (load {load:.1f}), so these times mean little", file=sys.stderr)
    return round(load, 2)


def machine(threads: int, load: float) -> dict[str, str | int | float]:
    """What the numbers depend on: processor, cores that this process may use, threads, load before, versions."""
    names = [line.partition(":")[2].strip() for line in cpu_lines() if line.startswith("model name")]
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": threads,
        "load before": load,
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def describe(values: dict[str, str | int | float]) -> str:
    return "machine: " + ", ".join(f"{name} {value}" for name, value in values.items())


def write(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def run(command: list[str], folder: Path, quiet: bool) -> tuple[float, float]:
    """Run to the end in `folder`; seconds and peak memory in GB (1e9 bytes). Raises SystemExit if it fails."""
    start = time.perf_counter()
    child = subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL if quiet else None
    )
    _, status, usage = os.wait4(child.pid, 0)  # the usage of this child, not the largest of all children so far
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"bench_main.py: {' '.join(command)} ended with status {child.returncode}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def measure_training(folder: Path, flags: list[str]) -> dict[str, float | None]:
    """Run the main command; its parts follow from when the base policy's files were written."""
    begin = time.time()
    seconds, peak = run([sys.executable, str(ROOT / "grpo.py"), "--task", "arithmetic", *flags], folder, quiet=False)
    out = folder / "saved_model"
    made = out / "base" / "model.safetensors"  # written once, when SFT ends
    base = made.stat().st_mtime - begin if made.exists() else None
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "wall": seconds,
        "sft": base,
        "grpo": seconds - (base or 0.0),
        "grpo_steps": sum(line.get("seconds", 0.0) for line in lines),
        "peak": peak,
        "threads": json.loads((out / "run.json").read_text())["threads"],
        "evaluation": json.loads((out / "evaluation.json").read_text()),
    }


def measure_inference(folder: Path, rounds: int) -> dict[str, float]:
    """Median seconds of one answer and of the imports alone, run in turns after one warm-up of each."""
    answer = [sys.executable, str(ROOT / "inference.py"), QUESTION]
    pairs = [(run(answer, folder, quiet=True)[0], run(IMPORTS, folder, quiet=True)[0]) for _ in range(rounds + 1)][1:]
    return {
        "inference": statistics.median(pair[0] for pair in pairs),
        "imports": statistics.median(pair[1] for pair in pairs),
        "inference_ratio": statistics.median(pair[0] / pair[1] for pair in pairs),
    }


def report(values: dict) -> str:
    rows = [["measure", "value", "target", "met"]]
    for name, (text, unit, most) in TARGETS.items():
        if values[name] is not None:
            target = "" if most is None else f"<= {most:g} {unit}"
            met = "" if most is None else "yes" if values[name] <= most else "NO"
            rows.append([text, f"{values[name]:.2f} {unit}", target, met])
    accuracy = ", ".join(f"{name} {result['accuracy']:.1%}" for name, result in values["evaluation"].items())
    return f"{table(rows)}\n\nheld-out accuracy, greedy: {accuracy}\n{describe(values['machine'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, help="timed answers of inference.py (default: 5)")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "bench_main.json", help="file to write")
    arguments, flags = parser.parse_known_args()
    load = load_before()
    with tempfile.TemporaryDirectory() as folder:
        values = measure_training(Path(folder), flags)
        values |= measure_inference(Path(folder), arguments.rounds)
    values |= {"machine": machine(values.pop("threads"), load), "flags": flags}
    write(arguments.results, values)
    print(f"\n{report(values)}\nwritten: {arguments.results}")


if __name__ == "__main__":
    main()
