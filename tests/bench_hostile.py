"""Hostile text and damaged files by the thousand: no reward may fail or hang, no file may end in a traceback.

    python tests/bench_hostile.py [--completions 1000000] [--files 1000]

Completions are random pieces of what rewards look for, of what has stopped such programs before, and of noise; every
reward that needs no other program scores each of them. Files are a toy's checkpoint and a run.json with flipped bits,
cut, or with a value of another type; each is loaded and asked, or resumed. Prints the slowest call and what was found,
and ends with status 1 if any of it was wrong.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_faults
import torch

import runs
from checkpoints import load
from commands import NotFinite, UserError
from grpo import GRPOConfig
from rewards import REWARDS
from tasks import Example

OTHERS = {"judge", "perplexity", "math_accuracy", "math_lenient"}  # ask another program, or a model
PIECES = [
    *(
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "\\boxed{",
        "}",
        "{",
        "$",
        "=",
        "-",
        "+",
        "*",
        ",",
        ".",
        "e",
        "_",
    ),
    *("1", "0", "-30", "1,000", "9" * 400, "1e999", "0x1F", "٣", "½", "NaN", "inf", "-" * 50, "(" * 200, "1=1=" * 30),
    *("\n", "\r", "\t", "\0", "\x1b[2J", "\u202e", "\ud800", "😀", "a" * 300, " " * 300, "4-9=-5", "```", "exit(1)"),
    *("{{7*7}}", "%s%n", "<answer><answer>", "</answer>" * 20, "\\frac{1}{0}", "2^{2^{2^{2}}}", "${", "\\", '"', "'"),
]
ODD = [None, True, -1, 0, 10**30, 1e308, 1.5, "", "x", "1", [], [[]], {}, {"a": None}, [None], [-1], "../../etc/passwd"]


def completions(count: int, seed: int) -> list[str]:
    """Hostile texts of up to 60 pieces."""
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randrange(60))) for _ in range(count)]


def score(texts: list[str]) -> tuple[float, str]:
    """Every reward on every text, alone; the most seconds that one took, and which; raises what they raise."""
    slowest = (0.0, "")
    given = {"prompts": ["What is 3 + 4?"], "answer": ["7"], "reference": ["right"], "completion_ids": [[1, 2]]}
    for name in sorted(REWARDS.keys() - OTHERS):
        for text in texts:
            start = time.perf_counter()
            (value,) = REWARDS[name](completions=[text], state={}, even_bonus=0.2, **given)
            slowest = max(slowest, (time.perf_counter() - start, name))
            assert value is None or abs(value) < 1e9, (name, text)
    return slowest


def odd_value(value, rng: random.Random):
    """A JSON value with one of its parts, or all of it, made something else."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(sorted(value))
        return value | {key: odd_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.5:
        place = rng.randrange(len(value))
        return [*value[:place], odd_value(value[place], rng), *value[place + 1 :]]
    return rng.choice(ODD)


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file; what was done to it."""
    content, kind = bytearray(path.read_bytes()), rng.choice(["flip", "cut", "nest", "value", "value", "value"])
    if path.suffix != ".json" and kind in ("nest", "value"):
        kind = "flip"
    if kind == "flip":
        for _ in range(rng.randrange(1, 8)):
            content[rng.randrange(min(len(content), 4000))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "nest":
        content = bytearray(b'{"a":' * 5000 + b"1" + b"}" * 5000)
    else:
        content = bytearray(json.dumps(odd_value(json.loads(content), rng)).encode())
    path.write_bytes(content)
    return f"{kind} {path.name}"


def ask(folder: Path) -> str:
    """Load a checkpoint and have it answer."""
    policy = load(folder, "cpu")
    return policy.sample([Example("1+1")], 1, (0, 0, 0), 4, greedy=True).texts[0]


def resume(folder: Path) -> GRPOConfig:
    """The settings that --resume finds in a folder."""
    before, sys.argv = sys.argv, ["grpo.py", "--out", str(folder), "--resume"]
    try:
        return runs.parse_settings(GRPOConfig, "", "")
    finally:
        sys.argv = before


def late(number, frame):
    raise TimeoutError("took more than 20 s")


def outcome(base: Path, folder: Path, seed: int) -> tuple[str, str]:
    """What comes of one damaged file: 'line' (a UserError), 'answer', or the name of another error; and what it was."""
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    checkpoint = [path for path in sorted(folder.iterdir()) if path.name != "run.json"]
    path = folder / "run.json" if rng.random() < 0.3 else rng.choice(checkpoint)
    done = damage(path, rng)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
            (resume if path.name == "run.json" else ask)(folder)
        found = "answer"
    except (UserError, NotFinite):
        found = "line"
    except SystemExit as error:  # of the parser of flags
        found = "line" if error.code == 2 and errors.getvalue().count("\n") == 1 else f"exit {error.code}"
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"[:200]
    signal.alarm(0)
    assert files == {file.name: file.read_bytes() for file in folder.iterdir()}, "a file was changed"
    return found, done


def damaged(count: int, folder: Path, first: int = 0) -> Counter:
    """Outcomes of so many damaged files, each with the number of the first that had it."""
    base = bench_faults.tiny(folder / "base")
    (base / "run.json").write_text(json.dumps({"settings": dataclasses.asdict(GRPOConfig(model="base"))}))
    found = Counter()
    for seed in range(first, first + count):
        what, done = outcome(base, folder / "damaged", seed)
        found[what if what in ("line", "answer") else f"{what} ({done}, seed {seed})"] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--completions", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    slowest = max(score(completions(1000, seed)) for seed in range(arguments.completions // 1000))
    worst = f"the slowest call took {1000 * slowest[0]:.1f} ms ({slowest[1]})"
    print(f"{arguments.completions:,} completions: no exception; {worst}")
    with tempfile.TemporaryDirectory() as name:
        found = damaged(arguments.files, Path(name))
    for what, count in found.most_common():
        print(f"{count:5d}  {what}")
    sys.exit(0 if slowest[0] < 0.05 and found.keys() <= {"line", "answer"} else 1)


if __name__ == "__main__":
    main()
