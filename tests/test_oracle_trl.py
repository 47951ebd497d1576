"""Parity with TRL: losses and their gradients, advantages, and reward functions carried in both directions.

Both sides compute in float64 on the same weights and the same sampled ids, so that what is compared is the formula.
"""

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from steps import rewards_of
from trl import GRPOConfig as TRLConfig
from trl import GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment, think_format_reward

import grpo
import tasks
from checkpoints import save
from grpo import (
    ALGORITHMS,
    Algorithm,
    correction_weight,
    group_advantages,
    high_entropy_tokens,
    mixed_advantages,
    policy_loss,
)
from rewards import Scores, answer_exact, answer_format, answer_near, parse_rewards, soft_overlong
from tasks import Example

PROMPTS = ["(4-9)*6=", "1+2=", "7*8-3="]
G, LENGTH = 4, 12
REWARDS = torch.tensor([[1.0, 0.2, 0.0, 0.4], [0.3, 0.7, 0.7, 0.1], [0.9, 0.5, 0.2, 0.2]])


@pytest.fixture(scope="module")
def policies(random_policy):
    """The policy, the older one that sampled, and the reference: three sets of weights near each other."""
    policies = [random_policy(end="05", seed=0) for _ in range(3)]
    for seed, scale, policy in ((0, 0.0, policies[0]), (1, 0.015, policies[1]), (2, 0.03, policies[2])):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in policy.model.parameters():
                weight *= 0.6 if weight.dim() > 1 else 1.0
                weight += scale * torch.randn(weight.shape, generator=generator)
        policy.model.double()
    return policies


@pytest.fixture(scope="module")
def rollout(policies):
    """Sampled from the third set of weights, so that the ratio of the first to the second goes both ways."""
    rollout = policies[2].sample([Example(prompt) for prompt in PROMPTS], G, (0, 0, 0), LENGTH)
    lengths = rollout.mask.sum(1)
    assert lengths.min() < lengths.max() == LENGTH and not rollout.prompt_mask.all()
    return rollout


def trl_trainer(policies, folder, trainer, config, reward_funcs, **more):
    """A trainer of TRL's on the same weights, in float64 on the CPU."""
    save(policies[0], folder / "model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    model.get_input_embeddings().padding_idx = None  # a sampled pad token is a token like any other
    arguments = config(
        output_dir=str(folder / "out"),
        beta=0.0,  # set on the trainer afterwards, so that no second model is loaded
        per_device_train_batch_size=len(PROMPTS) * G,
        num_generations=G,
        max_completion_length=LENGTH,
        steps_per_generation=1,
        learning_rate=1e-3,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        fp16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **more,
    )
    rows = [{"prompt": prompt, "answer": "5"} for prompt in PROMPTS]
    made = trainer(
        model=model,
        reward_funcs=reward_funcs,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    made.current_gradient_accumulation_steps = 1
    return made


def given_rewards(completions, **_) -> list[float]:
    return REWARDS.flatten().tolist()


@pytest.fixture(scope="module", params=[1.0, 0.7])
def trainer(request, policies, tmp_path_factory):
    """One for each temperature, which TRL builds into the model."""
    settings = {"loss_type": "grpo", "use_bias_correction_kl": False, "temperature": request.param}
    return trl_trainer(policies, tmp_path_factory.mktemp("trl"), GRPOTrainer, TRLConfig, given_rewards, **settings)


def score(policy, rollout, temperature: float) -> torch.Tensor:
    policy.temperature = temperature
    return policy.log_probs(rollout)[0]


# Name here, loss_type and importance_sampling_level in TRL, and the row or the cells of ours.
LOSSES = {
    "grpo": ("grpo", "token", ALGORITHMS["grpo"]),
    "token mean": ("bnpo", "token", Algorithm(aggregate="token_mean")),
    "dapo": ("dapo", "token", ALGORITHMS["dapo"]),
    "dr_grpo": ("dr_grpo", "token", ALGORITHMS["dr_grpo"]),
    "cispo": ("cispo", "token", ALGORITHMS["cispo"]),
    "gspo": ("grpo", "sequence", ALGORITHMS["gspo"]),
    "gspo, wide": ("grpo", "sequence", dataclasses.replace(ALGORITHMS["gspo"], epsilon=0.01, epsilon_high=0.02)),
    "cispo, capped": ("cispo", "token", dataclasses.replace(ALGORITHMS["cispo"], epsilon_high=0.1)),
    "asymmetric": ("grpo", "token", Algorithm(epsilon=0.1, epsilon_high=0.3)),
    "cap": ("grpo", "token", Algorithm(epsilon=0.1, epsilon_high=0.1, cap=1.15)),
    "off-policy limit": ("grpo", "token", Algorithm(off_policy_limit=0.001)),
    "sapo": ("sapo", "token", ALGORITHMS["sapo"]),
    "luspo": ("luspo", "sequence", dataclasses.replace(ALGORITHMS["luspo"], epsilon=0.01, epsilon_high=0.02)),
}


def configure(monkeypatch, trainer, loss_type: str, level: str, algorithm: Algorithm) -> None:
    """Give TRL's trainer the cells of a row, in its own terms, and no gradient."""
    high = 1 + algorithm.epsilon_high if loss_type == "cispo" else algorithm.epsilon_high  # TRL's cap is absolute
    for attribute, value in {
        "loss_type": loss_type, "importance_sampling_level": level, "beta": algorithm.beta,
        "epsilon_low": algorithm.epsilon, "epsilon_high": high, "max_completion_length": LENGTH,
        "top_entropy_quantile": algorithm.top_entropy,
    }.items():  # fmt: skip
        assert hasattr(trainer, attribute)
        monkeypatch.setattr(trainer, attribute, value)
    monkeypatch.setattr(trainer.args, "use_bias_correction_kl", algorithm.kl_estimator == "k3_unbiased")
    monkeypatch.setattr(trainer.args, "delta", algorithm.cap or None)
    monkeypatch.setattr(trainer, "off_policy_mask_threshold", algorithm.off_policy_limit or None)
    trainer.model.train()
    trainer.model.zero_grad()


def inputs_of(rollout) -> dict:
    """A rollout as TRL's loss takes it."""
    return {
        "prompt_ids": rollout.prompts[rollout.group],
        "prompt_mask": rollout.prompt_mask[rollout.group].long(),
        "completion_ids": rollout.actions,
        "completion_mask": rollout.mask.long(),
        "num_items_in_batch": rollout.mask.sum(),
    }


def assert_equal(policy, loss, model, theirs, atol: float, scale: float = 1) -> None:
    """The losses, and the gradients of all weights, which may be `scale` times as far apart."""
    assert abs(loss.item() - theirs.item()) <= atol
    for key, weight in model.named_parameters():
        gradient = policy.model.get_parameter(key).grad
        assert (gradient - weight.grad).abs().max() <= atol * scale, key
    norm = sum(weight.grad.square().sum() for weight in model.parameters()).sqrt()
    assert norm > 1e-2, "or the comparison would say nothing"


@pytest.mark.parametrize("kl", [None, "k3", "k3_unbiased"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_trls(policies, rollout, trainer, monkeypatch, name, kl):
    temperature = trainer.temperature
    loss_type, level, algorithm = LOSSES[name]
    algorithm = dataclasses.replace(algorithm, beta=0.3 if kl else 0.0, kl_estimator=kl or "k3")
    with torch.no_grad():
        old, ref = (score(policy, rollout, temperature) for policy in policies[1:])
    advantages = group_advantages(REWARDS.double(), "group").flatten()

    policies[0].model.zero_grad()
    logp = score(policies[0], rollout, temperature)
    loss, stats = policy_loss(
        logp,
        old,
        advantages,
        rollout.mask,
        algorithm,
        ref if kl else None,
        {"dr_grpo": LENGTH * len(old), "luspo": len(old)}.get(name),  # TRL's luspo has not divided by the length
    )
    loss.backward()

    configure(monkeypatch, trainer, loss_type, level, algorithm)
    given = {"advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref}
    theirs = trainer._compute_loss(trainer.model, inputs_of(rollout) | given)
    theirs.backward()
    assert_equal(policies[0], loss, trainer.model, theirs, 1e-6, LENGTH if name == "luspo" else 1)
    if name in ("grpo", "dapo", "gspo", "gspo, wide", "asymmetric", "cap", "luspo"):
        assert stats["clip_low"] > 0 and stats["clip_high"] > 0, "the clip must have acted"


def rows_by_trl(monkeypatch, trainer, rollout, old: torch.Tensor, sampled: torch.Tensor, algorithm: Algorithm) -> dict:
    """What TRL's trainer makes of a rollout by a server with log-probabilities `sampled`, and which it scored as `old`.

    Its own weights of the correction are in it; the server and the scorer are not called.
    """
    lengths = rollout.mask.sum(1).tolist()

    def cut(rows: torch.Tensor) -> list[list]:
        return [row[:length] for row, length in zip(rows.tolist(), lengths, strict=True)]

    prompts = [rollout.prompts[group][rollout.prompt_mask[group]].tolist() for group in rollout.group.tolist()]
    answer = (prompts, cut(rollout.actions), None, rollout.texts, cut(sampled), {}, None, None)
    mode = f"{algorithm.correction_level}_{algorithm.correction}"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_generate", lambda _: answer)
        patch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (old, None, None))
        patch.setattr(trainer, "beta", 0.0)  # it has no reference to score with
        for name, value in {"use_vllm": True, "vllm_importance_sampling_mode": mode}.items():
            assert hasattr(trainer, name)
            monkeypatch.setattr(trainer, name, value)
        inputs = [{"prompt": prompt, "answer": "5"} for prompt in PROMPTS for _ in range(G)]
        return trainer._generate_and_score_completions(inputs)


@pytest.mark.parametrize("correction", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo, wide", "cispo"])
def test_corrections_are_trls(policies, rollout, trainer, monkeypatch, name, level, correction):
    """The weights, which TRL too has on the surrogate and not on the KL, then the loss and the gradient with them.

    Three policies: what sampled, what the ratio starts from, what learns. TRL's `truncate` may have a lower bound, off
    by default, which would also raise small weights; here it has none. TRL's default is `mask` by row, from 0 to 3.
    """
    loss_type, ratio_level, row = LOSSES[name]
    bounds = {"correction_low": 0.95, "correction_high": 1.1}
    algorithm = dataclasses.replace(
        row, beta=0.3, kl_estimator="k3", correction=correction, correction_level=level, **bounds
    )
    with torch.no_grad():
        old, ref, sampled = (score(policies[i], rollout, trainer.temperature) for i in (1, 2, 2))
    sampled = sampled.float().double()  # what a server tells in lists, TRL has in float32
    for bound, value in {"min": 0.95 if correction == "mask" else None, "max": 1.1}.items():
        monkeypatch.setattr(trainer, f"vllm_importance_sampling_clip_{bound}", value)
    inputs = rows_by_trl(monkeypatch, trainer, rollout, old, sampled, algorithm)
    weight = correction_weight(old - sampled, rollout.mask, algorithm)
    theirs = inputs["importance_sampling_ratio"].expand_as(weight)
    torch.testing.assert_close(weight[rollout.mask], theirs[rollout.mask], rtol=0, atol=1e-12)
    plain = (old - sampled).exp() if level == "token" else ((old - sampled) * rollout.mask).sum(1, True).exp()
    assert (plain > 1.1).any() and (plain < 0.95).any(), "the bounds must have acted"

    advantages = group_advantages(REWARDS.double(), "group").flatten()
    policies[0].model.zero_grad()
    logp = score(policies[0], rollout, trainer.temperature)
    loss, _ = policy_loss(logp, old, advantages, rollout.mask, algorithm, ref, weight=weight)
    loss.backward()
    configure(monkeypatch, trainer, loss_type, ratio_level, algorithm)
    theirs = trainer._compute_loss(trainer.model, inputs | {"advantages": advantages, "ref_per_token_logps": ref})
    theirs.backward()
    assert_equal(policies[0], loss, trainer.model, theirs, 1e-6)


def test_a_lower_bound_of_trls_truncation_is_what_ours_does_not_have(policies, rollout, trainer, monkeypatch):
    """Where it is set, TRL raises small weights to it; ours leaves them, as truncation is there for large ones."""
    algorithm = Algorithm(correction="truncate", correction_low=0.95, correction_high=1.1)
    with torch.no_grad():
        old, sampled = (score(policy, rollout, trainer.temperature) for policy in policies[1:])
    sampled = sampled.float().double()
    monkeypatch.setattr(trainer, "vllm_importance_sampling_clip_min", 0.95)
    monkeypatch.setattr(trainer, "vllm_importance_sampling_clip_max", 1.1)
    theirs = rows_by_trl(monkeypatch, trainer, rollout, old, sampled, algorithm)["importance_sampling_ratio"]
    weight = correction_weight(old - sampled, rollout.mask, algorithm)
    torch.testing.assert_close(weight.clamp(min=0.95)[rollout.mask], theirs[rollout.mask], rtol=0, atol=1e-12)
    assert (weight < 0.94)[rollout.mask].any()


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo, wide", "cispo"])
def test_top_entropy_tokens_are_trls(policies, rollout, trainer, monkeypatch, name, share):
    """Which tokens they are; then the loss and the gradient, in which the KL stays on all tokens.

    On one batch before its first inner update. TRL takes the quantile of each micro-batch anew, and at each inner
    update from the policy as it is by then; here it is once that of the whole optimizer batch. TRL also rounds the
    threshold to float32, so a token that is itself the quantile may fall to either side.
    """
    loss_type, level, row = LOSSES[name]
    algorithm = dataclasses.replace(row, beta=0.3, kl_estimator="k3", top_entropy=share)
    with torch.no_grad():
        old, ref = (score(policy, rollout, trainer.temperature) for policy in policies[1:])
    advantages = group_advantages(REWARDS.double(), "group").flatten()
    policies[0].temperature = trainer.temperature
    chosen = high_entropy_tokens(policies[0], rollout, algorithm, 2**20) & rollout.mask
    assert chosen.sum() == pytest.approx(share * rollout.mask.sum(), abs=1)

    policies[0].model.zero_grad()
    logp = score(policies[0], rollout, trainer.temperature)
    loss, _ = policy_loss(logp, old, advantages, rollout.mask, algorithm, ref, weight=chosen.double())
    loss.backward()
    configure(monkeypatch, trainer, loss_type, level, algorithm)
    masks, theirs_of = [], trainer.get_high_entropy_mask
    monkeypatch.setattr(trainer, "get_high_entropy_mask", lambda *args: masks.append(theirs_of(*args)) or masks[-1])
    given = {"advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref}
    theirs = trainer._compute_loss(trainer.model, inputs_of(rollout) | given)
    theirs.backward()
    assert torch.equal(masks[0], chosen)
    assert_equal(policies[0], loss, trainer.model, theirs, 1e-6)


@pytest.mark.parametrize("scale", ["group", "batch_std", "centered"])
def test_advantages_are_trls(trainer, monkeypatch, scale):
    monkeypatch.setattr(trainer, "scale_rewards", {"batch_std": "batch", "centered": "none"}.get(scale, scale))
    inputs = [{"prompt": prompt, "answer": "5"} for prompt in PROMPTS for _ in range(G)]
    theirs = trainer._generate_and_score_completions(inputs)["advantages"]
    torch.testing.assert_close(group_advantages(REWARDS, scale).flatten(), theirs, rtol=0, atol=1e-6, check_dtype=False)


def test_each_reward_normalised_before_the_sum_is_trls(trainer, monkeypatch):
    """GDPO, with a function that is flat in a group."""
    second = torch.tensor([[1.0, 20.0, 0.0, 0.0], [5.0] * 4, [0.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
    values = torch.stack([REWARDS.double(), second], -1)
    weights = torch.tensor([0.7, 0.4])
    monkeypatch.setattr(trainer, "multi_objective_aggregation", "normalize_then_sum")
    monkeypatch.setattr(trainer, "reward_weights", weights)
    monkeypatch.setattr(trainer, "reward_funcs", [given_rewards] * 2)
    monkeypatch.setattr(trainer, "reward_func_names", ["one", "two"])
    monkeypatch.setattr(trainer, "reward_processing_classes", [None, None])
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *_: values.flatten(0, 1).float())
    inputs = [{"prompt": prompt, "answer": "5"} for prompt in PROMPTS for _ in range(G)]
    theirs = trainer._generate_and_score_completions(inputs)["advantages"]
    ours = mixed_advantages(Scores(values, weights.double()), ALGORITHMS["gdpo"]).flatten()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, check_dtype=False)


def test_leave_one_out_is_trls_rloo(policies, tmp_path):
    made = trl_trainer(policies, tmp_path, RLOOTrainer, RLOOConfig, given_rewards, normalize_advantages=False)
    inputs = [{"prompt": prompt, "answer": "5"} for prompt in PROMPTS for _ in range(G)]
    theirs = made._generate_and_score_completions(inputs)["advantages"]
    ours = group_advantages(REWARDS, "leave_one_out").flatten()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, check_dtype=False)


def test_the_overlong_penalty_is_trls():
    ids = [[0] * length for length in (1, 79, 80, 81, 90, 99, 100)]
    theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)(ids)
    assert soft_overlong(100, 0.2)(completion_ids=ids) == pytest.approx(theirs, abs=1e-12)


def test_trls_reward_functions_run_in_our_loop(random_policy, tmp_path):
    """`think_format_reward` reads message lists, so it gets a chat model's; the other one reads ids."""
    file = tmp_path / "theirs.py"
    file.write_text(
        "from trl.rewards import get_soft_overlong_punishment, think_format_reward\n"
        "overlong = get_soft_overlong_punishment(max_completion_len=12, soft_punish_cache=6)\n"
    )
    mix = parse_rewards(f"{file}:think_format_reward=1,{file}:overlong=0.5")
    examples = [Example([{"role": "user", "content": prompt}], {"answer": "5"}) for prompt in PROMPTS]
    policy = random_policy(end="05")
    policy.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    rollout = policy.sample(examples, G, (0, 0, 0), LENGTH)
    rollout.texts[0] = "<think>4-9=-5</think>-30"
    total, means = rewards_of(mix, examples, rollout)
    penalty = [-max(0.0, (length - 6) / 6) for length in rollout.mask.sum(1).tolist()]
    expected = [(i == 0) + 0.5 * value for i, value in enumerate(penalty)]
    assert total.flatten().tolist() == pytest.approx(expected, abs=1e-6) and min(penalty) == -1
    assert think_format_reward([[{"role": "assistant", "content": rollout.texts[0]}]]) == [1.0]
    assert means["reward/think_format_reward"] == pytest.approx(1 / 12)


TEXTS = ["1+4=5<answer>5</answer>", "<answer>6</answer>", "<answer>9</answer>", "5"]


def test_our_reward_functions_run_in_trls_trainer(policies, tmp_path):
    """On right, near and wrong answers they are what our loop makes of them; then a step of training with them."""
    functions = [answer_format, answer_near, answer_exact]
    made = trl_trainer(
        policies, tmp_path, GRPOTrainer, TRLConfig, functions, loss_type="grpo", reward_weights=[0.2, 0.2, 0.6]
    )
    examples = [Example(prompt, {"answer": "5"}) for prompt in PROMPTS]
    inputs = [{"prompt": prompt, "answer": "5"} for prompt in PROMPTS for _ in range(G)]
    ids = [[0]] * len(inputs)
    theirs = made._calculate_rewards(inputs, [row["prompt"] for row in inputs], TEXTS * 3, ids)
    rollout = SimpleNamespace(texts=TEXTS * 3, completion_ids=ids)
    mix = {f.__name__: (f, w) for f, w in zip(functions, (0.2, 0.2, 0.6), strict=True)}
    ours, _ = rewards_of(mix, examples, rollout)
    weighted = (theirs * torch.tensor([0.2, 0.2, 0.6])).sum(1)
    torch.testing.assert_close(ours.flatten(), weighted, rtol=0, atol=1e-6, check_dtype=False)
    assert ours[0].tolist() == pytest.approx([1.0, 0.4, 0.2, 0.0])
    made.train()
    (logged,) = [line for line in made.state.log_history if "reward" in line]
    assert {f"rewards/{f.__name__}/mean" for f in functions} <= logged.keys()
    assert logged["reward"] == pytest.approx(0.0)  # a random policy answers nothing


def test_one_step_of_ours_with_a_reward_of_trls(random_policy, tmp_path, monkeypatch):
    """From the command's point of view: --rewards FILE.py:NAME=WEIGHT with a function that is TRL's."""
    file = tmp_path / "theirs.py"
    file.write_text("from trl.rewards import get_soft_overlong_punishment\novl = get_soft_overlong_punishment(8, 8)\n")
    policy = random_policy(end="05")
    save(policy, tmp_path / "base")
    task = tasks.TASKS["arithmetic"]
    few = [Example(prompt, {"answer": "5"}) for prompt in PROMPTS]
    splits = {"train": few, "validation": few, "held_out": few}
    monkeypatch.setitem(tasks.TASKS, "arithmetic", dataclasses.replace(task, load=lambda **_: splits))
    config = grpo.GRPOConfig(
        model=str(tmp_path / "base"), out=str(tmp_path / "run"), rewards=f"{file}:ovl=1", steps=1, batch_size=3,
        num_generations=4, max_new_tokens=8,
    )  # fmt: skip
    grpo.train(config)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert line["reward/ovl"] == pytest.approx(-line["length"] / 8) == line["reward"]
