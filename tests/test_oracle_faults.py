"""Known faults, put back one by one: each must be caught by the test that tests/README.md names for it."""

import json
import subprocess
import sys

import pytest
from faults import FAULTS, ROOT, table


@pytest.fixture(scope="module")
def outcomes() -> dict[str | None, dict]:
    """What `python tests/faults.py` reports, by fault; None is the code as it is."""
    command = [sys.executable, str(ROOT / "tests" / "faults.py")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return {line["what"]: line for line in map(json.loads, result.stdout.splitlines())}


def test_the_named_tests_pass_on_the_code_as_it_is(outcomes):
    whole = outcomes[None]
    assert (whole["status"], whole["raised"]) == (0, []) and whole["tests"] >= len({fault.test for fault in FAULTS})


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_the_fault_is_caught(outcomes, fault):
    """By a test that ran and whose own assertion failed, not by an error on the way."""
    caught = outcomes[fault.what]
    assert caught["status"] == 1 and caught["tests"] >= 1
    assert caught["raised"] in (["call: AssertionError"], ["call: Failed"])


def test_every_patch_fits():
    """One that does not would stop all the others."""
    counts = {fault.what: (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old) for fault in FAULTS}
    assert {what: count for what, count in counts.items() if count != 1} == {}


def test_the_table_of_faults_is_the_readmes():
    assert len(FAULTS) >= 25 and table() in (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
