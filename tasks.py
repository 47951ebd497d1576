"""Tasks: what is asked, how it is split, how it is rewarded. `TASKS` is the registry.

A task's split is fixed: it follows from the text of each problem, never from a run's seed. Training problems train,
validation problems steer (curves, best checkpoint, early stop, tuning), held-out problems only report.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from rewards import RewardFunction, UserError, answer_exact, answer_format, text_of

OPERATIONS = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}


@dataclass(frozen=True)
class Example:
    """One problem: the question, the columns that rewards need, and demonstrations for supervised fine-tuning."""

    prompt: str | list[dict]  # a plain question, or messages for a chat model
    columns: dict = field(default_factory=dict)
    demonstrations: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The text that is asked, without the roles of a chat."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


@dataclass(frozen=True)
class Task:
    """What is asked and how it is rewarded; `metrics` are measured and plotted, never rewarded."""

    name: str
    load: Callable[..., dict[str, list[Example]]]  # keyword settings -> examples by split
    rewards: str  # the default mix, as on the command line
    accuracy: RewardFunction
    metrics: dict[str, RewardFunction]
    chat_instruction: str  # added to the question for models that have a chat template
    max_new_tokens: int


def in_fixed_order(examples: list[Example]) -> list[Example]:
    """Shuffle by a hash of the prompt: the same order on every machine, in every version, for every seed."""
    return sorted(examples, key=lambda example: hashlib.sha256(example.prompt.encode()).digest())


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
        working = f"{a}{first}{b}={middle};{middle}{second}{c}={right}"
        draw = random.Random(prompt)
        demonstrations = []
        for _ in range(copies):
            if draw.random() < worked:
                demonstrations.append(f"{working}<answer>{right}</answer>")
            else:
                demonstrations.append(f"<answer>{middle if draw.random() < wrong else right}</answer>")
        examples.append(Example(prompt, {"answer": str(right)}, tuple(demonstrations)))
    examples = in_fixed_order(examples)
    return {"validation": examples[:500], "train": examples[500:8000], "held_out": examples[8000:]}


def shows_working(prompts, completions, **_) -> list[float]:
    """1 where an equation such as `4-9=-5` stands before the answer, else 0."""
    before = (text_of(completion).partition("<answer>")[0] for completion in completions)
    return [float(re.search(r"[0-9][+*-][0-9-][0-9]{0,30}=-?[0-9]", text) is not None) for text in before]


TASKS = {
    task.name: task
    for task in [
        Task(
            name="arithmetic",
            load=arithmetic,
            rewards="answer_format=0.2,answer_near=0.2,answer_exact=0.6",
            accuracy=answer_exact,
            metrics={"working": shows_working, "format": answer_format},
            chat_instruction="Work it out step by step, then end with the number in <answer>...</answer>.",
            max_new_tokens=32,
        )
    ]
}


def find_task(name: str) -> Task:
    """The task of that name; raises UserError."""
    if name not in TASKS:
        raise UserError(f"--task: no task {name!r}; there is {', '.join(TASKS)}")
    return TASKS[name]


def as_chat(task: Task, example: Example) -> Example:
    """The example as one user message that also asks for the answer's format."""
    content = f"{example.prompt}\n{task.chat_instruction}"
    return replace(example, prompt=[{"role": "user", "content": content}])


def load_task(task: Task, chat: bool, **settings) -> dict[str, list[Example]]:
    """The examples of a task by split, as messages if `chat`; settings go to the task's `load`."""
    splits = task.load(**settings)
    return {name: [as_chat(task, e) if chat else e for e in examples] for name, examples in splits.items()}
