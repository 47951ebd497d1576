"""Draw the figure of study C and print its tables from results/stale: `python results/stale.py [FOLDER]`."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from plot_metrics import STYLE, RunFiles, read_run, t_interval  # noqa: E402

ROWS, LAGS = ("grpo", "rloo", "cispo", "gspo"), (0, 1, 4, 16)
METHODS = {"": "as it is", "_truncate": "truncated importance weights"}


def runs(name: str) -> list[RunFiles]:
    """The runs of a setting, a seed each."""
    found = [read_run(path) for path in sorted((HERE / "stale" / name).glob("seed*"))]
    if not found:
        sys.exit(f"stale.py: error: no run of {name}: make it with bash results/study_c.sh")
    return found


def setting(row: str, lag: int, method: str) -> str:
    return f"{row}_{lag}{method if lag else ''}"  # without a lag there is nothing to correct


def accuracy(name: str) -> np.ndarray:
    """Shares of held-out problems that the last policy answers rightly at T = 1, by seed."""
    return np.array([run.evaluation["last"]["sampled_accuracy"] for run in runs(name)])


def mean_of(name: str, key: str) -> float:
    """The mean of a metric over seeds and steps."""
    return float(np.mean([line[key] for run in runs(name) for line in run.metrics if key in line]))


def points(values: np.ndarray) -> str:
    mean, _, half = t_interval(100 * values)
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def table() -> str:
    """Held-out accuracy by row and lag, the cost of the lag and what the weights mend, paired by seed."""
    heads = ["row", "lag", "right, T = 1", "change by the lag", "corrected", "change by the weights"]
    heads += ["KL of sampler and policy, nats a token", "mean weight"]
    lines = [heads, ["---"] * len(heads)]
    for row in ROWS:
        fresh = accuracy(setting(row, 0, ""))
        for lag in LAGS:
            plain, corrected = setting(row, lag, ""), setting(row, lag, "_truncate")
            without, with_weights = accuracy(plain), accuracy(corrected)
            cells = [f"`{row}`", str(lag), f"{without.mean():.1%} ± {without.std(ddof=1):.1%}"]
            if not lag:
                lines.append([*cells, *["–"] * 3, f"{mean_of(plain, 'sampler_kl'):.4f}", "–"])
                continue
            cells += [points(without - fresh), f"{with_weights.mean():.1%} ± {with_weights.std(ddof=1):.1%}"]
            cells += [points(with_weights - without), f"{mean_of(plain, 'sampler_kl'):.4f}"]
            lines.append([*cells, f"{mean_of(corrected, 'weight'):.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cheaper() -> str:
    """What a bfloat16 sampler changes."""
    fresh, copy = accuracy("grpo_0"), accuracy("grpo_bfloat16")
    gap, kl = (mean_of("grpo_bfloat16", key) for key in ("sampler_gap", "sampler_kl"))
    return (
        f"grpo, sampled in bfloat16: right {copy.mean():.1%} ± {copy.std(ddof=1):.1%}, {points(copy - fresh)} points; "
        f"largest gap of a log-probability {gap:.3f} by the mean of all steps, KL {kl:.0e} nats a token"
    )


def figure() -> plt.Figure:
    """Accuracy against lag, a panel a row; the band is the 95 % interval of the mean over seeds."""
    made, axes = plt.subplots(1, len(ROWS), figsize=(13, 3.8), layout="constrained", sharey=True)
    for ax, row in zip(axes, ROWS, strict=True):
        for colour, (method, label) in zip(("C3", "C0"), METHODS.items(), strict=True):
            values = [accuracy(setting(row, lag, method)) for lag in LAGS]
            means, _, halves = zip(*map(t_interval, values), strict=True)
            low, high = np.subtract(means, halves), np.add(means, halves)
            x = np.arange(len(LAGS))
            ax.plot(x, means, "o-", color=colour, label=label)
            ax.fill_between(x, low, np.minimum(high, 1), color=colour, alpha=0.2, linewidth=0)
            for at, each in zip(x, values, strict=True):
                ax.plot([at] * len(each), each, ".", color=colour, markersize=3)
        ax.set(title=row, xlabel="rollouts of so many steps ago")
        ax.set_xticks(range(len(LAGS)), map(str, LAGS))
        ax.yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes[0].set_ylabel("held-out problems right, T = 1")
    axes[0].legend(loc="lower left")
    seeds = len(runs(setting(ROWS[0], 0, "")))
    made.suptitle(
        f"arithmetic, 40 steps of two inner updates; mean of {seeds} seeds, its 95 % interval, dots the seeds"
    )
    return made


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "stale"
    with plt.style.context(["default", STYLE]):
        made = figure()
        for kind in ("png", "svg"):
            made.savefig(out / f"stale.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else None)
    print(table(), cheaper(), sep="\n\n")


if __name__ == "__main__":
    main()
