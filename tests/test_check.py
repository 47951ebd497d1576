"""`check.py` from outside: every fault by its numbers, right functions in many forms, files that cannot be checked.

`python tests/test_check.py` prints the table of tests/README.md.
"""

import functools
import json
import math
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import check_cases as known  # noqa: E402
import check_conformance  # noqa: E402
from check import Unusable, Verdict, check  # noqa: E402
from check_variants import FAULTY, RIGHT, UNUSABLE, loss  # noqa: E402
from faults import FAULTS  # noqa: E402


@functools.cache
def verdict(text: str, *flags: str) -> Verdict:
    """The verdict on a file with one function."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mine.py"
        file.write_text(text)
        (one,), _ = check([str(file), *flags])
    return one


@pytest.mark.parametrize(("name", "faults", "text"), FAULTY)
def test_each_fault_is_named_first_and_no_other_but_what_gives_the_same_numbers(name, faults, text):
    told = verdict(text)
    assert (told.function, told.status) == (name, "differs")
    assert told.faults[0] == list(faults), told.text
    # A row's own tokens replaced by the width, and a constant by the width, are one formula: rows times width.
    assert sorted(told.faults) == ([[27], [28]] if faults in ((27,), (28,)) else [list(faults)])
    assert all(FAULTS[number - 1].what in told.text for number in faults)


@pytest.mark.parametrize(("name", "row", "text"), RIGHT)
def test_no_false_alarm(name, row, text):
    told = verdict(text)
    assert (told.function, told.status) == (name, "right") and row in told.text, told.text
    assert told.difference < 1e-6 or name == "sample"


def test_there_are_enough_of_both_and_every_fault_that_concerns_these_functions_is_among_them():
    of = {name: {number for other, faults, _ in FAULTY if other == name for number in faults} for name, *_ in FAULTY}
    assert of["policy_loss"] == {known.FAULTS.index(fault) + 1 for fault in known.LOSS_FAULTS}
    assert of["sample"] == {known.FAULTS.index(fault) + 1 for fault in known.known(4, 9, 17, 22, 23, 29, 30, 31, 34)}
    around = {10, 14, 16, 32, 33, 35, 36, 38, 39, 40}  # metrics, rewards, resuming, the draw from 150,000 tokens
    around |= {50, 52, 53, 54, 55, 56, 57, 58}  # of flat groups by several rewards, and of cells that no row has on
    assert (
        set().union(*of.values()) | around == set(range(1, len(FAULTS) + 1)) and not set().union(*of.values()) & around
    )
    assert len(RIGHT) >= 50
    counted = f"{len(FAULTY)} functions with faults and {len(RIGHT)} without"
    assert counted in (ROOT / "tests" / "README.md").read_text(encoding="utf-8")


def test_every_fault_moves_some_number_by_far_more_than_is_forgiven():
    """In each row it either changes nothing at all or at least 50 times what `check.py` takes for equal."""
    moved = set()
    for fault in known.LOSS_FAULTS:
        for name, row in known.patched("grpo.py", (fault,)).ALGORITHMS.items():
            right_row = known.grpo.ALGORITHMS[name]
            row = known.with_cells(row, kl_estimator="k1") if fault in known.known(37) else row
            if fault in known.known(51) and row.surrogate == "clip":
                row, right_row = known.with_cells(row, cap=known.CAP), known.with_cells(right_row, cap=known.CAP)
            given, right = (
                [known.loss_numbers(faults, cells, cells.beta > 0, case) for case in known.cases_of("policy_loss")]
                for faults, cells in (((fault,), row), ((), right_row))
            )
            gap = max(map(known.difference, given, right))
            assert gap < 1e-12 or gap > 50 * known.SAME, (fault.what, name, gap)
            moved |= {fault} if gap > 1e-12 else set()
    assert moved == set(known.LOSS_FAULTS)


def test_numpy_is_handed_numpy_and_float32_where_it_is_asked_for():
    text = "import numpy as np\n\ndef group_advantages(rewards):\n    assert isinstance(rewards, np.ndarray)\n"
    text += "    assert rewards.dtype == {}\n    return rewards - rewards.mean(1, keepdims=True)\n"
    assert verdict(text.format("np.float64")).status == "right"
    assert verdict(text.format("np.float32")).status == "unusable"
    assert verdict(text.format("np.float32"), "--float32").status == "right"
    wrong = (
        "import numpy as np\n\ndef group_advantages(rewards):\n    return (rewards - rewards.mean(1, keepdims=True)) / "
    )
    wrong += "(rewards.std(1, keepdims=True) + 1e-4)\n"  # of torch this is the unbiased std, of NumPy it is not
    assert verdict(wrong).faults == [[7, 8]] and verdict(wrong, "--arrays", "torch").faults == [[8]]


def test_a_row_that_is_named_is_held_to_it():
    assert verdict(loss("dapo"), "--row", "dapo").status == "right"
    told = verdict(loss("dapo"), "--row", "grpo")
    assert told.status == "differs" and "nearest: `grpo`" in told.text
    told = verdict(loss("grpo", ("(cost.sum(-1) / count)", "(cost.sum(-1) / cost.shape[1])")), "--row", "dr_grpo")
    assert told.faults == [[28]] or told.faults == [[28], [27]]
    narrow = loss("grpo").replace("(0.2, 0.2, 0.04", "(0.1, 0.3, 0.04")
    assert verdict(narrow).status == "differs"
    assert verdict(narrow, "--epsilon", "0.1", "--epsilon-high", "0.3").status == "right"


def test_a_sum_for_a_mean_a_subtracted_kl_and_a_clip_that_is_nobodys():
    told = verdict(loss("dapo", ("(step_tokens if", "(1.0 if")))
    assert told.status == "differs" and not told.equals  # another factor in each case
    told = verdict(loss("dr_grpo", ("max_new_tokens)", "max_new_tokens * 4)")))
    assert told.text.startswith("differs: 0.25 times `dr_grpo` or `rloo` or `maxrl` or `passk` in every case")
    told = verdict(loss("grpo", ("cost = cost + BETA", "cost = cost - BETA")))
    assert told.status == "differs" and "the KL term subtracted" in told.text
    assert "nearest: `" in verdict(loss("dapo").replace("0.28", "0.25")).text
    told = verdict(loss("dapo").replace("0.28", "0.25"), "--row", "dapo")
    lines = told.text.splitlines()
    assert "nearest: `dapo`" in lines[0] and "first at case 1" in lines[0] and len(lines) == 4
    assert "clip to [0.8, 1.28]" in lines[2] and "divided by all 22 tokens" in lines[2]


def test_what_stands_at_padding_can_be_said_to_be_zero():
    text = loss("grpo", ("x = logp - old", "x = raw - (raw.detach() if raw_old is None else raw_old)"))
    assert verdict(text).faults == [[15]] and verdict(text, "--padding", "zeros").status == "right"


@pytest.mark.parametrize(("text", "said"), UNUSABLE)
def test_what_cannot_be_checked_is_said_in_a_line(text, said):
    try:
        told = verdict(text)
        assert told.status == "unusable" and said in told.text and "\n" not in told.text, told.text
        assert "called " in told.text or "parameters" in told.text
    except Unusable as error:
        assert said in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("def pass_at_k(n, c, k):\n    import math\n    return 1 - math.comb(n - c, k) / math.comb(n, k)\n", 0),
        ("def pass_at_k(n, c, k):\n    return 1 - (1 - c / n) ** k\n", 1),
        ("def pass_at_k(n, c, k):\n    print('noise')\n    return None\n", 2),
        ("import nowhere_at_all\n", 2),
    ],
)
def test_the_command_its_status_and_its_json(text, status, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    command = [sys.executable, str(ROOT / "tests" / "check.py"), str(tmp_path / "mine.py"), "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == status and "Traceback" not in result.stderr, result.stderr
    if "nowhere" in text:
        assert result.stderr.count("\n") == 1 and "ModuleNotFoundError" in result.stderr
        return
    (told,) = json.loads(result.stdout)
    assert told["function"] == "pass_at_k" and told["status"] == ["right", "differs", "unusable"][status]
    assert told["faults"] == [[[]], [[41]], []][status]


@pytest.mark.parametrize("row", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_trl_is_right_but_for_padding_and_flat_groups(row, monkeypatch):
    """Scorer, sampler, mask and every loss; at padding that overflows its loss is NaN where the ratio is a token's."""
    monkeypatch.setenv("TRL_LOSS", row)
    file = str(ROOT / "tests" / "check_trl.py")
    told = {one.function: one for one in check([file, "--padding", "zeros"])[0]}
    flat = told.pop("group_advantages")
    assert set(told) == {"policy_loss", "completion_mask", "log_probs", "sample"}
    assert {one.status for one in told.values()} == {"right"} and f"`{row}`" in told["policy_loss"].text
    assert (flat.status, flat.faults) == (("right", [[]]) if row == "dr_grpo" else ("differs", [[8]]))
    loss_as_it_is = next(one for one in check([file])[0] if one.function == "policy_loss")
    assert loss_as_it_is.faults == ([[]] if row in ("gspo", "cispo") else [[15]])


def numbers_of(value) -> list[float]:
    """All numbers in nested lists and dictionaries, in their order."""
    if isinstance(value, (dict, list, tuple)):
        return [x for part in (value.values() if isinstance(value, dict) else value) for x in numbers_of(part)]
    return [value] if isinstance(value, (int, float)) else []


def without_numbers(value):
    if isinstance(value, dict):
        return {key: without_numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_numbers(part) for part in value]
    return value if isinstance(value, str) else None


def test_the_conformance_file_is_what_the_code_gives():
    committed = json.loads(check_conformance.FILE.read_text())
    made = json.loads(check_conformance.text())
    assert without_numbers(made) == without_numbers(committed), "python tests/check_conformance.py"
    np.testing.assert_allclose(numbers_of(made), numbers_of(committed), rtol=1e-9, atol=1e-12)
    assert check_conformance.FILE.stat().st_size < 300_000


def test_the_conformance_file_alone_is_enough():
    """Every loss of `dapo`, a mask and the log-probabilities' model, from the plain numbers."""
    file = json.loads(check_conformance.FILE.read_text())
    asked = file["functions"]["policy_loss"]
    for case, expected in zip(asked["cases"], asked["expected"]["dapo"], strict=True):
        given, total = case["given"], 0.0
        old = given["old_logp"] or given["logp"]
        for i, row in enumerate(given["mask"]):
            for t in range(sum(row)):
                ratio, a = math.exp(given["logp"][i][t] - old[i][t]), given["advantages"][i]
                total -= min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
        assert total / given["step_tokens"] == pytest.approx(expected["value"], abs=1e-12)
    asked = file["functions"]["completion_mask"]
    (answers,) = asked["expected"].values()
    for case, expected in zip(asked["cases"], answers, strict=True):
        for ids, mask in zip(case["given"]["ids"], expected["value"], strict=True):
            ends = [i for i, token in enumerate(ids) if token in case["given"]["end_ids"]]
            assert sum(mask) == (ends[0] + 1 if ends else len(ids))
    weights = {name: torch.tensor(x, dtype=torch.float64) for name, x in file["model"]["weights"].items()}
    known.theirs().load_state_dict(weights)  # which are its own: three decimals, written in full
    case, (answers,) = known.cases_of("log_probs")[0], file["functions"]["log_probs"]["expected"].values()
    np.testing.assert_allclose(known.by_transformers(case)["value"], answers[0]["value"], rtol=1e-9)


def table() -> str:
    """The table of tests/README.md: what each variant is named, by its numbers alone."""
    named: dict[tuple, list] = defaultdict(list)
    for name, faults, text in FAULTY:
        told = verdict(text)
        named[faults, name].append([" and ".join(map(str, numbers)) for numbers in told.faults])
    lines = ["| put in | function | variants | named first | the same numbers as |", "| --- | --- | --- | --- | --- |"]
    for (faults, name), found in sorted(named.items(), key=lambda item: (len(item[0][0]), item[0])):
        first = ", ".join(sorted({one[0] for one in found}))
        also = ", ".join(sorted({other for one in found for other in one[1:]}))
        lines.append(f"| {' and '.join(map(str, faults))} | `{name}` | {len(found)} | {first} | {also} |")
    right = sum(verdict(text).status == "right" for _, _, text in RIGHT)
    lines.append(f"| none | all | {len(RIGHT)} | {'right' if right == len(RIGHT) else right} | |")
    return "\n".join(lines)


def test_the_table_is_the_readmes():
    assert table() in (ROOT / "tests" / "README.md").read_text(encoding="utf-8"), "python tests/test_check.py prints it"


if __name__ == "__main__":
    print(table())
