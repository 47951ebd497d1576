"""Rewards: exact values for good, bad and hostile completions; mistakes in a reward are named by function and row."""

import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import graders
import rewards
from commands import NotFinite, UserError
from rewards import (
    answer_exact,
    answer_format,
    answer_last,
    answer_near,
    apply_reward,
    boxed_format,
    char_length,
    hard,
    last_boxed,
    math_accuracy,
    math_lenient,
    overlap,
    parse_rewards,
    perplexity,
    soft,
    think_format,
    token_length,
)
from tasks import Example

# (completion, answer_format, answer_near, answer_exact), the right answer being 5
TABLE = [
    ("<answer>5</answer>", 1, 1, 1),
    ("2+3=5;5*1=5<answer>5</answer>", 1, 1, 1),
    ("<answer>5</answer>\n ", 1, 1, 1),
    ("<answer> 5 </answer>", 1, 1, 1),
    ("<answer>\n5\n</answer>", 1, 1, 1),
    ("<answer>+5</answer>", 1, 1, 1),
    ("<answer>005</answer>", 1, 1, 1),
    ("<answer>4</answer>", 1, 1, 0),
    ("<answer>6</answer>", 1, 1, 0),
    ("<answer>7</answer>", 1, 0, 0),
    ("<answer>-5</answer>", 1, 0, 0),
    ("<answer>five</answer>", 1, 0, 0),
    ("<answer>5.0</answer>", 1, 1, 1),
    ("<answer>$5</answer>", 1, 1, 1),
    ("<answer>5.5</answer>", 1, 0, 0),
    ("<answer>5.</answer>", 1, 0, 0),
    ("<answer>,5</answer>", 1, 0, 0),
    ("<answer>0,005</answer>", 1, 1, 1),
    ("<answer>0,05</answer>", 1, 0, 0),
    ("<answer>5,000</answer>", 1, 0, 0),
    ("<answer>5e0</answer>", 1, 0, 0),
    ("<answer>0x5</answer>", 1, 0, 0),
    ("<answer>1_0</answer>", 1, 0, 0),
    ("<answer>- 5</answer>", 1, 0, 0),
    ("<answer>5 5</answer>", 1, 0, 0),
    ("<answer>2+3</answer>", 1, 0, 0),
    ("<answer>nan</answer>", 1, 0, 0),
    ("<answer>9**9**9</answer>", 1, 0, 0),  # never evaluated
    ("<answer>__import__('os').abort()</answer>", 1, 0, 0),
    ("<answer>٥</answer>", 1, 0, 0),  # an Arabic-Indic five, which int() would read
    ("<answer>５</answer>", 1, 0, 0),  # a full-width five
    ("<answer>" + "9" * 200 + "</answer>", 1, 0, 0),
    ("<answer>" + "0" * 30 + "5</answer>", 1, 0, 0),  # more than 30 digits are no integer
    ("<answer>" + "9" * 1_000_000 + "</answer>", 0, 0, 0),
    ("5", 0, 0, 0),
    ("", 0, 0, 0),
    ("<answer></answer>", 0, 0, 0),
    ("<answer> </answer>", 0, 0, 0),
    ("<answer>5", 0, 0, 0),
    ("5</answer>", 0, 0, 0),
    ("</answer>5<answer>", 0, 0, 0),
    ("<answer>5</answer>.", 0, 0, 0),
    ("<answer>5</answer> is right", 0, 0, 0),
    ("<answer>5</answer><answer>5</answer>", 0, 0, 0),
    ("<answer>4</answer> no <answer>5</answer>", 0, 0, 0),
    ("<answer><answer>5</answer></answer>", 0, 0, 0),
    ("<answer>5</answer></answer>", 0, 0, 0),
    ("<answer>5<b></answer>", 0, 0, 0),
    ("<ANSWER>5</ANSWER>", 0, 0, 0),
    ("<answer >5</answer>", 0, 0, 0),
    ("<answer>" * 125_000, 0, 0, 0),
    ("<answer>" * 60_000 + "5" + "</answer>" * 60_000, 0, 0, 0),
    ("<answer>" + " " * 1_000_000 + "5</answer>", 0, 0, 0),
]


@pytest.mark.parametrize("column", [1, 2, 3], ids=["answer_format", "answer_near", "answer_exact"])
@pytest.mark.parametrize("chat", [False, True], ids=["strings", "messages"])
def test_rewards_of_every_kind_of_completion(column, chat):
    function = (answer_format, answer_near, answer_exact)[column - 1]
    completions = [row[0] for row in TABLE]
    if chat:
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    values = function(prompts=["q"] * len(TABLE), completions=completions, answer=["5"] * len(TABLE), other=None)
    for row, value in zip(TABLE, values, strict=True):
        assert type(value) is float
        assert value == row[column], f"{function.__name__} of {row[0][:60]!r}"


def test_each_completion_meets_its_own_answer():
    completions = ["<answer>-30</answer>", "<answer>-30</answer>", "<answer>-30</answer>"]
    answers = ["-30", "-31", "30"]
    assert answer_near(["q"] * 3, completions, answer=answers) == [1, 1, 0]
    assert answer_exact(["q"] * 3, completions, answer=answers) == [1, 0, 0]


def call(function, texts=("a", "b"), prompts=("p", "q"), **extra):
    examples = [Example(prompt, {"answer": str(i), "level": i}) for i, prompt in enumerate(prompts)]
    rollout = SimpleNamespace(texts=list(texts), completion_ids=[[1, 2]] * len(texts))
    return apply_reward("mine", function, examples, rollout, **extra)


def test_a_reward_gets_every_column_by_keyword():
    seen = {}

    def mine(prompts, completions, **rest):
        seen.update(rest, prompts=prompts, completions=completions)
        return [0.5, None]

    message = [{"role": "user", "content": "q"}]
    assert call(mine, prompts=("p", message), state={"k": 1}) == [0.5, None]
    assert seen == {
        "prompts": ["p", message],
        "completions": ["a", [{"role": "assistant", "content": "b"}]],
        "completion_ids": [[1, 2], [1, 2]],
        "answer": ["0", "1"],
        "level": [0, 1],
        "state": {"k": 1},
    }


def test_a_reward_without_more_gets_what_it_asks_for():
    assert call(lambda answer, state: [float(a) + state["k"] for a in answer], state={"k": 1}, scorer=None) == [1, 2]


def test_the_total_of_a_mix_is_none_where_a_part_is():
    mix = {"a": (lambda answer: [1.0, None, 2.0], 0.5), "b": (lambda state, scorer, **_: [scorer, scorer, None], 2.0)}
    both = rewards.Rewards(mix, {"scorer": 1.0})
    assert both.total(prompts=["q"] * 3, completions=["c"] * 3, answer=["1"] * 3) == [2.5, None, None]


@pytest.mark.parametrize("function", [overlap, lambda reference: None, lambda *, reference, **_: None])
def test_a_column_that_the_task_does_not_have_is_named(function):
    mix = rewards.Rewards({"mine": (function, 1.0), "judge": (rewards.judge, 1.0)}, {"endpoint": None})
    mix.check_columns("alpaca", {"reference": "right"})
    with pytest.raises(UserError, match="--rewards: mine: .*'reference'.*--task arithmetic .*: answer, level$"):
        mix.check_columns("arithmetic", {"answer": "1", "level": 2})


@pytest.mark.parametrize("values", [[0.0, 1.0], [1, -2], [True, False], [None, None], (0.25, None), [-1e38, 1e38]])
def test_numbers_and_none_pass_through(values):
    assert call(lambda **_: values) == list(values)


def test_numbers_of_numpy_become_floats():
    values = call(lambda **_: [np.float32(0.5), np.int64(2)])
    assert values == [0.5, 2.0] and [type(value) for value in values] == [float, float]


def fails(**_):
    raise KeyError("level_2")


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        (lambda **_: [0.0, "1.0"], ["row 1", "'1.0'"]),
        (lambda **_: [0.0, [1.0]], ["row 1", "[1.0]"]),
        (lambda **_: [0.0, 1j], ["row 1", "1j"]),
        (lambda **_: [0.0, 10**400], ["row 1"]),  # no float can hold it
        (lambda **_: [1e300, 0.0], ["row 0", "1e+300"]),  # infinite in float32, in which rewards are summed
        (lambda **_: [0.0], ["returned 1 ", "2 completions"]),
        (lambda **_: [0.0] * 3, ["returned 3 ", "2 completions"]),
        (lambda **_: 0.5, ["float", "2 completions"]),
        (lambda **_: None, ["NoneType", "2 completions"]),
        (lambda **_: {0: 1.0, 1: 2.0}, ["dict", "2 completions"]),
        (lambda **_: (value for value in [0.0, 1.0]), ["generator"]),
        (lambda nowhere: [0.0, 1.0], ["TypeError", "nowhere"]),
        (fails, ["KeyError", "level_2"]),
    ],
)
def test_a_bad_reward_is_an_error_that_names_function_and_row(function, parts):
    with pytest.raises(UserError) as caught:
        call(function)
    for part in ["reward mine", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_reward_that_is_not_finite_is_no_score_and_no_mistake_of_the_command(value):
    """The step is skipped, and the row is kept."""
    with pytest.raises(NotFinite, match=f"reward mine is {value} for row 1") as caught:
        call(lambda **_: [0.0, value])
    assert caught.value.rows == [{"question": "", "completion": "b"}]


def only_for_b(prompts, completions, **_):
    if "b" in completions:
        raise ValueError("no b")
    return [0.0] * len(prompts)


@pytest.mark.parametrize("leave", [only_for_b, lambda completions, **_: sys.exit(7) if "b" in completions else [0.0]])
def test_a_reward_that_fails_or_leaves_is_named_with_the_row_that_it_fails_for(leave):
    with pytest.raises(UserError, match="reward mine failed for row 1, 'b': "):
        call(leave, state={})


def test_a_total_that_is_not_finite_is_no_score():
    mix = rewards.Rewards({"mine": (lambda **_: [1.0, math.nan, math.inf, None], 0.5)})
    assert mix.total(completions=["a"] * 4) == [0.5, None, None, None]


def waits(**_):
    while True:
        pass


def waits_whatever_comes(**_):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


@pytest.mark.parametrize("forever", [waits, waits_whatever_comes])
def test_a_reward_that_never_returns_is_stopped_and_named(forever):
    examples = [Example("p", {"answer": "0"})]
    rollout = SimpleNamespace(texts=["a", "b"], completion_ids=[[1], [2]])
    mix, before = rewards.Rewards({"mine": (forever, 1.0)}, {}, seconds=0.2), signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserError, match="reward mine took more than 0.2 s .*--reward-timeout"):
        mix(examples, rollout, {})
    with pytest.raises(UserError, match="reward mine took more than 0.2 s"):
        mix.total(completions=["a", "b"])
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_parse_rewards():
    mix = parse_rewards("answer_format=0.2, answer_near=-1,answer_exact=6e-1")
    assert mix == {
        "answer_format": (answer_format, 0.2),
        "answer_near": (answer_near, -1.0),
        "answer_exact": (answer_exact, 0.6),
    }


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["NAME=WEIGHT"]),
        ("answer_exact", ["'answer_exact'", "NAME=WEIGHT"]),
        ("answer_exact=", ["'answer_exact='"]),
        ("=1", ["'=1'"]),
        ("answer_exact=much", ["'answer_exact=much'"]),
        ("answer_exact=nan", ["'answer_exact=nan'"]),
        ("answer_exact=inf", ["'answer_exact=inf'"]),
        ("answer_exact=1,", ["''", "NAME=WEIGHT"]),
        ("exact=1", ["'exact'", "answer_format, answer_near, answer_exact", "FILE.py:FUNCTION"]),
        ("answer_exact=1,answer_exact=2", ["answer_exact is named twice"]),
        ("no_such_file.py:mine=1", ["'no_such_file.py'"]),
    ],
)
def test_a_bad_mix_of_rewards_is_refused(text, parts):
    with pytest.raises(UserError) as caught:
        parse_rewards(text)
    for part in ["--rewards", *parts]:
        assert part in str(caught.value)


def test_a_users_own_reward_comes_from_a_file(tmp_path):
    path = tmp_path / "my rewards=1.py"
    path.write_text(
        "LONG = 3\n\ndef longer(completions, **_):\n    return [float(len(c) > LONG) for c in completions]\n"
    )
    mix = parse_rewards(f"answer_exact=1,{path}:longer=0.5")
    assert list(mix) == ["answer_exact", "longer"]
    function, weight = mix["longer"]
    assert weight == 0.5
    assert call(function, texts=("abc", "abcd")) == [0.0, 1.0]
    for name, part in [("shorter", "'shorter'"), ("LONG", "'LONG'")]:
        with pytest.raises(UserError, match=part):
            parse_rewards(f"{path}:{name}=1")
    path.write_text("def longer(:\n")
    with pytest.raises(UserError, match="SyntaxError"):
        parse_rewards(f"{path}:longer=1")


@pytest.mark.parametrize(
    ("text", "right", "score"),
    [
        ("so she has 1,080 left", "1080", 1),
        ("48/2 = 24 clips, 48+24 = 72.", "72", 1),
        ("the answer is $18.", "18", 1),
        ("the answer is $18.00", "18", 1),
        ("the answer is 18.50", "18", 0),  # no integer, and its parts are none either
        ("it costs 18.50, so 19", "19", 1),
        ("<answer>-5</answer>", "-5", 1),
        ("10-5", "5", 0),  # reads as 10 and -5
        ("x = -5", "-5", 1),
        ("12345 and 1234567", "1234567", 1),
        ("1,23", "23", 0),
        ("48/2 = 24, so the total is 72.5", "24", 0),
        ("24, no, 3,5", "24", 0),
        ("24.", "24", 1),
        ("is it 24?", "24", 1),
        ("first 7, then 8", "7", 0),
        ("none", "7", 0),
        ("", "7", 0),
        ("\u0665", "5", 0),
        ("7" + " x" * 2000, "7", 0),  # beyond what is searched
        ("7" + "x" * 1999, "7", 1),
        ("7" + "x" * 2000, "7", 0),
        ("9" * 1_000_000, "9", 0),
        ("1," * 500_000 + "7", "7", 0),
        ("((((" * 250_000 + " 7", "7", 1),
    ],
)
def test_the_lenient_reading_is_the_last_integer(text, right, score):
    assert answer_last(["q"], [text], [right]) == [score]
    assert answer_last(["q"], [[{"role": "assistant", "content": text}]], [right]) == [score]


def test_hard_and_soft():
    texts = ["<answer>5</answer>", "<answer>6</answer>", "<answer>-4</answer>", "5", "<answer>x</answer>"]
    assert hard(None, texts, ["5"] * 5) == [2, 0, 0, 0, 0]
    assert soft(None, texts, ["5"] * 5) == pytest.approx([1, 0.5, 0.1, 0, 0])
    assert soft(None, ["<answer>" + "9" * 30 + "</answer>"], ["5"]) == pytest.approx([0])


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>4-9=-5</think><answer>-5</answer>", 1),
        (" <think>\na\n</think>\n<answer>-5</answer>\n", 1),
        ("<think></think><answer>5</answer>", 0),
        ("<think> </think><answer>5</answer>", 0),
        ("<think>a</think>so <answer>5</answer>", 0),
        ("so <think>a</think><answer>5</answer>", 0),
        ("<think>a<think>b</think></think><answer>5</answer>", 0),
        ("<think>a<think>b</think><answer>5</answer>", 0),
        ("<think>a</think><answer>5</answer></think>", 0),
        ("<think>a</think><answer>5</answer><answer>5</answer>", 0),
        ("<think>a<answer>5</answer></think><answer>5</answer>", 1),
        ("<think>a</think>", 0),
        ("<answer>5</answer>", 0),
        ("<think>" * 150_000, 0),
        ("", 0),
    ],
)
def test_think_format(text, score):
    assert think_format(None, [text]) == think_format(None, [[{"role": "assistant", "content": text}]]) == [score]


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so $\boxed{42}$.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{ \dfrac{\sqrt{3}}{2} }", r"\dfrac{\sqrt{3}}{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"\boxed{}", None),
        (r"\boxed{1", None),
        (r"\boxed{1\}", None),
        (r"\fbox{1} \boxed{2} \fbox{3}", "3"),
        (r"\boxed{7}" + "x" * (20_000 - 9), "7"),
        (r"\boxed{7}" + "x" * (20_000 - 8), None),  # begins beyond what is searched
        (r"so $\boxed 1$.", "1"),
        (r"\boxed7", "7"),
        (r"\boxed {8}", "8"),
        (r"\boxed", None),
        ("boxed{1}", None),
        ("", None),
        (r"\boxed{" * 200_000, None),
        ("{" * 1_000_000 + r"\boxed{3}", "3"),
        (r"\boxed{" + "{" * 5_000 + "3" + "}" * 5_000 + "}", "{" * 5_000 + "3" + "}" * 5_000),
    ],
)
def test_last_boxed(text, inside):
    assert last_boxed(text) == inside
    assert boxed_format(None, [text]) == [float(inside is not None)]


# (gold, answer, equal): what MATH's answers look like, and what policies write
MATH_PAIRS = [
    (r"\frac43", r"\frac{4}{3}", 1),
    (r"\frac43", "4/3", 1),
    (r"\dfrac{1}{6}", r"\frac16", 1),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", 1),
    (r"\frac{-1}{2}", "-0.5", 1),
    (r"\frac{1}{2}", "0.5", 1),
    (".5", "0.5", 1),
    ("0.25", r"\frac14", 1),
    (r"\frac{1}{3}", "0.33", 0),
    ("0.333", r"\frac13", 0),
    (r"1\frac12", r"\frac32", 1),
    (r"1 \frac{1}{2}", "1.5", 1),
    (r"2\sqrt{3}", r"\sqrt{12}", 1),
    (r"2\sqrt3", "3.46", 0),
    (r"3\pi", r"3\pi", 1),
    (r"3\pi", "9.42", 0),
    (r"\pi^2", r"\pi\cdot\pi", 1),
    (r"90^\circ", "90", 1),
    ("90", r"90^\circ", 1),
    (r"10\text{ inches}", "10", 1),
    ("10", r"10\text{ inches}", 1),
    ("10", "10 inches", 1),
    (r"5\text{ cm}^2", "5", 1),
    (r"12\text{ miles per hour}", "12", 1),
    (r"96,\!569", "96569", 1),
    ("24{,}000", "24000", 1),
    ("24,000", "24000", 1),
    ("1,080", "1080", 1),
    (r"\$32", "32", 1),
    ("32", r"\$32", 1),
    (r"50\%", "50", 1),
    ("50", r"50\%", 1),
    (r"50\%", "0.5", 1),
    (r"\text{Evelyn}", "Evelyn", 1),
    (r"\text{Evelyn}", "Bob", 0),
    (r"\text{Tuesday}", "Tuesday", 1),
    (r"\text{even}", "odd", 0),
    (r"\text{(C)}", "C", 1),
    ("(C)", "C", 1),
    ("(3,4)", "(3, 4)", 1),
    ("(3,4)", "(4,3)", 0),
    ("[2,5)", "[2, 5)", 1),
    ("[2,5)", "(2,5)", 0),
    ("[2,5)", "[2,5]", 0),
    (r"(-\infty,3)", r"(-\infty, 3)", 1),
    (r"(-\infty,3]\cup[5,\infty)", r"[5,\infty)\cup(-\infty,3]", 1),
    (r"\{1,2\}", r"\{2,1\}", 1),
    ("1,2,3", "3,2,1", 1),
    ("1,2,3", "1,2", 0),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", 0),
    ("52_8", "52_{8}", 1),
    ("52_8", "52_7", 0),
    ("52_8", "52", 0),
    ("x=5", "5", 1),
    ("5", "x=5", 1),
    ("y=2x+3", "2x+3", 1),
    ("x^2+2x+1", "(x+1)^2", 1),
    ("x^2+2x+1", "x^2+2x", 0),
    ("p - q", "-q+p", 1),
    ("3+4i", "4i+3", 1),
    ("3-4i", "3+4i", 0),
    ("-3", "-3", 1),
    ("-3", "3", 0),
    ("025", "25", 1),
    ("142.0", "142", 1),
    ("0", "0.0", 1),
    ("2^{10}", "1024", 1),
    ("10!", "3628800", 1),
    (r"\log_2 8", "3", 1),
    ("10^{100}", "10^{100}+1", 0),
    ("3", "three", 0),
    ("2", "1", 0),
]


def test_answers_of_mathematics():
    """Hand-written pairs, each boxed at the end of a completion; all at once, to name every one that is wrong."""
    completions = [rf"So the answer is $\boxed{{{answer}}}$." for _, answer, _ in MATH_PAIRS]
    golds = [gold for gold, _, _ in MATH_PAIRS]
    scores = math_accuracy(golds, completions, answer=golds)
    wrong = [pair for pair, score in zip(MATH_PAIRS, scores, strict=True) if score != pair[2]]
    assert not wrong and len(MATH_PAIRS) >= 60


def test_the_lenient_reading_of_mathematics_takes_the_last_number_without_a_box():
    completions = ["It is 5, or rather 7.", r"7, no: \boxed{5}", "seven", "7 of 9", r"\frac{14}{2} = 7"]
    assert math_lenient(completions, completions, answer=["7"] * 5) == [1, 0, 0, 0, 1]
    assert math_accuracy(completions, completions, answer=["7"] * 5) == [0, 0, 0, 0, 0]


HOSTILE = [
    r"\boxed{9**9**9}",
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{(10^9)!}",
    r"\boxed{" + "(" * 400 + "}",
    r"\boxed{" + r"\sqrt{" * 70 + "7" + "}" * 71,
    r"\boxed{" + r"\frac{1}{" * 41 + "7" + "}" * 42,
    r"\boxed" + "{" * 1_000_000,
    "[" * 1_000_000,
    "<answer>" * 100_000,
    "<think>" * 100_000 + "</think>",
    r"\boxed{٧}",
    "<answer>٧</answer>",
    "\x00\x1b[2J\u202e\\boxed{\x00}",
    "\ud800",
    "__import__('os').abort()",
    r"\boxed{__import__('os').abort()}",
    r"\boxed{\input{/etc/passwd}}",
    "9" * 1_000_000,
    "<answer>1</answer><answer>7</answer>",
    r"Question: end with \boxed{7}. Answer:" + " no" * 10_000 + r" \boxed{8}",
]


@pytest.mark.parametrize("name", sorted(rewards.REWARDS.keys() - {"judge"}))
def test_hostile_completions_get_a_score_in_bounded_time(name):
    """None of them is the right answer, 7; each comparison is stopped after its time, whatever it does."""
    start, ids = time.monotonic(), [[1, 2, 3]] * len(HOSTILE)
    columns = {"answer": ["7"] * len(HOSTILE), "reference": ["seven"] * len(HOSTILE), "completion_ids": ids}
    scorer = lambda prompts, completions, completion_ids: [-1e9] * len(completions)  # noqa: E731
    scores = rewards.REWARDS[name](prompts=HOSTILE, completions=HOSTILE, scorer=scorer, state={}, **columns)
    stopped = (None,) if name.startswith("math") else ()  # which is no score
    assert len(scores) == len(HOSTILE) and all(score in stopped or math.isfinite(score) for score in scores)
    if name in ("answer_exact", "hard", "math_accuracy"):
        assert not any(scores)
    limit = 10 * graders.COMPARE_SECONDS if name.startswith("math") else 10.0
    assert time.monotonic() - start < limit


def end(comparer: graders.Comparer) -> None:
    """As the end of the run does: the process reads to the end of its input."""
    comparer.process.communicate(timeout=10)
    assert comparer.process.returncode == 0


def test_a_comparison_that_hangs_is_stopped_and_the_next_one_is_right(monkeypatch):
    """Several times over: what is started again and again leaves no pipe open."""
    opened = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(graders, "COMPARE_SECONDS", 1e-4)
    comparer = graders.Comparer()
    for _ in range(4):
        with pytest.raises(TimeoutError):
            comparer.equal("2^{11}", "2048")
        assert comparer.process.returncode == -signal.SIGKILL
    monkeypatch.setattr(graders, "COMPARE_SECONDS", 60.0)
    assert comparer.equal("2^{11}", "2048") == 1.0
    comparer.process.kill()  # by somebody else: nobody's fault, so it is asked again
    comparer.process.wait()
    assert comparer.equal("2^{11}", "2048") == 1.0
    end(comparer)
    assert len(os.listdir("/dev/fd")) <= opened


def test_a_comparison_that_holds_the_interpreter_is_stopped_in_its_time(monkeypatch):
    """A large factorial is one call in C that does not come back; between comparisons the process may wait for long."""
    monkeypatch.setattr(graders, "COMPARE_SECONDS", 0.5)
    comparer = graders.Comparer()
    assert comparer.equal("2^{11}", "2048") == 1.0
    process = comparer.process
    time.sleep(1)
    assert comparer.equal("3^{7}", "2187") == 1.0 and comparer.process is process
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        comparer.equal("7", "(10^9)!")
    assert process.returncode == -signal.SIGKILL
    assert time.monotonic() - start < 1.5
    assert comparer.equal("3^{7}", "2187") == 1.0
    end(comparer)


def test_a_stopped_comparison_is_tried_once_more_alone_and_else_has_no_score(monkeypatch):
    asked, busy = [], {"11": 1, "12": 2}  # how often each is stopped

    def equal(self, gold, answer):
        asked.append(answer)
        if asked.count(answer) <= busy.get(answer, 0):
            raise TimeoutError
        return 1.0

    monkeypatch.setattr(graders.Comparer, "equal", equal)
    golds = ["{11}+0", "{12}+0", "{13}+0", "{12}+0"]  # nothing here equals as text
    assert graders.equal_answers(golds, ["11", "12", "13", "12"]) == [1.0, None, 1.0, None]
    assert sorted(asked) == ["11", "11", "12", "12", "13"] and asked[-2:] in (["11", "12"], ["12", "11"])
    assert graders.equal_answers(golds[:2], ["11", "12"]) == [1.0, 1.0]  # that it was stopped is not remembered
    assert sorted(asked[5:]) == ["12"]


def test_comparers_have_bounded_memory_and_ctrl_c_in_the_terminal_does_not_reach_them():
    comparer = graders.Comparer()
    assert comparer.equal("2^{11}", "2048") == 1.0
    assert os.getsid(comparer.process.pid) != os.getsid(0)
    if sys.platform == "linux":
        limits = Path(f"/proc/{comparer.process.pid}/limits").read_text().splitlines()
        assert [line.split()[3:5] for line in limits if "address space" in line] == [[str(2**32)] * 2]
        assert "libtorch" not in Path(f"/proc/{comparer.process.pid}/maps").read_text()
    end(comparer)


def test_without_math_verify_the_error_names_it(monkeypatch):
    monkeypatch.setattr(graders, "COMPARER", graders.Comparer())
    monkeypatch.setattr(sys, "executable", "/bin/true")  # a Python that says nothing and ends
    rollout = SimpleNamespace(texts=[r"\boxed{0.5}"], completion_ids=[[1]])
    with pytest.raises(UserError, match="pip install math-verify"):
        apply_reward("m", math_accuracy, [Example("?", {"answer": "1/2"})], rollout)


def test_lengths_are_best_at_the_ideal():
    """Half as good at twice the length in characters; in tokens an excess counts twice, so a third."""
    texts = ["a" * n for n in (10, 20, 5, 0)]
    assert char_length(texts, texts, ideal_length=10) == [1, 1 / 2, 1 / 1.5, 1 / 2]
    ids = [[0] * n for n in (10, 20, 5, 1)]
    assert token_length(texts, texts, completion_ids=ids, ideal_length=10) == [1, 1 / 3, 1 / 1.5, 1 / 1.9]
    assert token_length(texts, texts, completion_ids=[[0] * 50]) == [1]


@pytest.mark.parametrize(
    ("completion", "reference", "score"),
    [
        ("The cat sat.", "the cat sat", 1),
        ("a b", "a b c d", 2 / 3),
        ("a a a", "a", 1 / 2),
        ("", "a", 0),
        ("!?", "a", 0),
        ([{"role": "assistant", "content": "a"}], "a", 1),
    ],
)
def test_overlap_is_the_f1_of_words(completion, reference, score):
    assert overlap([""], [completion], reference=[reference]) == [pytest.approx(score)]


def test_perplexity_is_what_the_scorer_says():
    asked = []

    def scorer(prompts, completions, completion_ids):
        asked.append((prompts, completions, completion_ids))
        return [0.0, -math.log(4)]

    assert perplexity(["p", "q"], ["a", "b"], [[1], [2]], scorer=scorer) == [1, pytest.approx(1 / 4)]
    assert asked == [(["p", "q"], ["a", "b"], [[1], [2]])]
