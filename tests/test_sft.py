"""Completion-only cross-entropy against `torch.nn.functional`, the schedule, and a short run of the command."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import commands
import runs
import sft
import tasks
from checkpoints import load, new_policy
from commands import UserError
from sft import SFTConfig, batches, cross_entropy, learning_rate_at
from tasks import Example

ROOT = Path(sft.__file__).parent
TEXTS = [("What is (4 - 9) * 6?", "4-9=-5;-5*6=-30<answer>-30</answer>"), ("What is 1?", "<answer>1</answer>")]


def packed(policy):
    prompts = policy.encode([prompt for prompt, _ in TEXTS])
    ids = policy.tokenizer([text for _, text in TEXTS]).input_ids
    return policy.pack(prompts, [row + [policy.tokenizer.eos_token_id] for row in ids], [text for _, text in TEXTS])


@pytest.mark.parametrize("token_budget", [10_000, 1])
def test_loss_is_the_cross_entropy_of_completion_and_end_tokens_only(token_budget):
    policy = new_policy([text for pair in TEXTS for text in pair], seed=0, device=torch.device("cpu"))
    loss = cross_entropy(policy, packed(policy), torch.ones(2), token_budget, learn=True)
    gradients = [p.grad.clone() for p in policy.model.parameters()]

    policy.model.zero_grad()
    losses = []
    for prompt, text in TEXTS:  # one unpadded row at a time, labels shifted by hand
        ids = policy.tokenizer(prompt).input_ids + policy.tokenizer(text).input_ids + [policy.tokenizer.eos_token_id]
        start = len(policy.tokenizer(prompt).input_ids)
        inputs = torch.tensor([ids])
        logits = policy.model.logits(policy.model(inputs, torch.arange(len(ids))[None]))[0]
        losses.append(F.cross_entropy(logits[start - 1 : -1], inputs[0, start:], reduction="none"))
    expected = torch.cat(losses).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for gradient, parameter in zip(gradients, policy.model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=3e-7)


def test_equal_demonstrations_are_computed_once_and_count_as_often_as_they_occur():
    """Loss and gradient are those of a batch in which each copy is a row with a prompt of its own."""
    policy = new_policy([text for pair in TEXTS for text in pair], seed=0, device=torch.device("cpu"))
    (first, worked), (second, short) = TEXTS
    examples = [Example(first, {}, (worked, short, worked)), Example(second, {}, (short,) * 4)]
    rollout, copies = policy.demonstrations(examples)
    assert rollout.texts == [worked, short, short] and copies.tolist() == [2, 1, 4]
    assert rollout.group.tolist() == [0, 0, 1] and len(rollout.prompts) == 2
    results = []
    pairs = [(example.prompt, text) for example in examples for text in example.demonstrations]
    ids = [row + [policy.tokenizer.eos_token_id] for row in policy.tokenizer([text for _, text in pairs]).input_ids]
    apart = policy.pack(policy.encode([prompt for prompt, _ in pairs]), ids, [text for _, text in pairs])
    for batch, counts in ((rollout, copies), (apart, torch.ones(7))):
        policy.model.zero_grad()
        loss = cross_entropy(policy, batch, counts, 10_000, learn=True)
        results.append((loss, [weight.grad.clone() for weight in policy.model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for once, each in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(once, each, rtol=0, atol=1e-6)


def test_a_step_takes_all_demonstrations_of_its_prompts(few_problems, tmp_path, monkeypatch):
    seen = []
    inner = sft.cross_entropy

    def record(policy, batch, copies, *more, learn=True, **total):
        if learn:
            seen.append((len(batch.prompts), int(copies.sum())))
        return inner(policy, batch, copies, *more, learn=learn, **total)

    monkeypatch.setattr(sft, "cross_entropy", record)
    sft.train(SFTConfig(out=str(tmp_path / "a"), copies=3, epochs=1, batch_size=8))
    assert seen and set(seen) == {(8, 24)}


def test_schedule_worked_by_hand():
    config = SFTConfig(learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate_at(config, step, 10) for step in range(1, 11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_batches_are_shuffled_passes_over_all_rows():
    rows = [row for batch in batches(10, 4, 5, seed=0) for row in batch]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and rows[:10] != rows[10:]
    again = [row for batch in batches(10, 4, 5, seed=0) for row in batch]
    other = [row for batch in batches(10, 4, 5, seed=1) for row in batch]
    assert rows == again and rows != other


@pytest.fixture
def few_problems(monkeypatch):
    task = tasks.TASKS["arithmetic"]

    def load(**settings):
        examples = task.load(**settings)["train"][:16]
        return {"train": examples, "validation": examples[:4]}  # the same characters, so nothing is unknown

    monkeypatch.setitem(tasks.TASKS, "arithmetic", dataclasses.replace(task, load=load))


def test_training_learns_its_demonstrations_and_is_bitwise_repeatable(few_problems, tmp_path):
    config = SFTConfig(out=str(tmp_path / "a"), copies=1, epochs=40, batch_size=8, warmup_steps=5, worked=1.0)
    policy = sft.train(config)
    again = sft.train(dataclasses.replace(config, out=str(tmp_path / "b")))
    stored = load(tmp_path / "a", torch.device("cpu"))
    weights = [p.model.state_dict() for p in (policy, again, stored)]
    assert all(torch.equal(weights[0][name], other[name]) for other in weights[1:] for name in weights[0])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > 2.5 and losses[-1] < 1.0 and len(losses) == 80
    with pytest.raises(UserError, match="--overwrite"):
        sft.train(config)


def test_a_checkpoint_can_be_trained_further(few_problems, tmp_path):
    first = SFTConfig(out=str(tmp_path / "a"), copies=1, epochs=1, batch_size=8)
    policy = sft.train(first)
    more = dataclasses.replace(first, model=first.out, out=str(tmp_path / "b"), learning_rate=1e-9)
    for a, b in zip(policy.model.parameters(), sft.train(more).model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def weights_of(policy) -> list[torch.Tensor]:
    return [weight.detach() for weight in policy.model.parameters()]


def test_a_resumed_run_is_bitwise_equal_to_the_one_not_interrupted(few_problems, tmp_path, monkeypatch):
    config = SFTConfig(out=str(tmp_path / "whole"), copies=2, epochs=6, batch_size=8, save_every=3, eval_every=4)
    whole = weights_of(sft.train(config))
    step = sft.cross_entropy
    count = iter(range(100))

    def die(*arguments, **more):
        if next(count) == 8:
            raise KeyboardInterrupt  # a crash after the state of step 6
        return step(*arguments, **more)

    monkeypatch.setattr(sft, "cross_entropy", die)
    cut = dataclasses.replace(config, out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        sft.train(cut)
    monkeypatch.setattr(sft, "cross_entropy", step)
    assert sorted(path.name for path in (tmp_path / "cut" / "resume").iterdir()) == ["000006", "000007"]
    resumed = weights_of(sft.train(dataclasses.replace(cut, resume=True)))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    logs = [
        [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in path.read_text().splitlines()]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "cut" / "metrics.jsonl")
    ]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == list(range(1, 13))
    assert [line["step"] for line in logs[0] if "validation_loss" in line] == [4, 8, 12]
    monkeypatch.setattr(sft, "cross_entropy", None)  # a finished run trains no further
    again = weights_of(sft.train(dataclasses.replace(cut, resume=True)))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 12


def test_the_validation_loss_is_the_cross_entropy_of_the_validation_problems(few_problems, tmp_path):
    policy = sft.train(SFTConfig(out=str(tmp_path / "a"), copies=1, epochs=1, batch_size=8, eval_every=100))
    line = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    examples = tasks.find_task("arithmetic").load(copies=1)["validation"]
    total = count = 0
    for example in examples:
        rollout, copies = policy.demonstrations([example])
        total -= (policy.log_probs(rollout)[0].sum(1) * copies).sum().item()
        count += int((rollout.mask.sum(1) * copies).sum())
    assert line["validation_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--worked", "1.5"], ["--worked", "at most 1"]),
        (["--copies", "0"], ["--copies", "above 0"]),
        (["--epochs", "-1"], ["--epochs", "above 0"]),
        (["--task", "poetry"], ["poetry", "arithmetic"]),
        (["--model", "nowhere"], ["nowhere"]),
        (["--batch", "3"], ["--batch"]),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sft.py", *arguments])
    monkeypatch.setattr(runs.signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        commands.run_main(sft.main)
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and errors.count("\n") == 1, errors
    assert all(word in errors for word in ("error", *words)), errors
    assert not list(tmp_path.iterdir())


def test_what_stops_after_an_update_loses_no_batch(few_problems, tmp_path, monkeypatch):
    """The batch of the step whose end is missing has been taken: the next one is the next."""
    config = SFTConfig(out=str(tmp_path / "whole"), copies=2, epochs=2, batch_size=8, save_every=100, eval_every=2)
    whole = weights_of(sft.train(config))
    real = sft.validate

    def stop(run, step):
        raise KeyboardInterrupt(15)

    monkeypatch.setattr(sft, "validate", stop)
    cut = dataclasses.replace(config, out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        sft.train(cut)
    assert (tmp_path / "cut" / "resume" / "000001+").is_dir()
    monkeypatch.setattr(sft, "validate", real)
    resumed = weights_of(sft.train(dataclasses.replace(cut, resume=True)))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
