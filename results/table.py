"""Print the tables of results/README.md, and the summary in README.md, from the committed runs.

python results/table.py
"""

import dataclasses
import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from enumeration import angles  # noqa: E402

from grpo import ALGORITHMS, Algorithm  # noqa: E402
from inference import bootstrap  # noqa: E402
from plot_metrics import RunFiles, read_run, samples_to, t_interval  # noqa: E402
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


def evaluations(folder: str, which: str) -> list[dict]:
    """One policy's held-out evaluations, a seed each: `which` is base, best or last."""
    return [json.loads(path.read_text())[which] for path in sorted(HERE.glob(f"{folder}/seed*/evaluation.json"))]


def summary(what: str, measure: str, key: str, before: list[dict], after: list[dict]) -> str:
    """A line of README.md's table: mean before and after, and the change, paired by seed, with its 95 % interval."""
    old, new = (np.array([result[key] for result in results]) for results in (before, after))
    mean, _, half = t_interval(100 * (new - old))
    change = f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"
    return f"| {what} | {measure} | {len(old)} | {old.mean():.1%} | {new.mean():.1%} | {change} |"


def print_summary() -> None:
    right, sampled, greedy = "right, T = 1", "sampled_accuracy", "accuracy"
    main, grpo = evaluations("main", "base"), evaluations("algorithms/grpo", "last")
    print("\nREADME.md\n\n| study | held-out share of | seeds | before | after | change in points |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(summary("the main job, 40 steps", right, sampled, main, evaluations("main", "best")))
    print(summary("the same", "right, greedy", greedy, main, evaluations("main", "best")))
    print(summary("the same", "shows working, T = 1", "sampled_working", main, evaluations("main", "best")))
    for what, folder in (
        ("120 steps, the last policy", "long"),
        ("control: shuffled rewards", "shuffled"),
        ("`perplexity` as the only reward", "rewards/perplexity"),
    ):
        print(summary(what, right, sampled, *(evaluations(folder, which) for which in ("base", "last"))))
    before, after = [held_out_500("base")] * 2, [held_out_500(f"seed{seed}") for seed in (0, 1)]
    print(summary("SmolLM2-135M, 30 steps", right, sampled, before, after))
    print(summary("`dapo` (after) against `grpo`", right, sampled, grpo, evaluations("algorithms/dapo", "last")))
    for policy in ("autoencoder", "transformer"):
        biased, trained = (evaluations(f"odd_even/{policy}/{method}", "last") for method in ("biased", "grpo"))
        print(summary(f"`odd_even`, {policy}", "even sums right, greedy", "even_accuracy", biased, trained))


def held_out_500(name: str) -> dict:
    """SmolLM2's results on 500 held-out problems: of the base, or of a seed's policy."""
    (result,) = json.loads((HERE / "smollm2" / f"{name}.json").read_text())["results"].values()
    return result


def smollm2() -> None:
    """The table of SmolLM2 on arithmetic: 500 held-out problems, before and after."""
    measures = {"accuracy": "greedy", "sampled_accuracy": "T = 1", "pass@4": "pass@4"}
    print(f"\nsmollm2\n\n| 500 held-out problems | {' | '.join(measures.values())} | format, T = 1 | tokens, T = 1 |")
    print("| --- |" + " --- |" * (len(measures) + 2))
    for name in ("base", "seed0", "seed1", "shuffled"):
        result = held_out_500(name)
        cells = [f"{result[key]:.1%} [{result[f'{key}_low']:.1%}, {result[f'{key}_high']:.1%}]" for key in measures]
        cells += [f"{result['sampled_format']:.1%}", f"{result['sampled_length']:.1f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def summaries() -> None:
    """The table of SmolLM2's summaries: 75 held-out abstracts, before and after."""
    print("\nsummaries\n\n| 75 held-out abstracts | within 25 % of 40 tokens | overlap | tokens | cut at 96 |")
    print("| --- | --- | --- | --- | --- |")
    for name in ("base", "summaries"):
        lines = (HERE / "smollm2" / "summaries" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        for how, chosen in (("greedy", True), ("T = 1", False)):
            some = [row for row in rows if row["greedy"] == chosen]
            near = np.array([abs(row["length"] - 40) <= 10 for row in some]).reshape(75, -1).mean(1)
            overlap = np.array([row["overlap"] for row in some]).reshape(75, -1).mean(1)
            cells = [f"{value.mean():{form}}" for value, form in ((near, ".1%"), (overlap, ".3f"))]
            spans = [[f"{end:{form}}" for end in bootstrap(x)] for x, form in ((near, ".1%"), (overlap, ".3f"))]
            cells = [f"{cell} [{low}, {high}]" for cell, (low, high) in zip(cells, spans, strict=True)]
            cells += [f"{statistics.fmean(row['length'] for row in some):.1f}"]
            cells += [f"{statistics.fmean(row['truncated'] for row in some):.1%}"]
            print(f"| {name}, {how} | {' | '.join(cells)} |")


def runs_of(name: str) -> list[RunFiles]:
    """The runs of a row of study B, a seed each."""
    return [
        read_run(path) for study in ("algorithms", "more_rows") for path in sorted(HERE.glob(f"{study}/{name}/seed*"))
    ]


def rows() -> None:
    """Each row of the table of algorithms: what it changes, its bias, and what it came to in study B."""
    without_kl, grpo = runs_of("grpo_without_kl"), runs_of("grpo")
    heads = ["row", "other than `grpo --beta 0`", "angle", "samples to 90 %", "right, T = 1", "difference, points"]
    print(f"\nrows\n\n| {' | '.join([*heads, 'a step, of `grpo`'])} |\n| --- |" + " --- |" * len(heads))
    plain = Algorithm(beta=0.0)
    for name, row in ALGORITHMS.items():
        cells = [f.name for f in dataclasses.fields(row) if getattr(row, f.name) != getattr(plain, f.name)]
        values = {cell.replace("_", " "): getattr(row, cell) for cell in cells if cell not in row.idle}
        shown = ", ".join(f"{cell} {value}" for cell, value in values.items())
        runs = runs_of(name)
        samples = interval(np.array([samples_to(run) for run in runs]), ",.0f")
        right = np.array([run.evaluation["last"]["sampled_accuracy"] for run in runs])
        others = np.array([run.evaluation["last"]["sampled_accuracy"] for run in without_kl])
        angle = angles(dataclasses.replace(row, beta=0.0, k=2))
        measured = [samples, interval(100 * right, ".1f"), interval(100 * (right - others), "+.1f")]
        measured.append(f"{seconds(runs) / seconds(grpo):.2f}")
        print(f"| `{name}` | {' | '.join([shown, angle, *measured])} |")


def seconds(runs: list[RunFiles]) -> float:
    """The median time of a step."""
    return statistics.median(record["seconds"] for run in runs for record in run.metrics if "seconds" in record)


def interval(values: np.ndarray, form: str) -> str:
    mean, _, half = t_interval(values)
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


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
rows()
smollm2()
summaries()
print_summary()
print("\nWhat the text on study B says besides its tables; differences from the baseline, paired by seed:")
for study, baseline in (("algorithms", "grpo"), ("rewards", "shaped")):
    settings = {path.name: [read_run(run) for run in sorted(path.glob("seed*"))] for path in (HERE / study).glob("*/")}
    for name, runs in sorted(settings.items()):
        steps = [record for run in runs for record in run.metrics if "samples" in record]
        samples = statistics.fmean(record["samples"] for record in steps)
        clipped = statistics.fmean(r["clip_low"] + r["clip_high"] for r in steps if r["step"] <= 15)
        base, last = ([run.evaluation[which]["sampled_accuracy"] for run in runs] for which in ("base", "last"))
        print(f"{study}/{name}: {samples:,.0f} completions a step, {clipped:.2%} of the tokens clipped in 15 steps;")
        print(
            f"  held out, T = 1: {statistics.fmean(base):.1%} to {', '.join(f'{value:.1%}' for value in last)} by seed;"
        )
        pairs = list(zip(runs, settings[baseline], strict=True))
        greedy = [
            100 * (run.evaluation["last"]["accuracy"] - other.evaluation["last"]["accuracy"]) for run, other in pairs
        ]
        sooner = [samples_to(run) - samples_to(other) for run, other in pairs]
        for what, values, form in (("greedy, points", greedy, "+.2f"), ("samples to 90 %", sooner, "+,.0f")):
            mean, _, half = t_interval(np.array(values))
            print(f"  {what}: {mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]")
changes = [run["last"]["sampled_accuracy"] - run["base"]["sampled_accuracy"] for run in read("shuffled")]
mean, _, half = t_interval(np.array(changes))
print(f"\nshuffled, change at T = 1: {mean:+.1%}, 95 % interval [{mean - half:+.1%}, {mean + half:+.1%}]")
