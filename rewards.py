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


# At most 30 digits, thousands marked by commas or not, and nothing but zeros after a point.
INTEGER = re.compile(r"[+-]?(?:[0-9]{1,30}|[0-9]{1,3}(?:,[0-9]{3}){1,9})(?:\.0{1,9})?")
NUMBER = re.compile(r"[+-]?[0-9][0-9.,]*")
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
    """The integer that `text` is (ASCII digits, at most 30; `1,080`, `$18` and `142.0` too), or None."""
    text = (text or "").strip().removeprefix("$")
    return int(text.partition(".")[0].replace(",", "")) if INTEGER.fullmatch(text) else None


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


def hard(prompts, completions, answer, **_) -> list[float]:
    """2 for the right integer answer, else 0."""
    return [2 * value for value in answer_exact(prompts, completions, answer)]


def soft(prompts, completions, answer, **_) -> list[float]:
    """1 / (1 + distance) of an integer answer from the right one; 0 without one."""
    values = [to_integer(extract_answer(completion)) for completion in completions]
    return [0.0 if value is None else 1 / (1 + abs(value - int(a))) for value, a in zip(values, answer, strict=True)]


def think_format(prompts, completions, **_) -> list[float]:
    """1 for `<think>...</think><answer>...</answer>` and nothing else, each tag once, else 0."""
    scores = []
    for completion in completions:
        text = text_of(completion).strip()
        thought, mark, rest = text.partition("</think>")
        once = all(text.count(tag) == 1 for tag in ("<think>", "</think>"))
        framed = (
            text.startswith("<think>") and thought.removeprefix("<think>").strip() and rest.lstrip()[:8] == "<answer>"
        )
        scores.append(float(bool(mark and once and framed) and extract_answer(rest) is not None))
    return scores


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` (or `\fbox{...}`) of a text holds, braces inside balanced, or None.

    Searched are the last 20,000 characters, in one pass.
    """
    text = text[-20_000:]
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    start, depth, i = text.index("{", start) + 1, 1, text.index("{", start) + 1
    while i < len(text) and depth:
        if text[i] == "\\":
            i += 1  # an escaped brace, \{ or \}, is a sign, no bracket
        else:
            depth += {"{": 1, "}": -1}.get(text[i], 0)
        i += 1
    return text[start : i - 1].strip() or None if not depth else None


def boxed_format(prompts, completions, **_) -> list[float]:
    r"""1 where the completion has a well-formed `\boxed{...}` that is not empty, else 0."""
    return [float(last_boxed(text_of(completion)) is not None) for completion in completions]


def soft_overlong(limit: int, buffer: float) -> RewardFunction:
    """A penalty on length: 0 up to (1 - buffer) * limit tokens, then linear to -1 at the limit (DAPO, eq. 13)."""

    def overlong(completion_ids, **_) -> list[float]:
        return [min(0.0, (limit - len(ids)) / (buffer * limit) - 1) for ids in completion_ids]

    return overlong


def answer_last(prompts, completions, answer, **_) -> list[float]:
    """1 where the last number in the last 2,000 characters is the right integer, else 0: the lenient reading."""
    scores = []
    for completion, right in zip(completions, answer, strict=True):
        found = NUMBER.findall(text_of(completion)[-2000:])
        scores.append(float(bool(found) and to_integer(found[-1].rstrip(".,")) == int(right)))
    return scores


REWARDS: dict[str, RewardFunction] = {
    function.__name__: function
    for function in (answer_format, answer_near, answer_exact, answer_last, hard, soft, think_format, boxed_format)
}


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
