"""Draw the figures of study A and print its table from results/odd_even: `python results/odd_even.py [FOLDER]`."""

import json
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from plot_metrics import STYLE, t_interval  # noqa: E402

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


def results(policy: str, method: str) -> list[dict[str, float]]:
    return [last(folder) for folder in sorted((HERE / "odd_even" / policy / method).glob("seed*"))]


def table() -> str:
    """The comparison in Markdown: mean and 95 % interval over seeds of each measure, greedy, on held-out sums."""
    lines = ["| policy | method | odd sums right | even sums right | even answers | mean error |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for policy in POLICIES:
        for method, name in METHODS.items():
            runs, cells = results(policy, method), []
            for key in (*MEASURES, "mean_error"):
                values = [run[key] for run in runs if key in run]
                mean, half = statistics.fmean(values), t_interval(np.array(values))[2]
                low, high = mean - half, mean + half
                form = ".2f" if key == "mean_error" else ".1%"
                if key != "mean_error":
                    low, high = max(low, 0.0), min(high, 1.0)
                cells.append(f"{mean:{form}} [{low:{form}}, {high:{form}}]")
            lines.append(f"| {policy} | {' '.join(name.split())} | {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison() -> plt.Figure:
    figure, axes = plt.subplots(2, 1, figsize=(11, 7), layout="constrained", sharex=True)
    for ax, policy in zip(axes, POLICIES, strict=True):
        for i, (key, label) in enumerate(MEASURES.items()):
            for j, method in enumerate(METHODS):
                values = [run[key] for run in results(policy, method)]
                x = j + 0.27 * (i - 1)
                ax.bar(x, statistics.fmean(values), 0.25, color=f"C{i}", alpha=0.8, label=label if j == 0 else None)
                ax.plot([x] * len(values), values, ".", color="black", markersize=4)
        ax.set(title=f"{policy}: held-out sums, greedy; bars the mean of five seeds, dots the seeds", ylim=(0, 1.03))
        ax.set_axisbelow(True)
        ax.yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1))
    axes[0].legend(ncols=3, loc="upper left", bbox_to_anchor=(0.55, 1.14))
    axes[1].set_xticks(range(len(METHODS)), METHODS.values())
    return figure


def sweep(policy: str, setting: str) -> dict[float, dict[str, float]]:
    """Results by value of a setting, the comparison's own among them, seed 0."""
    points = {SETTINGS[setting][POLICIES.index(policy)]: last(HERE / "odd_even" / policy / "grpo" / "seed0")}
    for folder in (HERE / "odd_even" / policy / "sweep" / setting).iterdir():
        points[float(folder.name)] = last(folder)
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
    print(table(), sweep_lines(), sep="\n\n")


if __name__ == "__main__":
    main()
