"""What --trace shows of a step: the numbers of the step that would be taken, and nothing written."""

import re
import sys

import pytest
import torch
from test_real_models import command

import grpo
import sft
from checkpoints import load, save
from commands import UserError
from grpo import GRPOConfig, group_advantages, policy_loss
from policy import score_rollout
from rewards import Rewards
from tasks import find_task, load_task, take_prompts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(random_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save(random_policy(end="05", num_hidden_layers=1), folder)
    return folder


def traced(monkeypatch, capsys, *words) -> str:
    command(monkeypatch, grpo, "--task", "arithmetic", "--device", "cpu", "--trace", *words)
    return capsys.readouterr().out


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "pairwise", "gmpo"])
def test_it_is_the_step_that_would_be_taken(base, tmp_path, monkeypatch, capsys, algorithm):
    words = ["--model", base, "--num-generations", 6, "--max-new-tokens", 8, "--algorithm", algorithm]
    monkeypatch.chdir(tmp_path)
    out = traced(monkeypatch, capsys, *words)
    assert list(tmp_path.iterdir()) == []
    policy, task = load(base, CPU), find_task("arithmetic")
    (example,) = take_prompts(load_task(task, False)["train"], 1, 1, 0)
    rollout = policy.sample([example], 6, (0, 1, 0), 8)
    config = GRPOConfig(rewards=task.rewards, algorithm=algorithm, max_new_tokens=8)
    rewards = Rewards.from_settings(config)([example], rollout, {})[0].total
    sections = out.split("\n\n")
    assert sections[-5].endswith(example.question) and sections[-5].endswith(f"(1) the question\n{example.question}")
    title, head, *lines = sections[-4].splitlines()
    assert "answer_format x 0.2" in head and "answer_exact x 0.6" in head
    shown = [re.split(r" {2,}", line.strip(), maxsplit=7) for line in lines[:6]]
    assert [row[0] for row in shown] == list("123456")
    totals = [sum(float(x) * w for x, w in zip(row[1:4], (0.2, 0.2, 0.6), strict=True)) for row in shown]
    assert totals == pytest.approx([float(row[4]) for row in shown], abs=2e-3)
    assert [float(row[4]) for row in shown] == pytest.approx(rewards[0].tolist(), abs=6e-4)
    assert [int(row[6]) for row in shown] == rollout.mask.sum(1).tolist()
    row = config.resolved_algorithm
    if algorithm != "pairwise":
        expected = group_advantages(rewards, row.advantage)[0].tolist()
        assert [float(row[5]) for row in shown] == pytest.approx(expected, abs=6e-4)
    # Token by token, against finite differences of the loss.
    advantages = torch.tensor([float(row[5]) for row in shown])
    logp = score_rollout(policy, rollout, 4096)
    reference = logp if row.beta else None

    def loss(values):
        whole = grpo.loss_denominator(rollout.mask, row.aggregate, 8)
        return policy_loss(values.double(), logp.double(), advantages, rollout.mask, row, reference, whole)[0].item()

    ends = {int(rewards.argmin()), int(rewards.argmax())} if rewards.amin() < rewards.amax() else {0, 5}
    assert {int(re.search(r"completion (\d+)", section)[1]) - 1 for section in sections[-2:]} == ends
    for section in sections[-2:]:
        i = int(re.search(r"completion (\d+)", section)[1]) - 1
        title, _, *tokens = section.splitlines()
        assert f"completion {i + 1}, advantage {advantages[i]:+.3f}" in title and len(tokens) == int(
            rollout.mask[i].sum()
        )
        for t, line in enumerate(tokens):
            log_policy, log_reference, ratio, kl, asked, verdict = line.split()[:6]
            assert float(log_policy) == pytest.approx(logp[i, t].item(), abs=6e-5) and ratio == "1.000"
            assert (log_reference, kl) == ((log_policy, "0.00000") if row.beta else ("–", "–"))
            step = torch.zeros_like(logp)
            step[i, t] = 1e-3
            slope = -(loss(logp + step) - loss(logp - step)) / 2e-3 * len(tokens)
            assert float(asked) == pytest.approx(slope, abs=2e-3)
            assert verdict == ("up" if float(asked) > 0 else "down" if float(asked) < 0 else "nothing")


def test_a_flat_group_is_said_to_teach_nothing(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "one.py").write_text("def one(prompts, **_):\n    return [1.0] * len(prompts)\n")
    words = ["--model", base, "--num-generations", 3, "--max-new-tokens", 4, "--beta", 0]
    out = traced(monkeypatch, capsys, *words, "--rewards", f"{tmp_path / 'one.py'}:one=1")
    assert "this group teaches nothing" in out and " up " not in out and " down " not in out


def test_the_trace_of_a_run_is_of_its_last_state(base, tmp_path, monkeypatch, capsys):
    """--resume --trace: the policy has moved from the reference, so the KL is above 0; the run stays as it is."""
    monkeypatch.chdir(tmp_path)
    words = ["--steps", 2, "--batch-size", 2, "--num-generations", 3, "--max-new-tokens", 6, "--eval-limit", 2]
    words += ["--task", "arithmetic", "--device", "cpu", "--model", base, "--learning-rate", 0.01, "--out", "run"]
    words += ["--rewards", "char_length=1", "--ideal-length", 3]
    command(monkeypatch, grpo, *words)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    command(monkeypatch, grpo, "--resume", "--out", "run", "--trace")
    out = capsys.readouterr().out
    kls = [
        float(line.split()[3])
        for line in out.partition("(6) the loss")[2].splitlines()
        if re.match(r" *-\d+\.\d{4} ", line)
    ]
    assert kls and max(kls) > 0
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_the_folder_of_another_run_is_not_looked_at(base, tmp_path, monkeypatch, capsys):
    """Without --resume the policy is the --model, whatever state the default --out holds."""
    monkeypatch.chdir(tmp_path)
    words = ["--model", base, "--num-generations", 3, "--max-new-tokens", 6]
    before = traced(monkeypatch, capsys, *words)
    command(monkeypatch, grpo, "--task", "arithmetic", "--device", "cpu", *words, "--steps", 1, "--batch-size", 2,
            "--eval-limit", 2, "--learning-rate", 0.01, "--rewards", "char_length=1", "--ideal-length", 3)  # fmt: skip
    capsys.readouterr()
    assert traced(monkeypatch, capsys, *words) == before


def test_a_gaussian_policy_has_one_number_a_completion(tmp_path, monkeypatch, capsys):
    sft.train(sft.SFTConfig(task="odd_even", policy="autoencoder", epochs=1, limit=20, out=str(tmp_path / "base")))
    capsys.readouterr()
    words = ["--task", "odd_even", "--policy", "autoencoder", "--model", tmp_path / "base", "--num-generations", 4]
    command(monkeypatch, grpo, *words, "--trace", "--device", "cpu", "--out", tmp_path / "none")
    sections = capsys.readouterr().out.split("\n\n")
    assert len(sections[-1].splitlines()) == len(sections[-2].splitlines()) == 3  # a title, a head, a number
    assert not (tmp_path / "none").exists()


def test_without_a_model_the_error_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--task", "arithmetic", "--trace", "--out", str(tmp_path / "run")])
    with pytest.raises(UserError, match="--trace needs a --model, such as the base policy"):
        grpo.main()
    assert not (tmp_path / "run").exists()
