"""Print the README's tables of results from the committed runs: `python results/table.py`."""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
T_95 = 2.776  # 97.5 % quantile of Student's t with 4 degrees of freedom: five paired seeds


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
        for key, name in (
            ("accuracy", "greedy"),
            ("sampled_accuracy", "T = 1"),
            ("sampled_working", "shows working, T = 1"),
        ):
            print(row(f"{policy}: {name}", [run[policy][key] for run in runs]))


table("main", ("base", "best", "last"))
table("long", ("last",))
table("shuffled", ("base", "last"))
changes = [run["last"]["sampled_accuracy"] - run["base"]["sampled_accuracy"] for run in read("shuffled")]
half = T_95 * statistics.stdev(changes) / len(changes) ** 0.5
mean = statistics.fmean(changes)
print(f"\nshuffled, change at T = 1: {mean:+.1%}, 95 % interval [{mean - half:+.1%}, {mean + half:+.1%}]")
