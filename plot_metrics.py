"""Draw one run, or the mean over several (seeds of one setting): `training` has every curve, `accuracy` the result."""

import argparse
import json
import os
import sys
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Laid over matplotlib's defaults, not the reader's matplotlibrc: Okabe and Ito's palette for colour-blind readers, a
# salt that makes an SVG the same at every redraw, no parse_math, so that a `$` in a reward function's name stays one.
STYLE = {"axes.prop_cycle": matplotlib.cycler(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"])}
STYLE |= {"svg.hashsalt": "grpo", "text.parse_math": False, "font.size": 9, "axes.titlesize": 9.5, "axes.grid": True}
STYLE |= {"axes.titlelocation": "left", "axes.spines.right": False, "axes.spines.top": False, "grid.color": "#E8E8E8"}
STYLE |= {"axes.edgecolor": "#B0B0B0", "xtick.color": "dimgray", "ytick.color": "dimgray", "legend.frameon": False}
PANELS = {  # letter in the layout: title, metrics
    "R": ("reward (thin: by function, before weights)", ["reward"]),
    "A": ("accuracy", ["accuracy", "validation_accuracy"]),
    "K": ("KL to the reference (nats per token)", ["kl"]),
    "W": ("completions that show working", ["working"]),
    "E": ("entropy (nats per token)", ["entropy"]),
    "C": ("clipped tokens", ["clip_low", "clip_high"]),
    "L": ("completion length (tokens)", ["length"]),
}
NAMES = {"accuracy": "sampled, training", "validation_accuracy": "greedy, validation"}  # in the legend, for a metric
NAMES |= {"clip_low": "ratio too low", "clip_high": "ratio too high"}
Run = namedtuple("Run", "metrics evaluation settings")  # [{metric: float}], dict, dict: the files of a run folder
Band = namedtuple("Band", "steps mean sd n")  # arrays (S,) over seeds; n counts the runs with a finite value at a step


class PlotError(ValueError):
    """A run that cannot be drawn, in one line that names the thing and the mend."""


def read_run(folder: Path) -> Run:
    """Return what a run folder holds, less a line that is still being written; raises PlotError if that is nothing."""
    path, metrics = folder / "metrics.jsonl", []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        mend = f"make a run with `python grpo.py --task arithmetic --out {folder}`"
        raise PlotError(f"cannot read {path} ({error.strerror}): {mend}") from None
    for count, line in enumerate(lines, 1):
        try:
            record = {k: v for k, v in json.loads(line, parse_int=float).items() if isinstance(v, float)}
            metrics.append(record | {"step": int(record["step"])})
        except (ValueError, AttributeError, KeyError, OverflowError):
            if count < len(lines):
                raise PlotError(f"{path}, line {count}, is no JSON object with a step: mend or delete it") from None
    if not metrics:
        raise PlotError(f"{path} has no complete line yet: draw it again after the first step")
    files = {"evaluation.json": {}, "run.json": {}}
    for name in files:
        with suppress(OSError, ValueError, TypeError):  # not there yet, or not whole
            files[name] = dict(json.loads((folder / name).read_text(encoding="utf-8")))
    return Run(metrics, files["evaluation.json"], files["run.json"].get("settings", {}))


def ema(values: np.ndarray, smooth: float) -> np.ndarray:
    """Return the bias-corrected exponential moving average of values (S,); a NaN stays a gap and is not averaged in."""
    out, total, weight = np.full(len(values), np.nan), 0.0, 0.0
    for i in np.flatnonzero(np.isfinite(values)):
        total, weight = smooth * total + (1 - smooth) * values[i], smooth * weight + (1 - smooth)
        out[i] = total / weight
    return out


def over_seeds(series: list[tuple[np.ndarray, np.ndarray]]) -> Band:
    """Return mean and sd (n - 1; NaN for n < 2) of each run's (steps, values), at the steps that any run has."""
    steps = np.unique(np.concatenate([steps for steps, _ in series]))
    table = np.full((len(series), len(steps)), np.nan)  # (runs, S)
    for row, (own_steps, values) in zip(table, series, strict=True):
        row[np.searchsorted(steps, own_steps)] = values
    table = np.ma.masked_invalid(table)
    return Band(steps, table.mean(0).filled(np.nan), table.std(0, ddof=1).filled(np.nan), table.count(0))


def metric(runs: list[Run], key: str, smooth: float = 0.0) -> Band:
    """Return a metric over seeds, each run smoothed by itself; a step without a value is a gap, save for validation."""
    series = [np.array([(record["step"], record.get(key, np.nan)) for record in run.metrics]).T for run in runs]
    if key.startswith("validation_"):  # measured now and then: only those steps, as they are
        series, smooth = [run[:, np.isfinite(run[1])] for run in series], 0.0
    return over_seeds([(steps, ema(values, smooth)) for steps, values in series])


def heading(runs: list[Run], *bands: Band) -> tuple[str, str]:
    """Return what was trained, and what lines and bands stand for: early stops and gaps leave some steps fewer runs."""
    names = {f"{run.settings.get('algorithm', 'GRPO').upper()} on {run.settings.get('task', 'a task')}" for run in runs}
    count = "" if all(n in (0, len(runs)) for band in bands for n in band.n) else "up to "
    return " and ".join(sorted(names)), f"mean of {count}{len(runs)} runs, band ±1 sd" if len(runs) > 1 else "one run"


def draw(ax: matplotlib.axes.Axes, band: Band, colour: str, **line: object) -> None:
    """Draw a mean as a line, and one sd either side of it as a band where several runs have a value."""
    ax.plot(band.steps, band.mean, color=colour, **line)
    ax.fill_between(band.steps, band.mean - band.sd, band.mean + band.sd, color=colour, alpha=0.2, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))


def training_figure(runs: list[Run], smooth: float) -> Figure:
    """Return the figure of every curve: raw faint, smoothed full, reward functions thin, validation with markers."""
    figure, end = Figure((12, 6), dpi=150, layout="constrained"), max(1, *(run.metrics[-1]["step"] for run in runs))
    functions = dict.fromkeys(k for run in runs for record in run.metrics for k in record if k.startswith("reward/"))
    for letter, ax in figure.subplot_mosaic("RRAK;WECL").items():
        title, keys = PANELS[letter]
        for i, key in enumerate([*keys, *functions] if letter == "R" else keys):
            raw, full, label = metric(runs, key), metric(runs, key, smooth), NAMES.get(key, key.removeprefix("reward/"))
            if key in functions or key.startswith("validation_"):
                ax.plot(full.steps, full.mean, "-" if key in functions else "D", color=f"C{i}", label=label, lw=1, ms=4)
            else:  # with dots, since a line does not show a value between two gaps
                ax.plot(raw.steps, raw.mean, ".-", color=f"C{i}", alpha=0.3, linewidth=0.8, markersize=3)
                draw(ax, full, f"C{i}", label=label, linewidth=1.8)
        ax.set(title=title, xlim=(-0.03 * end, 1.03 * end), xlabel="step (one rollout)")
        if letter in "AWC":
            ax.set_ylim(0, None if letter == "C" else 1.01)
            ax.yaxis.set_major_formatter(PercentFormatter(1))
        if not any(np.isfinite(line.get_ydata()).any() for line in ax.lines):
            ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="dimgray")
        elif len(ax.get_legend_handles_labels()[0]) > 1:
            ax.legend()
    figure.suptitle(", ".join([*heading(runs, metric(runs, "reward")), "faint: unsmoothed"]), x=0.01, ha="left")
    return figure


def accuracy_figure(runs: list[Run]) -> Figure:
    """Return the figure of the result: validation accuracy and working by step, held-out accuracy before and after."""
    figure, end = Figure((8, 4.5), dpi=150), max(1, *(run.metrics[-1]["step"] for run in runs))
    ax = figure.add_axes((0.065, 0.115, 0.665, 0.705))
    curves = [(metric(runs, "validation_accuracy"), "C0", "accuracy, greedy")]
    curves += [(metric(runs, "validation_sampled_accuracy"), "C2", "accuracy, sampled")]
    curves += [(metric(runs, "validation_sampled_working"), "C1", "show working, sampled")]
    labels, held_out, gap, place = [], [], 0.11, -0.11  # labels: (height, colour, text), written at the right edge
    for band, colour, text in curves:
        if band.n.any():  # a run made by an older program has fewer curves
            draw(ax, band, colour, linewidth=2, marker="o", markersize=3.5)
            labels.append((band.mean[-1], colour, f"{band.mean[-1]:.0%} {text}"))
    after = "best" if any("best" in run.evaluation for run in runs) else "last"
    for name, steps, line in (("base", [0, 1.05 * end], "--"), (after, [1.05 * end], "D")):
        values = [(run.evaluation.get(name) or {}).get("accuracy") for run in runs]
        _, (mean,), (sd,), (n,) = over_seeds([([0], np.array([value], float)) for value in values])
        if n:
            ax.errorbar(steps, [mean] * len(steps), sd, fmt=line, color="black")
            spread, of = f" ± {sd:.1%}" if sd >= 5e-4 else "", f", {n} of {len(runs)} runs" if n < len(runs) else ""
            labels.append((mean, "black", f"{mean:.1%}{spread} held-out,\n{name} policy{of}"))
            held_out.append(f"{mean:.0%}")
    for i, (height, colour, text) in enumerate(sorted(labels), 1):  # a gap apart, the highest beside the axes
        place = min(max(height, place + gap), 1 - gap * (len(labels) - i))
        ax.text(1.02, place, text, color=colour, va="center", transform=ax.transAxes)
    ax.set(xlim=(-0.02 * end, 1.08 * end), ylim=(0, 1.01), xlabel="step (one rollout)")
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    trained, seeds = heading(runs, *(band for band, _, _ in curves))
    title = trained + (f": {' → '.join(held_out)} of held-out problems solved" if len(held_out) == 2 else "")
    figure.text(0.02, 0.93, title, weight="bold", fontsize=min(12, 840 / len(title)))
    subtitle = f"lines: validation problems, {seeds}; black: held-out problems, greedy, before and after"
    figure.text(0.02, 0.87, subtitle, color="dimgray")
    return figure


def plot(runs: list[Path], out: Path, smooth: float = 0.6) -> list[Path]:
    """Draw the runs that can be drawn into out, name the others on stderr; raises PlotError when none can."""
    usable, errors, written = [], [], []
    for folder in dict.fromkeys(runs):  # a folder named twice is one seed
        try:
            usable.append(read_run(folder))
        except PlotError as error:
            errors.append(str(error))
    if not usable:
        raise PlotError("; ".join(errors))
    sys.stderr.writelines(f"plot_metrics.py: skipped: {error}\n" for error in errors)
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context(["default", STYLE]):
        for name, figure in (("training", training_figure(usable, smooth)), ("accuracy", accuracy_figure(usable))):
            for kind in ("png", "svg"):
                partial = out / f".{name}.{kind}.{os.getpid()}"
                figure.savefig(partial, format=kind, metadata={"Date": None})
                written.append(partial.replace(out / f"{name}.{kind}"))
    return written


def main() -> None:
    """Draw the runs named on the command line."""
    parser = argparse.ArgumentParser(prog="plot_metrics.py", description=__doc__, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"plot_metrics.py: error: {message}\n")
    add = parser.add_argument
    add("RUN", nargs="*", type=Path, default=[Path("saved_model")], help="run folders to draw (default: saved_model)")
    add("--out", type=Path, help="folder for the figures (default: the RUN itself; for several, `figures`)")
    add("--smooth", type=float, default=0.6, help="weight of the past in the moving average (default: %(default)s)")
    args = parser.parse_args()
    if not 0 <= args.smooth < 1:
        parser.error(f"--smooth {args.smooth:g} is no weight: give a number from 0 to below 1")
    try:
        print(*plot(args.RUN, args.out or Path("figures" if args.RUN[1:] else args.RUN[0]), args.smooth), sep="\n")
    except PlotError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write the figures ({error}): name another folder with --out")


if __name__ == "__main__":
    main()
