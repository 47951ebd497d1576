"""What the three READMEs say against the code: commands, tables, flags, links, and the lines that README.md points at.

`python tests/test_readme.py` rewrites the line numbers in README.md where the code has moved.
"""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("README.md", "results/README.md", "tests/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
README, RESULTS, TESTS = TEXTS.values()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """A text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


LINES = [line for text in TEXTS.values() for block in blocks(text, "sh") for line in block.splitlines()]
COMMANDS = [part for line in LINES for part in line.split(" && ")]
NOT_HERE = ("python -m pip install", "python -m pytest")  # what runs this test has done both


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the source to run in, as a user would."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("results/*.py"), *ROOT.glob("tests/*.py")]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    return folder


@pytest.mark.parametrize("command", [line for line in COMMANDS if not line.startswith(NOT_HERE)])
def test_command_as_written(command, copy):
    """In the order in which they stand; the main job takes 3 steps here, and a fourth when it is resumed."""
    assert command.startswith("python ")
    steps = ""
    if command.startswith("python grpo.py") and "--steps" not in command:
        steps = " --steps 4" if "--resume" in command else " --steps 3"
    quoted = f'"{sys.executable}" {command.removeprefix("python ")}{steps}'
    result = subprocess.run(quoted, shell=True, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Traceback" not in result.stderr and result.stdout.strip()
    if command == "python grpo.py --task arithmetic":
        for name in ("base/model.safetensors", "model.safetensors", "evaluation.json", "training.png", "accuracy.svg"):
            assert (copy / "saved_model" / name).stat().st_size > 0
    if steps and "--task arithmetic" in command:
        assert len((copy / "saved_model" / "metrics.jsonl").read_text().splitlines()) == int(steps.split()[1]) + 1


def test_the_commands_are_there():
    readme = [line for block in blocks(README, "sh") for line in block.splitlines()]
    for command in (
        "python -m pip install -r requirements.txt && python grpo.py --task arithmetic",
        'python inference.py "What is (4 - 9) * 6?"',
        "python plot_metrics.py",
        "python -m pip install -r requirements-dev.txt && python -m pytest",
        "python grpo.py --task arithmetic --resume",
    ):
        assert command in readme, command


def test_flags_that_are_named_exist():
    programs = (
        "grpo.py",
        "sft.py",
        "inference.py",
        "plot_metrics.py",
        "tests/bench_sampler.py",
        "tests/bench_speed.py",
        "tests/bench_faults.py",
        "tests/check.py",
    )
    there = "".join(
        subprocess.run([sys.executable, str(ROOT / name), "--help"], capture_output=True, text=True).stdout
        for name in programs
    )
    there += (ROOT / "tests" / "faults.py").read_text(encoding="utf-8")  # which reads --table without a parser
    for module in (["pip", "install"], ["torch.distributed.run"]):
        there += subprocess.run([sys.executable, "-m", *module, "--help"], capture_output=True, text=True).stdout
    for flag in sorted(set(re.findall(r"--[a-z][a-z-]+", "".join(TEXTS.values())))):
        assert flag in there or flag.replace("-", "_").replace("__", "--", 1) in there, flag


def test_tables_are_the_committed_results():
    printed = subprocess.run([sys.executable, str(ROOT / "results" / "table.py")], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    report, _, rest = printed.stdout.partition("\nREADME.md\n")
    for text, part in ((RESULTS, report), (README, rest)):
        rows = [line for line in part.splitlines() if line.startswith("| ") and "---" not in line]
        rows = [row for row in rows if not row.startswith("| held-out |")]
        assert len(rows) >= 10 and [row for row in rows if f"\n{row}\n" not in text] == []
    assert printed.stdout.splitlines()[-1].partition(": ")[2] in RESULTS


def test_the_summary_and_the_second_steps_by_hand(capsys):
    """Changes 0.1, 0.2 and 0.3: sd 0.1, half an interval 4.303 * 0.1 / sqrt(3) = 0.248."""
    spec = importlib.util.spec_from_file_location("table_of_results", ROOT / "results" / "table.py")
    spec.loader.exec_module(table := importlib.util.module_from_spec(spec))
    before, after = ([{"share": value} for value in values] for values in ((0.1, 0.2, 0.3), (0.2, 0.4, 0.6)))
    line = table.summary("job", "right", "share", before, after)
    assert line == "| job | right | 3 | 20.0% | 40.0% | +20.0 [-4.8, +44.8] |"
    assert table.second_step(table.Example("What is (4 - 9) * 6?")) == (-5, "*", 6)


def test_the_studies_tables_and_figures_follow_from_the_committed_runs(tmp_path):
    """Study A's table and study C's as printed, study B's as drawn again; the tables of the report are these."""
    import plot_metrics

    command = [sys.executable, str(ROOT / "results" / "odd_even.py"), str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True)
    assert (tmp_path / "sweeps.svg").stat().st_size > 10_000
    rows = [line for line in printed.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 16 and all(row in RESULTS for row in rows), printed.stderr
    command = [sys.executable, str(ROOT / "results" / "stale.py"), str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in printed.stdout.splitlines() if line]
    assert len(lines) == 19 and all(line in RESULTS for line in lines), printed.stderr
    assert (tmp_path / "stale.svg").stat().st_size > 10_000
    shaped = "answer_format=0.2,answer_near=0.2,answer_exact=0.6"
    for study, baseline in (("algorithms", "grpo"), ("more_rows", "grpo"), ("rewards", shaped)):
        base = sorted((ROOT / "results" / "algorithms").glob("grpo/seed*")) if study == "more_rows" else []
        runs = [*base, *sorted((ROOT / "results" / study).glob("*/seed*"))]
        plot_metrics.plot(runs, tmp_path, baseline=baseline)
        drawn = (tmp_path / "comparison.md").read_text()
        assert drawn == (ROOT / "results" / study / "comparison.md").read_text() and drawn in RESULTS


def test_the_figure_of_the_formulas_is_drawn(tmp_path):
    command = [sys.executable, str(ROOT / "results" / "formulas.py"), "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "formulas.png").stat().st_size > 10_000 and (tmp_path / "formulas.svg").stat().st_size > 10_000


def test_the_table_of_algorithms_is_the_codes():
    from grpo import ALGORITHMS, Algorithm

    table = "\n".join(text[text.index("| `--algorithm` |") :].partition("\n\n")[0] for text in (README, RESULTS))
    rows = re.findall(r"^\| `(\w+)`(?: \(\[[\d.]+\]\(\S+\)\))? \| (.*) \|$", table, re.MULTILINE)
    assert [name for name, _ in rows] == list(ALGORITHMS)
    for name, cells in rows:
        row = ALGORITHMS[name]
        cells = [cell.strip() for cell in f"{cells} ".split("| ", 6)]
        advantage, ratio, surrogate, bounds, aggregate, beta, more = cells
        written = {"advantage": advantage, "surrogate": surrogate, "aggregate": aggregate}
        assert {key: getattr(row, key) for key in written} == written and float(beta) == row.beta
        for cell, key in ((ratio, "ratio"), (bounds, "epsilon")):  # "–" is what the row does not read
            assert (cell == "–") == (key in row.idle), f"{name}: {key}"
        assert ratio in ("–", row.ratio)
        assert bounds == "–" or [float(x) for x in bounds.split(" / ")] == [row.epsilon, row.epsilon_high]
        assert ("--combine each" in more) == (row.combine == "each")
        more = {key.replace("-", "_"): float(value) for key, value in re.findall(r"--([a-z-]+) ([\d.]+)", more)}
        assert {key: getattr(row, key) for key in more} == more
        for key in (
            "max_resample",
            "overlong_buffer",
            "kl_estimator",
            "anchor",
            "cap",
            "correction",
            "top_entropy",
            "entropy_bonus",
        ):
            assert key in more or getattr(row, key) == getattr(Algorithm(), key), f"{name}: {key}"


def test_each_function_that_a_figure_rests_on_has_its_test():
    rows = re.findall(r"^\| (\S+\.py) \| `([\w.]+)` \| .* \| (.*) \|$", TESTS, re.MULTILINE)
    assert len(rows) > 80
    for file, function, test in rows:
        assert line_of(file, function), f"{file} has no {function}"
        name, _, case = test.strip("`").partition("::")
        assert case and line_of(f"tests/test_{name}.py", case), f"{file}, {function}: no test {test}"


# [`grpo.py:30`](grpo.py#L30) `group_advantages`, or `train_step (4)`: the comment (4) in that function.
REFERENCE = re.compile(r"\[`([\w/]+\.py):(\d+)`\]\(([\w/]+\.py)#L(\d+)\) `([\w.]+)(?: \((\d)\))?`")


def line_of(file: str, name: str, mark: str | None = None) -> int | None:
    """The line on which a function, class, method (`Class.method`) or constant of a file begins, or None.

    With `mark` the first line in it whose comment holds that number in brackets.
    """
    path = ROOT / file
    if not path.exists():
        return None
    source = path.read_text(encoding="utf-8")
    body = ast.parse(source).body
    for part in name.split("."):
        node = next((node for node in body if part in names_of(node)), None)
        if node is None:
            return None
        body = getattr(node, "body", [])
    if mark is None:
        return node.lineno
    lines = enumerate(source.splitlines()[node.lineno - 1 : node.end_lineno], node.lineno)
    return next((number for number, line in lines if re.search(rf"#.*\({mark}\)", line)), None)


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = [*getattr(node, "targets", []), getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def with_lines(text: str) -> tuple[str, list[str]]:
    """The text with its references brought up to date, and those that lead nowhere."""
    lost = []

    def renew(match: re.Match) -> str:
        file, _, _, _, name, mark = match.groups()
        line = line_of(file, name, mark)
        if line is None:
            lost.append(f"{file} {name}" + (f" ({mark})" if mark else ""))
            return match[0]
        return f"[`{file}:{line}`]({file}#L{line}) `{name}" + (f" ({mark})`" if mark else "`")

    return REFERENCE.sub(renew, text), lost


def test_references_lead_to_what_they_name():
    text, lost = with_lines(README)
    assert lost == []
    assert text == README, "the code has moved: python tests/test_readme.py"
    assert len(REFERENCE.findall(README)) == len(re.findall(r"\.py:\d+", README)) >= 15


def anchors(text: str) -> list[str]:
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", FILES)
def test_relative_links_lead_somewhere(name):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[name])) if not link.startswith("https://")]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.is_file(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_readme_ends():
    assert len(README.splitlines()) <= 300 and len(README.encode()) <= 20_000


def block_with(text: str) -> str:
    (block,) = [block for block in blocks(README, "python") if text in block]
    return block


def test_the_task_of_the_readme(monkeypatch):
    """As written: the function and the item of TASKS, in at most 25 lines, and the test that such a task needs."""
    import tasks

    function, item = map(block_with, ("def backwards", 'name="backwards"'))
    assert len((function + item).splitlines()) <= 25
    names = dict(vars(tasks))
    exec(function, names)
    monkeypatch.setitem(tasks.TASKS, "backwards", eval(item, names))
    splits = tasks.find_task("backwards").load()
    assert {name: len(part) for name, part in splits.items()} == {"validation": 100, "train": 800, "held_out": 100}
    examples = [example for part in splits.values() for example in part]
    assert len({example.prompt for example in examples}) == 1000  # no problem stands in two splits
    assert all(example.columns["answer"] == example.prompt.split()[2][::-1] for example in examples)


def test_the_reward_of_the_readme():
    function = block_with("def steps_right(")
    assert len(function.splitlines()) <= 25
    names: dict = {}
    exec(function, names)
    texts = ["4-9=-5;-5*6=-31<answer>-31</answer>", "7", "1" * 10_000 + "=2"]
    assert names["steps_right"](None, texts) == [0.5, None, None]


def main() -> None:
    text, lost = with_lines(README)
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    if lost:
        sys.exit(f"README.md points at what is not there: {', '.join(lost)}")


if __name__ == "__main__":
    main()
