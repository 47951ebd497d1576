"""Statistics of an evaluation, answers on the terminal, the command line."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import inference
import runs
from checkpoints import save
from commands import run_main
from inference import InferenceConfig, bootstrap, evaluate, results_table, show_answer, wilson
from policy import TokenPolicy
from rollouts import Rollout
from tasks import Example, find_task

SCRIPT = Path(inference.__file__)


CPU = torch.device("cpu")


# Prompts of 10, 3, 8 and 10 tokens.
EXAMPLES = [Example(f"What is {text}?") for text in ("(4 - 9) * 6", "", "12+34", "(0 + 0) + 0")]


LENGTH = 12


ENDS = "05"  # with these as further end ids a random policy's completions have very different lengths


def sample(policy: TokenPolicy, examples=EXAMPLES, group_size=3, key=(0, 0, 0), length=LENGTH, **options) -> Rollout:
    return policy.sample(examples, group_size, key, length, **options)


def test_bootstrap_brackets_the_mean():
    values = np.array([0.0] * 300 + [1.0] * 100)
    low, high = bootstrap(values)
    spread = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.25 - spread, 0.25 + spread), abs=0.006)
    assert bootstrap(values) == (low, high) and bootstrap(np.ones(5)) == (1.0, 1.0)


def test_evaluate_counts_right_answers(chain_policy):
    """A policy that always answers 7, on 40 problems of which 3 have that answer."""
    policy = chain_policy("?", "<answer>", "7", "</answer>", "<eos>")
    examples = [Example(f"What is {i}?", {"answer": "7" if i in (0, 20, 39) else "-7"}) for i in range(40)]
    result = evaluate(policy, find_task("arithmetic"), examples, 8, samples=4, batch_rows=12)
    low, high = wilson(3, 40)
    expected = {"problems": 40, "accuracy": 3 / 40, "accuracy_low": low, "accuracy_high": high}
    expected |= {"sampled_accuracy": 3 / 40, "pass@2": 3 / 40, "pass@4": 3 / 40, "working": 0, "sampled_working": 0}
    expected |= {"length": 4, "truncated": 0, "sampled_length": 4, "sampled_truncated": 0}
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    table = results_table({"base": result}).splitlines()
    assert table[0].split() == ["base"]
    assert [line for line in table if line.startswith("greedy accuracy")][0].endswith("7.5% [2.6%, 19.9%]")


def test_evaluate_does_not_depend_on_the_batch(random_policy):
    policy = random_policy(end=ENDS)
    examples = [Example(f"What is {i}?", {"answer": str(i % 10)}) for i in range(20)]
    results = [evaluate(policy, find_task("arithmetic"), examples, 8, 3, batch_rows=rows) for rows in (1, 7, 512)]
    assert results[0] == results[1] == results[2]
    assert evaluate(policy, find_task("arithmetic"), examples, 8, 3, seed=1) != results[0]


@pytest.mark.parametrize(
    ("completion", "shown"),
    [
        ("4-9=-5;-5*6=-30<answer>-30</answer>", "4-9=-5;-5*6=-30  →  -30"),
        ("<answer> 5 </answer>", "→  5"),
        ("4-9=-5", "4-9=-5  (no <answer>...</answer> at the end)"),
        ("\x1b[31m<answer>\x1b[0m5</answer>", r"\x1b[31m  →  \x1b[0m5"),
        ("\x1b]8;;", r"\x1b]8;;  (no <answer>...</answer> at the end)"),
    ],
)
def test_show_answer(completion, shown):
    assert show_answer(completion) == shown


@pytest.fixture(scope="module")
def folders(chain_policy, tmp_path_factory):
    """Two checkpoints: one answers 7 to everything, the other prints an escape sequence."""
    root = tmp_path_factory.mktemp("models")
    save(chain_policy("?", "<answer>", "7", "</answer>", "<eos>"), root / "seven")
    save(chain_policy("?", "\x1b", "[", "\u202e", "<eos>"), root / "escape")
    return root


def command(*words: object, cwd: Path, text: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)], cwd=cwd, input=text, capture_output=True, encoding="utf-8"
    )


def run(monkeypatch, capsys, *words: object, text: str = "") -> tuple[int, str, str]:
    """The command in this process: exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    monkeypatch.setattr(runs.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        run_main(inference.main)
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


def test_the_command_answers_side_by_side_without_escape_sequences(folders):
    result = command("What is (4 - 9) * 6?", "--model", "seven", "escape", cwd=folders)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "seven:\n→  7\nescape:\n" + r"\x1b[\u202e  (no <answer>...</answer> at the end)" + "\n"


def test_the_command_names_unknown_characters_in_one_line(folders):
    result = command("What is 8 ÷ 2 % \x1b[2J?", "--model", "seven", cwd=folders)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("inference.py: error: question ") and result.stderr.count("\n") == 1
    assert "does not know" in result.stderr and "÷" in result.stderr and "\x1b" not in result.stderr


def test_questions_come_from_standard_input(monkeypatch, capsys, folders):
    text = "What is (4 - 9) * 6?\nWhat is 1?\n"
    status, out, err = run(monkeypatch, capsys, "--model", folders / "seven", text=text)
    assert (status, out, err) == (0, "→  7\n→  7\n", "")
    status, out, err = run(monkeypatch, capsys, "--model", folders / "seven", text=f"é\n\n{text}")
    assert (status, out) == (2, "→  7\n→  7\n")  # a bad line is named, a blank one skipped
    assert err.startswith("inference.py: error: ") and "é" in err and err.count("\n") == 1


def test_samples_are_drawn_at_a_temperature(monkeypatch, capsys, folders):
    words = ["What is 1?", "--model", folders / "seven", "--samples", 5, "--temperature", 1000, "--max-new-tokens", 6]
    status, out, err = run(monkeypatch, capsys, *words)
    assert (status, err) == (0, "") and len(set(out.splitlines())) > 1
    assert run(monkeypatch, capsys, *words)[1] == out
    assert run(monkeypatch, capsys, *words, "--seed", 1)[1] != out
    greedy = run(monkeypatch, capsys, *words[:5], "--temperature", 0)[1]
    assert greedy == "→  7\n" * 5


def test_eval_prints_a_table(monkeypatch, capsys, folders):
    words = ["--eval", "--task", "arithmetic", "--limit", 20, "--model", folders / "seven", folders / "escape"]
    status, out, err = run(monkeypatch, capsys, *words)
    assert status == 0
    lines = [
        f"{folders / name}: 20 problems, one greedy completion and 4 samples of each" for name in ("seven", "escape")
    ]
    assert err.splitlines() == lines
    examples = find_task("arithmetic").load(copies=1)["held_out"][:20]
    share = sum(example.columns["answer"] == "7" for example in examples) / 20
    lines = out.splitlines()
    assert lines[0].split() == [str(folders / "seven"), str(folders / "escape")]
    assert lines[1].split() == ["problems", "20", "20"]
    (accuracy,) = [line for line in lines if line.startswith("greedy accuracy")]
    assert accuracy.split()[2] == f"{share:.1%}" and "0.0% [0.0%, 16.1%]" in accuracy
    assert any(line.startswith("pass@4") for line in lines)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["q", "--samples", "0"], ["--samples is 0"]),
        (["q", "--max-new-tokens", "-1"], ["--max-new-tokens is -1"]),
        (["--eval", "--limit", "0"], ["--limit is 0"]),
        (["q", "--temperature", "-1"], ["--temperature is -1.0"]),
        (["q", "--temperature", "nan"], ["--temperature is nan"]),
        (["q", "--temperature", "1e-300"], ["--temperature is 1e-300"]),
        (["q", "--seed", "-1"], ["--seed is -1"]),
        (["q", "--samples", "many"], ["--samples", "'many'"]),
        (["q", "--colour", "red"], ["--colour", "--help"]),
        (["q", "--sample", "2"], ["--sample"]),  # no abbreviations
        (["q", "--model"], ["--model"]),
        (["q", "--model", "nowhere"], ["'nowhere'", "python grpo.py --task arithmetic --out nowhere"]),
        (["q", "--eval", "--model", "seven"], ["--eval"]),
        (["q", "--device", "abacus"], ["--device", "'abacus'"]),
        (["--eval", "--task", "chess"], ["--task", "'chess'", "arithmetic"]),
        ([" ", "--model", "seven"], ["empty"]),
        (["What is é?", "--model", "seven"], ["does not know é"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(monkeypatch, capsys, folders, words, parts):
    monkeypatch.chdir(folders)
    status, out, err = run(monkeypatch, capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith("inference.py: error: ") and err.count("\n") == 1 and err.endswith("\n")
    for part in parts:
        assert part in err


def test_settings_are_all_on_the_command_line():
    assert {field.metadata["help"].endswith(".") for field in dataclasses.fields(InferenceConfig)} == {True}


def test_eval_writes_a_report_and_every_completion(monkeypatch, capsys, folders, tmp_path):
    files = ["--report", tmp_path / "report.json", "--outputs", tmp_path / "outputs.jsonl"]
    words = ["--eval", "--limit", 3, "--model", folders / "seven", "--samples", 2, *files]
    assert run(monkeypatch, capsys, *words)[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    (result,) = report["results"].values()
    lines = [json.loads(line) for line in (tmp_path / "outputs.jsonl").read_text().splitlines()]
    assert report["settings"]["task"] == "arithmetic" and result["problems"] == 3
    greedy, sampled = ([line for line in lines if line["greedy"] is kind] for kind in (True, False))
    assert len(greedy) == 3 and len(sampled) == 3 * 4
    assert sum(line["accuracy"] for line in greedy) / 3 == pytest.approx(result["accuracy"])
    assert {line["completion"] for line in lines} == {"<answer>7</answer>"}
    assert [line["question"] for line in greedy] == [e.prompt for e in find_task("arithmetic").load()["held_out"][:3]]
    for line in lines:
        assert line["accuracy"] == (line["answer"] == "7") and line["length"] == 4 and not line["truncated"]
    status, _, errors = run(monkeypatch, capsys, *words)
    assert status == 2 and "report.json exists" in errors
    status, _, errors = run(monkeypatch, capsys, "What is 1?", "--report", tmp_path / "x.json")
    assert status == 2 and "--eval" in errors


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_free_memory_goes_back_to_the_system():
    """What `keep_memory` kept, and what lies between lasting pieces, too; in a process that has no other memory."""
    script = """
import commands
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20
commands.keep_memory()
pieces = [b"x" * 2**20 for _ in range(200)]
lasting = pieces[::2]
before, pieces = resident(), None
kept = resident()
commands.return_memory()
print(before - kept, kept - resident())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=SCRIPT.parent, capture_output=True, text=True)
    freed, returned = map(int, done.stdout.split())
    assert freed < 10 and 90 < returned < 110
