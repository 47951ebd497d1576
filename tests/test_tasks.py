"""The arithmetic task: right answers, a split that nothing moves, demonstrations in the stated proportions."""

import ast
import hashlib
import json
import operator
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest

from commands import UserError
from rewards import answer_exact, answer_format, answer_last, boxed_format
from tasks import (
    TASKS,
    Example,
    aimo_example,
    alpaca_example,
    arithmetic,
    find_task,
    gsm8k_example,
    load_task,
    math_example,
    pose,
    shows_working,
)

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
                left, _, right = step.partition(" = ")
                assert value_of(left.strip()) == int(right)
            inner = expression_of(example).partition(")")[0].removeprefix("(")
            assert steps[0].startswith(f"{inner} = ")
            assert steps[1].endswith(f" = {answer_in(text)} ") and answer_in(text) == example.columns["answer"]


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
        ("4 - 9 = -5; -5 * 6 = -30 <answer>-30</answer>", 1.0),
        ("9*9=81<answer>81</answer>", 1.0),
        ("3+4=7", 1.0),
        ("12+13=25<answer>25</answer>", 1.0),
        ("<answer>-30</answer>", 0.0),
        ("<answer>4-9=-5</answer>", 0.0),  # only what stands before the answer counts
        ("4-9<answer>-5</answer>", 0.0),
        ("=-5<answer>-5</answer>", 0.0),
        ("4-9=<answer>-5</answer>", 0.0),
        ("What is 4 - 9 * 6? <answer>-5</answer>", 0.0),
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
    assert before.question == after.question == before.prompt
    assert pose(task, Example(before.question, before.columns, before.demonstrations), chat=True) == after


def test_an_unknown_task_is_named_with_those_there_are():
    with pytest.raises(UserError, match="'arithmetics'.*arithmetic"):
        find_task("arithmetics")
    assert find_task("arithmetic") is TASKS["arithmetic"]


GSM8K = [
    {"question": f"How many are {i} and {i}?", "answer": f"{i}+{i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i:,}"}
    for i in range(400, 600)
]


def write_lines(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def gold(record: dict) -> str:
    """The answer of a GSM8K record by another way than the task's: split off the last line, drop the commas."""
    return str(int(record["answer"].splitlines()[-1].split()[1].replace(",", "")))


def test_all_records_of_gsm8k(shared_data):
    """8,792 answers are the gold ones, marks are gone from the working, and our rewards accept each demonstration."""
    count = 0
    for name in ("train", "test"):
        records = [json.loads(line) for line in (shared_data / "gsm8k" / f"{name}.jsonl").read_text().splitlines()]
        examples = [gsm8k_example(record) for record in records]
        answers = [example.columns["answer"] for example in examples]
        texts = [example.demonstrations[0] for example in examples]
        assert answers == [gold(record) for record in records]
        assert all("<<" not in text and "####" not in text for text in texts)
        assert answer_exact(None, texts, answers) == answer_format(None, texts) == [1.0] * len(records)
        assert answer_last(None, [record["answer"] for record in records], answers) == [1.0] * len(records)
        count += len(records)
    assert count == 8792


def test_gsm8k_keeps_the_test_split_for_the_end(shared_data):
    splits = load_task(find_task("gsm8k"), chat=True, data=str(shared_data / "gsm8k"))
    questions = {name: {example.question for example in examples} for name, examples in splits.items()}
    assert len(questions["held_out"]) == 1319 and len(questions["validation"]) == len(splits["validation"]) > 300
    assert len(set.union(*questions.values())) == sum(map(len, questions.values())), "no question stands in two splits"
    again = load_task(find_task("gsm8k"), chat=True, data=str(shared_data / "gsm8k"), limit=5)
    assert again == {name: examples[:5] for name, examples in splits.items()}
    (message,) = splits["train"][0].prompt
    assert message["content"].startswith(splits["train"][0].question) and "<answer>" in message["content"]
    plain = load_task(find_task("gsm8k"), chat=False, data=str(shared_data / "gsm8k"), limit=1)["train"][0].prompt
    assert plain == message["content"] + "\n"


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_a_file_is_split_by_itself(tmp_path, kind):
    path = tmp_path / f"records.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GSM8K), path)
    elif kind == "json":
        path.write_text(json.dumps(GSM8K))
    else:
        write_lines(path, GSM8K)
    splits = find_task("gsm8k").load(data=str(path))
    assert {name: len(examples) for name, examples in splits.items()} == {
        "train": 171, "validation": 9, "held_out": 20,
    }  # fmt: skip
    shuffled = write_lines(tmp_path / "other.jsonl", GSM8K[::-1] + GSM8K[:7])
    assert find_task("gsm8k").load(data=shuffled) == splits, "order and repeats change nothing"


@pytest.mark.parametrize(
    ("given", "answer"), [("025", "25"), ("142.0", "142"), (142.0, "142"), (7, "7"), ("1,080", "1080")]
)
def test_answers_of_aime_and_amc(given, answer):
    assert aimo_example({"problem": "p", "answer": given, "id": 3}).columns == {"answer": answer}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["line 1", "no JSON"]),
        ('{"question": "q"}\n', ["record 1", "lacks 'answer'", "its fields are question"]),
        ('{"question": "q", "answer": "7"}\n', ["record 1", "#### N"]),
        ('{"question": "q", "answer": 7}\n', ["record 1"]),
        ('{"question": "q", "answer": "#### seven"}\n', ["record 1", "#### N"]),
        ('{"question": 3, "answer": "#### 7"}\n', ["record 1", "no question"]),
        ('{"question": " ", "answer": "#### 7"}\n', ["record 1", "no question"]),
        ("[1]\n", ["record 1", "no object"]),
        ("", ["too few records"]),
        ('{"question": "q", "answer": "#### 7"}\n', ["too few records"]),
        ("[" * 100_000, ["line 1", "no JSON"]),
    ],
)
def test_a_damaged_file_is_named_with_the_record(tmp_path, text, words):
    (tmp_path / "records.jsonl").write_text(text)
    with pytest.raises(UserError) as caught:
        find_task("gsm8k").load(data=str(tmp_path / "records.jsonl"))
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_cannot_be_read_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no file.*give a .json"):
        find_task("gsm8k").load(data=str(tmp_path / "nothing.jsonl"))
    with pytest.raises(UserError, match="holds no train.jsonl"):
        find_task("gsm8k").load(data=str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="a.parquet cannot be read"):
        find_task("gsm8k").load(data=str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="openai/gsm8k cannot be read from the hub.*--data"):
        find_task("gsm8k").load()  # tests run without the network
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets.*--data"):
        find_task("gsm8k").load()
    with pytest.raises(UserError, match="--data: task arithmetic has no such setting"):
        load_task(find_task("arithmetic"), chat=False, data="x", limit=None)
    with pytest.raises(UserError, match="--worked: task gsm8k"):
        load_task(find_task("gsm8k"), chat=False, worked=0.5)


def test_math_has_the_last_box_and_math_500_its_own_answer():
    """Boxes nest and come several times; a record without one is named."""
    record = {"problem": "p", "level": "Level 5", "type": "Algebra", "solution": r"\boxed{1} or $\boxed{\frac{1}{2}}$."}
    example = math_example(record)
    assert example.columns == {"answer": r"\frac{1}{2}"} and example.demonstrations == (record["solution"],)
    assert math_example(record | {"answer": " 7 "}).columns == {"answer": "7"}
    assert boxed_format(None, example.demonstrations) == [1.0]
    assert math_example(record | {"solution": r"It is $\boxed 2$."}).columns == {"answer": "2"}  # two in MATH
    for broken in ("no box", r"\boxed{1", r"\boxed{}"):
        assert math_example(record | {"solution": broken}) is None


@pytest.mark.parametrize(
    ("given", "prompt"),
    [("", "Do it."), ("noinput", "Do it."), ("<noinput>", "Do it."), ("No input", "Do it."), (" 3 ", "Do it.\n\n3")],
)
def test_alpacas_input_is_often_empty(given, prompt):
    example = alpaca_example({"instruction": "Do it.", "input": given, "output": " Done. "})
    assert (example.prompt, example.columns, example.demonstrations) == (prompt, {"reference": "Done."}, ("Done.",))


def test_alpaca_without_input_field_and_without_output(tmp_path, capsys):
    """A record with an empty output is left out, which is said; the field itself may not lack."""
    records = [{"instruction": f"Do {i}.", "output": "" if i % 10 == 0 else "Done."} for i in range(50)]
    splits = find_task("alpaca").load(data=write_lines(tmp_path / "alpaca.jsonl", records))
    assert sum(map(len, splits.values())) == 45
    assert "5 of 50 records left out" in capsys.readouterr().out
    del records[7]["output"]
    with pytest.raises(UserError, match="record 8 lacks 'output'"):
        find_task("alpaca").load(data=write_lines(tmp_path / "alpaca.jsonl", records))


def test_smoltldr_is_asked_as_it_stands(tmp_path):
    records = [{"prompt": f"POST {i} TL;DR:", "completion": f" It is {i}."} for i in range(40)]
    data = write_lines(tmp_path / "smoltldr.jsonl", records)
    example = load_task(find_task("smoltldr"), chat=False, data=data)["train"][0]
    assert example.prompt == example.question and example.demonstrations == (" " + example.columns["reference"],)
    (message,) = load_task(find_task("smoltldr"), chat=True, data=data)["train"][0].prompt
    assert message == {"role": "user", "content": example.question}


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.toy])
def test_from_the_hub_come_all_parts_of_a_source(name, monkeypatch):
    """What is asked of the package datasets: every configuration and split, such as the seven subjects of MATH."""
    calls = []
    fields = {"question": "q{}", "answer": "#### {}", "problem": "p{}", "prompt": "p{}", "completion": "c"}
    fields |= {"instruction": "i{}", "output": "o", "solution": r"\boxed{{{}}}"}
    fields |= {"answer": "{}"} if name in ("aimo", "math") else {}

    def load_dataset(hub, config, split):
        calls.append((hub, config, split))
        rows = [{key: value.format(len(calls) * 100 + i) for key, value in fields.items()} for i in range(20)]
        return SimpleNamespace(to_list=lambda: rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    splits = find_task(name).load()
    assert sum(map(len, splits.values())) == 20 * len(calls) and len({hub for hub, _, _ in calls}) == 1
    assert len(calls) == {"math": 14, "gsm8k": 2, "smoltldr": 2}.get(name, 1)


@pytest.mark.parametrize("name", [task.name for task in TASKS.values() if task.toy])
def test_a_limit_takes_the_first_of_each_split_of_every_task(name):
    task = find_task(name)
    whole, few = load_task(task, False), load_task(task, False, 3)
    assert few == {split: examples[:3] for split, examples in whole.items()}


def test_scitldr_becomes_problems_of_smoltldr(shared_data, tmp_path):
    script = Path(__file__).parent.parent / "results" / "scitldr.py"
    subprocess.run([sys.executable, str(script), str(shared_data / "scitldr"), str(tmp_path)], check=True)
    splits = load_task(find_task("smoltldr"), chat=True, data=str(tmp_path))
    assert {name: len(part) for name, part in splits.items()} == {"train": 385, "validation": 21, "held_out": 75}
    for example in splits["train"] + splits["held_out"]:
        (turn,) = example.prompt
        abstract, blank, request = turn["content"].rpartition("\n\n")
        assert request == "Summarize this paper in one sentence." and blank and 0 < len(abstract) <= 1000
        assert example.columns["reference"] and example.demonstrations[0].strip() == example.columns["reference"]
