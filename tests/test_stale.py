"""Rollouts of an older or a cheaper policy: which weights sample, and what corrects for it; top-entropy tokens."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from steps import update_on
from test_grpo import EXAMPLES, lines_of, same, settings, small_arithmetic, tiny_policy, weights_of

import checkpoints
import grpo
import tasks
from checkpoints import load
from commands import NotFinite, UserError
from grpo import ALGORITHMS, Algorithm, GRPOConfig, correction_weight, high_entropy_tokens, policy_loss
from policy import TokenPolicy, frozen
from tasks import Example

ROW = ALGORITHMS["rloo"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    checkpoints.save(tiny_policy(), folder)
    return folder


@pytest.fixture
def small_task(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "arithmetic", small_arithmetic())


def weights(policy) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}


@pytest.mark.parametrize("failed", [None, "at once", "in a later inner update"])
@pytest.mark.parametrize("lag", [1, 3])
def test_a_rollout_is_of_the_policy_so_many_steps_ago(base, tmp_path, small_task, monkeypatch, lag, failed):
    """A skipped step is a step, whether it has moved the policy or not."""
    trained, sampled, step, update = [], [], grpo.train_step, grpo.update

    def watched(run, number):
        trained.append(weights(run.policy))
        sampled.append(weights(run.sampler))
        assert not any(weight.requires_grad for weight in run.sampler.model.parameters())
        return step(run, number)

    def failing(*given):
        third = len(trained) == 3
        metrics = None if third and failed == "at once" else update(*given)
        if third and failed:
            raise NotFinite("the loss is nan", [])
        return metrics

    monkeypatch.setattr(grpo, "train_step", watched)
    monkeypatch.setattr(grpo, "update", failing)
    grpo.train(settings(base, tmp_path / "run", steps=7, rollout_lag=lag, warmup_steps=0))
    assert [same(*pair) for pair in zip(trained, trained[1:], strict=False)].count(True) == (failed == "at once")
    for number, weight in enumerate(sampled):
        assert same(weight, trained[max(0, number - lag)])
    assert all(x.data_ptr() != y.data_ptr() for x, y in zip(sampled[0].values(), sampled[1].values(), strict=True))


def test_what_it_samples_is_what_is_learned_from(base, tmp_path, small_task, monkeypatch):
    """The completions are the old policy's own, log-probabilities and all; evaluation and samples are the new one's."""
    seen, actors, update, sample = [], [], grpo.update, TokenPolicy.sample

    def watched(policy, reference, optimizer, rollout, *rest):
        metrics = update(policy, reference, optimizer, rollout, *rest)
        seen.append((rollout, metrics))
        return metrics

    monkeypatch.setattr(grpo, "update", watched)
    monkeypatch.setattr(TokenPolicy, "sample", lambda self, *a, **b: (actors.append(self), sample(self, *a, **b))[1])
    run = grpo.train(settings(base, tmp_path / "run", steps=3, rollout_lag=2, learning_rate=0.01, warmup_steps=0))
    start = load(base, "cpu")
    for rollout, _ in seen:  # all of the base policy
        own = start.log_probs(rollout)[0].detach()
        torch.testing.assert_close(rollout.sampler_logp, own, rtol=0, atol=1e-5)
    gaps = [metrics["sampler_gap"] for _, metrics in seen]
    assert gaps[0] < 1e-5 < 1e-3 < gaps[1] < gaps[2]
    assert abs(seen[0][1]["sampler_kl"]) < 1e-6
    known = [line["sampler_kl"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")[1:]]
    assert known == [metrics["sampler_kl"] for _, metrics in seen]
    learners = [actor for actor in actors if actor is run.policy]
    assert len(learners) == len(actors) - 3  # base, validations, shown groups


@pytest.mark.parametrize("how", [{"rollout_lag": 2}, {"sampler_dtype": "bfloat16"}])
def test_resumed_with_its_samplers_it_is_bitwise_the_run_that_was_not_cut(base, tmp_path, small_task, monkeypatch, how):
    more = {"steps": 6, "learning_rate": 0.01, "correction": "truncate", **how}
    whole = grpo.train(settings(base, tmp_path / "whole", **more))
    step, config = grpo.train_step, settings(base, tmp_path / "cut", **more)

    def die(run, number):
        if number > 4:
            raise KeyboardInterrupt
        return step(run, number)

    monkeypatch.setattr(grpo, "train_step", die)
    with pytest.raises(KeyboardInterrupt):
        grpo.train(config)
    monkeypatch.setattr(grpo, "train_step", step)
    resumed = grpo.train(dataclasses.replace(config, resume=True))
    assert same(weights_of(whole), weights_of(resumed))
    assert lines_of(tmp_path / "whole" / "metrics.jsonl") == lines_of(tmp_path / "cut" / "metrics.jsonl")


def test_a_cheaper_sampler_has_the_weights_of_the_policy_as_it_is_now(base, tmp_path, small_task, monkeypatch):
    step, gaps = grpo.train_step, []

    def watched(run, number):
        assert run.sampler is not run.policy and run.sampler.dtype == torch.bfloat16
        mine, its = run.policy.model.state_dict(), run.sampler.model.state_dict()
        assert {weight.dtype for weight in its.values()} == {torch.float32, torch.bfloat16}
        assert all(torch.equal(mine[name].to(its[name].dtype), its[name]) for name in mine)
        metrics = step(run, number)
        gaps.append(metrics["sampler_gap"])
        return metrics

    monkeypatch.setattr(grpo, "train_step", watched)
    grpo.train(settings(base, tmp_path / "run", sampler_dtype="bfloat16", learning_rate=0.01))
    assert min(gaps) > 1e-5
    plain = grpo.prepare(settings(base, tmp_path / "plain"))
    assert plain.sampler is plain.policy and not plain.samplers
    twin = grpo.prepare(
        settings(base, tmp_path / "twin", sampler_dtype="float32")
    )  # on another device --dtype may differ
    assert twin.sampler is not twin.policy and twin.sampler.dtype == torch.float32


def test_weights_by_hand():
    """Three tokens of ratios 1/2, 4 and 1, and a row of one with garbage after it; the products are 2 and 8."""
    log_rho = torch.tensor([[0.5, 4.0, 1.0], [8.0, math.nan, math.inf]]).log()
    mask = torch.tensor([[True] * 3, [True, False, False]])
    row = dataclasses.replace(ROW, correction="truncate", correction_high=3.0, correction_low=0.6)

    def given(**cells) -> list[list[float]]:
        return correction_weight(log_rho, mask, dataclasses.replace(row, **cells)).tolist()

    def near(values: list[float]) -> object:
        return pytest.approx(values, abs=1e-6)

    assert [near(x) for x in given()] == [[0.5, 3, 1], [3, 1, 1]]
    assert [near(x) for x in given(correction="mask")] == [[0, 0, 1], [0, 1, 1]]
    assert [near(x) for x in given(correction_level="sequence")] == [[2] * 3, [3] * 3]
    assert [near(x) for x in given(correction="mask", correction_level="sequence")] == [[2] * 3, [0] * 3]
    assert [near(x) for x in given(correction="mask", correction_low=0.5, correction_high=4.0)][0] == [0.5, 4, 1]


def test_the_weight_is_on_the_surrogate_alone():
    """KL, anchor and entropy bonus are as without it, and so is the denominator."""
    generator = torch.Generator().manual_seed(0)
    logp, old, ref, weight = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    advantages, mask = torch.tensor([1.0, -2.0]).double(), torch.tensor([[True] * 3, [True, True, False]])
    row = dataclasses.replace(ROW, beta=0.3, anchor=0.4, entropy_bonus=0.5, surrogate="reinforce")

    entropy = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    entropy[1, 2] = math.nan  # padding

    def loss(how, advantages=advantages) -> float:
        return policy_loss(logp, old, advantages, mask, row, ref, weight=how, entropy=entropy)[0].item()

    other = loss(None, 0 * advantages)
    weighed = -(advantages[:, None] * logp * weight)[mask].sum().item() / 6
    assert loss(weight) == pytest.approx(other + weighed, abs=1e-12)
    assert other == pytest.approx(loss(weight, 0 * advantages), abs=1e-12) != pytest.approx(0, abs=1e-3)
    bonus = 0.5 * ((logp + entropy) * logp)[mask].sum().item() / 6
    without = dataclasses.replace(row, entropy_bonus=0.0)
    plain = policy_loss(logp, old, 0 * advantages, mask, without, ref)[0].item()
    assert other == pytest.approx(plain + bonus, abs=1e-12)


def test_an_update_ascends_the_entropy(rollout):
    """By the mean over a step's tokens of (log pi + H) * log pi, with the exact entropy."""
    policy, sampled = rollout
    step, _ = moved(policy, sampled, plain(entropy_bonus=0.2, micro_batch_tokens=40))
    without, _ = moved(policy, sampled, plain())
    logp, entropy = policy.log_probs(sampled)
    loss = 0.2 * ((logp + entropy).detach() * logp).sum() / (len(logp) * 9)
    gradient = torch.autograd.grad(loss, list(policy.model.parameters()))
    torch.testing.assert_close(step - without, -torch.cat([x.flatten() for x in gradient]), rtol=1e-6, atol=1e-9)


@pytest.fixture
def rollout(random_policy):
    policy = random_policy(end="05")
    policy.model.double()
    return policy, policy.sample([Example("1+2="), Example("(4-9)*6=")], 4, (0, 1, 0), 9)


def moved(policy, rollout, config: GRPOConfig) -> tuple[torch.Tensor, dict]:
    """What a step of plain gradient descent adds to the weights, and its metrics."""
    copy = frozen(policy)
    copy.model.requires_grad_(True)
    before = torch.cat([weight.detach().flatten().clone() for weight in copy.model.parameters()])
    optimizer = torch.optim.SGD(copy.model.parameters(), 1.0)
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.2], [0.0, 0.3, 0.3, 1.0]], dtype=torch.float64)
    metrics = update_on(copy, None, optimizer, rollout, rewards, config)
    after = torch.cat([weight.detach().flatten() for weight in copy.model.parameters()])
    return after - before, metrics


def plain(**more) -> GRPOConfig:
    given = {"algorithm": "rloo", "max_new_tokens": 9, "clip_grad_norm": 1e9, "micro_batch_tokens": 1000}
    return GRPOConfig(**given | more)


@pytest.mark.parametrize("inner", [1, 2])
def test_an_update_weighs_tokens_by_policy_over_sampler(rollout, inner):
    """The sampler gave each token a third of the probability: the weight is 3, or 2 where it is truncated."""
    policy, sampled = rollout
    more = {"num_inner_updates": inner, "surrogate": "reinforce", "micro_batch_tokens": 40}
    step, metrics = moved(policy, sampled, plain(**more))
    assert "weight" not in metrics and step.norm() > 1e-3
    sampled.sampler_logp = torch.where(sampled.mask, sampled.sampler_logp - math.log(3), 0.0)
    for weight, cells in ((3, {"correction_high": 5.0}), (2, {}), (0, {"correction": "mask"})):
        corrected, metrics = moved(
            policy, sampled, plain(correction=cells.pop("correction", "truncate"), **cells, **more)
        )
        assert metrics["weight"] == pytest.approx(weight, abs=1e-6)
        assert metrics["sampler_kl"] == pytest.approx(-math.log(3), abs=1e-6)
        if inner == 1:
            torch.testing.assert_close(corrected, weight * step, rtol=1e-6, atol=1e-9)
    sequence, metrics = moved(
        policy, sampled, plain(correction="truncate", correction_high=1e18, correction_level="sequence", **more)
    )
    lengths = sampled.mask.sum(1).double()
    assert metrics["weight"] == pytest.approx(((lengths * 3**lengths).sum() / lengths.sum()).item(), rel=1e-6)


def test_the_tokens_of_highest_entropy_are_a_share_of_the_whole_batch(rollout):
    policy, sampled = rollout
    entropy = policy.log_probs(sampled)[1]
    ordered = np.sort(entropy[sampled.mask].numpy())
    for share in (0.2, 0.5, 0.99):
        row = dataclasses.replace(ROW, top_entropy=share)
        chosen = [high_entropy_tokens(policy, sampled, row, budget) for budget in (1000, 30)]
        assert torch.equal(*chosen) and chosen[0].shape == sampled.mask.shape
        count = int((chosen[0] & sampled.mask).sum())
        assert count == math.floor(share * (len(ordered) - 1)) + 1
        assert entropy[chosen[0] & sampled.mask].min() == ordered[-count]
    assert high_entropy_tokens(policy, sampled, ROW, 1000) is None


def test_correction_and_top_entropy_multiply_and_are_measured_on_the_tokens_of_the_loss(rollout):
    policy, sampled = rollout
    more = {"correction": "truncate", "correction_high": 0.5, "top_entropy": 0.4, "mask_truncated": True}
    sampled.truncated[2] = True
    row = dataclasses.replace(ROW, top_entropy=0.4, mask_truncated=True)
    high, kept = high_entropy_tokens(policy, sampled, row, 1000), sampled.mask & ~sampled.truncated[:, None]
    step, metrics = moved(policy, sampled, plain(**more))
    assert metrics["weight"] == pytest.approx(0.5 * ((high & kept).sum() / kept.sum()).item(), abs=1e-6)
    alone, _ = moved(policy, sampled, plain(top_entropy=0.4, mask_truncated=True))
    torch.testing.assert_close(step, alone / 2, rtol=1e-6, atol=1e-9)
    sampled.sampler_logp = torch.where(kept, sampled.sampler_logp + 0.25, sampled.sampler_logp + 9)
    assert moved(policy, sampled, plain(**more))[1]["sampler_kl"] == pytest.approx(0.25, abs=1e-6)


def test_the_step_that_is_shown_is_the_one_that_would_be_taken(base, tmp_path, small_task, capsys):
    """With the sampler's completions, importance weights and high-entropy tokens."""

    def shown(**more) -> str:
        run = grpo.prepare(settings(base, tmp_path / "none", trace=True, beta=0.0, **more))
        return grpo.explain.page(run, grpo)

    plain = shown()
    assert " up " in plain and " up " not in shown(correction="mask", correction_low=1.5, correction_high=3.0)
    assert shown(top_entropy=0.3).count("nothing") > plain.count("nothing")
    assert shown(sampler_dtype="bfloat16", correction="truncate") != plain


def test_where_all_rows_are_left_out_none_is_chosen(rollout):
    policy, sampled = rollout
    sampled.truncated[:] = True
    row = dataclasses.replace(ROW, top_entropy=0.3, mask_truncated=True)
    assert not high_entropy_tokens(policy, sampled, row, 1000).any()


def test_rewards_act_on_the_chosen_tokens_only(rollout, monkeypatch):
    """The step is that of a weight of 0 and 1, the denominator that of all tokens, whatever the micro-batches."""
    policy, sampled = rollout
    row = dataclasses.replace(ROW, top_entropy=0.3)
    chosen = high_entropy_tokens(policy, sampled, row, 1000)
    steps = [moved(policy, sampled, plain(top_entropy=0.3, micro_batch_tokens=budget)) for budget in (1000, 40)]
    torch.testing.assert_close(steps[0][0], steps[1][0], rtol=1e-9, atol=1e-12)
    share = (chosen & sampled.mask).sum() / sampled.mask.sum()
    assert steps[0][1]["weight"] == pytest.approx(share.item(), abs=1e-6)
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.2], [0.0, 0.3, 0.3, 1.0]], dtype=torch.float64)
    logp = policy.log_probs(sampled)[0]
    advantages = grpo.group_advantages(rewards, "leave_one_out").flatten()[:, None]
    loss = -(advantages * logp * (chosen & sampled.mask)).sum() / (len(logp) * 9)
    gradient = torch.autograd.grad(loss, list(policy.model.parameters()))
    torch.testing.assert_close(steps[0][0], -torch.cat([x.flatten() for x in gradient]), rtol=1e-6, atol=1e-9)
    monkeypatch.setattr(grpo.ranks, "gather", lambda value: [value, torch.full_like(value, 1e9)])  # another rank's
    assert not (high_entropy_tokens(policy, sampled, row, 1000) & sampled.mask).any()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_corrections_stay_as_they_were_at_the_first_inner_update(level):
    """What another policy sampled, three inner updates long: pi_old / sampler, cut at 2, and not pi / sampler."""
    policy, other = tiny_policy(0), tiny_policy(1)
    rollout = other.sample(EXAMPLES, 4, (0, 1, 0), 8)
    with torch.no_grad():
        gap = torch.where(rollout.mask, policy.log_probs(rollout)[0] - rollout.sampler_logp, 0.0)
    gap = gap if level == "token" else gap.sum(1, keepdim=True).expand_as(gap)
    expected = gap.exp().clamp(max=2.0)[rollout.mask].mean().item()
    config = GRPOConfig(beta=0.0, max_new_tokens=8, num_inner_updates=3, correction="truncate", correction_level=level)
    rewards = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    metrics = update_on(policy, None, optimizer, rollout, rewards, config)
    assert metrics["ratio_max"] > 1.1 and abs(expected - 1) > 0.01
    assert metrics["weight"] == pytest.approx(expected, rel=1e-5)


def test_the_tokens_of_highest_entropy_by_hand(monkeypatch):
    """Entropies 1 to 6 of which half are wanted: the threshold is 3.5, whatever stands at padding."""
    policy = tiny_policy()
    rollout = policy.sample(EXAMPLES[:1], 2, (0, 1, 0), 8)
    entropy = torch.tensor([[4.0, 1.0, 0.0, 0.0], [3.0, 2.0, 5.0, 6.0]])
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    rollout = dataclasses.replace(rollout, mask=mask)
    monkeypatch.setattr(grpo, "score_rollout", lambda *_, **__: entropy)
    row = Algorithm(top_entropy=0.5)
    chosen = high_entropy_tokens(policy, rollout, row, 10**6)
    assert (chosen & mask).tolist() == [[True, False, False, False], [False, False, True, True]]
    cut = dataclasses.replace(rollout, truncated=torch.tensor([True, False]))  # 3, 2, 5 and 6 are left
    chosen = high_entropy_tokens(policy, cut, dataclasses.replace(row, mask_truncated=True), 10**6)
    assert chosen[1].tolist() == [False, False, True, True] and chosen[0, 0]
    assert high_entropy_tokens(policy, rollout, Algorithm(), 10**6) is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"sampler_dtype": "bfloat16", "policy": "autoencoder", "task": "odd_even"},
            "--sampler-dtype is for transformers",
        ),
        ({"entropy_bonus": 0.1, "policy": "autoencoder", "task": "odd_even"}, "an autoencoder's entropy is constant"),
        ({"top_entropy": 0.1, "policy": "autoencoder", "task": "odd_even"}, "an autoencoder's entropy is constant"),
        ({"rollout_lag": 40}, "--rollout-lag is 40; it must be below --steps, 40"),
        ({"rollout_lag": -1}, "--rollout-lag is -1"),
        ({"top_entropy": 0.0}, "--top-entropy is 0.0"),
        ({"top_entropy": 1.5}, "--top-entropy is 1.5"),
        ({"correction": "mask", "correction_low": 3.0}, "--correction-low is 3.0, above --correction-high"),
        ({"correction_high": 3.0}, "--correction-high does nothing without a --correction"),
        ({"correction": "truncate", "correction_low": 0.1}, "--correction-low does nothing without --correction mask"),
        ({"surrogate": "reinforce", "ratio": "sequence"}, "--ratio does nothing without a --surrogate that has one"),
    ],
)
def test_mistakes_are_told(more, words):
    with pytest.raises(UserError, match=words):
        GRPOConfig(**more)


def test_reinforce_has_a_ratio_where_the_kl_term_has_one():
    logp, old, ref = torch.tensor([[[-1.0, -2.0]], [[-1.5, -1.0]], [[-2.0, -1.2]]])
    losses = []
    for ratio in ("token", "sequence"):
        row = GRPOConfig(surrogate="reinforce", ratio=ratio, kl_estimator="k3_unbiased").resolved_algorithm
        assert f"ratio {ratio}" in str(row)
        losses.append(policy_loss(logp, old, torch.zeros(1), torch.ones(1, 2, dtype=torch.bool), row, ref)[0].item())
    (a, b), (x, y) = (0.5, -1.0), (-1.0, 0.8)  # log-ratios, and log ref - log pi
    kl = [math.exp(d) - d - 1 for d in (x, y)]
    by_token = 0.04 * (math.exp(a) * kl[0] + math.exp(b) * kl[1]) / 2
    assert losses == pytest.approx([by_token, 0.04 * math.exp((a + b) / 2) * sum(kl) / 2])


@pytest.mark.parametrize("more", [{"rollout_lag": 1}, {"sampler_dtype": "bfloat16"}])
def test_whole_copies_are_refused_where_weights_are_sharded(monkeypatch, more):
    monkeypatch.setattr(grpo.ranks, "WORLD", 2)
    with pytest.raises(UserError, match="keep whole copies of the policy; leave out --shard"):
        GRPOConfig(shard=True, **more)
