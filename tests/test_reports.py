"""What a run reports is what happened: table, rates, clock, rows, statistics, and an effect of every setting.

The policies of these tests give one answer to everything, the optimizer takes scripted steps and the clock is wound by
hand, so that figures are known beforehand.
"""

import contextlib
import dataclasses
import functools
import io
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import graders
import grpo
import inference
import plot_metrics
import rewards
import runs
import sft
import tasks
from checkpoints import save
from commands import UserError
from grpo import GRPOConfig
from inference import InferenceConfig, evaluate
from model_toy import Block, Llama, LlamaConfig, character_tokenizer
from policy import TokenPolicy
from policy_gaussian import Autoencoder, AutoencoderConfig, GaussianPolicy
from rollouts import Rollout, join
from sft import SFTConfig
from tasks import Example, find_task, load_task

COMMANDS = {"grpo": (grpo.main, GRPOConfig), "sft": (sft.main, SFTConfig)}
COMMANDS["inference"] = (inference.main, InferenceConfig)
WIDTH = 6  # tokens: <answer>, two digits, </answer>, <eos>, and one to spare


# One answer of ten is 10, four are 20, two are 30; in validation one of eight, six and one.
SUMS = {
    "held_out": [(1, 9), (1, 19), (2, 18), (3, 17), (4, 16), (5, 25), (6, 24), (0, 7), (1, 6), (2, 5)],
    "validation": [(2, 8), (5, 15), (6, 14), (7, 13), (8, 12), (10, 10), (11, 9), (8, 22)],
    "train": [(9, b) for b in range(12)],
}


def sums(worked=0.3, wrong=0.9, copies=1, even_data_ratio=0.0, data=None, limit=None) -> dict[str, list[Example]]:
    """A task's few problems; their demonstrations spell the settings."""
    spelt = "".join(f"{10 * number:.0f}" for number in (worked, wrong, even_data_ratio))
    return {
        name: [
            Example(
                f"What is {a} + {b + bool(data)}?",
                {"answer": str(a + b)},
                tuple(f"{spelt}={a + b}" + "0" * i for i in range(copies)),
            )
            for a, b in pairs[:limit]
        ]
        for name, pairs in SUMS.items()
    }


def lucky(prompts, completions, **_) -> list[float]:
    """1 where a 1, 3 or 6 stands, else 0: a reward with flat groups and others."""
    return [float(bool(set("136") & set(text))) for text in completions]


@pytest.fixture(autouse=True)
def few_problems(monkeypatch):
    """Two tasks with few problems, the reward, and no figures."""
    for name in ("arithmetic", "odd_even"):
        few = dataclasses.replace(tasks.TASKS[name], load=sums, max_new_tokens=WIDTH)
        monkeypatch.setitem(tasks.TASKS, name, few)
    monkeypatch.setitem(rewards.REWARDS, "lucky", lucky)
    monkeypatch.setattr(plot_metrics, "plot", lambda *_, **__: [])


@pytest.fixture(scope="module")
def known() -> dict:
    """Runs that several tests look at."""
    return {}


@pytest.fixture(scope="session")
def answering(chain_policy):
    """A factory of policies that answer one number: greedily always, else with about 0.93 a token."""

    def make(number: int, temperature: float = 1.0) -> TokenPolicy:
        policy = chain_policy("?", "<answer>", *str(number), "</answer>", "<eos>")
        with torch.no_grad():
            policy.model.lm_head.weight.div_(10)
        policy.temperature = temperature
        return policy

    return make


def constant(number: int, noise: float) -> GaussianPolicy:
    """An autoencoder that answers one number."""
    model = Autoencoder(AutoencoderConfig(30, hidden_size=4, bottleneck=2))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.decoder[2].bias.fill_(number / 30)
    return GaussianPolicy(model, noise)


def spy(patch: pytest.MonkeyPatch, owner: type, name: str, look: Callable) -> None:
    """After each call of a method give `look` its result and its arguments."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def watched(*arguments, **more):
        result = method(*arguments, **more)
        look(result, *arguments, **more)
        return result

    patch.setattr(owner, name, watched)


def script_optimizer(patch: pytest.MonkeyPatch, *policies) -> None:
    """The optimizer's k-th step takes the weights of the k-th policy."""
    following = iter(policies)

    @torch.no_grad()
    def step(self, closure=None):
        weights = next(following).model.parameters()
        for weight, new in zip(self.param_groups[0]["params"], weights, strict=True):
            weight.copy_(new)

    patch.setattr(torch.optim.AdamW, "step", step)


def weights_of(policy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def train(model: Path, out: Path, **more) -> runs.Run:
    small = {"steps": 2, "batch_size": 3, "num_generations": 3, "max_new_tokens": WIDTH, "eval_every": 1, "seed": 5}
    small |= {"rewards": "lucky=1", "device": "cpu"}
    return grpo.train(GRPOConfig(**{"model": str(model), "out": str(out), **small, **more}))


RUNS = {"plain": {}, "cold": {"temperature": 0.6}, "exploring": {"exploration_noise": 0.9}}
RUNS["gaussian"] = {"task": "odd_even", "policy": "autoencoder", "exploration_noise": 0.9}


@pytest.fixture(params=RUNS)
def three(request, known, answering, tmp_path_factory, monkeypatch, capsys):
    """A run of two scripted steps that answers 10, 20, 30; what each row is to be measured with; what was printed."""
    if request.param not in known:
        given, folder = RUNS[request.param], tmp_path_factory.mktemp("three")
        if request.param == "gaussian":  # its noise is the policy; a transformer explores in training alone
            policies = [constant(number, 0.9) for number in (10, 20, 30)]
        else:
            policies = [answering(number, given.get("temperature", 1.0)) for number in (10, 20, 30)]
        save(policies[0], folder / "start")
        script_optimizer(monkeypatch, *policies[1:])
        run = train(folder / "start", folder / "run", **given)
        known[request.param] = run, policies, capsys.readouterr().out
    return known[request.param]


def test_rows_of_the_table_are_base_best_and_last_on_held_out_problems(three, capsys):
    """Greedy 1, 4 and 2 of 10 problems; sampled 4 times, seed 0, at the run's temperature and a Gaussian's noise."""
    run, policies, _ = three
    grpo.report(run)
    results = json.loads((run.out / "evaluation.json").read_text())
    held_out = load_task(run.task, chat=False)["held_out"]
    for step, (name, policy) in enumerate(zip(("base", "best", "last"), policies, strict=True)):
        texts = policy.sample(held_out, 4, (0, 0, 0), WIDTH).texts
        expected = evaluate(policy, run.task, held_out, WIDTH, samples=4, seed=0)
        assert results[name] == {"step": step, **expected}, name
        answers = [example.columns["answer"] for example in held_out for _ in range(4)]
        right = run.task.metrics["accuracy"](None, texts, answers)
        assert results[name]["sampled_accuracy"] == pytest.approx(sum(right) / len(right))
    assert [(name, row["accuracy"]) for name, row in results.items()] == [("base", 0.1), ("best", 0.4), ("last", 0.2)]
    assert len({row["sampled_accuracy"] for row in results.values()}) == 3
    printed = re.sub(" +", " ", capsys.readouterr().out)
    assert "\n base (step 0) best (step 1) last (step 2)\n" in printed
    (greedy,) = re.findall("^greedy accuracy (.*)", printed, re.MULTILINE)
    assert re.findall(r"(\S+) \[", greedy) == ["10.0%", "40.0%", "20.0%"]


def test_validation_is_of_the_weights_of_its_step_on_validation_problems(three):
    """Greedy 1, 6 and 1 of 8 problems; sampled twice with the run's seed."""
    run, policies, _ = three
    lines = lines_of(run.out / "metrics.jsonl")
    validation = load_task(run.task, chat=False)["validation"]
    for line, policy in zip(lines, policies, strict=True):
        expected = evaluate(policy, run.task, validation, WIDTH, samples=2, seed=5)
        found = {name: value for name, value in line.items() if name.startswith("validation_")}
        assert found == {f"validation_{name}": value for name, value in expected.items()}
    assert [line["validation_accuracy"] for line in lines] == [0.125, 0.75, 0.125]


def test_the_group_shown_is_that_of_the_first_validation_question_sampled_without_exploration(three):
    run, policies, printed = three
    examples = load_task(run.task, chat=False)["validation"][:1]
    lines = lines_of(run.out / "samples.jsonl")
    texts = [text for policy in policies for text in policy.sample(examples, 3, (5, 0, 0), WIDTH).texts]
    assert [line["completion"] for line in lines] == texts
    a, b = SUMS["validation"][0]
    assert [(line["step"], line["question"]) for line in lines] == [(i // 3, f"What is {a} + {b}?") for i in range(9)]
    assert [line["reward"] for line in lines] == [float(bool(set("136") & set(text))) for text in texts]
    form = r"  (What is .*\?) The best and the worst of 3:\n  ( ?\d+\.\d)  (.*)\n  ( ?\d+\.\d)  (.*)\n"
    shown = re.findall(form, printed)
    assert len(shown) == 3
    for i, (question, best, best_text, worst, worst_text) in enumerate(shown):
        group = lines[3 * i : 3 * i + 3]
        rewards = [line["reward"] for line in group]
        assert question == group[0]["question"] and [float(best), float(worst)] == [max(rewards), min(rewards)]
        pairs = [(line["completion"], line["reward"]) for line in group]
        assert (best_text, max(rewards)) in pairs and (worst_text, min(rewards)) in pairs


def test_best_is_what_the_run_folder_holds(answering, tmp_path, monkeypatch):
    """Another checkpoint put there by hand, which answers 7 and so 3 of 10 problems, is what `best` reports."""
    save(answering(10), tmp_path / "start")
    script_optimizer(monkeypatch, answering(20), answering(30))
    run = train(tmp_path / "start", tmp_path / "run")
    assert same(load_file(run.out / "model.safetensors"), weights_of(answering(20)))
    save(answering(7), run.out)
    grpo.report(run)
    results = json.loads((run.out / "evaluation.json").read_text())
    assert [row["accuracy"] for row in results.values()] == [0.1, 0.3, 0.2]


@pytest.fixture
def taken(monkeypatch) -> list[tuple]:
    """The rate of each optimizer step as it is taken, its betas, its weight decay, and how many tensors it moves."""
    steps = []

    def look(_, optimizer, *__, **___):
        (group,) = optimizer.param_groups
        steps.append((group["lr"], group["betas"], group["weight_decay"], len(group["params"])))

    spy(monkeypatch, torch.optim.AdamW, "step", look)
    return steps


def check_steps(taken: list[tuple], out: Path, rates: list[float], decay: float, inner: int = 1) -> None:
    """Assert that these rates were taken and logged, with these settings, for all 20 tensors of `random_policy`."""
    assert [step[0] for step in taken] == pytest.approx(rates)
    logged = [line["learning_rate"] for line in lines_of(out / "metrics.jsonl") if "learning_rate" in line]
    assert logged == pytest.approx(rates[::inner])
    assert {step[1:] for step in taken} == {((0.9, 0.95), decay, 20)}


def test_grpo_learns_at_the_rate_that_it_logs(random_policy, tmp_path, taken):
    """Warm-up over three steps of two inner updates, then constant, also after a resume at another rate."""
    save(random_policy(), tmp_path / "base")
    given = {"warmup_steps": 3, "num_inner_updates": 2, "eval_every": 9, "save_every": 9}
    train(tmp_path / "base", tmp_path / "run", **given, steps=4, learning_rate=0.03)
    train(tmp_path / "base", tmp_path / "run", **given, steps=5, learning_rate=0.01, resume=True)
    rates = [0.01, 0.01, 0.02, 0.02, 0.03, 0.03, 0.03, 0.03, 0.01, 0.01]
    check_steps(taken, tmp_path / "run", rates, decay=0.0, inner=2)


@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.07}])
def test_sft_learns_at_the_rate_that_it_logs(random_policy, tmp_path, taken, decay):
    """Six steps: up to the fourth of 0.06 in two, down by a sixth each."""
    save(random_policy(), tmp_path / "base")
    given = {"batch_size": 4, "epochs": 2, "warmup_steps": 2, "learning_rate": 0.06, "device": "cpu"}
    sft.train(SFTConfig(model=str(tmp_path / "base"), out=str(tmp_path / "run"), **given, **decay))
    rates = [0.03, 0.05, 0.04, 0.03, 0.02, 0.01]
    check_steps(taken, tmp_path / "run", rates, decay.get("weight_decay", 0.01))


@pytest.mark.parametrize(
    ("numbers", "limit", "rows"),
    [
        ("1222555555", 9, [10, 10, 6, 6, 6]),  # 9 of 10 is not fewer than nine tenths, 6 is; nothing after the last end
        ("1222555555", 3, [10, 10, 6]),  # nor after the last token
        ("1122555555", 9, [10, 8, 6, 6, 6]),
        ("1" * 10 + "2" + "5" * 9, 9, [20, 10, 10, 10, 10]),  # nine tenths of those that were left
        ("1234", 9, [4, 3, 2, 1]),
    ],
)
def test_the_model_sees_the_rows_that_have_not_ended(chain_policy, monkeypatch, numbers, limit, rows):
    """A prompt that ends with n counts down and so has n tokens; the first pass is that over the prompts."""
    policy, seen = chain_policy("5", "4", "3", "2", "1", "<eos>"), []
    spy(monkeypatch, Llama, "forward", lambda hidden, *_, **__: seen.append(len(hidden)))
    rollout = policy.sample([Example(f"What is {n}") for n in numbers], 1, (0, 0, 0), limit)
    assert seen == rows and rollout.mask.sum(1).tolist() == [min(int(n), limit) for n in numbers]


def test_each_end_token_ends_its_row_and_belongs_to_it(chain_policy):
    """9, 8, 7, ... with 7 and 4 as further ends."""
    chain = chain_policy(*"987654321", "<eos>")
    ends = chain.tokenizer.convert_tokens_to_ids(["7", "4"])
    policy = TokenPolicy(chain.model, chain.tokenizer, 1.0, ends)
    rollout = policy.sample([Example(f"What is 1 + {n}") for n in "9673"], 2, (0, 0, 0), 9)
    tokens = [policy.tokenizer.convert_ids_to_tokens(ids) for ids in rollout.completion_ids]
    assert tokens[::2] == tokens[1::2] == [["8", "7"], ["5", "4"], ["6", "5", "4"], ["2", "1", "<eos>"]]
    assert rollout.mask.sum(1).tolist() == [2, 2, 2, 2, 3, 3, 3, 3] and not rollout.truncated.any()


def test_tokens_of_a_large_vocabulary_come_in_their_proportions():
    """Chi-square of 2,000 tokens, 20 a row, over 40 classes of 50,000 ids, likely to unlikely; half are impossible."""
    size, tokenizer = 50_000, character_tokenizer(["123?"])
    model = Llama(LlamaConfig(size, 8, 8, 1, 1, 1, tie_word_embeddings=False))
    logits = 2 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    possible = torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.5
    possible[tokenizer.eos_token_id] = False
    with torch.no_grad():  # whatever the tokens so far, the hidden state is sqrt(8) in its first place, else 0
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = logits.where(possible, -1e4) / 8**0.5
    rollout = TokenPolicy(model, tokenizer).sample([Example("What is 1?")], 100, (0, 1, 0), 20)
    assert rollout.mask.all() and possible[rollout.actions].all()
    weights = logits.double().exp() * possible / (logits.double().exp() * possible).sum()
    order = weights.argsort(descending=True)
    classes = torch.empty(size, dtype=torch.long)
    classes[order] = (40 * (weights[order].cumsum(0) - weights[order] / 2)).long().clamp(max=39)
    expected = 2000 * torch.zeros(40).double().index_add(0, classes, weights)
    found = torch.bincount(classes[rollout.actions.flatten()], minlength=40)
    statistic = ((found - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor(39 / 2).double(), statistic / 2) > 0.01


def test_a_joined_rollout_scores_as_its_parts(random_policy):
    """Rows of prompts and completions of other lengths, chosen as dynamic sampling chooses them, then joined."""
    policy, parts = random_policy(end="05"), []
    for draw, questions in enumerate((["(4 - 9) * 6", ""], ["1", "1+1"], ["12+34+56+78", "9"])):
        rollout = policy.sample([Example(f"What is {q}?") for q in questions], 3, (0, 1, draw), 4 + 4 * draw)
        parts.append(rollout.select(torch.tensor([[0, 1, 2], [3, 4, 5], [0, 1, 2]][draw])))
    assert len({part.prompts.shape[1] for part in parts}) == len({part.actions.shape[1] for part in parts}) == 3
    whole = join(parts)
    with torch.no_grad():
        together, alone = policy.log_probs(whole), [policy.log_probs(part) for part in parts]
    for kind in range(2):  # log-probabilities, entropies
        rows = [row[: len(ids)] for row, ids in zip(together[kind], whole.completion_ids, strict=True)]
        ids = [ids for part in parts for ids in part.completion_ids]
        expected = [row for scored in alone for row in scored[kind]]
        assert whole.completion_ids == ids and whole.texts == [text for part in parts for text in part.texts]
        for row, other, one in zip(rows, expected, ids, strict=True):
            torch.testing.assert_close(row, other[: len(one)], rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.sampler_logp, together[0], rtol=0, atol=1e-5)


def test_what_dynamic_sampling_joins_is_scored_as_it_was_sampled(random_policy, tmp_path):
    save(random_policy(end="05"), tmp_path / "base")
    train(tmp_path / "base", tmp_path / "run", steps=3, batch_size=6, max_resample=3, learning_rate=1e-9)
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")[1:]
    assert all(line["samples"] > 18 and 0 < line["zero_std_groups"] < 1 for line in lines)
    assert all(line["sampler_gap"] < 1e-5 and line["ratio_max"] == 1 for line in lines)


class Clock:
    """A clock that stands still but where a test lets work take its time."""

    now = 1000.0

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """A pass takes half a second, a quarter if it is differentiated, an optimizer step takes one, a sample two."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    look = {
        (TokenPolicy, "log_probs"): lambda *_, **__: clock.wait(0.25 if torch.is_grad_enabled() else 0.5),
        (TokenPolicy, "sample"): lambda *_, **__: clock.wait(2),
        (torch.optim.AdamW, "step"): lambda *_, **__: clock.wait(1),
    }
    for (owner, name), function in look.items():
        spy(monkeypatch, owner, name, function)
    return clock


@pytest.mark.parametrize("beta", [0.04, 0.0])
def test_seconds_and_rates_of_grpo(random_policy, tmp_path, monkeypatch, capsys, clock, beta):
    """Two draws of 2 + 4 seconds with their reward, one pass of the reference, two inner updates of 1.25."""
    save(random_policy(end="05"), tmp_path / "base")
    drawn = []

    def slow(prompts, completions, completion_ids, **_):  # and always the same, so that it is drawn again
        if len(prompts) == 2 * 3:
            clock.wait(4)
            drawn.append(sum(map(len, completion_ids)))
        return [0.0] * len(prompts)

    monkeypatch.setitem(rewards.REWARDS, "slow", slow)
    words = "--batch-size 2 --num-generations 3 --steps 2 --num-inner-updates 2 --max-resample 1 --eval-every 1"
    words += f" --rewards slow=1 --max-new-tokens {WIDTH} --device cpu --beta {beta} --learning-rate 0.1"
    arguments = ["--model", str(tmp_path / "base"), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["grpo.py", *words.split(), *arguments])
    grpo.main()
    seconds = {"seconds_sample": 12, "seconds_score": 0.5 if beta else 0.0, "seconds_update": 2.5}
    seconds["seconds"] = sum(seconds.values())
    for step, line in enumerate(lines_of(tmp_path / "run" / "metrics.jsonl")[1:]):
        first, last = drawn[2 * step : 2 * step + 2]
        expected = seconds | {
            "tokens_per_second": (first + last) / seconds["seconds"],
            "tokens_per_second_sample": (first + last) / 12,
            "tokens_per_second_score": last / 0.5 if beta else 0.0,
            "tokens_per_second_update": 2 * last / 2.5,
        }
        assert {name: value for name, value in line.items() if "second" in name} == pytest.approx(expected)
        assert first != last and line["tokens"] == first + last
    assert capsys.readouterr().out.splitlines()[-1] == f"{clock.now - 1000:.0f} s in all"


def test_rate_of_sft(random_policy, tmp_path, monkeypatch, clock):
    """Completion tokens of a step, end tokens included, in its 1.25 seconds."""
    save(random_policy(), tmp_path / "base")
    counts = []
    spy(monkeypatch, TokenPolicy, "log_probs", lambda _, __, rollout, **___: counts.append(int(rollout.mask.sum())))
    given = {"batch_size": 4, "epochs": 1, "device": "cpu"}
    sft.train(SFTConfig(model=str(tmp_path / "base"), out=str(tmp_path / "run"), **given))
    rates = [line["tokens_per_second"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([count / 1.25 for count in counts[:3]])
    texts = [example.demonstrations[0] for example in sums()["train"]]
    assert sum(counts[:3]) == sum(map(len, texts)) + len(texts)  # one token a character


def test_evaluation_leaves_weights_gradients_and_optimizer_as_they_were(random_policy, tmp_path):
    save(random_policy(end="05"), tmp_path / "base")
    run = train(tmp_path / "base", tmp_path / "run", learning_rate=0.01)
    parameters = list(run.policy.model.parameters())
    assert all(weight.grad is None for weight in parameters)  # after the last validation
    before = weights_of(run.policy)
    state = [{name: value.clone() for name, value in run.optimizer.state[weight].items()} for weight in parameters]
    held_out = load_task(run.task, chat=False)["held_out"]
    for look in (lambda: grpo.report(run), lambda: evaluate(run.policy, run.task, held_out, WIDTH, samples=2)):
        look()
        assert all(weight.grad is None and weight.requires_grad for weight in parameters)
        assert same(weights_of(run.policy), before)
        assert all(same(run.optimizer.state[w], kept) for w, kept in zip(parameters, state, strict=True))


@pytest.mark.parametrize("command", ["grpo", "sft"])
def test_a_run_does_not_depend_on_how_often_it_is_looked_at(outcome, command):
    often, rarely = outcome(command, "eval_every=1"), outcome(command, "eval_every=100")
    assert often["metrics"] != rarely["metrics"]
    assert often["weights"] == rarely["weights"] and often["moments"] == rarely["moments"]


class Given:
    """A policy whose completions are given: for each problem one that is greedy, and several."""

    model = torch.nn.Identity()

    def __init__(self, greedy: str, sampled: list[str]):
        self.greedy, self.sampled, self.keys = list(greedy), sampled, set()

    def sample(self, examples, group_size, key, max_new_tokens, greedy=False, first=0, **_) -> Rollout:
        self.keys.add(tuple(key))
        rows = (self.greedy if greedy else self.sampled)[first : first + len(examples)]
        answers = [answer for row in rows for answer in row[:group_size]]
        ids = torch.tensor([[int(answer), 0] for answer in answers])
        lengths = torch.tensor([[True, answer == "7"] for answer in answers])  # a right answer has two tokens
        return Rollout(
            prompts=torch.zeros(len(examples), 1, dtype=torch.long),
            prompt_mask=torch.ones(len(examples), 1, dtype=torch.bool),
            group=torch.arange(len(examples)).repeat_interleave(group_size),
            actions=ids,
            mask=lengths,
            sampler_logp=torch.zeros(ids.shape),
            truncated=torch.tensor([answer == "8" for answer in answers]),
            texts=[f"<answer>{answer}</answer>" for answer in answers],
        )


def evaluated(greedy: str, sampled: list[str], task=None, **more) -> dict[str, float]:
    """What `evaluate` says of these answers, one digit each, to problems whose answer is 7."""
    examples = [Example(f"What is {i}?", {"answer": "7"}) for i in range(len(greedy))]
    policy = Given(greedy, sampled)
    result = evaluate(policy, task or find_task("arithmetic"), examples, WIDTH, len(sampled[0]), seed=3, **more)
    assert policy.keys == {(3, 0, 0)}
    return result


@pytest.mark.parametrize("rows", [1, 24, 512])
def test_problems_are_resampled_and_not_samples(rows):
    """Half of 10 problems right 8 times, half never: 2 to 8 of 10 binomial draws, where 80 would give 0.39 to 0.61."""
    result = evaluated("7999999999", ["7" * 8, "8" * 8] * 5, batch_rows=rows)
    for name in ("sampled_accuracy", "pass@2", "pass@4", "pass@8"):
        assert (result[name], result[f"{name}_low"], result[f"{name}_high"]) == (0.5, 0.2, 0.8), name
    assert result["problems"] == 10 and result["accuracy"] == 0.1
    for end in (result["accuracy_low"], result["accuracy_high"]):  # Wilson: where 0.1 is 1.96 deviations away
        assert (0.1 - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 10, rel=1e-5)
    assert result["accuracy_low"] < 0.1 < result["accuracy_high"]
    assert (result["length"], result["truncated"]) == (1.1, 0.0)
    assert (result["sampled_length"], result["sampled_truncated"]) == (1.5, 0.5)
    many = evaluated("7" * 100, ["7" * 4, "8" * 4] * 50, batch_rows=rows)  # nearly normal: 1.96 times 0.05
    assert (many["pass@2_low"], many["pass@2_high"]) == pytest.approx((0.402, 0.598), abs=0.012)


def test_pass_at_k_is_that_of_samples_without_replacement():
    """Of 8 samples 0, 1, 2 and 8 are right, wherever they stand."""
    result = evaluated("9777", ["9" * 8, "99979999", "79999997", "7" * 8])
    assert result["sampled_accuracy"] == 11 / 32 and result["accuracy"] == 0.75
    assert result["pass@2"] == pytest.approx((1 / 4 + 13 / 28 + 1) / 4)
    assert result["pass@4"] == pytest.approx((1 / 2 + 55 / 70 + 1) / 4)
    assert result["pass@8"] == pytest.approx(3 / 4)
    assert not {"pass@1", "pass@3", "pass@16"} & result.keys()


def test_a_score_that_is_no_accuracy_has_a_bootstrap_interval_and_no_pass():
    """A problem without a score counts as the mean of the others."""

    def score(prompts, completions, **_):
        return [{"7": 1.0, "9": 0.0, "8": None}[text[8]] for text in completions]

    task = dataclasses.replace(find_task("arithmetic"), metrics={"overlap": score})
    result = evaluated("7979797979", ["77", "99"] * 5, task)
    for name in ("overlap", "sampled_overlap"):
        assert (result[name], result[f"{name}_low"], result[f"{name}_high"]) == (0.5, 0.2, 0.8)
    assert not [name for name in result if name.startswith("pass")]
    assert evaluated("7998", ["7"] * 4, task)["overlap"] == pytest.approx(1 / 3)
    assert evaluated("7788", ["7"] * 4, task)["overlap_low"] == 1.0
    assert evaluated("8888", ["7"] * 4, task).keys() & {"overlap", "overlap_low"} == set()


# What is given, as NAME=VALUE, then other values of single settings by what they change, then what these need besides.
GIVEN = {
    "grpo": "model=base out=run device=cpu rewards=lucky=1 batch_size=4 num_generations=3 steps=2 num_inner_updates=2 "
    "learning_rate=0.01",
    "sft": "model=base out=run device=cpu epochs=1 batch_size=4 learning_rate=0.01 warmup_steps=1",
    "inference": "model=base device=cpu samples=3",
}
EFFECTS = {
    "grpo": {
        "weights": "model=other dtype=bfloat16 num_inner_updates=1 learning_rate=0.02 warmup_steps=2 "
        "clip_grad_norm=0.001 algorithm=dapo advantage=leave_one_out ratio=sequence surrogate=cispo epsilon=0.01 "
        "epsilon_high=0.01 aggregate=constant beta=0.5 kl_estimator=k2 preference_strength=0.1 "
        "combine=each k=3 cap=1.0001 anchor=5 off_policy_limit=1e-9 mask_truncated "
        "rollout_lag=1 sampler_dtype=bfloat16 correction=truncate correction_level=sequence correction_low=0.999 "
        "correction_high=1.001 top_entropy=0.5 entropy_bonus=0.1",
        "metrics": "task=odd_even data=file.json limit=3 seed=1 steps=1 batch_size=2 num_generations=4 "
        "max_resample=2 overlong_buffer=1 ref_update_every=1 temperature=2 exploration_noise=0.5 even_bonus=0.7 "
        "max_new_tokens=4 rewards=lucky=2 ideal_length=3 scorer=other eval_every=1 patience=1 kl_limit=1e-9 "
        "shots=1 eval_limit=2",
        "work": "gradient_checkpointing micro_batch_tokens=50",
        "asked": "judge_url=http://two/v1 judge_model=two judge_scale=2",
        "files": "out=elsewhere save_every=1 dry_run trace",
        "error": "device=abacus policy=autoencoder resume overwrite chat_template=absent thinking=on max_bad_steps=1 "
        "reward_timeout=0.001 shard compile",
        "mode": "deterministic",
    },
    "sft": {
        "weights": "model=other seed=1 learning_rate=0.02 warmup_steps=2 weight_decay=0.5 clip_grad_norm=0.001 "
        "worked=0.5 wrong=0.5 even_data_ratio=0.5 data=file.json limit=5 dtype=bfloat16",
        "metrics": "epochs=2 batch_size=3 copies=2 eval_every=1 patience=1 shots=1",
        "work": "gradient_checkpointing micro_batch_tokens=50",
        "table": "task=odd_even",
        "files": "out=elsewhere save_every=1",
        "error": "device=abacus policy=autoencoder resume overwrite chat_template=absent thinking=on max_bad_steps=1 "
        "shard compile",
        "mode": "deterministic",
    },
    "inference": {
        "text": "model=other samples=2 temperature=2 max_new_tokens=3 seed=1 eval task=odd_even data=file.json limit=3 "
        "shots=1",
        "work": "batch_size=4 dtype=bfloat16",
        "files": "report=report.json outputs=outputs.jsonl",
        "error": "device=abacus chat_template=absent thinking=on",
    },
}
NEEDS = {
    "preference_strength": "algorithm=pairwise",
    "combine": "advantage=centered",
    "k": "algorithm=passk k=2",
    "cap": "epsilon_high=0",
    "correction": "rollout_lag=1",
    **dict.fromkeys(("correction_level", "correction_high"), "rollout_lag=1 correction=truncate"),
    "correction_low": "rollout_lag=1 correction=mask",
    "mask_truncated": "max_new_tokens=3",
    "even_bonus": "model=twenty rewards=even_bonus=1",
    "ideal_length": "rewards=char_length=1",
    "scorer": "rewards=perplexity=1 scorer=base",
    "patience": "learning_rate=1e-12 eval_every=1",
    "reward_timeout": "rewards=odd.py:slow=1",
    **dict.fromkeys(("judge_url", "judge_model", "judge_scale"), "rewards=judge=1 judge_url=http://one/v1"),
    **dict.fromkeys(("resume", "overwrite"), "begun"),
}
BAD = {"grpo": "rewards=odd.py:bad=1", "sft": "model=broken epochs=9"}  # what makes steps not finite
NEEDS_OF_INFERENCE = dict.fromkeys(("task", "data", "limit", "batch_size", "report", "outputs"), "eval")
CASES = [
    (command, changed, setting)
    for command, effects in EFFECTS.items()
    for changed, settings in effects.items()
    for setting in settings.split()
]


@pytest.fixture(scope="module")
def models(random_policy, answering, tmp_path_factory) -> Path:
    """Checkpoints to start from; one is so large that a plan's gigabytes show it, and has no weights."""
    folder = tmp_path_factory.mktemp("models")
    save(random_policy(end="05", num_hidden_layers=1), folder / "base")
    save(random_policy(seed=1, num_hidden_layers=1), folder / "other")
    save(answering(20), folder / "twenty")
    broken = random_policy(num_hidden_layers=1)
    broken.model.model.norm.weight.data.fill_(torch.nan)
    save(broken, folder / "broken")
    bodies = {"slow": "import time\n    time.sleep(0.1)\n    return [0.5]", "bad": "return [float('nan')]"}
    lines = [f"def {name}(completions, **_):\n    {body} * len(completions)\n" for name, body in bodies.items()]
    (folder / "odd.py").write_text("".join(lines))
    shutil.copytree(folder / "base", folder / "large", ignore=lambda *_: ["model.safetensors"])
    values = json.loads((folder / "base" / "config.json").read_text())
    sizes = {"hidden_size": 2**13, "intermediate_size": 2**15, "num_hidden_layers": 64, "head_dim": 2**11}
    (folder / "large" / "config.json").write_text(json.dumps(values | sizes))
    return folder


@pytest.fixture
def outcome(known, models, tmp_path_factory):
    """A function that runs a command with these settings, in a folder of its own, and says what came of it."""

    def run(command: str, *settings: str) -> dict[str, object]:
        words = (word.partition("=") for word in " ".join((GIVEN[command], *settings)).split())
        flags = {name: value for name, _, value in words}
        key = (command, *sorted(flags.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp(command)
            for model in models.iterdir():
                (folder / model.name).symlink_to(model)
            if "begun" in flags:
                shutil.copytree(run(command)["folder"] / "run", folder / "run")
                del flags["begun"]
            known[key] = look_at(command, folder, flags)
        return known[key]

    return run


def look_at(command: str, folder: Path, flags: dict[str, str]) -> dict[str, object]:
    """Run a command in a folder: its files, figures and weights, its error, what was printed, computed and asked."""
    words = ["What is 1?"] * (command == "inference" and "eval" not in flags)
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", *filter(None, [value])]
    work, asked, error, mode = [], [], None, set()

    async def score(judge, session, turns, question, answer):
        asked.append((judge.url, judge.model, judge.scale))

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{command}.py", *words])
        patch.setattr(graders.Judge, "score", score)
        patch.setattr(grpo, "report", lambda run: None)
        spy(patch, Block, "before", lambda heads, *_, **__: work.append((tuple(heads[0].shape), heads[0].dtype)))
        spy(patch, Block, "before", lambda *_, **__: mode.add(torch.are_deterministic_algorithms_enabled()))
        try:
            COMMANDS[command][0]()
        except UserError as caught:
            error = str(caught)
    torch.use_deterministic_algorithms(False)
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found = {name.removeprefix("run/"): path.read_bytes() for name, path in files.items() if name.startswith("run/")}
    last = max((name.rpartition("/")[0] for name in found if name.startswith("resume/0")), default="")
    return {
        "folder": folder,
        "files": list(files),
        "metrics": timeless(lines_of(files["run/metrics.jsonl"])) if "metrics.jsonl" in found else None,
        "table": found.get("evaluation.json"),
        "weights": found.get(f"{last}/weights.safetensors"),
        "moments": found.get(f"{last}/optimizer.safetensors"),
        "error": error,
        "text": printed.getvalue(),
        "work": work,
        "mode": mode,
        "asked": set(asked),
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_is_among_those_below(command):
    there = [setting.partition("=")[0] for name, _, setting in CASES if name == command]
    assert sorted(there) == sorted(field.name for field in dataclasses.fields(COMMANDS[command][1]))


@pytest.mark.parametrize(("command", "changed", "setting"), CASES)
def test_a_setting_has_an_effect(outcome, command, changed, setting):
    needs = NEEDS_OF_INFERENCE if command == "inference" else NEEDS
    given = BAD[command] if setting == "max_bad_steps=1" else needs.get(setting.partition("=")[0], "")
    before, after = outcome(command, given), outcome(command, given, setting)
    assert before[changed] != after[changed]
    assert changed == "error" or before["error"] is after["error"] is None


@pytest.mark.parametrize(
    "settings",
    [
        "rollout_lag=1",
        "batch_size=9",
        "num_generations=9",
        "batch_size=2 num_generations=6",
        "max_new_tokens=9",
        "num_inner_updates=9",
    ]
    + ["micro_batch_tokens=10", "gradient_checkpointing", "dtype=bfloat16", "beta=0", "model=base"]
    + ["rewards=perplexity=1 scorer=other", "shots=4"],
)
def test_what_costs_memory_or_work_changes_the_plan(outcome, settings):
    before, after = (outcome("grpo", "dry_run model=large", more) for more in ("", settings))
    # Without the process and the peak that holds it, which differ from one run to the next.
    texts = [re.sub("(?m)^(process|peak).*$", "", each["text"]) for each in (before, after)]
    numbers = [re.findall(r" ([0-9.]+) (?:GB  |tera)", text) for text in texts]
    assert len(numbers[0]) == 10 and numbers[0] != numbers[1] and before["error"] is after["error"] is None


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_one_entry_with_a_sentence_for_each_setting(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", [f"{command}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[command][0]()
    assert not stopped.value.code
    entries = re.split(r"^ {1,8}(?=-)", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    heads = [re.match(r"(?:-\S+(?: \S+)*,? ?)+", entry)[0] for entry in entries]
    for field in dataclasses.fields(COMMANDS[command][1]):
        flag = f"--{field.name.replace('_', '-')}"
        (place,) = [i for i, head in enumerate(heads) if flag in re.split(r"[\s,=]+", head)]
        assert re.match(r"\s*[A-Z0-9].{8,}\.", entries[place][len(heads[place]) :]), entries[place]
