"""The figures show what the metrics say: averages by hand, drawn lines against the file, mistakes in one line."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.style
import numpy as np
import pytest

import plot_metrics

SCRIPT = Path(plot_metrics.__file__)
NAN = float("nan")
START = {"validation_accuracy": 0.25, "validation_accuracy_low": 0.2, "validation_accuracy_high": 0.3}
START |= {"validation_sampled_accuracy": 0.35, "validation_working": 0.1, "validation_sampled_working": 0.2}
END = {"validation_accuracy": 0.75, "validation_accuracy_low": 0.7, "validation_accuracy_high": 0.8}
END |= {"validation_sampled_accuracy": 0.65, "validation_working": 1.0, "validation_sampled_working": 0.9}


def line(step: int, **values: float | None) -> str:
    return json.dumps({"step": step, **{key.replace("__", "/"): value for key, value in values.items()}}) + "\n"


def write_run(folder: Path, rewards: list, tail: str = "", **files: dict) -> Path:
    """Write a run whose step i + 1 has rewards[i], validated at step 0 and at the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    text = line(0, **START)
    for step, reward in enumerate(rewards, 1):
        validation = END if step == len(rewards) else {}
        shared = {"accuracy": 0.1 * step, "working": 0.2, "kl": None, "entropy": 0.5, "length": 9, "clip_low": 0.0}
        text += line(step, reward=reward, reward__exact=0.5, clip_high=0.01 * step, **shared, **validation)
    (folder / "metrics.jsonl").write_text(text + tail)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def command(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], cwd=cwd, capture_output=True, text=True)


def assert_one_line_error(result: subprocess.CompletedProcess, *parts: str) -> None:
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("plot_metrics.py: error: ") and result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def panel(figure, title: str):
    return next(ax for ax in figure.axes if (ax.get_title() or ax.get_title(loc="left")).startswith(title))


def drawn(ax) -> list[tuple[list, list]]:
    return [(list(map(float, x)), list(map(float, y))) for x, y in (artist.get_data() for artist in ax.lines)]


def labelled(ax, label: str) -> tuple[list, list]:
    (artist,) = [artist for artist in ax.lines if artist.get_label() == label]
    return [list(map(float, data)) for data in artist.get_data()]


def test_smoothing_by_hand_keeps_gaps():
    # Weights 1; 1/2, 1/4 over 3/4; the gap neither counts nor decays; 1/2, 1/4, 1/8 over 7/8.
    smoothed = plot_metrics.ema(np.array([4.0, 1.0, NAN, 2.0]), 0.5)
    np.testing.assert_allclose(
        smoothed, [4.0, (0.5 * 1 + 0.25 * 4) / 0.75, NAN, (0.5 * 2 + 0.25 * 1 + 0.125 * 4) / 0.875]
    )
    np.testing.assert_array_equal(plot_metrics.ema(np.array([NAN, 3.0, -1.0]), 0.0), [NAN, 3.0, -1.0])


def test_mean_and_sd_over_runs_of_different_length_by_hand():
    long = (np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, NAN]))
    short = (np.array([2.0, 4.0]), np.array([6.0, np.inf]))
    late = (np.array([2.0, 3.0]), np.array([7.0, 5.0]))
    band = plot_metrics.over_seeds([long, short, late])
    np.testing.assert_array_equal(band.steps, [1, 2, 3, 4])
    np.testing.assert_array_equal(band.n, [1, 3, 2, 0])
    np.testing.assert_allclose(band.mean, [1, 5, 4, NAN])
    np.testing.assert_allclose(band.sd, [NAN, np.sqrt((9 + 1 + 4) / 2), np.sqrt(2), NAN])


def test_lines_of_one_run_are_the_metrics(tmp_path):
    run = plot_metrics.read_run(write_run(tmp_path, [0.2, 0.6, 0.4]))
    figure = plot_metrics.training_figure([run], smooth=0.5)
    (raw_x, raw_y), (_, smooth_y), (_, exact_y) = drawn(panel(figure, "reward"))
    assert raw_x == [0, 1, 2, 3]
    np.testing.assert_allclose(raw_y, [NAN, 0.2, 0.6, 0.4])
    np.testing.assert_allclose(smooth_y, [NAN, 0.2, (0.3 + 0.05) / 0.75, (0.2 + 0.15 + 0.025) / 0.875])
    np.testing.assert_allclose(exact_y, [NAN, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(labelled(panel(figure, "accuracy"), "sampled, training")[1][1], 0.1)
    assert labelled(panel(figure, "accuracy"), "greedy, validation") == [[0, 3], [0.25, 0.75]]
    np.testing.assert_allclose(drawn(panel(figure, "clipped"))[2][1], [NAN, 0.01, 0.02, 0.03])
    np.testing.assert_allclose(drawn(panel(figure, "completion length"))[0][1], [NAN, 9, 9, 9])
    np.testing.assert_allclose(drawn(panel(figure, "entropy"))[0][1], [NAN, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(drawn(panel(figure, "completions that show"))[0][1], [NAN, 0.2, 0.2, 0.2])
    assert [text.get_text() for text in panel(figure, "KL").texts] == ["not measured"]
    assert "one run" in figure.get_suptitle()


def test_several_runs_are_smoothed_then_averaged_with_a_band(tmp_path):
    first = plot_metrics.read_run(write_run(tmp_path / "a", [0.0, 1.0, 1.0]))
    second = plot_metrics.read_run(write_run(tmp_path / "b", [0.4, 0.4]))
    ax = panel(figure := plot_metrics.training_figure([first, second], smooth=0.5), "reward")
    smooth = [(0 + 0.4) / 2, (2 / 3 + 0.4) / 2, (0.5 + 0.25) / 0.875]  # by hand: 1/2 over 3/4 is 2/3
    np.testing.assert_allclose(labelled(ax, "reward")[1], [NAN, *smooth])
    np.testing.assert_allclose(drawn(ax)[0][1], [NAN, 0.2, 0.7, 1.0])
    corners = np.concatenate([path.vertices for path in ax.collections[0].get_paths()])
    half = (2 / 3 - 0.4) / np.sqrt(2)
    assert np.isclose(corners[corners[:, 0] == 2, 1].max(), smooth[1] + half)
    assert np.isclose(corners[corners[:, 0] == 2, 1].min(), smooth[1] - half)
    assert corners[:, 0].max() == 2, "a single run at step 3 has no spread"
    assert "mean of up to 2 runs, band ±1 sd" in figure.get_suptitle()
    assert "mean of 2 runs, band ±1 sd" in plot_metrics.training_figure([first, first], 0.5).get_suptitle()


def test_accuracy_figure_marks_the_held_out_result(tmp_path):
    runs = []
    for seed, (base, best) in enumerate([(0.30, 0.90), (0.30, 0.94)]):
        evaluation = {"base": {"accuracy": base}, "best": {"accuracy": best}, "last": {"accuracy": 0.1}}
        settings = {"settings": {"task": "arithmetic", "algorithm": "grpo"}}
        runs.append(
            plot_metrics.read_run(write_run(tmp_path / str(seed), [0.5] * 4, evaluation=evaluation, run=settings))
        )
    figure = plot_metrics.accuracy_figure(runs)
    (ax,) = figure.axes
    assert drawn(ax)[:3] == [([0, 4], [0.25, 0.75]), ([0, 4], [0.35, 0.65]), ([0, 4], [0.2, 0.9])]
    (base_x, base_y), (best_x, best_y) = drawn(ax)[3:]
    assert base_y == [0.3, 0.3] and base_x[0] == 0 and ax.lines[3].get_linestyle() == "--"
    assert np.isclose(best_y, [0.92]) and best_x[0] > 4
    labels = {text.get_text(): text.get_color() for text in ax.texts}
    assert labels == {
        "75% accuracy, greedy": ax.lines[0].get_color(),
        "65% accuracy, sampled": ax.lines[1].get_color(),
        "90% show working, sampled": ax.lines[2].get_color(),
        "30.0% held-out,\nbase policy": "black",
        "92.0% ± 2.8% held-out,\nbest policy": "black",
    }
    assert len(set(labels.values())) == 4, "a colour tells the curves apart"
    title, subtitle = (text.get_text() for text in figure.texts)
    assert title == "GRPO on arithmetic: 30% → 92% of held-out problems solved"
    assert "mean of 2 runs, band ±1 sd" in subtitle and "black: held-out problems, greedy" in subtitle


def write_samples(folder: Path, groups: dict[int, list[tuple[str, float]]], tail: str = "") -> None:
    rows = [
        {"step": step, "question": "What?", "completion": text, "reward": reward}
        for step, group in groups.items()
        for text, reward in group
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_the_group_of_three_steps_is_drawn_by_reward(tmp_path):
    """First, half way in reward, and last; rows from the best to the worst, the colour by reward over all steps."""
    folder = write_run(tmp_path / "run", [0.1, 0.2])
    hostile = "\x1b[31m$x^2$" + "a" * 200
    groups = {0: [("low", 0.0), ("high", 1.0), (hostile, 0.2)], 5: [("unseen", 0.0)] * 3, 10: [("unseen", 1.0)] * 3}
    groups |= {15: [("half", 0.5)] * 3, 20: [("high", 1.0), ("", 1.0), ("half", 0.2)]}
    write_samples(folder, groups, '{"step": 25, "question": "Wh')
    figure = plot_metrics.samples_figure(plot_metrics.read_samples(folder))
    scale = {reward: tuple(plot_metrics.REWARD_COLOURS(reward)) for reward in (0.0, 0.2, 0.5, 1.0)}
    expected = {
        "step 0: mean reward 0.40": [("high", 1.0), (" [31m$x^2$" + "a" * 49 + "…", 0.2), ("low", 0.0)],
        "step 15: mean reward 0.50": [("half", 0.5)] * 3,
        "step 20: mean reward 0.73": [("high", 1.0), ("(empty)", 1.0), ("half", 0.2)],
    }
    assert [ax.get_title() for ax in figure.axes[:-1]] == list(expected)
    for title, rows in expected.items():
        ax = panel(figure, title)
        assert [text.get_text() for text in ax.texts] == [text for text, _ in rows]
        assert [tuple(bar.get_facecolor()) for bar in ax.patches] == [scale[reward] for _, reward in rows]
    assert "What?" in figure.get_suptitle()


def test_a_run_without_groups_has_no_figure_of_them(tmp_path):
    """Older programs kept single questions; a damaged line ends what is drawn."""
    folder = write_run(tmp_path / "run", [0.1, 0.2])
    assert not [path for path in plot_metrics.plot([folder], folder) if path.stem == "samples"]
    (folder / "samples.jsonl").write_text('{"step": 0, "prompt": "What?", "completion": "1", "reward": 1.0}\n')
    assert not [path for path in plot_metrics.plot([folder], folder) if path.stem == "samples"]
    write_samples(folder, {0: [("1", NAN), ("2", NAN)]}, "[1]\n")
    written = [path.name for path in plot_metrics.plot([folder], folder) if path.stem == "samples"]
    assert written == ["samples.png", "samples.svg"]


def test_run_without_sampled_validation_has_one_curve_and_one_label(tmp_path):
    old, new = (plot_metrics.read_run(write_run(tmp_path / name, [0.5] * 4)) for name in ("old", "new"))
    for record in old.metrics:
        record.pop("validation_sampled_accuracy", None), record.pop("validation_sampled_working", None)
    (ax,) = (figure := plot_metrics.accuracy_figure([old])).axes
    assert drawn(ax) == [([0, 4], [0.25, 0.75])]
    assert [text.get_text() for text in ax.texts] == ["75% accuracy, greedy"] and "one run" in figure.texts[
        1
    ].get_text()
    figure = plot_metrics.accuracy_figure([old, new])
    assert len(figure.axes[0].lines) == 3 and "mean of up to 2 runs" in figure.texts[1].get_text()


def test_equal_results_have_no_spread(tmp_path):
    run = plot_metrics.read_run(write_run(tmp_path, [0.5], evaluation={"base": {"accuracy": 0.126}}))
    texts = [text.get_text() for text in plot_metrics.accuracy_figure([run] * 11).axes[0].texts]
    assert "12.6% held-out,\nbase policy" in texts, "the sd of eleven equal numbers is 1e-17, by rounding"


def test_last_policy_stands_in_and_missing_runs_are_counted(tmp_path):
    evaluation = {"base": {"accuracy": None}, "last": {"accuracy": 0.5}}
    runs = [plot_metrics.read_run(write_run(tmp_path / name, [0.5])) for name in "ab"]
    runs.append(plot_metrics.read_run(write_run(tmp_path / "c", [0.5], evaluation=evaluation)))
    figure = plot_metrics.accuracy_figure(runs)
    assert figure.texts[0].get_text() == "GRPO on a task", "no before and after to announce"
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "50.0% held-out,\nlast policy, 1 of 3 runs" in texts and not any("base" in text for text in texts)


@pytest.mark.parametrize("heights", [(0.98, 0.94, 1.0, 0.95, 0.963), (0.0, 0.0, 0.01, 0.02, 0.02), (0.5,) * 5])
@pytest.mark.parametrize("early", [False, True])
def test_labels_keep_apart_and_nothing_runs_off_the_figure(tmp_path, heights, early):
    greedy, sampled, working, base, best = heights
    runs = []
    for seed in range(12):
        evaluation = {"base": {"accuracy": base}, "best": {"accuracy": best + 0.004 * (-1) ** seed}}
        settings = {"settings": {"task": "arithmetic", "algorithm": "dr_grpo"}}
        folder = write_run(tmp_path / str(seed), [0.5], evaluation=evaluation, run=settings)
        runs.append(plot_metrics.read_run(folder))
        runs[-1].metrics[-1].update(validation_accuracy=greedy, validation_sampled_accuracy=sampled)
        runs[-1].metrics[-1].update(validation_sampled_working=working)
    if early:  # the longest texts: one run of another algorithm is at its first step, and not evaluated
        del runs[0].metrics[1:]
        runs[0].evaluation.clear()
        runs[0].settings["algorithm"] = "grpo"
    with matplotlib.style.context(["default", plot_metrics.STYLE]):
        figure = plot_metrics.accuracy_figure(runs)
        (ax,) = figure.axes
        labels = [(text.get_window_extent(), text.get_text()) for text in ax.texts]
        above = [(text.get_window_extent(), text.get_text()) for text in figure.texts[::-1]]
    assert len(labels) == 5 and len(above) == 2
    assert ("up to 12 runs" in above[0][1]) == any("11 of 12 runs" in text for _, text in labels) == early
    boxes = [box for box, _ in labels + above]  # from the lowest to the highest, in pixels
    assert all(low.y1 + 3 < high.y0 for low, high in zip(boxes, boxes[1:], strict=False))
    assert all(box.x0 > 8 and box.x1 < figure.bbox.x1 - 8 and box.y1 < figure.bbox.y1 for box in boxes)
    assert all(box.x0 > ax.bbox.x1 and ax.bbox.y0 <= (box.y0 + box.y1) / 2 < ax.bbox.y1 + 1 for box, _ in labels)
    assert np.all(np.diff([float(text.split("%")[0]) for _, text in labels]) >= 0), "the best is the highest"


def test_run_in_progress_is_drawn_without_its_cut_line(tmp_path):
    write_run(tmp_path, [0.5, 0.6], tail='{"step": 3, "reward": 0.')
    (tmp_path / "evaluation.json").write_text('{"base": {"acc')
    run = plot_metrics.read_run(tmp_path)
    assert [record["step"] for record in run.metrics] == [0, 1, 2] and run.evaluation == {}
    assert len(plot_metrics.plot([tmp_path], tmp_path)) == 4
    run = plot_metrics.read_run(write_run(tmp_path, [], tail='{"step": 1'))  # only the validation before the first step
    assert labelled(panel(plot_metrics.training_figure([run], 0.6), "accuracy"), "greedy, validation") == [[0], [0.25]]
    assert drawn(plot_metrics.accuracy_figure([run]).axes[0]) == [([0], [0.25]), ([0], [0.35]), ([0], [0.2])]
    write_run(tmp_path, [0.5], tail=line(2, reward=0.7).rstrip())
    assert plot_metrics.read_run(tmp_path).metrics[-1] == {"step": 2, "reward": 0.7}, "whole, only its newline is not"


@pytest.mark.parametrize("bad", ['{"step": 3, "rew', "[3]", '{"reward": 1}', '{"step": NaN}', '{"step": "3"}', ""])
def test_bad_line_is_named_by_file_and_number(tmp_path, bad):
    write_run(tmp_path, [0.5, 0.6], tail=bad + "\n" + line(4, reward=0.5))
    with pytest.raises(plot_metrics.PlotError, match=r"metrics\.jsonl, line 4, ") as error:
        plot_metrics.read_run(tmp_path)
    assert str(tmp_path) in str(error.value) and isinstance(error.value, ValueError)


def test_nan_infinity_null_and_missing_values_are_gaps(tmp_path):
    text = "".join(line(step, reward=value) for step, value in enumerate([1.0, NAN, np.inf, None, 2.0], 1))
    text += line(6, accuracy=1.0) + '{"step": 7, "reward": "high"}\n{"step": 8, "reward": 1' + 400 * "0" + "}\n"
    (tmp_path / "metrics.jsonl").write_text(text + line(9, reward=3.0))
    run = plot_metrics.read_run(tmp_path)
    raw = drawn(panel(plot_metrics.training_figure([run], 0.0), "reward"))[0]
    np.testing.assert_array_equal(raw[0], range(1, 10))
    np.testing.assert_array_equal(raw[1], [1, NAN, NAN, NAN, 2, NAN, NAN, NAN, 3])


def test_command_writes_valid_figures_that_do_not_change_and_count_a_folder_once(tmp_path):
    write_run(tmp_path / "saved_model", [0.5, 0.7], run={"settings": {"task": "$\\frac$", "algorithm": "dr_grpo"}})
    result = command(cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    names = [f"saved_model/{name}.{kind}" for name in ("training", "accuracy") for kind in ("png", "svg")]
    assert result.stdout.split() == names
    first = {name: (tmp_path / name).read_bytes() for name in names}
    for name, content in first.items():
        if name.endswith("png"):
            assert content.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in content[-12:] and len(content) > 10_000
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg") and len(content) > 10_000
            assert b"<dc:date>" not in content and rb"DR_GRPO on $\frac$" in content
    assert b"validation problems, one run;" in first["saved_model/accuracy.svg"]
    plot_metrics.plot([tmp_path / "saved_model"] * 2, tmp_path / "again")  # a folder named twice is one run
    assert all((tmp_path / "again" / Path(name).name).read_bytes() == content for name, content in first.items())
    assert not list(tmp_path.rglob(".*")), "no temporary file is left"


def test_usable_runs_are_drawn_and_the_others_named(tmp_path):
    good = [write_run(tmp_path / name, [0.5, 0.7]) for name in "ab"]
    (tmp_path / "empty").mkdir()
    result = command(good[0], tmp_path / "absent", good[1], tmp_path / "empty", cwd=tmp_path)
    assert result.returncode == 0 and len(result.stdout.split()) == 4
    skipped, notes = result.stderr.splitlines()[:2], result.stderr.splitlines()[2:]
    assert all(text.startswith("plot_metrics.py: skipped: ") for text in skipped)
    assert len(notes) == 2 and all("has not ended" in text for text in notes)
    assert "absent" in skipped[0] and "empty" in skipped[1]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(
        Path(name).name for name in result.stdout.split()
    )
    # Text is drawn as glyphs; the SVG carries it as a comment.
    assert "mean of 2 runs, band ±1 sd" in (tmp_path / "figures" / "training.svg").read_text(encoding="utf-8")


def test_mistake_is_one_line_that_names_the_mend(tmp_path):
    (tmp_path / "empty").mkdir()
    mend = "python grpo.py --task arithmetic --out "
    result = command("absent", "empty", cwd=tmp_path)
    assert_one_line_error(result, "absent/metrics.jsonl", "empty/metrics.jsonl", mend + "absent", mend + "empty")


@pytest.mark.parametrize(
    "words, part",
    [
        ([], "saved_model/metrics.jsonl (No such file or directory): make a run with `python grpo.py"),
        (["cut"], "cut/metrics.jsonl has no complete line yet: draw it again"),
        (["cut", "--smooth", "1"], "--smooth 1 is no weight: give a number from 0 to below 1"),
        (["cut", "--smooth", "nan"], "--smooth nan"),
        (["cut", "--smo", "0.5"], "--smo"),
        (["good", "--out", "good/metrics.jsonl"], "good/metrics.jsonl'): name another folder with --out"),
    ],
)
def test_command_line_is_checked(tmp_path, monkeypatch, capsys, words, part):
    monkeypatch.chdir(tmp_path)
    write_run(Path("good"), [0.5])
    Path("cut").mkdir()
    Path("cut/metrics.jsonl").write_text('{"step": 0, "validation_acc')
    monkeypatch.setattr(sys, "argv", ["plot_metrics.py", *words])
    with pytest.raises(SystemExit) as stop:
        plot_metrics.main()
    assert_one_line_error(subprocess.CompletedProcess(words, stop.value.code, *capsys.readouterr()), part)


def test_help_states_the_defaults_and_nothing_heavy_is_imported(tmp_path):
    result = command("--help", cwd=tmp_path)
    assert result.returncode == 0 and "saved_model" in result.stdout and "0.6" in result.stdout
    names = ("torch", "transformers", "tasks", "matplotlib.pyplot")
    code = f"import plot_metrics, sys; print([name for name in {names} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]"


def write_setting(folder: Path, seed: int, held_out: float | None, rewards=(0.1, 0.2), **settings) -> Path:
    """A run of one setting; `accuracy` is 0.1, 0.2, ... and 64 completions are sampled a step."""
    evaluation = {"base": {}} if held_out is None else {"last": {"sampled_accuracy": held_out, "accuracy": held_out}}
    settings = {"task": "arithmetic", "model": f"base/seed{seed}", "seed": seed, "out": str(folder)} | settings
    write_run(folder, list(rewards), run={"settings": settings}, evaluation=evaluation)
    path = folder / "metrics.jsonl"
    lines = [json.loads(text) | {"samples": 64} for text in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record | ({} if record["step"] else {"samples": 0})) + "\n" for record in lines))
    return folder


def two_settings(tmp_path: Path) -> list[Path]:
    folders = [write_setting(tmp_path / f"a{i}", i, v, algorithm="grpo") for i, v in enumerate((0.5, 0.6, 0.7))]
    return folders + [write_setting(tmp_path / f"b{i}", i, v, algorithm="rloo") for i, v in enumerate((0.6, 0.6, 0.9))]


def test_runs_are_grouped_by_what_differs_but_the_seed(tmp_path):
    runs = [plot_metrics.read_run(folder) for folder in two_settings(tmp_path)]
    groups = plot_metrics.group_runs(runs)
    assert {name: [run.settings["seed"] for run in group] for name, group in groups.items()} == {
        "grpo": [0, 1, 2],
        "rloo": [0, 1, 2],
    }
    for run in runs:  # None is a default, and is not named
        run.settings["beta"] = None if run.settings["algorithm"] == "grpo" else 0.1
    assert list(plot_metrics.group_runs(runs)) == ["grpo", "rloo, beta 0.1"]
    for i, run in enumerate(runs):
        run.settings["beta"] = 0.1 * (i % 2)
    assert list(plot_metrics.group_runs(runs)) == [
        "grpo, beta 0.0",
        "grpo, beta 0.1",
        "rloo, beta 0.1",
        "rloo, beta 0.0",
    ]
    del runs[0].settings["beta"]  # of an older program, while the others have two values
    assert list(plot_metrics.group_runs(runs[:3])) == [
        *("beta not recorded", "beta 0.1", "beta 0.0"),
    ]
    for run in runs[1:]:
        run.settings["beta"] = 0.1  # now there is one value only, and what was not recorded tells nothing apart
    assert list(plot_metrics.group_runs(runs)) == ["grpo", "rloo"]
    for run in runs:
        run.settings["rewards"] = "first=0.1,second=0.2"  # not the seed's 0, 1 and 2
    assert list(plot_metrics.group_runs(runs)) == ["grpo", "rloo"]
    for run in runs:  # a hub's name is full of digits that are no seed
        run.settings["model"] = "Qwen/Qwen2.5-0.5B-Instruct"
    assert list(plot_metrics.group_runs(runs)) == ["grpo", "rloo"]
    for run in runs:
        run.settings["model"] = f"base/seed{run.settings['seed']}"
    runs[0].settings["model"] = "another/seed0"
    assert len(plot_metrics.group_runs(runs)) == 3
    assert list(plot_metrics.group_runs(runs[1:2])) == [""]
    for i, run in enumerate(runs):  # the same word for two settings
        run.settings.update(ratio="token" if i % 2 else None, aggregate=None if i % 2 else "token")
    runs[0].settings["model"] = None
    names = ["aggregate token", "base/seed*, ratio token", "base/seed*, aggregate token"]
    assert list(plot_metrics.group_runs(runs[:3])) == names


def test_settings_have_their_present_names_whatever_program_made_the_run(tmp_path):
    """A run with the names of today and one with the names before stand in one group."""
    old = {"advantage": "none", "surrogate": "plain", "aggregate": "sequence", "ratio": "sequence"}
    new = {"advantage": "centered", "surrogate": "reinforce", "aggregate": "sequence_mean", "ratio": "sequence"}
    folders = [write_setting(tmp_path / "old", 0, 0.5, **old), write_setting(tmp_path / "new", 1, 0.5, **new)]
    old |= {"advantage": "batch", "aggregate": "token"}
    new |= {"advantage": "batch_std", "aggregate": "token_mean"}
    folders += [write_setting(tmp_path / "old2", 0, 0.5, **old), write_setting(tmp_path / "new2", 1, 0.5, **new)]
    groups = plot_metrics.group_runs([plot_metrics.read_run(folder) for folder in folders])
    assert {name: [run.folder.name for run in runs] for name, runs in groups.items()} == {
        "advantage centered, aggregate sequence_mean": ["old", "new"],
        "advantage batch_std, aggregate token_mean": ["old2", "new2"],
    }
    unset = plot_metrics.read_run(write_setting(tmp_path / "unset", 0, 0.5, advantage=None, scorer=["none"]))
    assert (unset.settings["advantage"], unset.settings["scorer"]) == (None, ["none"])


def test_the_statistics_of_a_comparison_by_hand(tmp_path):
    """Means 0.6 and 0.7; paired differences 0.1, 0, 0.2: sd 0.1, half an interval 4.303 * 0.1 / sqrt(3)."""
    groups = plot_metrics.group_runs([plot_metrics.read_run(folder) for folder in two_settings(tmp_path)])
    first, second = plot_metrics.compare(groups, "grpo")
    assert (first["held_out"], first["held_out_sd"], first["runs"]) == (pytest.approx(0.6), pytest.approx(0.1), 3)
    assert first["difference"] == 0 and second["difference"] == pytest.approx(0.1)
    half = 4.303 * 0.1 / 3**0.5
    assert second["difference_low"] == pytest.approx(0.1 - half)
    assert second["difference_high"] == pytest.approx(0.1 + half)
    assert second["reward"] == pytest.approx(0.15) and second["reward_sd"] == pytest.approx(0)
    assert second["reached_90"] == 0 and np.isnan(second["samples_to_90"])
    text = plot_metrics.markdown([first, second], "grpo").splitlines()
    assert text[2].startswith("| grpo | 3 | 60.0% ± 10.0% |") and "| baseline | never |" in text[2]
    assert "| +10.0 [-14.8, +34.8] | never |" in text[3]


def test_a_comparison_is_paired_by_seed(tmp_path):
    """Whatever the order, and from the seeds that both have; a seed that stands twice is named."""
    folders = two_settings(tmp_path)
    runs = [plot_metrics.read_run(folder) for folder in [folders[1], folders[0], *folders[3:]]]
    row = plot_metrics.compare(groups := plot_metrics.group_runs(runs), "grpo")[1]
    assert row["runs"] == 3 and row["pairs"] == 2 and row["difference"] == pytest.approx(0.05)  # 0.1 and 0
    assert "(2 of 3 runs)" in plot_metrics.markdown([row], "grpo")
    assert plot_metrics.remarks(groups) == []
    runs[1].settings.update(seed=1, model="base/seed1")
    assert "2 of its runs have seed 1" in plot_metrics.remarks(plot_metrics.group_runs(runs))[0]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("run.json", '{"settings": null}'),
        ("run.json", "[]"),
        ("run.json", '{"settings": {"task": ["a"], "seed": {}}}'),
        ("run.json", "[" * 100_000),
        ("evaluation.json", '{"last": 3}'),
        ("evaluation.json", '{"last": {"sampled_accuracy": "x", "accuracy": []}, "base": null}'),
        ("metrics.jsonl", "[" * 100_000 + "\n"),
    ],
)
def test_one_broken_file_does_not_stop_the_others(tmp_path, file, text):
    folders = two_settings(tmp_path)
    (folders[0] / file).write_text(text)
    result = command(*folders, "--out", tmp_path / "out", cwd=tmp_path)
    assert result.returncode == 0 and str(folders[0]) in result.stderr and "Traceback" not in result.stderr
    assert "| rloo | 3 |" in (tmp_path / "out" / "comparison.md").read_text()
    alone = command(folders[0], cwd=tmp_path)
    assert alone.returncode in (0, 2) and "Traceback" not in alone.stderr


def test_an_unfinished_run_is_no_part_of_the_table(tmp_path):
    folders = two_settings(tmp_path)
    write_setting(tmp_path / "stopped", 3, None, [9.0], algorithm="rloo")
    runs = [plot_metrics.read_run(folder) for folder in [*folders, tmp_path / "stopped"]]
    row = plot_metrics.compare(plot_metrics.group_runs(runs), "grpo")[1]
    assert row["runs"] == 3 and row["reward"] == pytest.approx(0.15)


def test_a_task_without_accuracy_is_compared_by_its_total_reward(tmp_path):
    folders = [write_setting(tmp_path / f"a{i}", i, None, task="alpaca", scorer="a") for i in range(2)]
    folders += [write_setting(tmp_path / f"b{i}", i, None, task="alpaca", scorer="b") for i in range(2)]
    for i, folder in enumerate(folders):
        last = {"total_reward": 0.1 * i, "sampled_total_reward": 0.2 * i}
        (folder / "evaluation.json").write_text(json.dumps({"last": last}))
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(line(3, validation_sampled_total_reward=0.3))
    groups = plot_metrics.group_runs([plot_metrics.read_run(folder) for folder in folders])
    assert plot_metrics.remarks(groups) == []
    rows = plot_metrics.compare(groups, "scorer a")
    assert [row["held_out"] for row in rows] == pytest.approx([0.1, 0.5]) and rows[1]["difference"] == pytest.approx(
        0.4
    )
    table = plot_metrics.markdown(rows, "scorer a")
    assert "held-out total reward" in table and "| 0.5 ± 0.141 |" in table and "| +0.4 [+0.4, +0.4] |" in table
    for run in groups["scorer b"]:
        run.settings["rewards"] = "perplexity=1"  # which is not measured in the same units
    assert plot_metrics.compare(groups, "scorer a")[1]["pairs"] == 0
    assert [(row["score"], row["reward"]) for row in rows] == [("total_reward", pytest.approx(0.15))] * 2  # of training
    figure = plot_metrics.comparison_figure(groups)
    assert drawn(panel(figure, "validation total reward")) == [([3], [0.3])] * 2
    bars = panel(figure, "held-out total reward")
    assert [patch.get_height() for patch in bars.patches] == pytest.approx([0.1, 0.5])


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (31, 2.042), (32, 1.96)])
def test_students_interval(n, quantile):
    """Against the table that textbooks print; tried out: of 4,000 samples of normal numbers 95 % hold their mean."""
    values = np.random.default_rng(0).normal(size=(4000, n))
    mean, sd, half = plot_metrics.t_interval(values[0])
    assert half == pytest.approx(quantile * sd / n**0.5) and mean == pytest.approx(values[0].mean())
    held = np.mean([abs(row.mean()) <= plot_metrics.t_interval(row)[2] for row in values])
    assert held == pytest.approx(0.95, abs=0.012)
    assert np.isnan(plot_metrics.t_interval(values[0, :1])[1:]).all()


def test_samples_to_nine_in_ten(tmp_path):
    runs = [plot_metrics.read_run(write_setting(tmp_path / f"r{n}", 0, 0.5, [0.1] * n)) for n in (8, 9, 12)]
    np.testing.assert_array_equal([plot_metrics.samples_to(run) for run in runs], [NAN, 9 * 64, 9 * 64])


def test_the_command_compares_and_names_what_is_wrong(tmp_path):
    """An unfinished run, one of another task, one without metrics, one cut in mid-line: the rest is still drawn."""
    folders = two_settings(tmp_path)
    write_setting(tmp_path / "unfinished", 3, None, [0.1], algorithm="rloo")
    write_setting(tmp_path / "other", 0, 0.5, task="gsm8k", algorithm="grpo")
    (tmp_path / "empty").mkdir()
    with open(folders[0] / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    names = [*folders, *(tmp_path / name for name in ("unfinished", "other", "empty"))]
    result = command(*names, "--out", tmp_path / "out", "--baseline", "rloo", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("comparison.csv", "comparison.md", "comparison.png", "comparison.svg"),
    ]
    for words in ("other is of task gsm8k", "unfinished has not ended", "different lengths, 1 to 2", "empty"):
        assert words in result.stderr
    assert "| rloo | 3 |" in (tmp_path / "out" / "comparison.md").read_text()
    csv_lines = (tmp_path / "out" / "comparison.csv").read_text().splitlines()
    assert csv_lines[0].startswith("setting,runs,reached_90,held_out,held_out_sd") and len(csv_lines) == 3
    wrong = command(*folders, "--out", tmp_path / "x", "--baseline", "ppo", cwd=tmp_path)
    assert_one_line_error(wrong, "ppo", "--baseline", "'grpo', 'rloo'")
    assert not (tmp_path / "x").exists()


def test_bars_and_scatter_show_the_runs(tmp_path):
    groups = plot_metrics.group_runs([plot_metrics.read_run(folder) for folder in two_settings(tmp_path)])
    figure = plot_metrics.comparison_figure(groups)
    bars = panel(figure, "held-out accuracy")
    assert [patch.get_height() for patch in bars.patches] == pytest.approx([0.6, 0.7])
    scatter = panel(figure, "accuracy against reward")
    end = next(line for line in scatter.lines if line.get_label() == "rloo")
    smooth = plot_metrics.ema(np.array([0.1, 0.2]), 0.6)[1]
    assert (float(end.get_xdata()[0]), float(end.get_ydata()[0])) == pytest.approx((smooth, smooth))


def test_more_settings_than_colours_are_told_apart(tmp_path):
    folders = [write_setting(tmp_path / str(i), 0, 0.5, beta=i) for i in range(17)]
    with matplotlib.style.context(["default", plot_metrics.STYLE]):
        groups = plot_metrics.group_runs([plot_metrics.read_run(folder) for folder in folders])
        lines = panel(plot_metrics.comparison_figure(groups), "reward").lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 17
