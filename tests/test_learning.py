"""Does it learn? A small base policy, a few steps of GRPO, before and after; and with shuffled rewards, nothing."""

import dataclasses
from pathlib import Path

import pytest

import grpo
import sft
import tasks
from checkpoints import load
from inference import evaluate

SAMPLES = 4
SMALL = {"steps": 16, "batch_size": 24, "num_generations": 12, "eval_every": 100}


@pytest.fixture(scope="module")
def small_task():
    """The task with the problems whose numbers are at most 4, which a small budget can learn."""
    task = tasks.TASKS["arithmetic"]

    def load_small(**settings):
        splits = task.load(**settings)
        small = {name: [e for e in part if not set("56789") & set(e.prompt)] for name, part in splits.items()}
        return small | {"validation": small["validation"][:10]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "arithmetic", dataclasses.replace(task, load=load_small))
        yield tasks.TASKS["arithmetic"]


@pytest.fixture(scope="module")
def base(small_task, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learning") / "base"
    sft.train(sft.SFTConfig(out=str(folder), epochs=8.0, batch_size=32, learning_rate=2e-3))
    return folder


def measure(policy, task) -> dict[str, float]:
    return evaluate(policy, task, task.load()["held_out"], task.max_new_tokens, samples=SAMPLES)


def test_grpo_learns_to_show_its_working(small_task, base, tmp_path):
    before = measure(load(base, "cpu"), small_task)
    run = grpo.train(grpo.GRPOConfig(model=str(base), out=str(tmp_path / "run"), **SMALL))
    after = measure(run.policy, small_task)
    assert before["sampled_working"] < 0.45 and after["sampled_working"] > 0.75, (before, after)
    assert after["sampled_accuracy_low"] > before["sampled_accuracy_high"] + 0.1, (before, after)
    assert after["accuracy_low"] > before["accuracy_high"], (before, after)


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_rewards_teach_nothing(small_task, base, tmp_path, seed):
    """The negative control: the same rewards and budget, but each reward dealt to a random completion.

    The bound is a third of what the true rewards gain; what is left is the random walk of a few noisy steps.
    """
    before = measure(load(base, "cpu"), small_task)
    shuffled = f"{Path(__file__).parent / 'shuffled.py'}:shuffled=1"
    config = grpo.GRPOConfig(model=str(base), out=str(tmp_path / "run"), rewards=shuffled, seed=seed, **SMALL)
    after = measure(grpo.train(config).policy, small_task)
    assert abs(after["sampled_accuracy"] - before["sampled_accuracy"]) < 0.1, (before, after)
    assert abs(after["sampled_working"] - before["sampled_working"]) < 0.2, (before, after)
