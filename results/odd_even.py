"""Draw the figures of study A and print its table from results/odd_even: `python results/odd_even.py [FOLDER]`."""

import json
import math
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from plot_metrics import STYLE, t_interval  # noqa: E402

FIRST, LAST = slice(0, 5), slice(-5, None)  # steps of a run
POLICIES = ("autoencoder", "transformer")
METHODS = {  # folder: what it is called
    "biased": "SFT, biased",
    "biased_longer": "+ SFT, biased",
    "full": "+ SFT, full",
    "grpo": "+ GRPO,\ncloseness",
    "grpo_bonus": "+ GRPO,\ncloseness\nand bonus",
    "grpo_adaptive": "+ GRPO,\ncloseness and\nadaptive bonus",
    "only_bonus": "+ GRPO,\nbonus only",
}
MEASURES = {"odd_accuracy": "odd sums right", "even_accuracy": "even sums right", "even_answers": "even answers"}
SETTINGS = {  # of a sweep: the value that the comparison has, by policy
    "even_data_ratio": (0.0, 0.0),
    "exploration_noise": (0.5, 0.1),
    "even_bonus": (0.0, 0.0),
    "steps": (60.0, 60.0),
    "learning_rate": (1e-4, 1e-4),
}


def last(folder: Path) -> dict[str, float]:
    """The greedy held-out result of a run's last policy."""
    return json.loads((folder / "evaluation.json").read_text())["last"]


def results(policy: str, method: str) -> dict[str, dict[str, float]]:
    """The results of a method by seed."""
    folders = sorted(path.parent for path in (HERE / "odd_even" / policy / method).glob("seed*/evaluation.json"))
    if not folders:
        sys.exit(f"odd_even.py: error: no run of {policy}, {method}: make it with bash results/study_a.sh")
    return {folder.name: last(folder) for folder in folders}


def interval(values: list[float], form: str = "points", least: float = 0.0, most: float = math.inf) -> str:
    """Mean and 95 % interval over seeds as text, cut off where no value can be; differences of shares in points."""
    mean, _, half = t_interval(np.array(values))
    low, high = max(mean - half, least), min(mean + half, most)
    if form == "points":
        return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def table() -> str:
    """The comparison in Markdown, greedy, on held-out sums; differences are paired by seed."""
    measures = {**MEASURES, "mean_error": "mean error"}
    heads = ["policy", "method", *measures.values(), "odd: difference to GRPO, closeness", "even: the same"]
    lines = [heads, ["---"] * len(heads)]
    for policy in POLICIES:
        grpo = results(policy, "grpo")
        for method, name in METHODS.items():
            runs, cells = results(policy, method), []
            for key in measures:
                values = [run[key] for run in runs.values() if key in run]
                cells.append(interval(values, ".2f") if key == "mean_error" else interval(values, ".1%", most=1.0))
            for key in ("odd_accuracy", "even_accuracy"):
                pairs = [runs[seed][key] - grpo[seed][key] for seed in runs.keys() & grpo.keys()]
                cells.append("–" if method == "grpo" else interval(pairs, least=-1.0, most=1.0))
            lines.append([policy, " ".join(name.split()), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def other_lines() -> str:
    """What the text says besides: the gap that biased data leave, and the reward that each method was trained on."""
    lines = []
    for policy in POLICIES:
        gaps = [run["odd_accuracy"] - run["even_accuracy"] for run in results(policy, "biased").values()]
        lines.append(f"{policy}: gap after fine-tuning on odd sums, in points: {interval(gaps, least=-1.0, most=1.0)}")
        for method in list(METHODS)[3:]:
            paths = (HERE / "odd_even" / policy / method).glob("seed*/metrics.jsonl")
            steps = [[json.loads(line) for line in path.read_text().splitlines()][1:] for path in paths]
            ends = [statistics.fmean(line["reward"] for run in steps for line in run[part]) for part in (FIRST, LAST)]
            errors, grpo = ({k: run["mean_error"] for k, run in results(policy, m).items()} for m in (method, "grpo"))
            worse = interval([errors[seed] - grpo[seed] for seed in errors.keys() & grpo.keys()], "+.2f", -math.inf)
            lines.append(
                f"{policy}, {method}: reward {ends[0]:.3f} in the first five steps, {ends[1]:.3f} in the last;"
            )
            lines[-1] += f" mean error {worse} from closeness alone"
    return "\n".join(lines)


def comparison() -> plt.Figure:
    figure, axes = plt.subplots(2, 1, figsize=(11, 7), layout="constrained", sharex=True)
    for ax, policy in zip(axes, POLICIES, strict=True):
        for i, (key, label) in enumerate(MEASURES.items()):
            for j, method in enumerate(METHODS):
                values = [run[key] for run in results(policy, method).values()]
                x = j + 0.27 * (i - 1)
                ax.bar(x, statistics.fmean(values), 0.25, color=f"C{i}", alpha=0.8, label=label if j == 0 else None)
                ax.plot([x] * len(values), values, ".", color="black", markersize=4)
        ax.set(title=f"{policy}: held-out sums, greedy; bars the mean over seeds, dots the seeds", ylim=(0, 1.03))
        ax.set_axisbelow(True)
        ax.yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1))
    axes[0].legend(ncols=3, loc="upper left", bbox_to_anchor=(0.55, 1.14))
    axes[1].set_xticks(range(len(METHODS)), METHODS.values())
    return figure


def sweep(policy: str, setting: str) -> dict[float, dict[str, float]]:
    """Results by value of a setting, the comparison's own among them, seed 0."""
    points = {SETTINGS[setting][POLICIES.index(policy)]: last(HERE / "odd_even" / policy / "grpo" / "seed0")}
    for path in (HERE / "odd_even" / policy / "sweep" / setting).glob("*/evaluation.json"):
        points[float(path.parent.name)] = last(path.parent)
    return dict(sorted(points.items()))


def before(policy: str, ratios: list[float]) -> list[float]:
    """Even sums right after fine-tuning alone, by even_data_ratio, seed 0."""
    at = HERE / "odd_even" / policy
    folders = [at / "sweep" / f"base_{ratio:g}" if ratio else at / "biased" / "seed0" for ratio in ratios]
    return [last(folder)["even_accuracy"] for folder in folders]


def sweeps() -> plt.Figure:
    figure, axes = plt.subplots(2, len(SETTINGS), figsize=(14, 6), layout="constrained", sharey=True)
    for row, policy in zip(axes, POLICIES, strict=True):
        for ax, setting in zip(row, SETTINGS, strict=True):
            points = sweep(policy, setting)
            for i, (key, label) in enumerate(MEASURES.items()):
                ax.plot(range(len(points)), [run[key] for run in points.values()], "o-", color=f"C{i}", label=label)
            if setting == "even_data_ratio":
                alone = before(policy, list(points))
                ax.plot(range(len(points)), alone, "s--", color="gray", label="even sums right, before GRPO")
            ax.set_xticks(range(len(points)), [f"{value:g}" for value in points])
            ax.set(title=f"{policy}: {setting.replace('_', ' ')}", ylim=(-0.02, 1.03))
            ax.yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1))
    axes[0, 0].legend()
    figure.suptitle(
        "SFT on biased sums, then GRPO: one setting changed at a time, seed 0, held-out sums, greedy", x=0.3
    )
    return figure


def sweep_lines() -> str:
    """The sweeps as text, a line for each run."""
    lines = []
    for policy in POLICIES:
        for setting in SETTINGS:
            points = sweep(policy, setting)
            alone = before(policy, list(points)) if setting == "even_data_ratio" else [None] * len(points)
            for (value, run), base in zip(points.items(), alone, strict=True):
                measures = ", ".join(f"{label} {run[key]:.1%}" for key, label in MEASURES.items())
                more = "" if base is None else f" (even sums right before GRPO {base:.1%})"
                lines.append(f"{policy}, {setting} {value:g}: {measures}{more}")
    return "\n".join(lines)


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "odd_even"
    with plt.style.context(["default", STYLE]):
        for name, figure in (("comparison", comparison()), ("sweeps", sweeps())):
            for kind in ("png", "svg"):
                figure.savefig(out / f"{name}.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else None)
    print(table(), other_lines(), sweep_lines(), sep="\n\n")


if __name__ == "__main__":
    main()
