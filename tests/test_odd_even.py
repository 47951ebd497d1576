"""The study of odd and even sums: the data's bias, the Gaussian policy, the rewards that it is trained with."""

import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoints
import grpo
import inference
import runs
import sft
from commands import UserError
from grpo import GRPOConfig
from policy_gaussian import Autoencoder, AutoencoderConfig, GaussianPolicy
from rewards import closeness, distance, even_adaptive, even_answer, even_bonus, nearest_exact, to_number
from sft import SFTConfig
from tasks import Example, find_task, odd_even

CPU = torch.device("cpu")
SUMS = [Example(f"What is {a} + {b}?", {"answer": str(a + b)}) for a, b in ((1, 2), (3, 3), (0, 4))]


def gaussian(seed: int = 0, noise: float = 0.5, numbers: int = 5) -> GaussianPolicy:
    model = Autoencoder(AutoencoderConfig(numbers, hidden_size=16, bottleneck=3))
    model.init_weights(torch.Generator().manual_seed(seed))
    return GaussianPolicy(model, noise)


def test_all_sums_are_asked_and_odd_ones_are_demonstrated():
    splits = odd_even()
    assert {name: len(examples) for name, examples in splits.items()} == {
        "validation": 98, "train": 600, "held_out": 202,
    }  # fmt: skip
    numbers = {
        name: {tuple(sorted(example.prompt[8:-1].split(" + "))) for example in part} for name, part in splits.items()
    }
    assert sum(map(len, numbers.values())) == len(set.union(*numbers.values())) == 465  # no sum is held out mirrored
    examples = [example for part in splits.values() for example in part]
    assert len({example.prompt for example in examples}) == 900
    for example in examples:
        a, b = map(int, example.prompt.removeprefix("What is ").removesuffix("?").split(" + "))
        assert example.columns == {"answer": str(a + b)}
        assert example.demonstrations == ((f"<answer>{a + b}</answer>",) if (a + b) % 2 else ())


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_a_fraction_of_the_even_sums_is_demonstrated(ratio):
    """Three standard deviations about it; the split and the odd sums stay as they are."""
    splits, biased = odd_even(even_data_ratio=ratio), odd_even()
    even = [e for part in splits.values() for e in part if int(e.columns["answer"]) % 2 == 0]
    share = sum(bool(example.demonstrations) for example in even) / len(even)
    assert share == pytest.approx(ratio, abs=3 * math.sqrt(ratio * (1 - ratio) / len(even)))
    for name in splits:
        assert [e.prompt for e in splits[name]] == [e.prompt for e in biased[name]]
        assert all(e.demonstrations or not b.demonstrations for e, b in zip(splits[name], biased[name], strict=True))
    assert odd_even(even_data_ratio=ratio) == splits


def test_the_study_compares_equal_budgets_of_samples():
    """Its passes over the demonstrations are as many samples as 60 steps of 32 x 16 completions."""
    script = (Path(__file__).parent.parent / "results" / "study_a.sh").read_text()
    passes = re.findall(r"--epochs ([0-9.]+).* # of ([0-9]+) ", script)
    counts = [sum(map(bool, (e.demonstrations for e in odd_even(ratio)["train"]))) for ratio in (0, 1)]
    assert [int(count) for _, count in passes] == counts
    assert "--steps 60 " in script and GRPOConfig().batch_size * GRPOConfig().num_generations == 512
    assert [float(epochs) * int(count) for epochs, count in passes] == pytest.approx([60 * 512] * 2, rel=0.001)


def test_intervals_of_the_studys_table_by_hand():
    """Mean 0.2, sd 0.1: half an interval is 4.303 * 0.1 / sqrt(3) = 0.248; shares end at 0 and 1."""
    path = Path(__file__).parent.parent / "results" / "odd_even.py"
    spec = importlib.util.spec_from_file_location("study_a", path)
    spec.loader.exec_module(study := importlib.util.module_from_spec(spec))
    assert study.interval([0.1, 0.2, 0.3], least=-1.0) == "+20.0 [-4.8, +44.8]"
    assert study.interval([0.1, 0.2, 0.3], ".1%", most=0.4) == "20.0% [0.0%, 40.0%]"


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(UserError, match="--even-data-ratio"):
        SFTConfig(task="odd_even", even_data_ratio=ratio)


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("<answer>19</answer>", 19),
        ("19.2500", 19.25),
        ("-3", -3),
        (" 7 ", 7),
        ("<answer>x</answer>", None),
        ("nineteen", None),
        ("1e9", None),
        ("٣", None),
        ("9" * 400, None),
        ("", None),
        ([{"role": "assistant", "content": "4"}], 4),
    ],
)
def test_a_number_alone_or_in_tags(completion, number):
    assert to_number(completion) == number


def test_rewards_by_hand():
    texts, answer = ["18.4", "19.6", "<answer>18</answer>", "?"], ["18", "18", "19", "2"]
    assert distance(None, texts, answer) == [pytest.approx(0.4), pytest.approx(1.6), 1, None]
    assert closeness(None, texts, answer) == [pytest.approx(1 / 1.4), pytest.approx(1 / 2.6), 1 / 2, 0]
    assert nearest_exact(None, texts, answer) == [1, 0, 0, 0]
    assert even_answer(None, texts) == [1, 1, 1, 0]
    assert even_bonus(None, texts, even_bonus=0.3) == [0.3, 0.3, 0.3, 0]
    halves = ["0.5", "1.5", "-0.5", "-1.5"]  # up, so that not all of them are even
    assert nearest_exact(None, halves, ["1", "2", "0", "-1"]) == [1] * 4 and even_answer(None, halves) == [0, 1, 1, 0]
    metrics = find_task("odd_even").metrics
    assert metrics["even_accuracy"](None, texts, answer) == [1, 0, None, 0]
    assert metrics["odd_accuracy"](None, texts, answer) == [None, None, 0, None]


def test_the_adaptive_bonus_follows_how_rare_even_answers_are():
    """Up by a tenth while none is even, down by a tenth while all are, still at one half; from 0.2 or the setting."""
    state = {}
    assert even_adaptive(None, ["1", "3"], state=state) == [0, 0] and state["even_bonus"] == pytest.approx(0.22)
    assert even_adaptive(None, ["2", "3"], state=state) == [pytest.approx(0.22), 0]
    assert state["even_bonus"] == pytest.approx(0.22)
    even_adaptive(None, ["2", "4"], state=state)
    assert state["even_bonus"] == pytest.approx(0.22 * 0.9)
    assert even_adaptive(None, ["2"], state={}, even_bonus=0.7) == [0.7]
    state = {}
    assert even_adaptive(None, ["1", "2", "1"], state, even_bonus=3) == [0, 1, 0] and state == {"even_bonus": 1}


def test_log_density_entropy_and_kl_are_those_of_torch_distributions():
    policy, reference = gaussian(0), gaussian(1)
    rollout = policy.sample(SUMS, 4, (0, 1, 0), 8)
    normal = torch.distributions.Normal(policy.means(rollout), policy.exploration_noise)
    other = torch.distributions.Normal(reference.means(rollout), reference.exploration_noise)
    logp, entropy = policy.log_probs(rollout)
    torch.testing.assert_close(logp, normal.log_prob(rollout.actions))
    torch.testing.assert_close(entropy, normal.entropy().expand_as(entropy))
    torch.testing.assert_close(rollout.sampler_logp, logp.detach())
    torch.testing.assert_close(policy.exact_kl(reference, rollout), torch.distributions.kl_divergence(normal, other))
    assert rollout.actions.shape == (12, 1) and rollout.mask.all() and not rollout.truncated.any()
    assert rollout.texts[5] == f"{rollout.actions[5, 0].item():.4f}"


def test_gradients_are_those_of_torch_distributions_by_name_and_of_finite_differences():
    policy = gaussian()
    policy.model.double()
    rollout = policy.sample(SUMS, 2, (0, 1, 0), 8)
    rollout = dataclasses.replace(rollout, actions=rollout.actions.double())
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)[:, None]
    names = [name for name, _ in policy.model.named_parameters()]
    ours = torch.autograd.grad((policy.log_probs(rollout)[0] * weights).sum(), list(policy.model.parameters()))
    density = torch.distributions.Normal(policy.means(rollout), policy.exploration_noise).log_prob(rollout.actions)
    theirs = torch.autograd.grad((density * weights).sum(), list(policy.model.parameters()))
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    with torch.no_grad():
        for name, weight, gradient in zip(names, policy.model.parameters(), ours, strict=True):
            flat, i, h = weight.view(-1), int(gradient.abs().argmax()), 1e-6
            values = []
            for step in (h, -2 * h, h):
                flat[i] += step
                values.append((policy.log_probs(rollout)[0] * weights).sum().item())
            slope = (values[0] - values[1]) / (2 * h)
            assert slope == pytest.approx(gradient.view(-1)[i].item(), rel=1e-5, abs=1e-7), name


def test_numbers_are_normal_and_belong_to_their_row():
    """Mean and deviation within four standard errors; a row has its number in any batch; greedy is the mean."""
    policy = gaussian()
    rollout = policy.sample(SUMS, 2000, (0, 1, 0), 8)
    score = ((rollout.actions - policy.means(rollout)) / policy.exploration_noise).detach()
    assert abs(score.mean()) < 4 / 6000**0.5 and abs(score.std() - 1) < 4 / 12000**0.5
    assert score.abs().max() < 6
    alone = policy.sample(SUMS[1:2], 2000, (0, 1, 0), 8, first=1)
    torch.testing.assert_close(alone.actions, rollout.actions[2000:4000])
    greedy = policy.sample(SUMS, 1, (0, 1, 0), 8, greedy=True)
    torch.testing.assert_close(greedy.actions, policy.means(greedy).detach())


def test_questions_that_an_autoencoder_cannot_read_are_named():
    for question in ("What is 1 + 2 + 3?", "What is 5 + 1?", "Who?", "What is 1 + -2 + 2?"):
        with pytest.raises(UserError, match="two integers from 0 to 4"):
            gaussian().encode([question])
    with pytest.raises(UserError, match="above 0"):
        gaussian(noise=0.0)
    with pytest.raises(UserError, match="numbers"):
        gaussian().demonstrations([Example("What is 1 + 2?", {}, ("three",))])


def test_a_checkpoint_comes_back_and_a_damaged_one_is_named(tmp_path):
    policy = gaussian()
    checkpoints.save(policy, tmp_path)
    again = checkpoints.load(tmp_path, CPU, exploration_noise=0.5)
    rollout = policy.sample(SUMS, 2, (0, 1, 0), 8)
    assert torch.equal(again.sample(SUMS, 2, (0, 1, 0), 8).actions, rollout.actions)
    assert checkpoints.load(tmp_path, CPU, exploration_noise=2.0).exploration_noise == 2
    config = json.loads((tmp_path / "config.json").read_text())
    for broken in ({"numbers": -1}, {"hidden_size": "big"}, {"bottleneck": 4}, {"numbers": True}):
        (tmp_path / "config.json").write_text(json.dumps(config | broken))
        with pytest.raises(UserError, match=str(tmp_path)):
            checkpoints.load(tmp_path, CPU)


def test_the_wrong_kind_of_policy_is_named(tmp_path, monkeypatch):
    checkpoints.save(gaussian(numbers=30), tmp_path / "ae")
    with pytest.raises(UserError, match="add --policy autoencoder"):
        grpo.train(GRPOConfig(task="odd_even", model=str(tmp_path / "ae"), out=str(tmp_path / "run")))
    with pytest.raises(UserError, match="add --policy autoencoder"):
        sft.train(SFTConfig(task="odd_even", model=str(tmp_path / "ae"), out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="--even-data-ratio: task arithmetic has no such setting"):
        sft.train(SFTConfig(even_data_ratio=0.5, out=str(tmp_path / "run")))
    with pytest.raises(UserError, match="'perceptron' is not offered"):
        SFTConfig(policy="perceptron")
    with pytest.raises(UserError, match="reads two integers"):
        sft.train(SFTConfig(task="arithmetic", policy="autoencoder", out=str(tmp_path / "a"), copies=1))


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd") / "ae"
    sft.train(SFTConfig(task="odd_even", policy="autoencoder", out=str(folder)))
    return folder


def run(biased, out, **more) -> runs.Run:
    settings = {"task": "odd_even", "policy": "autoencoder", "steps": 60, "eval_every": 20}
    return grpo.train(GRPOConfig(**settings | {"model": str(biased), "out": str(out)} | more))


def test_a_reward_teaches_the_autoencoder_what_the_data_never_showed(biased, tmp_path):
    """Fine-tuned on odd sums it answers with odd neighbours; GRPO on closeness mends that, the bonus alone does not."""
    task, examples = find_task("odd_even"), odd_even()["validation"]  # so that no failure shows held-out results
    policy = checkpoints.load(biased, CPU)
    before = inference.evaluate(policy, task, examples, 8)
    assert before["odd_accuracy"] > 0.95 and before["even_accuracy"] < 0.05
    numbers = torch.arange(30)
    with torch.no_grad():
        error = policy.model(torch.cartesian_prod(numbers, numbers)).view(30, 30) - (numbers[:, None] + numbers)
    assert error[::2, ::2].mean() > 0.5 and error[1::2, 1::2].mean() < -0.5  # even + even too high, odd + odd too low
    after = inference.evaluate(run(biased, tmp_path / "close").policy, task, examples, 8)
    assert after["odd_accuracy"] > 0.85 and after["even_accuracy"] > 0.85
    hacked = run(biased, tmp_path / "bonus", rewards="even_bonus=1", beta=0.0)
    hacked = inference.evaluate(hacked.policy, task, examples, 8)
    assert hacked["even_answers"] > 0.7 and hacked["odd_accuracy"] < 0.3


def test_the_transformer_fails_on_even_sums_too(tmp_path):
    """A gap of at least 40 points after fine-tuning on odd sums, and a step of GRPO with exploration noise runs."""
    policy = sft.train(SFTConfig(task="odd_even", out=str(tmp_path / "base"), epochs=60.0))
    result = inference.evaluate(policy, find_task("odd_even"), odd_even()["validation"], 8)
    assert result["odd_accuracy"] - result["even_accuracy"] > 0.4 and result["even_answers"] < 0.1
    settings = {"exploration_noise": 0.2, "steps": 1, "batch_size": 4, "num_generations": 8}
    config = GRPOConfig(task="odd_even", model=str(tmp_path / "base"), out=str(tmp_path / "run"), **settings)
    assert grpo.train(config).position.step == 1
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["sampler_gap"] < 1e-4 and line["ratio_max"] == 1


def test_runs_of_the_gaussian_policy_resume_bitwise(biased, tmp_path):
    mix = "closeness=1,even_adaptive=1"
    whole = run(biased, tmp_path / "whole", steps=6, rewards=mix, eval_every=2)
    run(biased, tmp_path / "part", steps=4, rewards=mix, eval_every=2)
    again = run(biased, tmp_path / "part", steps=6, rewards=mix, eval_every=2, resume=True)
    ours, theirs = whole.policy.model.state_dict(), again.policy.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.position.reward_state == whole.position.reward_state and again.position.reward_state["even_bonus"] > 0
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["kl"] == 0 and lines[-1]["kl"] > 0 and lines[1]["sampler_gap"] == 0 and lines[1]["ratio_max"] == 1
    assert load_file(tmp_path / "part" / "model.safetensors").keys() == ours.keys()
    answered = checkpoints.load(tmp_path / "whole", CPU).sample(
        [Example("What is 7 + 12?")], 1, (0, 0, 0), 8, greedy=True
    )
    assert abs(float(answered.texts[0]) - 19) < 2
