"""Properties that must hold for any input: of the formulas by generated examples, of the update for every algorithm."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import rewards_of, update_on

from algorithms import pairwise_advantages
from grpo import ALGORITHMS, GRPOConfig, group_advantages, loss_denominator, policy_loss
from policy import TokenPolicy
from rollouts import Rollout
from tasks import Example

pytestmark = pytest.mark.math

SCALES = ("group", "batch_std", "centered", "leave_one_out")  # max_rl and max_at_k do not sum to 0
numbers = st.floats(-100, 100, width=32)
groups = st.integers(2, 9).flatmap(lambda size: st.lists(st.lists(numbers, min_size=size, max_size=size), min_size=1))
scales = st.sampled_from(SCALES)
quick = settings(max_examples=60)


def float64(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@quick
@given(groups, scales, st.floats(-50, 50, width=32))
def test_advantages_sum_to_zero_and_do_not_change_when_all_rewards_rise_alike(rows, scale, shift):
    rewards = float64(rows)
    advantages = group_advantages(rewards, scale)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(len(rows)).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(group_advantages(rewards + shift, scale), advantages, rtol=1e-6, atol=1e-6)
    assert not advantages[rewards.amax(1) == rewards.amin(1)].any()


@quick
@given(groups, scales, st.floats(0.01, 100))
def test_the_scale_of_the_rewards_drops_out_or_stays_to_within_the_eps(rows, scale, factor):
    """`none` and `leave_one_out` are linear; the others divide by std + 1e-4: c * s / (c * s + 1e-4) of what it was."""
    rewards = float64(rows)
    before, after = group_advantages(rewards, scale), group_advantages(factor * rewards, scale)
    if scale in ("centered", "leave_one_out"):
        expected = factor * before
    else:
        std = rewards.std(1, keepdim=True) if scale == "group" else rewards.std()
        expected = before * (std + 1e-4) * factor / (factor * std + 1e-4)
        wide = std > 1e-2
        bound = 1e-4 / std.clamp(min=1e-12) * max(1, 1 / factor)
        assert (((after - before).abs() <= bound * before.abs() + 1e-9) | ~wide).all()
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)


@quick
@given(groups, scales, st.randoms(use_true_random=False))
def test_permutation_within_a_group_permutes_its_advantages(rows, scale, random):
    rewards = float64(rows)
    order = list(range(rewards.shape[1]))
    random.shuffle(order)
    torch.testing.assert_close(
        group_advantages(rewards[:, order], scale), group_advantages(rewards, scale)[:, order], rtol=1e-6, atol=1e-9
    )


@quick
@given(groups, st.floats(0.01, 100), st.floats(-50, 50, width=32))
def test_max_at_k_is_linear_from_0_up_and_does_not_change_when_all_rewards_rise_alike(rows, factor, shift):
    rewards = float64(rows)
    for k in range(2, rewards.shape[1] + 1):
        advantages = group_advantages(rewards, "max_at_k", k=k)
        assert (advantages >= -1e-9).all() and (advantages <= rewards.shape[1] * 200).all()
        for other, times in ((rewards + shift, 1.0), (rewards * factor, factor)):
            moved = group_advantages(other, "max_at_k", k=k)
            torch.testing.assert_close(moved, times * advantages, rtol=1e-6, atol=1e-6)


@quick
@given(groups)
def test_groups_do_not_see_each_other(rows):
    """But for `batch`, which is meant to."""
    rewards = float64(rows)
    for scale in ("group", "centered", "leave_one_out", "max_rl", "max_at_k"):
        given = rewards + 100 if scale == "max_rl" else rewards
        alone = torch.cat([group_advantages(row[None], scale, k=2) for row in given])
        torch.testing.assert_close(group_advantages(given, scale, k=2), alone, rtol=1e-12, atol=1e-12)


@quick
@given(groups, st.floats(0.1, 5))
def test_pairwise_advantages_sum_to_zero_and_lift_winners(rows, strength):
    rewards = float64(rows)
    means = -rewards.abs().sqrt()  # the likelier rows are not always the better ones
    advantages = pairwise_advantages(rewards, means, strength)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(len(rows)).double(), rtol=0, atol=1e-6)
    wins = rewards == rewards.amax(1, keepdim=True)
    assert (advantages[wins] >= 0).all() and (advantages[~wins] <= 0).all()
    assert not advantages[rewards.amax(1) == rewards.amin(1)].any()


@quick
@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.6, 0.7, None]), min_size=2, max_size=9),
    st.floats(0.1, 3),
    st.integers(0, 8),
)
def test_equal_rewards_are_a_flat_group_whatever_they_are_made_of(parts, weight, spare):
    """A None among equals, and totals that are equal as sums of other terms, must not come alive by rounding."""
    size, value = len(parts) + spare, next((part for part in parts if part is not None), 0.5)
    equal = [value if part is not None else None for part in parts] + [value] * spare
    swapped = [0.3 if i % 2 else 0.6 for i in range(size)]
    mix = {
        "equal": (lambda **_: equal, weight),
        "one": (lambda **_: swapped, 1.0),
        "other": (lambda **_: [0.9 - x for x in swapped], 1.0),
    }
    rollout = SimpleNamespace(texts=[""] * size, completion_ids=[[0]] * size)
    total, _ = rewards_of(mix, [Example("?")], rollout)
    for scale in (*SCALES, "max_rl", "max_at_k"):
        assert not group_advantages(total, scale, k=2).any()
    assert not pairwise_advantages(total, torch.randn(1, size), 2.0).any()


def batch(seed: int, rows: int = 6, length: int = 5):
    """logp, old, ref, advantages and a mask with rows of length 1 to `length`, in float64."""
    generator = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(rows, length, dtype=torch.float64, generator=generator)
    old, ref = (logp + 0.3 * torch.randn(logp.shape, dtype=torch.float64, generator=generator) for _ in range(2))
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    return logp, old, ref, torch.randn(rows, dtype=torch.float64, generator=generator), mask


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("kl_estimator", ["k2", "k3", "k3_unbiased"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_padding_changes_neither_value_nor_gradient(name, kl_estimator, garbage):
    algorithm = dataclasses.replace(ALGORITHMS[name], beta=0.1, kl_estimator=kl_estimator)
    logp, old, ref, advantages, mask = batch(0)
    results = []
    for fill in (0.0, garbage):
        tensors = [torch.where(mask, x, fill).requires_grad_() for x in (logp, old, ref)]
        loss, stats = policy_loss(tensors[0], tensors[1].detach(), advantages, mask, algorithm, tensors[2].detach())
        loss.backward()
        assert not tensors[0].grad[~mask].any() and tensors[0].grad[mask].isfinite().all()
        results.append((loss.detach(), tensors[0].grad, *stats.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@quick
@given(st.sampled_from(list(ALGORITHMS)), st.integers(0, 1000), st.lists(st.booleans(), min_size=5, max_size=5))
def test_any_split_gives_the_same_loss_and_gradient(name, seed, cuts):
    """One denominator for the whole step, so that micro-batches of 1, of 2, of all or of any sizes sum to the same."""
    algorithm = dataclasses.replace(ALGORITHMS[name], beta=0.1)
    logp, old, ref, advantages, mask = batch(seed)
    denominator = loss_denominator(mask, algorithm.aggregate, 7)
    edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 6]
    results = []
    for parts in ([slice(0, 6)], [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]):
        x = logp.clone().requires_grad_()
        total = sum(
            policy_loss(x[part], old[part], advantages[part], mask[part], algorithm, ref[part], denominator)[0]
            for part in parts
        )
        total.backward()
        results.append((total.detach(), x.grad))
    for whole, split in zip(*results, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-14)


@quick
@given(st.sampled_from(list(ALGORITHMS)), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(name, seed, random):
    algorithm = dataclasses.replace(ALGORITHMS[name], beta=0.1)
    logp, old, ref, advantages, mask = batch(seed)
    order = list(range(6))
    random.shuffle(order)
    loss, _ = policy_loss(logp, old, advantages, mask, algorithm, ref)
    mixed, _ = policy_loss(*(x[order] for x in (logp, old, advantages, mask)), algorithm, ref[order])
    torch.testing.assert_close(mixed, loss, rtol=1e-12, atol=1e-14)


EXAMPLES = [Example("(4 - 9) * 6?"), Example("12"), Example("7*8=?")]


@pytest.fixture(scope="module")
def world(random_policy):
    """A policy, a reference, and a rollout with rows of several lengths, some truncated; all in float64."""
    policy, reference = random_policy(end="05", seed=0), random_policy(end="05", seed=1)
    for one in (policy, reference):
        one.model.double()
    rollout = policy.sample(EXAMPLES, 4, (0, 1, 0), 8)
    assert rollout.truncated.any() and not rollout.truncated.all() and not rollout.prompt_mask.all()
    return policy, reference, rollout


def updated(world, name: str, rollout: Rollout | None = None, **more) -> torch.Tensor:
    """The change of all weights by two inner updates of plain gradient descent, as one vector."""
    policy, reference, sampled = world
    policy = copy.copy(policy)
    policy.model = copy.deepcopy(policy.model)
    config = GRPOConfig(
        **{"algorithm": name, "beta": 0.1, "max_new_tokens": 8, "num_inner_updates": 2, "clip_grad_norm": 1e9} | more
    )
    rewards = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.01)
    before = torch.cat([p.detach().flatten().clone() for p in policy.model.parameters()])
    update_on(policy, reference, optimizer, rollout or sampled, rewards, config)
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()]) - before


@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_of_1_of_2_and_of_all_rows_give_the_same_update(world, name):
    whole = updated(world, name, micro_batch_tokens=10**6)
    for budget in (1, 40, 70):  # single rows, pairs and more
        parts = updated(world, name, micro_batch_tokens=budget)
        assert (parts - whole).norm() <= 1e-6 * whole.norm(), budget
    assert whole.norm() > 1e-4


@pytest.mark.parametrize("name", ALGORITHMS)
def test_ids_at_padding_change_nothing(world, name):
    rollout = world[2]
    other = dataclasses.replace(
        rollout,
        prompts=torch.where(rollout.prompt_mask, rollout.prompts, 7),
        actions=torch.where(rollout.mask, rollout.actions, 9),
    )
    assert not torch.equal(other.prompts, rollout.prompts) and not torch.equal(other.actions, rollout.actions)
    expected = updated(world, name)
    assert (updated(world, name, other) - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_completions_get_a_policy_gradient_up_to_the_end_token_and_prompts_get_none(world, name):
    """Seen at the hidden states (B, L + T - 1, C) that the logits are made of; the last prompt token's comes first."""
    policy, _, rollout = world
    kept = []

    def keep(module, inputs, hidden):
        hidden.retain_grad()
        kept.append(hidden)

    handle = policy.model.register_forward_hook(keep)
    logp, _ = policy.log_probs(rollout, layout="joined")
    handle.remove()
    advantages = torch.linspace(-1, 1, len(logp)).double()  # none of them 0
    policy_loss(logp, logp.detach(), advantages, rollout.mask, ALGORITHMS[name])[0].backward()
    alive = kept[0].grad.abs().sum(-1) > 0
    first = rollout.prompts.shape[1] - 1
    assert not alive[:, :first].any(), "prompt tokens are given, not chosen"
    assert torch.equal(alive[:, first:], rollout.mask)
    ended = ~rollout.truncated
    last = rollout.mask.sum(1) - 1
    assert torch.isin(rollout.actions[ended, last[ended]], torch.tensor(policy.end_ids)).all()
    assert alive[ended, first + last[ended]].all(), "stopping is an action like any other"
    given = policy.encode([example.prompt for example in EXAMPLES])
    assert [ids[keep].tolist() for ids, keep in zip(rollout.prompts, rollout.prompt_mask, strict=True)] == given
    assert rollout.mask[rollout.truncated].all(), "a truncated row has all its tokens in the loss, and no end token"
    assert not torch.isin(rollout.actions[rollout.truncated], torch.tensor(policy.end_ids)).any()


def test_the_first_inner_update_has_ratio_1_for_every_algorithm(world):
    policy, _, rollout = world
    for name in ALGORITHMS:
        config = GRPOConfig(algorithm=name, max_new_tokens=8, beta=0.0)
        copied: TokenPolicy = copy.copy(policy)
        copied.model = copy.deepcopy(policy.model)
        optimizer = torch.optim.SGD(copied.model.parameters(), lr=0.01)
        rewards = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
        metrics = update_on(copied, None, optimizer, rollout, rewards, config)
        assert metrics["ratio_max"] == 1 and metrics["clip_low"] == metrics["clip_high"] == 0
