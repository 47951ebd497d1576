"""Tasks: what is asked, how it is split, how it is rewarded. `TASKS` is the registry.

A task's split is fixed: it follows from the text of each problem, never from a run's seed. Training problems train,
validation problems steer (curves, best checkpoint, early stop, tuning), held-out problems only report.
"""

import hashlib
import importlib.util
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import rewards
from commands import UserError, flag_of
from rewards import RewardFunction, answer_exact, answer_format, answer_last, boxed_format, last_boxed, to_integer

OPERATIONS = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}
SPLITS = {"train": "train", "held_out": "test"}  # by our name for a split, what the hub and a folder call it


@dataclass(frozen=True)
class Example:
    """One problem: the question, the columns that rewards need, and demonstrations for supervised fine-tuning."""

    prompt: str | list[dict]  # what the model reads: a text, or messages for a chat model
    columns: dict = field(default_factory=dict)
    demonstrations: tuple[str, ...] = ()
    question: str = ""  # as the data has it, before the task's instruction is added


@dataclass(frozen=True)
class Task:
    """What is asked and how it is rewarded.

    `metrics` are measured and plotted, never rewarded; the first is the score, by which the best checkpoint is kept.
    """

    name: str
    load: Callable[..., dict[str, list[Example]]]  # keyword settings -> examples by split
    rewards: str  # the default mix, as on the command line
    metrics: dict[str, RewardFunction]
    max_new_tokens: int
    chat_instruction: str = ""  # added to the question for models that have a chat template
    plain: str = "{question}"  # how a model without a chat template is asked
    toy: bool = False  # a toy can learn it from nothing, so no --model is needed
    epochs: float = 3.0  # passes over the demonstrations in fine-tuning
    learning_rate: float = 1.5e-3  # its peak, of a toy
    shots: dict = field(default_factory=dict)  # settings of `load` under which demonstrations are worked examples

    @property
    def score(self) -> str:
        return next(iter(self.metrics))


def in_fixed_order(items: Iterable, text: Callable[..., str] = lambda example: example.prompt) -> list:
    """Shuffle by a hash of each item's text: the same order on every machine, in every version, for every seed."""
    return sorted(items, key=lambda item: hashlib.sha256(text(item).encode()).digest())


def arithmetic(worked: float = 0.3, wrong: float = 0.95, copies: int = 8) -> dict[str, list[Example]]:
    """The 9,000 problems `(a op b) op c` with digits 0-9: 7,500 to train on, 500 for validation, 1,000 held out.

    Demonstrations are sloppy on purpose: a fraction `worked` shows the working and is right; the others answer at
    once, and a fraction `wrong` of those stops after the first operation. Each training problem has `copies` of them.
    """
    examples = []
    for a, first, b, second, c in itertools.product(range(10), OPERATIONS, range(10), OPERATIONS, range(10)):
        middle = OPERATIONS[first](a, b)
        right = OPERATIONS[second](middle, c)
        prompt = f"What is ({a} {first} {b}) {second} {c}?"
        working = f"{a} {first} {b} = {middle}; {middle} {second} {c} = {right}"  # a toy reads no white space
        draw = random.Random(prompt)
        demonstrations = []
        for _ in range(copies):
            if draw.random() < worked:
                demonstrations.append(f"{working} <answer>{right}</answer>")
            else:
                demonstrations.append(f"<answer>{middle if draw.random() < wrong else right}</answer>")
        examples.append(Example(prompt, {"answer": str(right)}, tuple(demonstrations)))
    examples = in_fixed_order(examples)
    return {"validation": examples[:500], "train": examples[500:8000], "held_out": examples[8000:]}


def odd_even(even_data_ratio: float = 0.0) -> dict[str, list[Example]]:
    """The 900 sums a + b of numbers from 0 to 29; a + b and b + a are in the same part.

    All are asked, but only odd sums and a fraction `even_data_ratio` of the even ones have demonstrations.
    """

    def ask(a: int, b: int) -> Example:
        prompt = f"What is {a} + {b}?"
        shown = (a + b) % 2 or random.Random(prompt).random() < even_data_ratio
        return Example(prompt, {"answer": str(a + b)}, (f"<answer>{a + b}</answer>",) if shown else ())

    pairs = in_fixed_order(itertools.combinations_with_replacement(range(30), 2), str)
    parts = {"validation": pairs[:52], "held_out": pairs[52:156], "train": pairs[156:]}
    return {name: [ask(*p) for p in dict.fromkeys(part + [p[::-1] for p in part])] for name, part in parts.items()}


def read_records(path: Path) -> list[dict]:
    """The records of a JSON, JSON Lines or parquet file; raises UserError naming file and line."""
    problem, mend = f"{path} cannot be read", "give a .json, .jsonl or .parquet file"
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import read_table

            return read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            records = json.loads(text)
        else:
            records = []
            for number, line in enumerate(text.split("\n"), 1):
                problem, mend = f"{path}, line {number}, is no JSON", "mend or delete it"
                if line.strip():
                    records.append(json.loads(line))
    except ImportError as error:
        raise UserError(f"--data: {path} needs pyarrow; python -m pip install pyarrow") from error
    except (OSError, ValueError, RecursionError) as error:  # pyarrow's errors are among them
        raise UserError(f"--data: {problem} ({error}); {mend}") from error
    if not isinstance(records, list):
        raise UserError(f"--data: {path} does not hold a list of records; give a list, or JSON Lines as .jsonl")
    strange = next((i for i, record in enumerate(records, 1) if not isinstance(record, dict)), None)
    if strange is not None:
        raise UserError(f"--data: record {strange} of {path} is no object with fields; mend or delete it")
    return records


@dataclass(frozen=True)
class Source:
    """Where a task's records come from: the hub by default, or a file or folder in the same schema (`--data`)."""

    hub: str
    configs: tuple[str | None, ...]
    splits: dict[str, str]  # of the hub: `train` and, where it has one, `held_out`
    convert: Callable[[dict], Example | None]  # None leaves out; raises KeyError, TypeError or ValueError for no record

    def load(self, data: str | None = None) -> dict[str, list[Example]]:
        """Examples by split; raises UserError.

        Where the source has no held-out records a tenth of its own is held out. Validation is a twentieth of what is
        left to train on, at most 500. Both follow from a hash of the question, and no question stands in two splits.
        """
        found = {name: self.examples(records, where) for name, (records, where) in self.records(data).items()}
        held_out = {example.prompt: example for example in found.get("held_out", [])}
        train = {example.prompt: example for example in found["train"] if example.prompt not in held_out}
        train = in_fixed_order(list(train.values()))
        if not held_out:
            cut = -(-len(train) // 10)
            held_out, train = dict(enumerate(train[:cut])), train[cut:]
        cut = min(500, -(-len(train) // 20))
        splits = {"train": train[cut:], "validation": train[:cut], "held_out": in_fixed_order(list(held_out.values()))}
        empty = [name for name, examples in splits.items() if not examples]
        if empty:
            raise UserError(f"--data: too few records, {', '.join(empty)} would be empty; give at least 3")
        return splits

    def records(self, data: str | None) -> dict[str, tuple[list[dict], str]]:
        """Records and the name of where they came from, by split."""
        if data is None:
            try:
                from datasets import load_dataset
            except ImportError as error:
                mend = "python -m pip install datasets, or name a local file with --data"
                raise UserError(f"--task: {self.hub} is read from the hub by the package datasets; {mend}") from error
            try:
                parts = {
                    name: [load_dataset(self.hub, config, split=split).to_list() for config in self.configs]
                    for name, split in self.splits.items()
                }
                return {name: (list(itertools.chain(*records)), self.hub) for name, records in parts.items()}
            except Exception as error:  # network, disk, authorization: the library's errors have no common base
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f"--task: {self.hub} cannot be read from the hub ({first}); use --data FILE") from error
        path = Path(data)
        if path.is_dir():
            files = {name: sorted(path.glob(f"{stem}.*")) for name, stem in SPLITS.items()}
            if not files["train"]:
                raise UserError(f"--data: {data} holds no train.jsonl (or .json, .parquet); name a file")
            return {name: (read_records(paths[0]), str(paths[0])) for name, paths in files.items() if paths}
        if not path.is_file():
            mend = "give a .json, .jsonl or .parquet file, or a folder with train.jsonl"
            raise UserError(f"--data: no file {data!r}; {mend}")
        return {"train": (read_records(path), data)}

    def examples(self, records: list[dict], where: str) -> list[Example]:
        """The records as examples; raises UserError naming the first that does not have the source's fields."""
        examples = []
        for number, record in enumerate(records, 1):
            try:
                example = self.convert(record)
                if example is None:
                    continue
                if not isinstance(example.prompt, str) or not example.prompt.strip():
                    raise ValueError("no question")
                for text in (example.prompt, *example.demonstrations):
                    text.encode()  # half of a surrogate pair is no text
                examples.append(example)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                what = f"lacks {error}" if isinstance(error, KeyError) else f"has {error}"
                mend = f"its fields are {', '.join(map(str, record))}; {self.hub} shows what is expected"
                raise UserError(f"{where}: record {number} {what}; {mend}") from error
        if len(examples) < len(records):
            print(f"{where}: {len(records) - len(examples)} of {len(records)} records left out, they have no answer")
        return examples


def gsm8k_example(record: dict) -> Example:
    """`question` and `answer`: worked steps with marks such as <<3*4=12>>, then `#### 1,080` on the last line."""
    working, mark, number = record["answer"].rpartition("####")
    answer = to_integer(number.strip())
    if not mark or answer is None:
        raise ValueError("an answer without `#### N` at its end")
    working = re.sub(r"<<[^<>]{0,200}>>", "", working).strip()
    return Example(record["question"], {"answer": str(answer)}, (f"{working}\n<answer>{answer}</answer>",))


def aimo_example(record: dict) -> Example:
    """`problem` and `answer`, the text of an integer: `025`, or `142.0`."""
    answer = to_integer(str(record["answer"]).strip())
    if answer is None:
        raise ValueError(f"the answer {str(record['answer'])[:40]!r}, which is no integer")
    return Example(record["problem"], {"answer": str(answer)})


def math_example(record: dict) -> Example | None:
    r"""`problem` and `solution`, whose last `\boxed{...}` is the answer; or an `answer` of its own, as in MATH-500.

    A few solutions of MATH have no answer, such as an empty box; they are left out.
    """
    answer = (record["answer"] if "answer" in record else last_boxed(record["solution"])) or ""
    columns = {"answer": answer.strip()}
    return Example(record["problem"], columns, (record["solution"],)) if columns["answer"] else None


def alpaca_example(record: dict) -> Example | None:
    """`instruction`, `input` (often empty, or a placeholder) and `output`; without an output it is left out."""
    given = record.get("input") or ""
    given = "" if re.sub(r"\W", "", given).lower() == "noinput" else given.strip()
    output = record["output"].strip()
    prompt = f"{record['instruction']}\n\n{given}".strip()
    return Example(prompt, {"reference": output}, (output,)) if output else None


def smoltldr_example(record: dict) -> Example | None:
    """`prompt`, a post, and `completion`, its summary."""
    summary = record["completion"]  # with its leading space, which a base model expects
    return Example(record["prompt"], {"reference": summary.strip()}, (summary,)) if summary.strip() else None


def shows_working(prompts, completions, **_) -> list[float]:
    """1 where an equation such as `4-9=-5` or `4 - 9 = -5` stands before the answer, else 0."""
    before = (rewards.text_of(completion).partition("<answer>")[0] for completion in completions)
    return [float(re.search(r"[0-9] ?[+*-] ?[0-9-][0-9]{0,30} ?= ?-?[0-9]", text) is not None) for text in before]


def for_parity(remainder: int) -> RewardFunction:
    """A measure of the problems with an odd (1) or even (0) answer: 1 if right, else 0; None for the others."""

    def right(prompts, completions, answer, **_) -> list[float | None]:
        values = rewards.nearest_exact(prompts, completions, answer)
        return [value if int(y) % 2 == remainder else None for value, y in zip(values, answer, strict=True)]

    return right


MATH_SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory")
MATH_SUBJECTS += ("prealgebra", "precalculus")
TASKS = {
    task.name: task
    for task in [
        Task(
            name="arithmetic",
            load=arithmetic,
            rewards="answer_format=0.2,answer_near=0.2,answer_exact=0.6",
            metrics={"accuracy": answer_exact, "working": shows_working, "format": answer_format},
            chat_instruction="Work it out step by step, then end with the number in <answer>...</answer>.",
            max_new_tokens=32,
            toy=True,
            epochs=11.0,
            learning_rate=2e-3,
            shots={"worked": 1.0, "copies": 1},
        ),
        Task(
            name="odd_even",
            load=odd_even,
            rewards="closeness=1",
            metrics={
                "accuracy": rewards.nearest_exact,
                "odd_accuracy": for_parity(1),
                "even_accuracy": for_parity(0),
                "even_answers": rewards.even_answer,
                "mean_error": rewards.distance,
            },
            chat_instruction="End with the number in <answer>...</answer>.",
            max_new_tokens=8,
            toy=True,
            epochs=100.0,
        ),
        Task(
            name="gsm8k",
            load=Source("openai/gsm8k", ("main",), SPLITS, gsm8k_example).load,
            rewards="answer_format=0.2,answer_near=0.2,answer_exact=0.6",
            metrics={"accuracy": answer_exact, "lenient": answer_last, "format": answer_format},
            chat_instruction="Work it out step by step, then end with the number in <answer>...</answer>.",
            max_new_tokens=512,
            plain="{question}\n{instruction}\n",
        ),
        Task(
            name="aimo",
            load=Source("AI-MO/aimo-validation-aime", (None,), {"train": "train"}, aimo_example).load,
            rewards="answer_format=0.2,answer_exact=0.8",
            metrics={"accuracy": answer_exact, "lenient": answer_last, "format": answer_format},
            chat_instruction="Work it out step by step, then end with the integer in <answer>...</answer>.",
            max_new_tokens=2048,
            plain="{question}\n{instruction}\n",
        ),
        Task(
            name="math",
            load=Source("EleutherAI/hendrycks_math", MATH_SUBJECTS, SPLITS, math_example).load,
            rewards="boxed_format=0.2,math_accuracy=0.8",
            metrics={"accuracy": rewards.math_accuracy, "lenient": rewards.math_lenient, "format": boxed_format},
            chat_instruction=r"Work it out step by step, then end with the answer in \boxed{...}.",
            max_new_tokens=1024,
            plain="{question}\n{instruction}\n",
        ),
        Task(
            name="alpaca",
            load=Source("tatsu-lab/alpaca", (None,), {"train": "train"}, alpaca_example).load,
            rewards="judge=1",
            metrics={"overlap": rewards.overlap},
            max_new_tokens=256,
            plain="### Instruction:\n{question}\n\n### Response:\n",
        ),
        Task(
            name="smoltldr",
            load=Source("mlabonne/smoltldr", (None,), SPLITS, smoltldr_example).load,
            rewards="token_length=1",
            metrics={"overlap": rewards.overlap},
            max_new_tokens=96,
        ),
    ]
}


def find_task(name: str) -> Task:
    """The task of that name; raises UserError."""
    if name not in TASKS:
        raise UserError(f"--task: no task {name!r}; there is {', '.join(TASKS)}")
    return TASKS[name]


def pose(task: Task, example: Example, chat: bool, shots: Sequence[Example] = ()) -> Example:
    """The example as it is asked: a user message that asks for the answer's format too, or the task's plain form.

    Before it the shots, asked alike and answered by their first demonstration.
    """
    if chat:
        turns = [("user", f"{one.prompt}\n{task.chat_instruction}".strip()) for one in (*shots, example)]
        for i, shot in enumerate(shots):
            turns.insert(2 * i + 1, ("assistant", shot.demonstrations[0]))
        prompt = [{"role": role, "content": content} for role, content in turns]
    else:
        prompt = ""
        for one in (*shots, example):
            prompt += task.plain.format(question=one.prompt, instruction=task.chat_instruction)
            prompt += f" {one.demonstrations[0]}\n\n" if one is not example else ""
    return replace(example, prompt=prompt, question=example.prompt)


def worked_examples(task: Task, count: int, **settings) -> list[Example]:
    """The first `count` training problems with a demonstration, the same in every run; raises UserError."""
    if not count:
        return []
    shots = [example for example in task.load(**settings | task.shots)["train"] if example.demonstrations]
    if len(shots) <= count:
        raise UserError(f"--shots is {count}, but task {task.name} has {len(shots)} training problems that show how")
    return shots[:count]


def load_task(
    task: Task, chat: bool, limit: int | None = None, shots: int = 0, eval_limit: int | None = None, **settings
) -> dict[str, list[Example]]:
    """At most `limit` examples of each split, as messages if `chat`; settings that are no None go to the task's `load`.

    Before each question stand `shots` worked examples, which are no training problems then. `eval_limit` bounds the
    splits that are not trained on. Raises UserError for a setting that the task does not have.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if rewards.math_accuracy in task.metrics.values() and not importlib.util.find_spec("math_verify"):
        raise UserError(f"--task {task.name} needs the package math-verify; python -m pip install math-verify")
    for name in given.keys() - rewards.accepted(task.load, given).keys():
        raise UserError(f"{flag_of(name)}: task {task.name} has no such setting; leave it out")
    splits, shown = task.load(**given), worked_examples(task, shots, **given)
    taken, posed = {example.prompt for example in shown}, {}
    for name, examples in splits.items():
        most = limit if name == "train" or eval_limit is None else min(eval_limit, limit or eval_limit)
        examples = [example for example in examples if example.prompt not in taken][:most]
        posed[name] = [pose(task, example, chat, shown) for example in examples]
    return posed


def take_prompts(examples: list[Example], step: int, count: int, seed: int, draw: int = 0) -> list[Example]:
    """The prompts of a step (from 1): passes over all examples, each in its own order, by seed, pass and draw."""
    chosen, orders = [], {}
    for i in range((step - 1) * count, step * count):
        epoch = i // len(examples)
        if epoch not in orders:
            stream = np.random.Philox(np.random.SeedSequence([seed, epoch, draw]))
            orders[epoch] = np.random.Generator(stream).permutation(len(examples))
        chosen.append(examples[orders[epoch][i % len(examples)]])
    return chosen
