"""One update against an independent one, and the run as a whole; the formulas are in test_oracle_*.py."""

import dataclasses
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from steps import rewards_of, update_on
from transformers import AutoModelForCausalLM

import checkpoints
import commands
import grpo
import grpo_run
import inference
import rewards
import runs
import sft
import tasks
from commands import UserError
from grpo import ALGORITHMS, GRPOConfig, group_advantages
from model_toy import Llama, LlamaConfig, character_tokenizer
from policy import TokenPolicy
from rollouts import Rollout
from tasks import Example, take_prompts

ROOT = Path(grpo.__file__).parent
GRPO = ALGORITHMS["grpo"]


def tiny_policy(seed: int = 0) -> TokenPolicy:
    """A random toy of 8,000 parameters that knows the arithmetic task's characters."""
    tokenizer = character_tokenizer(["What is (0123456789) + - * ? = ;"])
    model = Llama(LlamaConfig(len(tokenizer), 32, 32, 1, 2, 1))
    model.init_weights(torch.Generator().manual_seed(seed))
    return TokenPolicy(model, tokenizer)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    checkpoints.save(tiny_policy(), folder)
    return folder


def small_arithmetic() -> tasks.Task:
    """The arithmetic task with few problems."""
    task, sizes = tasks.TASKS["arithmetic"], {"train": 40, "validation": 8, "held_out": 8}
    return dataclasses.replace(
        task, load=lambda **given: {name: task.load(**given)[name][:size] for name, size in sizes.items()}
    )


@pytest.fixture
def small_task(monkeypatch):
    """Few problems to evaluate on, and a reward that even a random policy gets."""
    monkeypatch.setitem(tasks.TASKS, "arithmetic", small_arithmetic())


def settings(base: Path, out: Path, **more) -> GRPOConfig:
    reward = f"{Path(__file__).parent / 'test_grpo.py'}:digits=1"
    small = {"steps": 4, "batch_size": 3, "num_generations": 4, "max_new_tokens": 8, "eval_every": 2, "save_every": 2}
    return GRPOConfig(**{"model": str(base), "out": str(out), "rewards": reward, **small, **more})


def digits(prompts, completions, **_) -> list[float]:
    """The share of digits in a completion: a reward with spread for a policy that knows nothing."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def test_prompts_cover_every_pass_once_in_a_new_order_and_need_no_history():
    examples = [Example(str(i)) for i in range(10)]
    steps = [[e.prompt for e in take_prompts(examples, step, 4, seed=3)] for step in range(1, 6)]
    first, second = sum(steps, [])[:10], sum(steps, [])[10:]
    assert sorted(first) == sorted(second) == sorted(str(i) for i in range(10))
    assert first != second
    assert [e.prompt for e in take_prompts(examples, 1, 4, seed=4)] != steps[0]


def rollout_of(policy: TokenPolicy, examples: list[Example], group_size: int, **more) -> Rollout:
    return policy.sample(examples, group_size, (0, 1, 0), more.pop("max_new_tokens", 8), **more)


def test_rewards_are_weighted_and_a_missing_one_is_the_mean_of_its_group():
    policy = tiny_policy()
    examples = [Example("1+1", {"answer": "2"}), Example("2", {"answer": "2"})]
    rollout = rollout_of(policy, examples, 3)
    mix = {
        "whole": (lambda completions, **_: [1.0, 2.0, None, None, None, None], 1.0),
        "other": (lambda completions, **_: [float(i) for i in range(6)], 0.1),
    }
    total, means = rewards_of(mix, examples, rollout)
    torch.testing.assert_close(total, torch.tensor([[1.0, 2.1, 1.7], [0.3, 0.4, 0.5]]))
    stds = {"reward_std/whole": math.sqrt(0.5), "reward_std/other": math.sqrt(3.5)}
    missing = {"missing/whole": 4 / 6, "missing/other": 0}  # before they were filled in
    assert means == pytest.approx({"reward/whole": 1.5, "reward/other": 2.5} | stds | missing)


def test_what_is_known_of_a_row_is_the_share_of_its_terms_that_no_fill_is():
    """A function without a say in the group, or without a weight, is no term; one row has no reward at all."""
    nan = math.nan
    values = torch.tensor([[[1, 0.5, nan, nan], [nan, 0.5, nan, 1], [nan, nan, nan, 1]], [[nan] * 3 + [1]] * 3])
    scores = rewards.Scores(values.double(), torch.tensor([1.0, 2.0, 3.0, 0.0]).double())
    assert scores.known.tolist() == [[1.0, 0.5, 0.0], [0.0] * 3]
    assert scores.total.tolist() == [[2.0] * 3, [0.0] * 3] and scores[torch.tensor([1])].total.tolist() == [[0.0] * 3]


def test_a_group_is_flat_before_the_overlong_penalty():
    values = torch.tensor([[[0, -1.0], [0, 0]], [[1, 0], [0, -1]]]).double()
    scores = rewards.Scores(values, torch.ones(2).double())
    assert grpo.flat_groups(scores, ALGORITHMS["dapo"]).tolist() == [True, False]
    assert grpo.flat_groups(scores, ALGORITHMS["grpo"]).tolist() == [False, False]


EXAMPLES = [Example("What is (4 - 9) * 6?"), Example("(1+2)"), Example("7*8=?")]


def one_update(token_budget: int, inner: int = 1, beta: float = 0.04, share: bool = True):
    """A policy after an update on fixed rollouts, the metrics, and what went in."""
    policy, reference = tiny_policy(0), tiny_policy(1)
    if not share:
        policy.log_probs = lambda rollout, f=policy.log_probs: f(rollout, layout="joined")
    rollout = rollout_of(policy, EXAMPLES, 4)
    rewards = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    config = GRPOConfig(
        num_inner_updates=inner, micro_batch_tokens=token_budget, beta=beta, learning_rate=1e-2, max_new_tokens=8
    )
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
    metrics = update_on(policy, reference if beta else None, optimizer, rollout, rewards, config)
    advantages = group_advantages(rewards).flatten()
    return policy, metrics, rollout, advantages, reference


def test_update_equals_an_independent_one_by_transformers(tmp_path):
    policy, metrics, rollout, advantages, reference = one_update(10**6)
    models = []
    for name, source in (("policy", tiny_policy(0)), ("reference", reference)):
        checkpoints.save(source, tmp_path / name)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).eval())
        models[-1].get_input_embeddings().padding_idx = None  # a sampled pad token learns as any other
    rows = []
    for i, group in enumerate(rollout.group.tolist()):  # one row at a time, no padding, no cache
        prompt = rollout.prompts[group][rollout.prompt_mask[group]]
        completion = rollout.actions[i][rollout.mask[i]]
        logps = [
            model(torch.cat([prompt, completion])[None]).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            for model in models
        ]
        logp, ref = (x.gather(1, completion[:, None])[:, 0] for x in logps)
        d = ref.detach() - logp
        ratio = (logp - logp.detach()).exp()
        rows.append((-ratio * advantages[i] + 0.04 * (d.exp() - d - 1)).mean())
    torch.stack(rows).mean().backward()
    gradients = {name: p.grad for name, p in models[0].named_parameters()}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    before = tiny_policy(0).model
    for (name, after), start in zip(policy.model.named_parameters(), before.parameters(), strict=True):
        step = -0.1 * gradients[name] * min(1.0, 1.0 / (norm.item() + 1e-6))
        torch.testing.assert_close(after - start, step, rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize("token_budget", [1, 60, 120])
@pytest.mark.parametrize("inner", [1, 3])
def test_micro_batches_do_not_change_the_update(token_budget, inner):
    whole, metrics, *_ = one_update(10**6, inner)
    parts, others, *_ = one_update(token_budget, inner)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for name in (name for name in metrics if name != "sampler_gap" and "second" not in name):
        assert metrics[name] == pytest.approx(others[name], rel=1e-4, abs=1e-6), name


def test_ratio_is_one_at_first_and_moves_with_inner_updates():
    _, first, *_ = one_update(10**6, inner=1)
    assert first["ratio_max"] == 1.0 and first["clip_low"] == first["clip_high"] == 0
    assert first["sampler_gap"] < 1e-5
    _, third, *_ = one_update(10**6, inner=3)
    assert third["ratio_max"] > 1.0


def test_no_reference_no_kl():
    _, metrics, *_ = one_update(10**6, beta=0.0)
    assert "kl" not in metrics


def test_update_raises_the_reward_it_is_given():
    """Ten updates that reward one token make it likelier: the sign of everything, end to end."""
    policy = tiny_policy()
    target = policy.tokenizer.convert_tokens_to_ids("7")
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2, weight_decay=0.0)
    share = []
    for step in range(10):
        rollout = policy.sample(EXAMPLES, 16, (0, step, 0), 8)
        rewards = ((rollout.actions == target) & rollout.mask).sum(1).float().view(3, 16)
        share.append(((rollout.actions == target) & rollout.mask).sum().item() / rollout.mask.sum().item())
        update_on(policy, None, optimizer, rollout, rewards, GRPOConfig(beta=0.0, max_new_tokens=8))
    assert share[0] < 0.15 and share[-1] > 0.5


def test_not_finite_stops_before_the_weights_move():
    policy = tiny_policy()
    rollout = rollout_of(policy, EXAMPLES, 4)
    start = [p.detach().clone() for p in policy.model.parameters()]
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="nan"):
        update_on(
            policy, None, optimizer, rollout, torch.full((3, 4), math.nan), GRPOConfig(beta=0.0, max_new_tokens=8)
        )
    assert all(torch.equal(a, b) for a, b in zip(start, policy.model.parameters(), strict=True))


def weights_of(run: runs.Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.policy.model.state_dict().items()}


def lines_of(path: Path) -> list[dict]:
    """The lines of a metrics file without what depends on the clock."""
    timed = ("seconds", "tokens_per_second")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_runs_are_bitwise_equal_and_another_seed_is_not(base, tmp_path, small_task):
    first = grpo.train(settings(base, tmp_path / "a"))
    second = grpo.train(settings(base, tmp_path / "b"))
    third = grpo.train(settings(base, tmp_path / "c", seed=1))
    assert same(weights_of(first), weights_of(second))
    assert not same(weights_of(first), weights_of(third))
    assert not same(weights_of(first), load_file(base / "model.safetensors"))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines_of(tmp_path / "a" / name) == lines_of(tmp_path / "b" / name)
    steps = [line["step"] for line in lines_of(tmp_path / "a" / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("stop_after", [2, 3])
def test_resumed_run_is_bitwise_equal_to_the_one_not_interrupted(base, tmp_path, small_task, stop_after, monkeypatch):
    whole = grpo.train(settings(base, tmp_path / "whole", num_inner_updates=2, steps=5))
    config = settings(base, tmp_path / "cut", num_inner_updates=2, steps=5)
    step = grpo.train_step

    def die(run, number):
        if number > stop_after:
            raise KeyboardInterrupt  # a crash: nothing is saved but what save_every saved
        return step(run, number)

    monkeypatch.setattr(grpo, "train_step", die)
    with pytest.raises(KeyboardInterrupt):
        grpo.train(config)
    (tmp_path / "cut" / "resume" / ".partial").mkdir()
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    monkeypatch.setattr(grpo, "train_step", step)
    resumed = grpo.train(dataclasses.replace(config, resume=True))
    assert same(weights_of(whole), weights_of(resumed))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines_of(tmp_path / "whole" / name) == lines_of(tmp_path / "cut" / name)
    best = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert same(*best)


def test_run_folder_holds_what_the_design_lists(base, tmp_path, small_task):
    run = grpo.train(settings(base, tmp_path / "run"))
    grpo.report(run)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    files = {"config.json", "model.safetensors", "tokenizer.json", "run.json", "metrics.jsonl", "samples.jsonl"}
    assert files | {"evaluation.json", "resume", "training.png", "training.svg", "accuracy.png"} <= names
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["settings"]["steps"] == 4 and stored["algorithm"]["beta"] == 0.04
    assert sorted(path.name for path in (tmp_path / "run" / "resume").iterdir()) == ["000002", "000004"]
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert list(results) == ["base", "best", "last"]


def test_best_checkpoint_is_the_best_by_validation(base, tmp_path, small_task, monkeypatch):
    scores = iter([0.1, 0.5, 0.3])
    evaluate = inference.evaluate

    def scored(policy, task, examples, width, samples, *args):
        result = evaluate(policy, task, examples, width, samples, *args)
        return result | ({"sampled_accuracy": next(scores)} if samples == 2 else {})

    monkeypatch.setattr(grpo_run, "evaluate", scored)
    run = grpo.train(settings(base, tmp_path / "run"))
    assert (run.position.best_step, run.position.best_score, run.position.validations_since_best) == (2, 0.5, 1)
    at_two = load_file(tmp_path / "run" / "resume" / "000002" / "weights.safetensors")
    assert same(at_two, load_file(tmp_path / "run" / "model.safetensors"))


def test_truncated_rows_leave_the_loss_and_not_their_groups_mean():
    """Under `token_mean` it is that of the rows that are left, with the advantages of all; of none left it is 0."""
    rollout, weights = rollout_of(tiny_policy(), EXAMPLES, 4, max_new_tokens=8), []
    rewards = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    rollout.truncated[::2] = True
    row = GRPOConfig(aggregate="token_mean", beta=0.0, mask_truncated=True, max_new_tokens=8)
    plain, left = dataclasses.replace(row, mask_truncated=None), (~rollout.truncated).nonzero()[:, 0]
    all_cut = dataclasses.replace(rollout, truncated=torch.ones(12, dtype=torch.bool))
    advantages = group_advantages(rewards).flatten()
    for part, config, given in ((rollout, row, advantages), (rollout.select(left), plain, advantages[left])):
        policy = tiny_policy()
        optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
        metrics = grpo.update(policy, None, optimizer, part, given, None, config)
        weights.append(torch.cat([weight.detach().flatten() for weight in policy.model.parameters()]))
        assert metrics["entropy"] > 0
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)
    metrics = grpo.update(policy, None, optimizer, all_cut, advantages, None, row)
    after = torch.cat([weight.detach().flatten() for weight in policy.model.parameters()])
    assert metrics["loss"] == metrics["grad_norm"] == 0 and torch.equal(after, weights[1])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_runs_and_is_stored_with_the_run(base, tmp_path, small_task, name, capsys):
    config = settings(base, tmp_path / "run", algorithm=name, steps=2, num_inner_updates=2)
    run = grpo.train(config)
    assert f"{name}: {ALGORITHMS[name]}" in capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["algorithm"] == dataclasses.asdict(ALGORITHMS[name])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ("kl" in lines[1]) == ("kl_k1" in lines[1]) == (ALGORITHMS[name].beta > 0)
    assert ("reward/overlong-penalty" in lines[1]) == (name == "dapo")
    penalty = lines[1].get("reward/overlong-penalty", 0.0)
    assert lines[1]["reward"] == pytest.approx(lines[1]["reward/digits"] + penalty, abs=1e-6)
    assert penalty < 0 or name != "dapo", "a random policy runs into the limit"
    assert not same(weights_of(run), load_file(base / "model.safetensors"))


def test_flags_override_cells_of_the_row():
    config = GRPOConfig(algorithm="dapo", aggregate="sequence_mean", beta=0.1, max_resample=0)
    changed = dataclasses.replace(ALGORITHMS["dapo"], aggregate="sequence_mean", beta=0.1, max_resample=0)
    assert config.resolved_algorithm == changed
    assert {cell.name for cell in dataclasses.fields(grpo.Algorithm)} <= {
        f.name for f in dataclasses.fields(GRPOConfig)
    }


def only_products(prompts, completions, **_) -> list[float]:
    """A reward that tells completions apart only where the question has a product, so that other groups are flat."""
    return [len(text) % 7 / 7 if "*" in prompt else 0.0 for prompt, text in zip(prompts, completions, strict=True)]


def sample_groups(run: grpo.GRPORun, step: int):
    """Steps (1) to (3) with dynamic sampling: the rollout, its rewards, and what was measured."""
    config, state = run.config, run.position.reward_state
    examples = take_prompts(run.data["train"], step, config.batch_size, config.seed)
    rollout = run.policy.sample(examples, config.num_generations, (config.seed, step, 0), config.max_new_tokens)
    scores, _ = run.rewards(examples, rollout, state)
    flat = grpo.flat_groups(scores, config.resolved_algorithm)
    measured = inference.measure_rollout(rollout, scores.total, examples, run.task)
    rollout, scores, counts = grpo.replace_flat_groups(run, step, examples, rollout, scores)
    return rollout, scores.total, measured | {"zero_std_groups": flat.float().mean().item()} | counts


def test_dynamic_sampling_replaces_flat_groups_and_only_those(base, tmp_path, small_task):
    reward = f"{Path(__file__)}:only_products=1"
    config = settings(base, tmp_path / "run", rewards=reward, batch_size=8, max_resample=3)
    run = grpo.prepare(config)
    for step in range(1, 6):
        examples = take_prompts(run.data["train"], step, 8, config.seed)
        rollout, rewards, measured = sample_groups(run, step)
        assert rewards.shape == (8, 4) and len(rollout.texts) == 32 and len(rollout.prompts) == 8
        prompts = [run.policy.tokenizer.decode(p[m]) for p, m in zip(rollout.prompts, rollout.prompt_mask, strict=True)]
        expected = only_products([prompts[group] for group in rollout.group], rollout.texts)
        assert rewards.flatten().tolist() == pytest.approx(expected), "each row has its own completion's reward"
        first = run.policy.sample(examples, 4, (config.seed, step, 0), config.max_new_tokens)
        alive = [i for i in range(8) if len(set(only_products([examples[i].prompt] * 4, first.texts[4 * i :][:4]))) > 1]
        kept = [text for i in alive for text in first.texts[4 * i :][:4]]
        assert rollout.texts[: len(kept)] == kept, "what is not flat stays"
        others = prompts[len(alive) :]
        assert len(set(prompts)) == 8, "what replaces a group is another problem"
        assert not others or not {"".join(examples[i].prompt.split()) for i in range(8)} & set(others)
        assert measured["zero_std_groups"] == pytest.approx(1 - len(alive) / 8), "measured on the first draw"
        assert measured["samples"] >= 32 + 4 * (8 - len(alive)) and measured["tokens"] > rollout.mask.sum() - 1
        again = sample_groups(run, step)[0]
        assert again.texts == rollout.texts


def test_dynamic_sampling_gives_up_after_max_resample_draws(base, tmp_path, small_task):
    config = settings(base, tmp_path / "run", rewards="answer_exact=1", max_resample=2)
    run = grpo.prepare(config)
    rollout, rewards, measured = sample_groups(run, 1)
    assert measured["samples"] == 3 * 3 * 4 and rewards.shape == (3, 4) and not rewards.any()
    assert len(rollout.texts) == 12


def test_the_reference_is_refreshed_and_is_part_of_the_state(base, tmp_path, small_task):
    """KL is measured before the update: 0 whenever the reference was the policy a moment ago."""
    config = settings(base, tmp_path / "whole", ref_update_every=2, steps=5, save_every=1, beta=1.0)
    whole = grpo.train(config)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["kl"] > 0 for line in lines[1:]] == [False, True, False, True, False]
    grpo.train(dataclasses.replace(config, out=str(tmp_path / "parts"), steps=3))
    parts = grpo.train(dataclasses.replace(config, out=str(tmp_path / "parts"), resume=True))
    assert same(weights_of(whole), weights_of(parts))
    assert same(whole.reference.model.state_dict(), parts.reference.model.state_dict())


def test_exploration_noise_is_in_sampler_scorer_and_reference(base, tmp_path, small_task):
    run = grpo.train(settings(base, tmp_path / "run", exploration_noise=0.5, steps=1))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert run.reference.exploration_noise == 0.5 and line["kl"] == 0 and line["sampler_gap"] < 1e-5
    noisy = inference.evaluate(run.policy, run.task, run.data["validation"], 8, samples=4)
    run.policy.exploration_noise = 0.0
    assert inference.evaluate(run.policy, run.task, run.data["validation"], 8, samples=4) == noisy, "nor in evaluation"


def test_patience_and_kl_limit_stop_early(base, tmp_path, small_task, capsys):
    run = grpo.train(settings(base, tmp_path / "kl", kl_limit=1e-12))
    assert run.position.step == 2 and "--kl-limit" in capsys.readouterr().out  # at step 1 policy and reference agree
    run = grpo.train(settings(base, tmp_path / "patience", patience=1))
    assert run.position.step == 2 and "--patience" in capsys.readouterr().out


def test_kl_and_flat_warnings():
    calm = {"step": 3, "truncated": 0.0, "zero_std_groups": 0.5, "accuracy": 0.5, "format": 0.5, "kl": 0.1}

    for change, words in (({}, []), ({"kl": 2.0}, ["--beta"]), ({"zero_std_groups": 1.0, "accuracy": 1.0}, [])):
        run = grpo.GRPORun(
            config=GRPOConfig(),
            policy=None,
            optimizer=None,
            last_step=9,
            task=None,
            data={},
            rewards=None,
            reference=None,
        )
        said = []
        run.say = lambda text, file, said=said: said.append(text)
        for _ in range(2):  # each thing once
            run.warn(calm | change)
            assert len(said) == len(words) and all(word in text for word, text in zip(words, said, strict=True))


def test_warnings_name_the_flag_and_come_once(base, tmp_path, small_task, capsys):
    grpo.train(settings(base, tmp_path / "run", rewards="answer_format=0.2,answer_exact=0.8"))
    text = capsys.readouterr().err
    for flag in ("--max-new-tokens", "--num-generations", "sft.py"):
        assert text.count(flag) == 1, flag


def test_the_loop_uses_the_numbers_of_the_docstring():
    numbers = re.findall(r"^(\d)\. ", grpo.__doc__, re.MULTILINE)
    assert numbers == list("123456")
    marked = re.findall(r"# \((\d)\)", inspect.getsource(grpo.train_step))
    assert marked == numbers, "one line each, in this order"


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "grpo.py"), *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "poetry"], ["poetry", "arithmetic"]),
        (["--lerning-rate", "1"], ["--lerning-rate"]),
        (["--learn", "1"], ["--learn"]),
        (["--rewards", "answer_exakt=1"], ["answer_exakt", "answer_exact"]),
        (["--rewards", "answer_exact"], ["answer_exact", "WEIGHT"]),
        (["--algorithm", "ppo"], ["ppo", "grpo"]),
        (["--num-generations", "1"], ["--num-generations", "at least 2"]),
        (["--steps", "0"], ["--steps", "above 0"]),
        (["--batch-size", "-3"], ["--batch-size", "above 0"]),
        (["--temperature", "nan"], ["--temperature", "nan"]),
        (["--beta", "-1"], ["--beta"]),
        (["--beta", "nan"], ["--beta"]),
        (["--learning-rate", "inf"], ["--learning-rate"]),
        (["--temperature", "1e-300"], ["--temperature", "0.001"]),
        (["--kl-limit", "0.1", "--beta", "0"], ["--kl-limit", "--beta"]),
        (["--ref-update-every", "2", "--algorithm", "dapo"], ["--ref-update-every", "--beta"]),
        (["--kl-estimator", "k1"], ["--kl-estimator", "exactly 0", "k3"]),
        (["--algorithm", "dapo", "--kl-estimator", "k2"], ["--kl-estimator", "--beta above 0"]),
        (["--algorithm", "pairwise", "--epsilon", "0.1"], ["--epsilon", "--surrogate"]),
        (["--algorithm", "pairwise", "--ratio", "sequence"], ["--ratio", "--surrogate"]),
        (["--preference-strength", "5"], ["--preference-strength", "pairwise"]),
        (["--num-generations", "-1"], ["--num-generations", "above 0"]),
        (["--temperature", "-1"], ["--temperature", "0.001 or above"]),
        (["--seed", "18446744073709551616"], ["--seed", "at most 9223372036854775807"]),
        (["--aggregate", "row"], ["--aggregate", "'row'", "'sequence_mean', 'token_mean', 'constant'"]),
        (["--advantage", "pairwise"], ["--advantage pairwise", "--surrogate reinforce"]),
        (["--algorithm", "pairwise", "--aggregate", "token_mean"], ["pairwise", "--aggregate sequence_mean"]),
        (["--overlong-buffer", "2"], ["--overlong-buffer", "at most 1"]),
        (["--exploration-noise", "1"], ["--exploration-noise", "below 1"]),
        (["--exploration-noise", "0", "--policy", "autoencoder"], ["--exploration-noise", "above 0"]),
        (["--policy", "perceptron"], ["--policy", "'transformer', 'autoencoder'"]),
        (["--rewards", "judge=1"], ["judge", "--judge-url", "overlap=1"]),
        (["--rewards", "judge=1", "--judge-url", "localhost:8000"], ["--judge-url", "http://"]),
        (["--judge-url", "http://localhost:8000/v1"], ["--judge-url", "does nothing", "answer_exact"]),
        (["--scorer", "gpt2"], ["--scorer", "does nothing"]),
        (["--ideal-length", "9"], ["--ideal-length", "does nothing"]),
        (["--ideal-length", "0", "--rewards", "char_length=1"], ["--ideal-length", "above 0"]),
        (["--judge-scale", "3"], ["--judge-scale", "1, 2"]),
        (["--seed", "-1"], ["--seed"]),
        (["--device", "toaster"], ["toaster", "cpu"]),
        (["--model", "no_such_folder"], ["no_such_folder", "grpo.py"]),
        (["--out", "no_such_run", "--resume"], ["no_such_run", "--resume"]),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grpo.py", *arguments])
    monkeypatch.setattr(runs.signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        commands.run_main(grpo.main, resumable=True)
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and errors.count("\n") == 1, errors
    assert all(word in errors for word in ("error", *words)), errors
    assert not list(tmp_path.iterdir())


def test_a_run_begins_with_what_it_will_do(base, tmp_path, small_task, capsys, monkeypatch):
    grpo.prepare(settings(base, tmp_path / "run", steps=7))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("7 steps on arithmetic, each of 3 x 4 completions") and str(tmp_path / "run") in lines[0]
    assert lines[1] == f"grpo: {GRPO}" and "advantage group, ratio token, surrogate clip, epsilon 0.2" in lines[1]
    monkeypatch.setattr(sft, "toy", lambda config: base)
    grpo.prepare(dataclasses.replace(settings(base, tmp_path / "new"), model=None))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"no --model: first a toy base policy, fine-tuned into {tmp_path / 'new' / 'base'}, about")


def test_a_row_shows_what_it_reads():
    assert str(ALGORITHMS["pairwise"]) == (
        "advantage pairwise, surrogate reinforce, aggregate sequence_mean, beta 0.0, preference strength 2.0"
    )
    assert "epsilon" not in str(ALGORITHMS["sapo"]) and "k 4" in str(ALGORITHMS["passk"])
    assert "max resample 3, overlong buffer 0.2" in str(ALGORITHMS["dapo"]) and "kl" not in str(ALGORITHMS["dapo"])
    corrected = str(dataclasses.replace(ALGORITHMS["rloo"], correction="mask", top_entropy=0.2))
    assert corrected.endswith(
        "correction mask, correction level token, correction low 0.5, correction high 2.0, top entropy 0.2"
    )


def test_a_single_completion_is_enough_where_the_baseline_is_the_batchs(base, tmp_path, small_task):
    with pytest.raises(UserError, match="at least 2"):
        GRPOConfig(num_generations=1)
    run = grpo.train(settings(base, tmp_path / "run", num_generations=1, advantage="batch_mean", steps=1))
    assert not same(weights_of(run), load_file(base / "model.safetensors"))


def test_what_to_try_next_is_safe_to_paste_and_keeps_what_the_run_needs(base, tmp_path):
    how = {"shots": 2, "thinking": "off", "max_new_tokens": 7}
    config = settings(base, tmp_path / "run", task="smoltldr", data="my file.jsonl", eval_limit=3, **how)
    text = grpo_run.next_commands(config, "What?\x1b[2J'; rm -rf x", "start")
    first, beside, last = text.splitlines()[1:]
    flags = ["--shots", "2", "--thinking", "off", "--max-new-tokens", "7"]
    assert shlex.split(beside)[4:] == [*("smoltldr", "--model", "start", config.out, "--samples", "4"), *flags]
    assert shlex.split(first)[:4] == ["python", "inference.py", "What?\\x1b[2J'; rm -rf x", "--task"]
    assert shlex.split(last)[2:] == [
        *("--task", "smoltldr", "--model", "start", "--out", "another_run", "--algorithm", "dr_grpo"),
        *("--data", "my file.jsonl", "--rewards", config.rewards, "--eval-limit", "3", *flags),
    ]


def test_a_run_is_not_overwritten(base, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text('{"settings": {}}')
    result = command("--model", str(base), "--out", str(out))
    assert result.returncode == 2 and "--overwrite" in result.stderr and "--resume" in result.stderr
    assert (out / "run.json").read_text() == '{"settings": {}}' and len(list(out.iterdir())) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_the_printed_command_continues(base, tmp_path, number):
    out = tmp_path / "run"
    arguments = ["--model", str(base), "--out", str(out), "--steps", "100000", "--max-new-tokens", "4"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "grpo.py"), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out / "samples.jsonl").exists():
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    saved = int(re.search(r"saved after step (\d+)", errors)[1])
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == saved
    again = errors.split("continue with: python ")[1].split()
    result = subprocess.run(
        [sys.executable, *again, "--steps", str(saved + 2)], capture_output=True, text=True, env=dict(os.environ)
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == saved + 2


def test_the_base_is_never_the_victim(base, tmp_path, small_task):
    """Neither --model itself nor a user's own OUT/base may be replaced by accident."""
    weights = (base / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="--model itself"):
        grpo.train(settings(base, base, overwrite=True))
    shutil.copytree(base, tmp_path / "run" / "base")
    with pytest.raises(UserError, match="--overwrite"):
        grpo.train(dataclasses.replace(settings(base, tmp_path / "run"), model=None))
    assert (tmp_path / "run" / "base" / "model.safetensors").read_bytes() == weights
    assert (base / "model.safetensors").read_bytes() == weights


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "arithmetic", small_arithmetic())
        grpo.train(settings(base, folder))
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("resume/000004/position.json", "{}"),
        ("resume/000004/position.json", '{"step": "a"}'),
        ("resume/000004/position.json", '{"strange": 1}'),
        ("resume/000004/position.json", "[1"),
        ("resume/000004/weights.safetensors", b"garbage"),
        ("resume/000004/optimizer.safetensors", b"\x02\0\0\0\0\0\0\0{}"),  # whole, but empty
    ],
)
def test_a_damaged_state_gives_way_to_the_one_before(finished, base, tmp_path, small_task, name, content, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    content = content if isinstance(content, bytes) else content.encode()
    (out / name).write_bytes(content)
    grpo.train(settings(base, out, resume=True))
    assert "damaged: " in capsys.readouterr().err
    again, whole = (load_file(folder / "resume" / "000004" / "weights.safetensors") for folder in (out, finished))
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    old, new = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (finished, out))
    assert [json.loads(line)["step"] for line in new] == [json.loads(line)["step"] for line in old]


@pytest.mark.parametrize(
    ("name", "content"), [("metrics.jsonl", b'{"step": 0}\nnonsense\n'), ("samples.jsonl", b"\xff\xfe\n")]
)
def test_a_damaged_log_is_one_line_and_changes_nothing(finished, base, tmp_path, small_task, name, content):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / name).write_bytes(content)
    best, metrics = (out / "model.safetensors").read_bytes(), (out / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        grpo.train(settings(base, out, resume=True, steps=6))
    assert (out / "model.safetensors").read_bytes() == best and (out / "metrics.jsonl").read_bytes() == metrics


def test_a_run_made_before_a_setting_was_there_can_be_continued(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "old")
    stored = json.loads((tmp_path / "old" / "run.json").read_text())
    del stored["settings"]["exploration_noise"], stored["settings"]["max_resample"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(stored))
    rewards = stored["settings"]["rewards"]
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--out", str(tmp_path / "old"), "--resume", "--rewards", rewards])
    config = runs.parse_settings(GRPOConfig, "", "")
    assert config.exploration_noise is None and config.max_resample is None


def test_a_reward_that_never_has_a_say_leaves_no_mean(recwarn):
    rollout = rollout_of(tiny_policy(), EXAMPLES, 2)
    total, means = rewards_of({"mute": (lambda **_: [None] * 6, 1.0)}, EXAMPLES, rollout)
    assert not total.any() and means == {"missing/mute": 1.0} and not recwarn


@pytest.mark.parametrize("stored", ["{}", '{"settings": 3}', '{"settings": {"epochs": 1}}', "[]", "{"])
def test_damaged_run_json_is_one_line(tmp_path, stored, monkeypatch):
    (tmp_path / "run.json").write_text(stored)
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--out", str(tmp_path), "--resume"])
    with pytest.raises(UserError, match="run.json"):
        runs.parse_settings(GRPOConfig, "", "")


def test_a_renamed_run_resumes_where_it_is_now(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "saved_model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--resume"])
    with pytest.raises(UserError, match="would run a file that only it names; if you trust it, add --rewards "):
        runs.parse_settings(GRPOConfig, "", "")
    stored = json.loads((finished / "run.json").read_text())["settings"]
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--resume", "--rewards", stored["rewards"]])
    assert runs.parse_settings(GRPOConfig, "", "").out == "saved_model"


def test_resume_after_an_early_stop_trains_no_further(base, tmp_path, small_task):
    first = grpo.train(settings(base, tmp_path / "run", patience=1))
    again = grpo.train(settings(base, tmp_path / "run", patience=1, resume=True))
    assert same(weights_of(first), weights_of(again)) and again.position == first.position
    further = grpo.train(settings(base, tmp_path / "run", patience=9, resume=True))
    assert further.position.step == 4


def test_interrupt_between_save_and_loop_still_saves(base, tmp_path, small_task, monkeypatch):
    def kill(run, metrics):
        if metrics and not run.signal:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(grpo.GRPORun, "reason_to_stop", kill)
    with pytest.raises(KeyboardInterrupt) as stopped:
        grpo.train(settings(base, tmp_path / "run", save_every=100))
    assert stopped.value.args == (2, "saved after step 0") and (tmp_path / "run" / "resume" / "000000").exists()


@pytest.mark.parametrize(("fails", "flag"), [("sample", "--num-generations"), ("log_probs", "--micro-batch-tokens")])
def test_out_of_memory_names_the_flag(base, tmp_path, small_task, monkeypatch, fails, flag):
    run = grpo.prepare(settings(base, tmp_path / "run"))

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TokenPolicy, fails, full)
    with pytest.raises(UserError, match=flag):
        grpo.train_step(run, 1)


def test_resume_refuses_to_become_another_run(base, tmp_path, small_task, monkeypatch):
    config = settings(base, tmp_path / "run")
    grpo.train(config)

    def parsed(*arguments):
        given = ["--out", config.out, "--resume", "--rewards", config.rewards, *arguments]
        monkeypatch.setattr(sys, "argv", ["grpo.py", *given])
        return runs.parse_settings(GRPOConfig, "", "")

    with pytest.raises(UserError, match="--batch-size 3"):
        parsed("--batch-size", "5")
    chosen = {"exploration_noise": 0.0, "learning_rate": config.learning_rate or 1e-4}
    assert parsed("--steps", "9") == dataclasses.replace(config, resume=True, steps=9, **chosen)


def test_reward_functions_see_what_trl_would_give_them(base, tmp_path, small_task):
    seen = {}

    def spy(prompts, completions, completion_ids, answer, **_):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer)
        return [0.0] * len(prompts)

    policy = tiny_policy()
    examples = tasks.TASKS["arithmetic"].load()["train"][:2]
    rollout = rollout_of(policy, examples, 2)
    rewards_of({"spy": (spy, 1.0)}, examples, rollout)
    assert seen["prompts"] == [examples[0].prompt] * 2 + [examples[1].prompt] * 2
    assert seen["answer"] == [examples[0].columns["answer"]] * 2 + [examples[1].columns["answer"]] * 2
    assert [policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in seen["ids"]] == seen["completions"]


def adaptive(completions, state, **_) -> list[float]:
    """A reward that changes with every call of a step."""
    state["calls"] = state.get("calls", 0) + 1
    return [len(completion) * state["calls"] % 7 for completion in completions]


def test_the_state_of_a_reward_is_the_runs_and_looking_on_changes_nothing(base, tmp_path, small_task, monkeypatch):
    """Four steps are four calls, though validation calls it too; the resumed run goes on from its number."""
    monkeypatch.setitem(rewards.REWARDS, "adaptive", adaptive)
    mix = {"rewards": "adaptive=1"}
    whole = grpo.train(settings(base, tmp_path / "whole", **mix))
    assert whole.position.reward_state == {"calls": 4}
    grpo.train(settings(base, tmp_path / "part", **mix | {"steps": 2}))
    resumed = grpo.train(settings(base, tmp_path / "part", **mix | {"resume": True}))
    assert resumed.position.reward_state == {"calls": 4} and same(weights_of(whole), weights_of(resumed))


def test_the_frozen_base_is_the_scorer_even_where_the_reference_moves(base, tmp_path, small_task):
    for more in ({"beta": 0.0}, {"ref_update_every": 1}, {"temperature": 2.0}):
        out = tmp_path / "-".join(more)
        run = grpo.train(settings(base, out, rewards="perplexity=1", learning_rate=0.01, **more))
        rollout = rollout_of(run.policy, EXAMPLES, 2)
        total = run.rewards(EXAMPLES, rollout, {})[0].total
        start = checkpoints.load(base, torch.device("cpu"))
        with torch.no_grad():
            expected = (start.log_probs(rollout)[0].sum(1) / rollout.mask.sum(1)).exp()
        torch.testing.assert_close(total.flatten(), expected, rtol=1e-5, atol=0)
