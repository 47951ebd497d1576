"""The arithmetic task: right answers, a split that nothing moves, demonstrations in the stated proportions."""

import ast
import hashlib
import operator

import pytest

from rewards import UserError
from tasks import TASKS, Example, arithmetic, as_chat, find_task, load_task, shows_working

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


@pytest.fixture(scope="module")
def splits():
    return arithmetic()


def evaluate(node: ast.AST) -> int:
    """Python's own reading of an expression of integers."""
    if isinstance(node, ast.Expression):
        return evaluate(node.body)
    if isinstance(node, ast.UnaryOp):
        assert isinstance(node.op, ast.USub)
        return -evaluate(node.operand)
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
    return node.value


def value_of(expression: str) -> int:
    return evaluate(ast.parse(expression, mode="eval"))


def expression_of(example: Example) -> str:
    return example.prompt.removeprefix("What is ").removesuffix("?")


def answer_in(demonstration: str) -> str:
    return demonstration.partition("<answer>")[2].removesuffix("</answer>")


def test_9000_different_problems_are_split_once(splits):
    assert {name: len(examples) for name, examples in splits.items()} == {
        "train": 7500,
        "validation": 500,
        "held_out": 1000,
    }
    prompts = [example.prompt for examples in splits.values() for example in examples]
    assert len(set(prompts)) == len(prompts) == 9000


def test_the_split_never_moves(splits):
    """A run's results are comparable only while these checksums stand; no setting of a run enters the split."""
    checksums = {
        name: hashlib.sha256("\n".join(example.prompt for example in examples).encode()).hexdigest()[:16]
        for name, examples in splits.items()
    }
    assert checksums == {"train": "66dd77bf60280654", "validation": "bf9c7a1188a80230", "held_out": "3adc690d32603084"}
    other = arithmetic(worked=1.0, wrong=0.0, copies=1)
    for name, examples in splits.items():
        assert [example.prompt for example in other[name]] == [example.prompt for example in examples]


def test_every_answer_is_right(splits):
    for examples in splits.values():
        for example in examples:
            assert example.columns == {"answer": str(value_of(expression_of(example)))}


def test_the_split_is_no_sorted_one(splits):
    """Every operation is about as frequent in each part as in all problems: 1,000 of 9,000 each."""
    for name, examples in splits.items():
        for first in "+-*":
            share = sum(f" {first} " in example.prompt.partition(")")[0] for example in examples) / len(examples)
            assert 0.26 < share < 0.41, (name, first)


def test_demonstrations_have_the_stated_proportions():
    """Of 60,000 demonstrations 40 % work; the others answer at once, 90 % of them with the first operation's result."""
    worked, at_once, first_only = 0, 0, 0
    for example in arithmetic(worked=0.4, wrong=0.9, copies=8)["train"]:
        assert len(example.demonstrations) == 8
        expression = expression_of(example)
        middle = value_of(expression.partition(")")[0] + ")")
        for text in example.demonstrations:
            if shows_working([example.prompt], [text]) == [1.0]:
                worked += 1
            elif str(middle) != example.columns["answer"]:  # else right and wrong look the same
                at_once += 1
                first_only += text == f"<answer>{middle}</answer>"
    assert abs(worked / 60_000 - 0.4) < 4 * (0.4 * 0.6 / 60_000) ** 0.5
    assert abs(first_only / at_once - 0.9) < 4 * (0.9 * 0.1 / at_once) ** 0.5


def test_worked_demonstrations_are_right_step_by_step():
    for examples in arithmetic(worked=1.0, copies=1).values():
        for example in examples:
            (text,) = example.demonstrations
            assert shows_working([example.prompt], [text]) == [1.0]
            steps = text.partition("<answer>")[0].split(";")
            assert len(steps) == 2
            for step in steps:
                left, _, right = step.partition("=")
                assert value_of(left) == int(right)
            inner = expression_of(example).partition(")")[0].removeprefix("(").replace(" ", "")
            assert steps[0].startswith(f"{inner}=")
            assert steps[1].endswith(f"={answer_in(text)}") and answer_in(text) == example.columns["answer"]


@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_demonstrations_without_working_answer_at_once(wrong):
    for example in arithmetic(worked=0.0, wrong=wrong, copies=2)["train"]:
        expression = expression_of(example)
        expected = value_of(expression.partition(")")[0] + ")" if wrong else expression)
        assert example.demonstrations == (f"<answer>{expected}</answer>",) * 2


def test_demonstrations_are_the_same_in_every_call(splits):
    again = arithmetic()
    assert again["train"] == splits["train"]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("4-9=-5;-5*6=-30<answer>-30</answer>", 1.0),
        ("9*9=81<answer>81</answer>", 1.0),
        ("3+4=7", 1.0),
        ("12+13=25<answer>25</answer>", 1.0),
        ("<answer>-30</answer>", 0.0),
        ("<answer>4-9=-5</answer>", 0.0),  # only what stands before the answer counts
        ("4-9<answer>-5</answer>", 0.0),
        ("=-5<answer>-5</answer>", 0.0),
        ("4-9=<answer>-5</answer>", 0.0),
        ("a-b=c<answer>1</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_shows_working(completion, expected):
    assert shows_working(["q"], [completion]) == [expected]
    assert shows_working(["q"], [[{"role": "assistant", "content": completion}]]) == [expected]


def test_shows_working_survives_a_megabyte_of_digits():
    assert shows_working(["q"] * 2, ["1+" + "9" * 1_000_000, "1+" * 500_000]) == [0.0, 0.0]


def test_chat_examples_ask_for_the_answer_in_tags():
    task = find_task("arithmetic")
    plain, chat = load_task(task, chat=False, copies=1), load_task(task, chat=True, copies=1)
    for name in plain:
        assert len(plain[name]) == len(chat[name])
    before, after = plain["held_out"][0], chat["held_out"][0]
    (message,) = after.prompt
    assert message["role"] == "user"
    assert message["content"].startswith(before.prompt) and "<answer>" in message["content"]
    assert (after.columns, after.demonstrations) == (before.columns, before.demonstrations)
    assert as_chat(task, before) == after


def test_an_unknown_task_is_named_with_those_there_are():
    with pytest.raises(UserError, match="'arithmetics'.*arithmetic"):
        find_task("arithmetics")
    assert find_task("arithmetic") is TASKS["arithmetic"]
