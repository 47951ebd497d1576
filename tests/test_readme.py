"""The README's commands as written, and its figures against the committed results."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import plot_metrics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
NOT_HERE = ("python -m pip install", "python -m pytest")  # what runs this test has done both


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the source to run in, as a user would."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), ROOT / "README.md"]:
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("command", [line for line in COMMANDS if not line.startswith(NOT_HERE)])
def test_command_as_written(command, copy):
    if command.startswith("python grpo.py") and "--steps" not in command:
        command += " --steps 3"
    assert command.startswith("python ")
    quoted = f'"{sys.executable}" {command.removeprefix("python ")}'
    result = subprocess.run(quoted, shell=True, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Traceback" not in result.stderr and result.stdout.strip()
    if command == "python grpo.py --task arithmetic --steps 3":
        for name in ("base/model.safetensors", "model.safetensors", "evaluation.json", "training.png", "accuracy.svg"):
            assert (copy / "saved_model" / name).stat().st_size > 0
        assert len((copy / "saved_model" / "metrics.jsonl").read_text().splitlines()) == 4


def test_the_commands_are_there():
    for command in (
        "python -m pip install -r requirements.txt",
        "python grpo.py --task arithmetic",
        'python inference.py "What is (4 - 9) * 6?"',
        "python plot_metrics.py",
        "python -m pip install -r requirements-dev.txt",
        "python -m pytest",
    ):
        assert command in COMMANDS, command


def test_tables_are_the_committed_results():
    printed = subprocess.run([sys.executable, str(ROOT / "results" / "table.py")], capture_output=True, text=True)
    rows = [line for line in printed.stdout.splitlines() if line.startswith("| ") and "seed 0" not in line]
    assert rows and all(row in README for row in rows if "---" not in row)
    assert printed.stdout.splitlines()[-1].partition(": ")[2] in README


def test_the_studies_tables_and_figures_follow_from_the_committed_runs(tmp_path):
    """Study A's table as printed, study B's as drawn again; the tables in the README are these."""
    command = [sys.executable, str(ROOT / "results" / "odd_even.py"), str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True)
    assert (tmp_path / "sweeps.svg").stat().st_size > 10_000
    rows = [line for line in printed.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 16 and all(row in README for row in rows), printed.stderr
    for study, baseline in (("algorithms", "grpo"), ("rewards", "answer_format=0.2,answer_near=0.2,answer_exact=0.6")):
        runs = sorted((ROOT / "results" / study).glob("*/seed*"))
        plot_metrics.plot(runs, tmp_path, baseline=baseline)
        drawn = (tmp_path / "comparison.md").read_text()
        assert drawn == (ROOT / "results" / study / "comparison.md").read_text() and drawn in README


def test_line_counts_are_true():
    for name, count in re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README):
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(lines - int(count)) <= 0.05 * lines, f"{name} has {lines} lines"


def test_flags_in_the_readme_exist():
    helps = "".join(
        subprocess.run([sys.executable, str(ROOT / name), "--help"], capture_output=True, text=True).stdout
        for name in ("grpo.py", "sft.py", "inference.py", "plot_metrics.py", "tests/bench_sampler.py")
    )
    for flag in set(re.findall(r"--[a-z][a-z-]+", README)):
        assert flag in helps or flag.replace("-", "_").replace("__", "--", 1) in helps, flag


def test_the_figure_of_the_formulas_is_drawn(tmp_path):
    command = [sys.executable, str(ROOT / "results" / "formulas.py"), "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "formulas.png").stat().st_size > 10_000 and (tmp_path / "formulas.svg").stat().st_size > 10_000
