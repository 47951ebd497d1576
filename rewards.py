"""Reward functions, with TRL's signature: lists of length B in, a list of B floats (or None) out.

`completions` are strings, or message lists `[{"role": "assistant", "content": ...}]` for chat models. Everything that
the example carries (`answer`, ...) and `completion_ids` come by keyword. A completion is hostile text: it is
searched with bounded patterns and converted with `int`, never evaluated.
"""

import importlib.util
import math
import numbers
import re
import sys
from collections.abc import Callable
from pathlib import Path

RewardFunction = Callable[..., list[float | None]]


class UserError(ValueError):
    """A mistake of the user's; its one line names the thing and the mend."""


INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
ANSWER = re.compile(r"<answer>([^<>]{1,200})</answer>")


def text_of(completion: str | list[dict]) -> str:
    """The text of a completion in either form."""
    return completion if isinstance(completion, str) else "".join(str(message["content"]) for message in completion)


def extract_answer(completion: str | list[dict]) -> str | None:
    """What stands in the one well-formed `<answer>...</answer>` at the end of a completion, or None."""
    text = text_of(completion).rstrip()
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    match = ANSWER.fullmatch(text, text.index("<answer>"))
    return (match and match[1].strip()) or None


def to_integer(text: str | None) -> int | None:
    """The integer that `text` is (ASCII digits, at most 30), or None."""
    return int(text) if text is not None and INTEGER.fullmatch(text) else None


def answer_format(prompts, completions, **_) -> list[float]:
    """1 for exactly one well-formed `<answer>...</answer>` at the end, else 0."""
    return [float(extract_answer(completion) is not None) for completion in completions]


def answer_near(prompts, completions, answer, **_) -> list[float]:
    """1 for an integer answer within 1 of the right one, else 0."""
    values = [to_integer(extract_answer(completion)) for completion in completions]
    return [
        float(value is not None and abs(value - int(right)) <= 1) for value, right in zip(values, answer, strict=True)
    ]


def answer_exact(prompts, completions, answer, **_) -> list[float]:
    """1 for the right integer answer, else 0."""
    values = [to_integer(extract_answer(completion)) for completion in completions]
    return [float(value is not None and value == int(right)) for value, right in zip(values, answer, strict=True)]


def soft_overlong(limit: int, buffer: float) -> RewardFunction:
    """A penalty on length: 0 up to (1 - buffer) * limit tokens, then linear to -1 at the limit (DAPO, eq. 13)."""

    def overlong(completion_ids, **_) -> list[float]:
        return [min(0.0, (limit - len(ids)) / (buffer * limit) - 1) for ids in completion_ids]

    return overlong


REWARDS: dict[str, RewardFunction] = {f.__name__: f for f in (answer_format, answer_near, answer_exact)}


def apply_reward(name: str, function: RewardFunction, examples, rollout, **extra) -> list[float | None]:
    """Call a reward on the B completions of a rollout, whose row i answers examples[i]; raises UserError.

    NaN, infinity, anything that is not a number or None, and a wrong number of values are errors, never a score.
    """
    prompts = [example.prompt for example in examples]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, rollout.texts, strict=True)
    ]
    columns = {key: [example.columns[key] for example in examples] for key in examples[0].columns}
    try:
        values = function(
            prompts=prompts, completions=completions, completion_ids=rollout.completion_ids, **columns, **extra
        )
    except Exception as error:
        raise UserError(f"reward {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(values, (list, tuple)) or len(values) != len(prompts):
        count = len(values) if isinstance(values, (list, tuple)) else type(values).__name__
        raise UserError(f"reward {name} returned {count} for {len(prompts)} completions; return a list of that length")
    for row, value in enumerate(values):
        number = isinstance(value, numbers.Real) and abs(value) < 2.0**127  # the total is summed in float32
        if value is not None and not number:
            raise UserError(f"reward {name} returned {value!r} for row {row}; return finite numbers or None")
    return [None if value is None else float(value) for value in values]


def parse_rewards(text: str) -> dict[str, tuple[RewardFunction, float]]:
    """Read `name=weight,file.py:name=weight` into {name: (function, weight)}; raises UserError."""
    mix = {}
    for item in text.split(","):
        source, _, weight = item.strip().rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not source or not math.isfinite(value):
            raise UserError(f"--rewards: {item!r} is not NAME=WEIGHT, as in answer_exact=0.6")
        function = load_function(source) if ".py:" in source else REWARDS.get(source)
        if function is None:
            raise UserError(f"--rewards: no reward {source!r}; there are {', '.join(REWARDS)}, or FILE.py:FUNCTION")
        name = source.rpartition(":")[2]
        if name in mix:
            raise UserError(f"--rewards: {name} is named twice; give each function once")
        mix[name] = (function, value)
    return mix


def load_function(source: str) -> RewardFunction:
    """A user's own reward from `file.py:function`; the file is run, as any script that the user names."""
    path, _, name = source.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"--rewards: no file {path!r}; give the path of a Python file, as in my_file.py:my_reward=1")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--rewards: {path} does not run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"--rewards: {path} has no function {name!r}")
    return getattr(module, name)
