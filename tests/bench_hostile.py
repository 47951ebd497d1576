"""Hostile text and damaged files by the thousand: no reward may fail or hang, no file may end in a traceback.

    python tests/bench_hostile.py [--completions 1000000] [--files 1000]

Completions are random pieces of what rewards look for, of what has stopped such programs before, and of noise; every
reward that needs no other program scores each of them. Files are those of a toy's checkpoint, whole or in shards behind
an index, and of a run (run.json, metrics, samples, states), with flipped bits, cut, with a value of another type or a
path that leaves the folder; each is loaded and asked, or resumed. What may come of it is a line (exit status 2) that
leaves the file as it is, or a right answer: that of a whole file, or the state of a run as it was saved. Prints the
slowest call and what was found, and ends with status 1 if any of it was wrong.
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
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_faults
import torch
from safetensors.torch import load_file, save_file

import grpo
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
INDEX = "model.safetensors.index.json"


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


def odd_lines(content: str, rng: random.Random) -> str:
    """Lines of JSON, or one JSON value, with a value of one made something else."""
    lines = [content] if "\n}" in content else content.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = json.dumps(odd_value(json.loads(lines[place]), rng))
    return "\n".join(lines) + "\n"


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file; what was done to it."""
    content, kind = bytearray(path.read_bytes()), rng.choice(["flip", "cut", "nest", "value", "value", "value"])
    if path.suffix not in (".json", ".jsonl") and kind in ("nest", "value"):
        kind = "flip"
    if path.name == INDEX and rng.random() < 0.5:
        kind = "leave"
    if kind == "flip":
        for _ in range(rng.randrange(1, 8)):
            content[rng.randrange(min(len(content), 4000))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "nest":
        content = bytearray(b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"\n")
    elif kind == "leave":
        index = json.loads(content)
        names, whole = index["weight_map"], path.parent.parent / "checkpoint" / "model.safetensors"  # which would fit
        outside = rng.choice([str(whole), f"../checkpoint/{whole.name}", f"./../checkpoint/{whole.name}", "..", "/"])
        for name in names if rng.random() < 0.5 else [rng.choice(sorted(names))]:
            names[name] = outside
        content = bytearray(json.dumps(index).encode())
    else:
        content = bytearray(odd_lines(content.decode(), rng).encode())
    path.write_bytes(content)
    return f"{kind} {path.name}"


def ask(folder: Path) -> str:
    """Load a checkpoint and have it answer."""
    policy = load(folder, "cpu")
    return policy.sample([Example("1+1")], 1, (0, 0, 0), 4, greedy=True).texts[0]


def resume(folder: Path) -> tuple[int, dict]:
    """Go on with a run until its first step would be taken; where it stands, and its weights."""
    before, sys.argv = sys.argv, ["grpo.py", "--out", str(folder), "--resume"]
    try:
        run = grpo.prepare(runs.parse_settings(GRPOConfig, "", ""))
    finally:
        sys.argv = before
    with run:
        next(run.steps(), None)
    return run.position.step, run.policy.model.weights()


def late(number, frame):
    raise TimeoutError("took more than 20 s")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def told(command: Callable, folder: Path) -> tuple[str, object]:
    """How a command ends: "line" (exit status 2), "answer" (and which), or an error's name and text."""
    signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
            return "answer", command(folder)
    except (UserError, NotFinite, OSError):  # which `run_main` tells in a line
        return "line", None
    except SystemExit as error:  # of the parser of flags
        return "line" if error.code == 2 and errors.getvalue().count("\n") == 1 else f"exit {error.code}", None
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200], None
    finally:
        signal.alarm(0)


def outcome(made: dict[str, Path], folder: Path, seed: int) -> tuple[str, str]:
    """What comes of one damaged file of something made: "line", "answer", or what was wrong; and what was damaged."""
    rng = random.Random(seed)
    kind = rng.choice(sorted(made))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made[kind], folder)
    if kind == "run" and rng.random() < 0.2:  # the state before is then not there to go on from
        shutil.rmtree(folder / "resume" / "000002")
    there = sorted(name for name in files_of(folder) if not name.endswith(".lock"))
    parts = {"checkpoint": [there], "shards": [[INDEX]]}
    parts["run"] = [["run.json"], ["metrics.jsonl", "samples.jsonl"], [name for name in there if "resume" in name]]
    name = rng.choice(rng.choice(parts[kind]))
    done, before = damage(folder / name, rng), files_of(folder)
    found, answer = told(resume if kind == "run" else ask, folder)
    after = files_of(folder)
    if found == "answer" and (done.startswith("leave") or (kind == "run" and not is_saved(made[kind], *answer))):
        found = "a wrong answer"
    if (found != "answer" and before[name] != after.get(name)) or (kind != "run" and before != after):
        found += ", and the file was changed"
    return found, f"{done} of {kind}"


def is_saved(run: Path, step: int, weights: dict[str, torch.Tensor]) -> bool:
    """Whether these are the weights of a state as it was saved."""
    saved = load_file(run / "resume" / f"{step:06d}" / "weights.safetensors")
    return saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in saved)


def make(folder: Path) -> dict[str, Path]:
    """A checkpoint, the same in two shards, and a run of four steps with two states, which was resumed once."""
    made = {name: folder / name for name in ("checkpoint", "shards", "run")}
    shutil.copytree(bench_faults.tiny(made["checkpoint"]), made["shards"])
    file, weight_map = made["shards"] / "model.safetensors", {}
    tensors = load_file(file)
    file.unlink()
    for number in range(2):
        part = dict(list(tensors.items())[number::2])
        save_file(part, file.with_stem(f"model-{number}"))
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (made["shards"] / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    small = {"batch_size": 4, "num_generations": 4, "max_new_tokens": 8, "limit": 40, "eval_limit": 6, "device": "cpu"}
    config = GRPOConfig(
        model=str(made["checkpoint"]), out=str(made["run"]), steps=4, eval_every=2, save_every=2, **small
    )
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        grpo.train(config)
        grpo.train(dataclasses.replace(config, resume=True))
    return made


def damaged(count: int, folder: Path, first: int = 0) -> Counter:
    """Outcomes of so many damaged files, each with the number of the first that had it."""
    made, found = make(folder), Counter()
    for seed in range(first, first + count):
        what, done = outcome(made, folder / "damaged", seed)
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
