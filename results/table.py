"""Print the README's tables of results from the committed runs: `python results/table.py`."""

import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from plot_metrics import t_interval  # noqa: E402
from tasks import OPERATIONS, Example, arithmetic  # noqa: E402

MEASURES = {"accuracy": "greedy", "sampled_accuracy": "T = 1", "sampled_working": "shows working, T = 1"}


def read(study: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(HERE.glob(f"{study}/seed*/evaluation.json"))]


def row(name: str, values: list[float]) -> str:
    cells = " | ".join(f"{value:.1%}" for value in values)
    return f"| {name} | {cells} | {statistics.fmean(values):.1%} ± {statistics.stdev(values):.1%} |"


def table(study: str, which: tuple[str, ...]) -> None:
    runs = read(study)
    print(f"\n{study}\n\n| held-out | {' | '.join(f'seed {i}' for i in range(len(runs)))} | mean ± sd |")
    print("| --- |" + " --- |" * (len(runs) + 1))
    for policy in which:
        for key, name in MEASURES.items():
            print(row(f"{policy}: {name}", [run[policy][key] for run in runs]))


def second_step(example: Example) -> tuple[int, str, int]:
    """The second operation of a problem: (4 - 9) * 6 has (-5, "*", 6)."""
    a, first, b, second, c = re.fullmatch(r"What is \((\d) (.) (\d)\) (.) (\d)\?", example.prompt).groups()
    return OPERATIONS[first](int(a), int(b)), second, int(c)


splits = arithmetic()
trained = {second_step(example) for example in splits["train"]}
for name in ("validation", "held_out"):
    unseen = statistics.fmean(second_step(example) not in trained for example in splits[name])
    print(f"{name}: {unseen:.1%} of the problems have a second step that no training problem has")
table("main", ("base", "best", "last"))
table("long", ("last",))
table("shuffled", ("base", "last"))
print("\nWhat the text on study B says of single runs:")
for folder in [*sorted(HERE.glob("algorithms/*/")), *sorted(HERE.glob("rewards/*/"))]:
    steps = [
        [json.loads(line) for line in path.read_text().splitlines()][1:]
        for path in sorted(folder.glob("seed*/metrics.jsonl"))
    ]
    samples = statistics.fmean(line["samples"] for run in steps for line in run)
    clipped = statistics.fmean(line["clip_low"] + line["clip_high"] for run in steps for line in run[:15])
    study = f"{folder.parent.name}/{folder.name}"
    base, last = ([run[which]["sampled_accuracy"] for run in read(study)] for which in ("base", "last"))
    print(f"{study}: {samples:,.0f} completions a step, {clipped:.2%} of the tokens clipped in the first 15 steps;")
    print(f"  held out, T = 1: {statistics.fmean(base):.1%} to {', '.join(f'{value:.1%}' for value in last)} by seed")
changes = [run["last"]["sampled_accuracy"] - run["base"]["sampled_accuracy"] for run in read("shuffled")]
mean, _, half = t_interval(np.array(changes))
print(f"\nshuffled, change at T = 1: {mean:+.1%}, 95 % interval [{mean - half:+.1%}, {mean + half:+.1%}]")
