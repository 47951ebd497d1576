"""Draw one run, or the mean over several (seeds of one setting): `training` has every curve, `accuracy` the result,
`samples` what the first run writes to one question as it learns.

Runs of several settings are compared instead: `comparison` has their curves and results, as a figure and as tables.
"""

import argparse
import csv
import json
import os
import re
import sys
import textwrap
from collections import Counter, namedtuple
from contextlib import suppress
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Laid over matplotlib's defaults, not the reader's matplotlibrc: Okabe and Ito's palette for colour-blind readers, a
# salt that makes an SVG the same at every redraw, no parse_math, so that a `$` in a reward function's name stays one.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
STYLE = {"axes.prop_cycle": matplotlib.cycler(color=COLOURS)}
STYLE |= {"svg.hashsalt": "grpo", "text.parse_math": False, "font.size": 9, "axes.titlesize": 9.5, "axes.grid": True}
STYLE |= {"axes.titlelocation": "left", "axes.spines.right": False, "axes.spines.top": False, "grid.color": "#E8E8E8"}
STYLE |= {"axes.edgecolor": "#B0B0B0", "xtick.color": "dimgray", "ytick.color": "dimgray", "legend.frameon": False}
# From the lowest reward to the highest, light enough to be written on.
REWARD_COLOURS = LinearSegmentedColormap.from_list("reward", ["#F3B58A", "#F2F2F2", "#8CC6EA"])
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
COMPARED = PANELS | {  # the same for a comparison, where `accuracy` gives way to the score of a task without one
    "A": ("validation accuracy, sampled (T = 1)", ["validation_sampled_accuracy"]),
    "B": ("held-out accuracy, last policy, T = 1", []),
    "R": ("reward, as trained on", ["reward"]),
    "S": ("accuracy against reward (diamond: the end)", []),
}
LAST = {"reward": "reward", "kl": "KL", "entropy": "entropy", "working": "shows working", "length": "length"}
# Settings that do not make a run another experiment; `model` counts without the run's own seed in its name.
NOT_SETTINGS = {"seed", "out", "resume", "overwrite", "save_every", "device", "compile", "micro_batch_tokens"}
# What older programs called some values of settings.
RENAMED = {"advantage none": "centered", "advantage batch": "batch_std", "surrogate plain": "reinforce"}
RENAMED |= {"aggregate sequence": "sequence_mean", "aggregate token": "token_mean"}
SPEAK_FOR_THEMSELVES = {"algorithm", "rewards", "model"}  # settings that need no name beside their value
# Student's t, 97.5 % quantile for 1 to 30 degrees of freedom; beyond, the normal distribution's is near enough.
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
T_95 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
RunFiles = namedtuple("RunFiles", "metrics evaluation settings folder")  # [{metric: float}], {policy: {key: float}}
Band = namedtuple("Band", "steps mean sd n")  # arrays (S,) over seeds; n counts the runs with a finite value at a step


class PlotError(ValueError):
    """A run that cannot be drawn, in one line that names the thing and the mend."""


def read_run(folder: Path) -> RunFiles:
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
        except (ValueError, AttributeError, KeyError, OverflowError, RecursionError):
            if count < len(lines):
                raise PlotError(f"{path}, line {count}, is no JSON object with a step: mend or delete it") from None
    if not metrics:
        raise PlotError(f"{path} has no complete line yet: draw it again after the first step")
    evaluation = read_objects(folder / "evaluation.json")
    for policy, measures in evaluation.items():
        evaluation[policy] = {key: value for key, value in measures.items() if isinstance(value, (int, float))}
    settings = read_objects(folder / "run.json").get("settings", {})
    settings = {key: RENAMED.get(f"{key} {value}", value) for key, value in settings.items()}
    return RunFiles(metrics, evaluation, settings, folder)


def read_objects(path: Path) -> dict[str, dict]:
    """Return the objects that a file's JSON object holds, {} if it is not there yet, or not whole."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        held = json.loads(path.read_text(encoding="utf-8"))
        return {name: value for name, value in held.items() if isinstance(value, dict)}
    return {}


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


def metric(runs: list[RunFiles], key: str, smooth: float = 0.0) -> Band:
    """Return a metric over seeds, each run smoothed by itself; a step without a value is a gap, save for validation."""
    series = [np.array([(record["step"], record.get(key, np.nan)) for record in run.metrics]).T for run in runs]
    if key.startswith("validation_"):  # measured now and then: only those steps, as they are
        series, smooth = [run[:, np.isfinite(run[1])] for run in series], 0.0
    return over_seeds([(steps, ema(values, smooth)) for steps, values in series])


def heading(runs: list[RunFiles], *bands: Band) -> tuple[str, str]:
    """Return what was trained, and what lines and bands stand for: early stops and gaps leave some steps fewer runs."""
    names = {f"{run.settings.get('algorithm', 'GRPO').upper()} on {run.settings.get('task', 'a task')}" for run in runs}
    count = "" if all(n in (0, len(runs)) for band in bands for n in band.n) else "up to "
    return " and ".join(sorted(names)), f"mean of {count}{len(runs)} runs, band ±1 sd" if len(runs) > 1 else "one run"


def draw(ax: matplotlib.axes.Axes, band: Band, colour: str, **line: object) -> None:
    """Draw a mean as a line, and one sd either side of it as a band where several runs have a value."""
    ax.plot(band.steps, band.mean, color=colour, **line)
    ax.fill_between(band.steps, band.mean - band.sd, band.mean + band.sd, color=colour, alpha=0.2, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))


def training_figure(runs: list[RunFiles], smooth: float) -> Figure:
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


def accuracy_figure(runs: list[RunFiles]) -> Figure:
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
        _, (mean,), (sd,), (n,) = over_seeds([([0], np.array([result(run, "accuracy", name)])) for run in runs])
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


def read_samples(folder: Path) -> dict[int, list[tuple[float, str, str]]]:
    """Return reward, completion and question of every line of samples.jsonl, by step; {} if it holds no groups."""
    groups: dict[int, list[tuple[float, str, str]]] = {}
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):  # a line that is being written ends it
        for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            shown = ["".join(c if c.isprintable() else " " for c in row[key]) for key in ("completion", "question")]
            groups.setdefault(int(row["step"]), []).append((float(row["reward"]), *shown))
    return groups


def samples_figure(groups: dict[int, list[tuple[float, str, str]]], width: int = 60) -> Figure:
    """Return the figure of one question's group, coloured by reward: first step, last, and one half way in reward."""
    steps, rows = sorted(groups), max(map(len, groups.values()))
    means = {step: np.mean([reward for reward, _, _ in groups[step]]) for step in steps}
    middle = min(steps[1:-1] or steps, key=lambda step: abs(2 * means[step] - means[steps[0]] - means[steps[-1]]))
    rewards = [reward for group in groups.values() for reward, _, _ in group if np.isfinite(reward)] or [0.0]
    scale = Normalize(min(rewards), max(max(rewards), min(rewards) + 1e-9))
    shown = sorted({steps[0], middle, steps[-1]})
    figure = Figure((1 + 4.6 * len(shown), 1.2 + 0.24 * rows), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for ax, step in zip(axes, shown, strict=True):
        group = sorted(groups[step], reverse=True)
        for place, (reward, text, _) in enumerate(group):
            ax.barh(place, 1, height=0.92, color=REWARD_COLOURS(scale(reward)))
            text = text if len(text) <= width else f"{text[: width - 1]}…"
            ax.text(0.01, place, text or "(empty)", va="center", family="monospace", fontsize=7)
        ax.set(title=f"step {step}: mean reward {means[step]:.2f}", xlim=(0, 1), ylim=(rows - 0.5, -0.5))
        ax.axis("off")
    figure.colorbar(ScalarMappable(scale, REWARD_COLOURS), ax=axes, label="reward", fraction=0.02)
    question = textwrap.shorten(groups[steps[0]][0][2], 110, placeholder=" …")
    figure.suptitle(f"{rows} completions of one validation question, by reward: {question}", x=0.01, ha="left")
    return figure


def group_runs(runs: list[RunFiles]) -> dict[str, list[RunFiles]]:
    """Return the runs by setting, each named by what tells it from the others; seeds of a setting stand together."""

    def value(run: RunFiles, key: str) -> object:
        found = run.settings.get(key, "not recorded")
        if key == "model" and isinstance(found, str):
            return re.sub(rf"seed[_-]?{run.settings.get('seed')}(?=/|$)", "seed*", found)
        return found

    # A setting that an older program did not record is taken as the one value that all others have, if it is one.
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.settings) if key not in NOT_SETTINGS]
    differ = [key for key in keys if len({str(value(run, key)) for run in runs if key in run.settings}) > 1]
    groups: dict[str, list[RunFiles]] = {}
    for run in runs:
        values = {key: value(run, key) for key in differ if value(run, key) is not None}
        names = [str(v) if key in SPEAK_FOR_THEMSELVES else f"{key.replace('_', ' ')} {v}" for key, v in values.items()]
        groups.setdefault(", ".join(names), []).append(run)
    return groups


def t_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return mean, sd and half of the mean's 95 % interval (Student's t), without NaNs; of one value the mean only."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return (float(values[0]) if len(values) else np.nan), np.nan, np.nan
    sd = float(values.std(ddof=1))
    return float(values.mean()), sd, (T_95[len(values) - 2] if len(values) <= 31 else 1.96) * sd / len(values) ** 0.5


def samples_to(run: RunFiles, share: float = 0.9) -> float:
    """Return how many completions were sampled until this share of a step's was right, NaN if it never was."""
    total = 0.0
    for record in run.metrics:
        total += record.get("samples", np.nan) if "accuracy" in record else 0.0
        if record.get("accuracy", 0.0) >= share:
            return total
    return np.nan


def at_the_end(run: RunFiles, key: str) -> float:
    """Return the mean of a metric over the last five steps that have it, NaN if none has."""
    values = [record[key] for record in run.metrics if np.isfinite(record.get(key, np.nan))][-5:]
    return float(np.mean(values)) if values else np.nan


def score_of(runs: list[RunFiles]) -> str:
    """Return what the runs are compared by: accuracy, or the total reward where a task has none."""
    rewarded = any("sampled_total_reward" in run.evaluation.get("last", {}) for run in runs)
    return "total_reward" if rewarded else "accuracy"


def result(run: RunFiles, key: str, policy: str = "last") -> float:
    """Return a measure of a policy on the held-out problems, NaN for a run that has not ended."""
    return float(run.evaluation.get(policy, {}).get(key, np.nan))


def compare(groups: dict[str, list[RunFiles]], baseline: str) -> list[dict[str, float | str]]:
    """Return a row for each setting: mean and sd of every measure over its runs that have ended.

    The difference of the held-out score at T = 1 is taken from the baseline's by seed, over `pairs` of runs; low and
    high are its 95 % interval. Rewards of another mix are not subtracted. `samples_to_90` is the mean over the runs
    that got there, `reached_90` counts them.
    """
    score = score_of([run for runs in groups.values() for run in runs])
    base = {run.settings.get("seed"): result(run, f"sampled_{score}") for run in groups[baseline]}
    mix = groups[baseline][0].settings.get("rewards")
    rows = []
    for name, runs in groups.items():
        ended = [run for run in runs if run.evaluation.get("last")]
        columns = {"held_out": [result(run, f"sampled_{score}") for run in ended]}
        columns["held_out_greedy"] = [result(run, score) for run in ended]
        columns |= {key: [at_the_end(run, key) for run in ended] for key in LAST}
        columns["samples_to_90"] = [samples_to(run) for run in ended]
        row = {"setting": name, "runs": len(ended), "reached_90": int(np.isfinite(columns["samples_to_90"]).sum())}
        for key, values in columns.items():
            row[key], row[f"{key}_sd"], _ = t_interval(np.array(values, float))
        pairs = [result(run, f"sampled_{score}") - base.get(run.settings.get("seed"), np.nan) for run in ended]
        comparable = score == "accuracy" or all(run.settings.get("rewards") == mix for run in runs)
        pairs = np.array(pairs if comparable else [], float)
        mean, _, half = t_interval(pairs)
        row |= {"difference": mean, "difference_low": mean - half, "difference_high": mean + half}
        rows.append(row | {"pairs": int(np.isfinite(pairs).sum()), "score": score})
    return rows


def markdown(rows: list[dict[str, float | str]], baseline: str) -> str:
    """Return the rows of `compare` as a Markdown table, ± being the sd over runs."""

    def cell(row: dict, key: str, form: str) -> str:
        spread = f" ± {row[f'{key}_sd']:{form}}" if np.isfinite(row[f"{key}_sd"]) else ""
        return f"{row[key]:{form}}{spread}" if np.isfinite(row[key]) else "–"

    score = rows[0]["score"].replace("_", " ")
    form, unit, points = (".1%", 100, "+.1f") if score == "accuracy" else (".3g", 1, "+.3g")
    heads = ["", "runs", f"held-out {score}, T = 1", "greedy", "difference to the baseline, T = 1", "samples to 90 %"]
    lines = [[*heads, *LAST.values()]]
    for row in rows:
        low, high = unit * row["difference_low"], unit * row["difference_high"]
        interval = f" [{low:{points}}, {high:{points}}]" if np.isfinite(low) else ""
        few = f" ({row['pairs']} of {row['runs']} runs)" if row["pairs"] < row["runs"] else ""
        difference = f"{unit * row['difference']:{points}}{interval}{few}" if row["pairs"] else "–"
        reached = f" ({row['reached_90']} of {row['runs']})" if row["reached_90"] < row["runs"] else ""
        samples = f"{cell(row, 'samples_to_90', ',.0f')}{reached}" if row["reached_90"] else "never"
        cells = [row["setting"], str(row["runs"]), cell(row, "held_out", form), cell(row, "held_out_greedy", form)]
        measures = (cell(row, key, ".0%" if key == "working" else ".3g") for key in LAST)
        lines.append([*cells, "baseline" if row["setting"] == baseline else difference, samples, *measures])
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(text.replace('|', '/') for text in line)} |\n" for line in lines)


def comparison_figure(groups: dict[str, list[RunFiles]], smooth: float = 0.6) -> Figure:
    """Return the figure of several settings: curves with a band over seeds, held-out bars, accuracy against reward."""
    figure = Figure((16, 7), dpi=150, layout="constrained")
    axes, score = figure.subplot_mosaic("ABSR;WELK"), score_of([run for runs in groups.values() for run in runs])
    labels = [textwrap.fill(re.sub(",(?! )", ", ", name), 24) for name in groups]
    for i, (name, runs) in enumerate(zip(labels, groups.values(), strict=True)):
        colour, style = f"C{i % len(COLOURS)}", ("-", "--", ":", "-.")[i // len(COLOURS) % 4]
        for letter, ax in axes.items():
            for key in COMPARED[letter][1]:
                band = metric(runs, key.replace("accuracy", score), smooth)
                if band.n.any():
                    draw(ax, band, colour, label=name, linewidth=1.6, linestyle=style)
        mean, _, half = t_interval(np.array([result(run, f"sampled_{score}") for run in runs]))
        axes["B"].bar(i, mean, color=colour, alpha=0.8, yerr=half, error_kw={"capsize": 3, "linewidth": 1})
        text = "none" if np.isnan(mean) else f"{mean:.0%}" if score == "accuracy" else f"{mean:.3g}"
        axes["B"].annotate(text, (i, 0.02), ha="center", color="white" if mean > 0.1 else "dimgray")
        bands = [metric(runs, key, smooth).mean for key in ("reward", "accuracy")]
        axes["S"].plot(*bands, style, color=colour, linewidth=0.8, alpha=0.6)
        axes["S"].plot(*bands, ".", color=colour, markersize=4)
        end = np.array(bands)[:, np.isfinite(bands).all(0)][:, -1:]  # (2, 1), or (2, 0) if a run has not both
        axes["S"].plot(*end, "D", color=colour, label=name)
    for letter, ax in axes.items():
        title = COMPARED[letter][0]
        title = title.replace("accuracy", score.replace("_", " ")) if letter in "AB" else title
        ax.set(title=title, xlabel={"B": "", "S": "reward, as trained on"}.get(letter, "step (one rollout)"))
        if letter in "SW" or (letter in "AB" and score == "accuracy"):
            ax.set_ylim(0, 1.01)
            ax.yaxis.set_major_formatter(PercentFormatter(1))
        if letter != "B" and not any(np.isfinite(line.get_ydata()).any() for line in ax.lines):
            ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="dimgray")
    axes["R"].legend()
    axes["S"].set_ylabel("accuracy of the samples")
    axes["B"].set_axisbelow(True)
    axes["B"].set_xticks(range(len(groups)), labels, rotation=30, ha="right")
    counts = sorted({len(runs) for runs in groups.values()})
    count = f"{counts[0]} run(s)" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} runs"
    task = next(iter(groups.values()))[0].settings.get("task")
    title = f"{task}: {count} of each setting; bands ±1 sd, bars 95 % interval of the mean of those that have ended"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def same_task(runs: list[RunFiles]) -> list[RunFiles]:
    """Return the runs of the task that most of them have, and name the others on stderr."""
    tasks = [str(run.settings.get("task")) for run in runs]
    kept = Counter(tasks).most_common(1)[0][0]
    for run, task in zip(runs, tasks, strict=True):
        if task != kept:
            what = f"is of task {run.settings['task']}, not {kept}" if "task" in run.settings else "names no task"
            mend = "compare it alone" if "task" in run.settings else "restore its run.json"
            print(f"plot_metrics.py: skipped: {run.folder} {what}: {mend}", file=sys.stderr)
    return [run for run, task in zip(runs, tasks, strict=True) if task == kept]


def remarks(groups: dict[str, list[RunFiles]]) -> list[str]:
    """Return what a reader must know: runs that have not ended, of different length, or of the same seed."""
    lines = []
    for name, runs in groups.items():
        steps, of = sorted({run.metrics[-1]["step"] for run in runs}), f"{name}: " * bool(name)
        if len(steps) > 1:
            lines.append(f"{of}its runs have different lengths, {steps[0]} to {steps[-1]} steps")
        for seed, count in Counter(str(run.settings["seed"]) for run in runs if "seed" in run.settings).items():
            if count > 1:
                lines.append(f"{of}{count} of its runs have seed {seed}: they count as separate runs")
        for run in runs:
            if not run.evaluation.get("last"):
                lines.append(f"{run.folder} has not ended: its curves are drawn, its held-out result is missing")
    return lines


def plot(runs: list[Path], out: Path, smooth: float = 0.6, baseline: str | None = None) -> list[Path]:
    """Draw the runs that can be drawn into out, name the others on stderr; raises PlotError when none can.

    Runs of one setting give the figures `training` and `accuracy`, runs of several the `comparison`.
    """
    usable, errors = [], []
    for folder in dict.fromkeys(runs):  # a folder named twice is one seed
        try:
            usable.append(read_run(folder))
        except PlotError as error:
            errors.append(str(error))
    if not usable:
        raise PlotError("; ".join(errors))
    sys.stderr.writelines(f"plot_metrics.py: skipped: {error}\n" for error in errors)
    usable = same_task(usable)
    groups = group_runs(usable)
    if baseline is not None and baseline not in groups:
        there = ", ".join(map(repr, groups)) if len(groups) > 1 else "not for runs of a single setting"
        raise PlotError(f"no setting is named {baseline!r}: --baseline is {there}")
    baseline = next(iter(groups)) if baseline is None else baseline
    if len(usable) > 1:
        sys.stderr.writelines(f"plot_metrics.py: note: {line}\n" for line in remarks(groups))
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context(["default", STYLE]):
        if len(groups) == 1:
            figures = {"training": training_figure(usable, smooth)}
            if any("validation_accuracy" in record for run in usable for record in run.metrics):
                figures["accuracy"] = accuracy_figure(usable)
            if groups_shown := read_samples(usable[0].folder):
                figures["samples"] = samples_figure(groups_shown)
            return save_figures(figures, out)
        written = save_figures({"comparison": comparison_figure(groups, smooth)}, out)
    rows = compare(groups, baseline)
    (out / "comparison.md").write_text(markdown(rows, baseline), encoding="utf-8")
    with open(out / "comparison.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return [*written, out / "comparison.md", out / "comparison.csv"]


def save_figures(figures: dict[str, Figure], out: Path) -> list[Path]:
    """Write each figure as PNG and SVG, whole or not at all."""
    written = []
    for name, figure in figures.items():
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
    add("--baseline", help="setting that others are compared with, as the table names it (default: the first)")
    args = parser.parse_args()
    if not 0 <= args.smooth < 1:
        parser.error(f"--smooth {args.smooth:g} is no weight: give a number from 0 to below 1")
    out = args.out or Path("figures" if args.RUN[1:] else args.RUN[0])
    try:
        print(*plot(args.RUN, out, args.smooth, args.baseline), sep="\n")
    except PlotError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write the figures ({error}): name another folder with --out")


if __name__ == "__main__":
    main()
