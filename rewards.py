"""Reward functions, with TRL's signature: lists of length B in, a list of B floats (or None) out; and the mix of them.

`completions` are strings, or message lists `[{"role": "assistant", "content": ...}]` for chat models. Everything that
the example carries (`answer`, ...) and `completion_ids` come by keyword. A completion is hostile text: it is
searched with bounded patterns and converted with `int`, never evaluated. graders.py holds the judge and the comparison
of mathematics.
"""

import contextlib
import inspect
import json
import math
import numbers
import os
import re
import runpy
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from commands import NotFinite, UserError, flag_of, option
from graders import Judge, equal_answers

RewardFunction = Callable[..., list[float | None]]

# At most 30 digits, thousands marked by commas or not, and nothing but zeros after a point.
INTEGER = re.compile(r"[+-]?(?:[0-9]{1,30}|[0-9]{1,3}(?:,[0-9]{3}){1,9})(?:\.0{1,9})?")
NUMBER = re.compile(r"[+-]?[0-9][0-9.,]*")
BARE = re.compile(r"[^\s$]{0,100}")
DECIMAL = re.compile(r"-?[0-9]{1,15}(?:\.[0-9]{1,15})?")
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


def integer_errors(completions, answer) -> list[int | None]:
    """How far each integer answer is from the right one; None without one."""
    values = [to_integer(extract_answer(completion)) for completion in completions]
    return [None if value is None else abs(value - int(right)) for value, right in zip(values, answer, strict=True)]


def answer_near(prompts, completions, answer, **_) -> list[float]:
    """1 for an integer answer within 1 of the right one, else 0."""
    return [float(error in (0, 1)) for error in integer_errors(completions, answer)]


def answer_exact(prompts, completions, answer, **_) -> list[float]:
    """1 for the right integer answer, else 0."""
    return [float(error == 0) for error in integer_errors(completions, answer)]


def hard(prompts, completions, answer, **_) -> list[float]:
    """2 for the right integer answer, else 0."""
    return [2.0 * (error == 0) for error in integer_errors(completions, answer)]


def soft(prompts, completions, answer, **_) -> list[float]:
    """1 / (1 + distance) of an integer answer from the right one; 0 without one."""
    return [0.0 if error is None else 1 / (1 + error) for error in integer_errors(completions, answer)]


def to_number(completion: str | list[dict]) -> float | None:
    """The decimal number that a completion is, alone or in its `<answer>...</answer>`, or None."""
    text = (extract_answer(completion) or text_of(completion)).strip()
    return float(text) if DECIMAL.fullmatch(text) else None


def to_nearest(completion: str | list[dict]) -> int | None:
    """The integer nearest to the number that a completion is, a half rounded up; None without a number."""
    value = to_number(completion)
    return None if value is None else math.floor(value + 0.5)  # `round` makes every half even, which earns the bonus


def nearest_exact(prompts, completions, answer, **_) -> list[float]:
    """1 where the number rounds to the right integer, else 0."""
    return [float(to_nearest(text) == int(right)) for text, right in zip(completions, answer, strict=True)]


def distance(prompts, completions, answer, **_) -> list[float | None]:
    """How far the number is from the right one; None without a number."""
    values = [to_number(completion) for completion in completions]
    return [None if value is None else abs(value - int(right)) for value, right in zip(values, answer, strict=True)]


def closeness(prompts, completions, answer, **_) -> list[float]:
    """1 / (1 + distance) of the number from the right one; 0 without one."""
    return [0.0 if d is None else 1 / (1 + d) for d in distance(prompts, completions, answer)]


def even_answer(prompts, completions, **_) -> list[float]:
    """1 where the number rounds to an even integer, else 0."""
    values = [to_nearest(completion) for completion in completions]
    return [float(value is not None and value % 2 == 0) for value in values]


def even_bonus(prompts, completions, even_bonus=0.2, **_) -> list[float]:
    """The bonus for an even answer, whatever was asked."""
    return [even_bonus * even for even in even_answer(prompts, completions)]


def even_adaptive(prompts, completions, state, even_bonus=0.2, **_) -> list[float]:
    """The same with a bonus that begins at `even_bonus` and follows how rare even answers are.

    It grows by up to 10 % a call while fewer than half of the answers are even, to 1 at most, and shrinks while more
    are; the run keeps the number in its state.
    """
    even, bonus = even_answer(prompts, completions), state.get("even_bonus", min(1.0, even_bonus))
    state["even_bonus"] = min(1.0, bonus * (1 + 0.2 * (0.5 - sum(even) / len(even))))
    return [bonus * value for value in even]


def think_format(prompts, completions, **_) -> list[float]:
    """1 for `<think>...</think><answer>...</answer>` and nothing else, each tag once, else 0."""
    scores = []
    for completion in completions:
        text = text_of(completion).strip()
        thought, _, rest = text.removeprefix("<think>").partition("</think>")
        framed = text.startswith("<think>") and text.count("<think>") == text.count("</think>") == 1
        answered = rest.lstrip().startswith("<answer>") and extract_answer(rest) is not None
        scores.append(float(framed and answered and thought.strip() != ""))
    return scores


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` (or `\fbox{...}`, or `\boxed 2`) of a text holds, braces inside balanced, or None.

    Searched are the last 20,000 characters, in one pass.
    """
    *before, text = re.split(r"\\boxed|\\fbox", text[-20_000:])
    if not before:
        return None
    text = text.lstrip()
    if not text.startswith("{"):
        return BARE.match(text)[0] or None
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # an escaped brace, \{ or \}, is a sign, no bracket
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return text[1 : mark.start()].strip() or None
    return None


def boxed_format(prompts, completions, **_) -> list[float]:
    r"""1 where the completion has a well-formed `\boxed{...}` that is not empty, else 0."""
    return [float(last_boxed(text_of(completion)) is not None) for completion in completions]


def char_length(prompts, completions, ideal_length=200, **_) -> list[float]:
    """1 / (1 + distance / ideal), the distance in characters from the ideal length."""
    lengths = [len(text_of(completion)) for completion in completions]
    return [1 / (1 + abs(length - ideal_length) / ideal_length) for length in lengths]


def token_length(prompts, completions, completion_ids, ideal_length=50, **_) -> list[float]:
    """1 / (1 + distance / ideal), the distance in tokens, end token included; an excess counts twice."""
    excess = [len(ids) - ideal_length for ids in completion_ids]
    return [1 / (1 + max(2 * e, -e) / ideal_length) for e in excess]


def overlap(prompts, completions, reference, **_) -> list[float]:
    """F1 of the words that completion and reference share, case and punctuation aside (as for SQuAD, 1606.05250)."""
    scores = []
    for completion, right in zip(completions, reference, strict=True):
        ours, theirs = (Counter(re.findall(r"\w+", text.lower())) for text in (text_of(completion), right))
        scores.append(2 * (ours & theirs).total() / max(1, ours.total() + theirs.total()))
    return scores


def perplexity(prompts, completions, completion_ids, scorer, **_) -> list[float]:
    """1 / perplexity under the scorer, a frozen policy: exp of the mean log-probability of the completion's tokens."""
    return [math.exp(mean) for mean in scorer(prompts, completions, completion_ids)]


def soft_overlong(limit: int, buffer: float) -> RewardFunction:
    """A penalty on length: 0 up to (1 - buffer) * limit tokens, then linear to -1 at the limit (DAPO, eq. 13)."""

    def overlong(completion_ids, **_) -> list[float]:
        return [min(0.0, (limit - len(ids)) / (buffer * limit) - 1) for ids in completion_ids]

    return overlong


def last_number(text: str) -> str | None:
    """The last number in the last 2,000 characters of a text, or None."""
    found = NUMBER.findall(text[-2000:])
    return found[-1].rstrip(".,") if found else None


def answer_last(prompts, completions, answer, **_) -> list[float]:
    """1 where the last number in the last 2,000 characters is the right integer, else 0: the lenient reading."""
    values = [to_integer(last_number(text_of(completion))) for completion in completions]
    return [float(value == int(right)) for value, right in zip(values, answer, strict=True)]


def math_accuracy(prompts, completions, answer, **_) -> list[float | None]:
    r"""1 where the last `\boxed{...}` equals the answer mathematically, else 0; needs math-verify."""
    return equal_answers(answer, [last_boxed(text_of(completion)) for completion in completions])


def math_lenient(prompts, completions, answer, **_) -> list[float | None]:
    r"""The same, but without a `\boxed{...}` the last number of the last 2,000 characters counts."""
    texts = [text_of(completion) for completion in completions]
    return equal_answers(answer, [last_boxed(text) or last_number(text) for text in texts])


def judge(prompts, completions, endpoint, **_) -> list[float | None]:
    """A judge's score, 0 to the largest of --judge-scale, or None where it gave none."""
    return endpoint([text_of(prompt) for prompt in prompts], [text_of(completion) for completion in completions])


REWARDS: dict[str, RewardFunction] = {
    function.__name__: function
    for function in (
        *(answer_format, answer_near, answer_exact, answer_last, hard, soft, think_format, boxed_format),
        *(math_accuracy, math_lenient, char_length, token_length, overlap, perplexity, judge),
        *(closeness, even_bonus, even_adaptive),
    )
}


@dataclass(frozen=True)
class RewardSettings:
    """Settings of the rewards; those of grpo.py extend them."""

    rewards: str | None = option(None, "NAME=WEIGHT or FILE.py:FUNCTION=WEIGHT, ... Default: the task's.", "rewards")
    ideal_length: int | None = option(
        None, "Aim of char_length and token_length. Default: 200 characters, 50 tokens.", "rewards", above_zero=True
    )
    even_bonus: float | None = option(None, "First bonus for even answers. Default: 0.2.", "rewards", above_zero=True)
    scorer: str | None = option(None, "Model of the perplexity reward. Default: the policy at the start.", "rewards")
    judge_url: str | None = option(
        None, "The judge's URL, as in http://localhost:8000/v1; its key is JUDGE_API_KEY.", "rewards", may_change=True
    )
    judge_model: str = option("default", "Name of the judge's model, as the endpoint knows it.", "rewards")
    reward_timeout: float = option(
        1800.0, "Most seconds of a reward function for one batch.", "rewards", above_zero=True, may_change=True
    )
    judge_scale: Literal[1, 2] = option(1, "The judge's best score; 2 leaves room for right in part.", "rewards")


# Flags by the name of the parameter that reads them.
READ_BY = {"scorer": "scorer", "endpoint": "judge_url", "ideal_length": "ideal_length", "even_bonus": "even_bonus"}


@dataclass(frozen=True)
class Scores:
    """What F reward functions gave P groups of G completions, on the CPU; `[]` selects groups."""

    values: torch.Tensor  # (P, G, F) float64; NaN where a function had no say
    weights: torch.Tensor  # (F,) float64

    def __getitem__(self, groups: torch.Tensor) -> "Scores":
        return Scores(self.values[groups], self.weights)

    @property
    def filled(self) -> torch.Tensor:
        """The values with the mean of the function's others in the group where it had no say, 0 if it had none there.

        In float64 until the sum: rounding must not tell rewards apart that are equal, or a flat group comes alive.
        """
        means = self.values.nanmean(1, keepdim=True)
        return torch.where(self.values.isnan(), means, self.values).nan_to_num(0.0)

    @property
    def total(self) -> torch.Tensor:
        """The weighted sum (P, G) float32."""
        return (self.filled * self.weights).sum(-1).float()

    @property
    def known(self) -> torch.Tensor:
        """The share (P, G) of a row's terms that are no fill: 1 where all were given, 0 where none was."""
        given = ~self.values[..., self.weights != 0].isnan()
        return given.sum(-1) / given.any(1, keepdim=True).sum(-1).clamp(min=1)


@dataclass
class Rewards:
    """The mix of reward functions that a run is trained on.

    A function gets by the name of a parameter what it asks for: `prompts`, `completions`, `completion_ids`, any column
    of the task's examples, what stands in `inputs`, and `state`, a dictionary that lasts as long as the run.
    """

    mix: dict[str, tuple[RewardFunction, float]]  # name: function, weight
    inputs: dict = field(default_factory=dict)
    seconds: float = 1800.0  # for one function and one batch

    @classmethod
    def from_settings(cls, settings: RewardSettings) -> "Rewards":
        """Parse and check the settings; raises UserError, also for a flag that no function of the mix reads."""
        mix = parse_rewards(settings.rewards)
        asked = {name for function, _ in mix.values() for name in inspect.signature(function).parameters}
        inputs = {"scorer": None} if "scorer" in asked else {}  # is made once there is a policy
        for name, flag in READ_BY.items():
            value = getattr(settings, flag)
            if value is not None and name not in asked:
                raise UserError(f"{flag_of(flag)} does nothing with --rewards {settings.rewards}; leave it out")
            if value is not None:
                inputs[name] = value
        if "endpoint" in asked:
            url = settings.judge_url or ""
            if not url.startswith(("http://", "https://")):
                needed = f"--judge-url with an address that begins with http:// or https://, not {url!r}"
                raise UserError(f"--rewards judge needs {needed}; give one, or other --rewards, as in overlap=1")
            key = os.environ.get("JUDGE_API_KEY", "")
            inputs["endpoint"] = Judge(url, settings.judge_model, settings.judge_scale, key)
        return cls(mix, inputs, settings.reward_timeout)

    @property
    def needs_scorer(self) -> bool:
        return "scorer" in self.inputs

    def take_scorer(self, scorer: Callable[..., list[float]]) -> None:
        """Give the functions that ask for it a scorer: (prompts, completions, completion_ids) -> B floats."""
        self.inputs["scorer"] = scorer

    def check_columns(self, task: str, columns: dict) -> None:
        """Raise UserError for a function that asks for what neither the task's examples nor the run have."""
        given = dict.fromkeys(["prompts", "completions", "completion_ids", "state", *self.inputs, *columns])
        for name, (function, _) in self.mix.items():
            try:
                inspect.signature(function).bind(**accepted(function, given))
            except TypeError as error:
                has = ", ".join(columns)
                raise UserError(f"--rewards: {name}: {error}; the columns of --task {task} are: {has}") from error

    def __call__(self, examples, rollout, state: dict) -> tuple[Scores, dict[str, float]]:
        """What each function gives; its mean and std over the rows where it had a say, and the share of the others.

        `state` is changed in place, and must be what JSON can hold. Raises UserError.
        """
        rows = [example for example in examples for _ in range(len(rollout.texts) // len(examples))]
        columns, metrics = [], {}
        for name, (function, _) in self.mix.items():
            with time_limit(self.seconds, name):
                values = apply_reward(name, function, rows, rollout, **self.inputs, state=state)
            values = [math.nan if value is None else value for value in values]
            columns.append(torch.tensor(values, dtype=torch.float64).view(len(examples), -1))
            known = columns[-1][~columns[-1].isnan()]
            metrics[f"missing/{name}"] = 1 - len(known) / len(rows)
            if len(known):
                metrics[f"reward/{name}"] = known.mean().item()
            if len(known) > 1:
                metrics[f"reward_std/{name}"] = known.std().item()
        try:
            plain = json.loads(json.dumps(state, allow_nan=False))  # as it is read back when the run is resumed
        except (TypeError, ValueError) as error:
            raise UserError(f"--rewards: a state has what JSON cannot hold ({error}); keep numbers in it") from error
        state.clear()
        state.update(plain)
        weights = torch.tensor([weight for _, weight in self.mix.values()], dtype=torch.float64)
        return Scores(torch.stack(columns, -1), weights), metrics

    def total(self, **given) -> list[float | None]:
        """The mix as one function, by which policies are compared where a task has no accuracy.

        None where one of the functions has no value, or none that is finite, so that an outage is no bad score.
        """
        total: list[float | None] = [0.0] * len(given["completions"])
        for name, (function, weight) in self.mix.items():
            with time_limit(self.seconds, name):
                values = function(**accepted(function, given | self.inputs | {"state": {}}))
            known = [None if value is None or not math.isfinite(value) else value for value in values]
            pairs = zip(total, known, strict=True)
            total = [None if value is None or part is None else part + weight * value for part, value in pairs]
        return total


def accepted(function: Callable, given: dict) -> dict:
    """What a function takes by name of what is given: all of it where its parameters end in `**`."""
    taken = inspect.signature(function).parameters
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in taken.values()):
        return given
    return {name: value for name, value in given.items() if name in taken}


def apply_reward(name: str, function: RewardFunction, examples, rollout, **extra) -> list[float | None]:
    """Call a reward on the B completions of a rollout, whose row i answers examples[i]; raises UserError.

    Anything that is not a number or None, and a wrong number of values are errors, never a score; NaN and infinity
    raise NotFinite.
    """
    prompts = [example.prompt for example in examples]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, rollout.texts, strict=True)
    ]
    columns = {key: [example.columns[key] for example in examples] for key in examples[0].columns}
    given = {"prompts": prompts, "completions": completions, "completion_ids": rollout.completion_ids}
    try:
        values = function(**accepted(function, columns | given | extra))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        row = first_failure(function, columns | given, extra)
        where = "" if row is None else f" for row {row}, {given['completions'][row]!r:.200}"
        raise UserError(f"reward {name} failed{where}: {type(error).__name__}: {error}") from error
    count = len(values) if isinstance(values, (list, tuple)) else type(values).__name__
    if count != len(prompts):
        raise UserError(f"reward {name} returned {count} for {len(prompts)} completions; return a list of that length")
    for row, value in enumerate(values):
        number = isinstance(value, numbers.Real) and not abs(value) >= 2.0**127  # the total is summed in float32
        if isinstance(value, numbers.Real) and (value != value or value in (math.inf, -math.inf)):
            asked = {"question": examples[row].question, "completion": rollout.texts[row]}
            raise NotFinite(f"reward {name} is {value} for row {row}", [asked])
        if value is not None and not number:
            raise UserError(f"reward {name} returned {value!r} for row {row}; return finite numbers or None")
    return [None if value is None else float(value) for value in values]


def first_failure(function: RewardFunction, columns: dict[str, list], extra: dict) -> int | None:
    """The first row that the function fails for when it is asked for that row alone, or None."""
    for row in range(len(columns["completions"])):
        alone = {name: [values[row]] for name, values in columns.items()}
        try:
            function(**accepted(function, alone | extra | {"state": {}}))
        except (Exception, SystemExit):
            return row
    return None


class TookTooLong(BaseException):
    """The alarm of `time_limit`."""


@contextlib.contextmanager
def time_limit(seconds: float, name: str):
    """Raise UserError where a reward takes longer; only in the main thread, and where the system has an alarm.

    The alarm is no Exception, and comes again each second, lest a reward that catches whatever comes goes on for ever.
    """
    able = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    def late(number, frame):
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, late) if able else None
    try:
        if able:
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        yield
    except TookTooLong:
        what = f"reward {name} took more than {seconds:g} s for one batch"
        raise UserError(f"{what}; raise --reward-timeout, or mend it") from None
    finally:
        if able:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


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
    try:
        function = runpy.run_path(path).get(name)
    except (Exception, SystemExit) as error:
        raise UserError(f"--rewards: {path} does not run: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"--rewards: {path} has no function {name!r}")
    return function
