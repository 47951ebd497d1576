"""Values that a person can check by hand, and gradients against finite differences."""

import dataclasses
import itertools
import math

import pytest
import torch

import commands
from algorithms import pairwise_advantages
from commands import UserError
from grpo import (
    ALGORITHMS,
    Algorithm,
    GRPOConfig,
    flat_groups,
    group_advantages,
    kl_penalty,
    loss_denominator,
    mixed_advantages,
    policy_loss,
)
from inference import pass_at_k, wilson
from rewards import Scores, soft_overlong

pytestmark = pytest.mark.math

PLAIN = Algorithm(surrogate="reinforce", beta=0.0)


# advantage, ratio, surrogate, epsilon, epsilon_high, aggregate, beta, kl_estimator, max_resample, overlong_buffer, s,
# combine, k, cap, anchor, off_policy_limit, mask_truncated, correction, its level, low and high, top_entropy, bonus
OFF = ("sum", 4, 0.0, 0.0, 0.0, False, "none", "token", 0.5, 2.0, 1.0, 0.0)


def anchored(anchor: float) -> tuple:
    return (*OFF[:3], anchor, *OFF[4:])


TABLE = {
    "grpo": ("group", "token", "clip", 0.2, 0.2, "sequence_mean", 0.04, "k3", 0, 0.0, 2.0, *OFF),
    "dr_grpo": ("centered", "token", "clip", 0.2, 0.2, "constant", 0.0, "k3", 0, 0.0, 2.0, *OFF),
    "dapo": ("group", "token", "clip", 0.2, 0.28, "token_mean", 0.0, "k3", 3, 0.2, 2.0, *OFF),
    "gspo": ("group", "sequence", "clip", 3e-4, 4e-4, "sequence_mean", 0.0, "k3", 0, 0.0, 2.0, *OFF),
    "cispo": ("group", "token", "cispo", 1.0, 4.0, "token_mean", 0.0, "k3", 0, 0.0, 2.0, *OFF),
    "rloo": ("leave_one_out", "token", "clip", 0.2, 0.2, "constant", 0.0, "k3", 0, 0.0, 2.0, *OFF),
    "pairwise": ("pairwise", "token", "reinforce", 0.2, 0.2, "sequence_mean", 0.0, "k3", 0, 0.0, 2.0, *OFF),
    "luspo": ("group", "sequence", "clip", 2e-3, 2.5e-3, "constant", 0.0, "k3", 0, 0.0, 2.0, *OFF),
    "sapo": ("group", "token", "sapo", 0.2, 0.2, "sequence_mean", 0.0, "k3", 0, 0.0, 2.0, *OFF),
    "gmpo": ("group", "token", "geometric", 0.4, 0.4, "sequence_mean", 0.0, "k3", 0, 0.0, 2.0, *OFF),
    "dppo": ("group", "token", "dppo", 0.15, 0.15, "token_mean", 0.0, "k3", 0, 0.0, 2.0, *OFF),
    "prime": ("centered", "token", "dppo", 0.2, 0.2, "token_mean", 0.0, "k3", 0, 0.0, 2.0, *anchored(2e-3)),
    "kimi": ("centered", "token", "reinforce", 0.2, 0.2, "token_mean", 0.0, "k3", 0, 0.0, 2.0, *anchored(0.2)),
    "maxrl": ("max_rl", "token", "clip", 0.2, 0.2, "constant", 0.0, "k3", 0, 0.0, 2.0, *OFF),
    "passk": ("max_at_k", "token", "clip", 0.2, 0.2, "constant", 0.0, "k3", 0, 0.0, 2.0, *OFF),
    "gdpo": ("batch_std", "token", "clip", 0.2, 0.2, "sequence_mean", 0.0, "k3", 0, 0.0, 2.0, "each", *OFF[1:]),
}


def test_the_rows_of_the_table_are_those_of_the_papers():
    assert {name: dataclasses.astuple(row) for name, row in ALGORITHMS.items()} == TABLE


@pytest.mark.parametrize(
    ("scale", "first", "second"),
    [
        # mean 1/2, deviations +-1/2, unbiased variance 4 * (1/4) / 3 = 1/3
        ("group", 0.5 / (math.sqrt(1 / 3) + 1e-4), -0.5 / (math.sqrt(1 / 3) + 1e-4)),
        # all eight rewards: mean 1/4, unbiased variance (2 * 9/16 + 6 * 1/16) / 7 = 3/14
        ("batch_std", 0.5 / (math.sqrt(3 / 14) + 1e-4), -0.5 / (math.sqrt(3 / 14) + 1e-4)),
        ("centered", 0.5, -0.5),
        # 1 - (0 + 0 + 1) / 3, and 0 - (1 + 0 + 1) / 3
        ("leave_one_out", 2 / 3, -2 / 3),
    ],
)
def test_advantages_by_hand(scale, first, second):
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), scale)
    torch.testing.assert_close(advantages[0], torch.tensor([first, second, second, first]), rtol=1e-6, atol=0)
    assert torch.equal(advantages[1], torch.zeros(4))


def test_max_rl_by_hand():
    """Mean 1/4: one right of four has 3/4 over 1/4. A negative reward could turn every sign."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    assert group_advantages(rewards, "max_rl").tolist() == [[3.0, -1.0, -1.0, -1.0], [0.0] * 4, [0.0] * 4]
    with pytest.raises(UserError, match="there is a reward of -0.5, below 0"):
        group_advantages(rewards - 0.5, "max_rl")


def test_max_at_k_by_hand():
    """Of the 6 pairs of 4, 3 beats 1 in two ways, and so on: 4/6 times the sum of what it beats the others by."""
    advantages = group_advantages(torch.tensor([[3.0, 1.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]]), "max_at_k", k=2)
    assert advantages.flatten().tolist() == pytest.approx([14 / 3, 2 / 3, 0, 2 / 3, 0, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_max_at_k_is_the_sum_over_subsets(k):
    """Each subset of k gives its best one what that adds over the second best; G over their number."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 5, (5,), generator=generator).double()
    expected = torch.zeros(5).double()
    for subset in itertools.combinations(range(5), k):
        *_, second, best = sorted(subset, key=lambda i: rewards[i])
        expected[best] += 5 / math.comb(5, k) * (rewards[best] - rewards[second])
    torch.testing.assert_close(group_advantages(rewards[None], "max_at_k", k=k)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_group_with_more_than_enough_successes_is_silent_under_max_at_k():
    for successes in range(7):
        advantages = group_advantages(torch.tensor([[1.0] * successes + [0.0] * (6 - successes)]), "max_at_k", k=3)
        assert advantages.any() == (0 < successes <= 6 - 3 + 1), "k - 1 failures are needed"


NAN = math.nan


@pytest.mark.parametrize("advantage", ["centered", "batch_std"])
def test_each_reward_is_normalised_in_its_group_by_hand(advantage):
    """Two functions, the second of a hundred times the scale; then the first is flat, and then the second missing."""
    first, second = [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]], [[0.0, 100.0], [300.0, 100.0], [NAN, NAN]]
    values = torch.stack([torch.tensor(first), torch.tensor(second)], -1).double()
    scores = Scores(values, torch.tensor([1.0, 3.0]).double())
    # The std of a group of two is its difference over sqrt(2), the deviation half of the difference.
    one, hundred, twice = (half / (half * math.sqrt(2) + 1e-4) for half in (0.5, 50, 100))
    expected = torch.tensor([[one - 3 * hundred], [3 * twice], [one]]) * torch.tensor([1.0, -1.0])
    if advantage == "batch_std":
        expected = expected / (expected.std() + 1e-4)
    found = mixed_advantages(scores, Algorithm(advantage=advantage, combine="each"))
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-6)


def test_under_each_a_group_is_flat_only_if_every_function_is():
    """1 + 0 against 0 + 1: an equal sum, but alive, and with unlike weights not silent."""
    scores = Scores(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]).double(), torch.ones(2).double())
    each, total = Algorithm(advantage="centered", combine="each"), Algorithm()
    assert flat_groups(scores, each).tolist() == [False, True] and flat_groups(scores, total).tolist() == [True, True]
    halves = Scores(scores.values * torch.tensor([1.0, 0.5]), torch.tensor([1.0, 2.0]).double())
    assert halves.total[0].tolist() == [1.0, 1.0] and not mixed_advantages(halves, total).any()
    assert mixed_advantages(halves, each)[0].abs().min() > 0.7 and not mixed_advantages(halves, each)[1].any()


def test_the_batch_mean_is_the_one_baseline_that_is_not_the_groups():
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), "batch_mean")
    assert advantages.tolist() == [[0.75, -0.25, -0.25, 0.75], [-0.25] * 4]  # a flat group is not 0
    assert group_advantages(torch.tensor([[1.0], [0.0]]), "batch_mean").tolist() == [
        [0.5],
        [-0.5],
    ]  # nor G = 1 an error


KNOWN = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.5, 0.0]])


@pytest.mark.parametrize(
    ("scale", "first", "second", "filled"),
    [
        ("group", 0.5 / (math.sqrt(0.5) + 1e-4), -0.5 / (math.sqrt(0.5) + 1e-4), 0.3 / (math.sqrt(0.5) + 1e-4)),
        # five given in full, 1, 0, 1, 1, 0: mean 3/5, variance (3 * 4/25 + 2 * 9/25) / 4 = 3/10
        ("batch_std", 0.5 / (math.sqrt(0.3) + 1e-4), -0.5 / (math.sqrt(0.3) + 1e-4), 0.3 / (math.sqrt(0.3) + 1e-4)),
        ("centered", 0.5, -0.5, 0.3),
        ("leave_one_out", 1.0, -1.0, 0.3),  # against the other one that was given, or both
        ("batch_mean", 0.4, -0.6, 0.2),
    ],
)
def test_what_was_filled_in_is_no_observation(scale, first, second, filled):
    """Two of four given, one of four, and two with a third of which a part was."""
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.8, 0.5]])
    advantages = group_advantages(rewards, scale, KNOWN)
    alone = 0.4 if scale == "batch_mean" else 0.0
    expected = [[first, second, 0, 0], [alone, 0, 0, 0], [first, second, filled, 0]]
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=1e-5, atol=1e-7)


def test_where_the_given_rewards_are_equal_all_rows_count():
    """Else a row of which a part was filled would be 0.5 / 1e-4 away from them."""
    advantages = group_advantages(torch.tensor([[1.0, 1.0, 0.5, 0.5]]), "group", torch.tensor([[1.0, 1.0, 0.5, 0.5]]))
    assert advantages[0].tolist() == pytest.approx([0.866, 0.866, -0.866, -0.866], abs=1e-3)


def test_a_row_without_any_reward_neither_wins_nor_loses():
    order = group_advantages(torch.tensor([[1.0, 0.0, 0.5, 0.5]]), "pairwise", KNOWN[:1])
    assert pairwise_advantages(order, torch.zeros(1, 4), 2.0).tolist() == [[4.0, -4.0, 0.0, 0.0]]


def test_pairwise_keeps_the_order_and_an_unknown_scale_is_an_error():
    rewards = torch.tensor([[3.0, 1.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert group_advantages(rewards, "pairwise").tolist() == [[1.0, -1.0, 1.0, -1.0], [0.0] * 4]
    with pytest.raises(ValueError, match="no scale 'none'"):
        group_advantages(rewards, "none")


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.2 + 0.2 + 0.6, 1e6])
@pytest.mark.parametrize("scale", ["group", "batch_std", "centered", "leave_one_out"])
def test_flat_group_is_exactly_zero(value, scale):
    # 0.1 seven times has a mean that is not 0.1 in float32: dividing that rounding by the 1e-4 would be visible
    assert torch.equal(group_advantages(torch.full((2, 7), value), scale), torch.zeros(2, 7))


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(4, 1))


def test_overlong_penalty_by_hand():
    """Limit 100, buffer a fifth: nothing up to 80 tokens, then a twentieth for each token."""
    lengths = (1, 80, 81, 90, 99, 100)
    values = soft_overlong(100, 0.2)(completion_ids=[[0] * length for length in lengths])
    assert values == pytest.approx([0.0, 0.0, -0.05, -0.5, -0.95, -1.0], abs=1e-12)


def loss_of_one_token(ratio: float, advantage: float, algorithm: Algorithm, logp: float = 0.0) -> tuple[float, float]:
    """Loss and its derivative by logp for a single token with this ratio, without KL."""
    logp = torch.tensor([[logp]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    old = logp.detach() - math.log(ratio)
    loss, _ = policy_loss(logp, old, torch.tensor([advantage], dtype=torch.float64), mask, algorithm)
    loss.backward()
    return loss.item(), logp.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (0.5, 2.0, -1.0, -1.0),  # A > 0: alive below and inside, dead above 1.2
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),
        (0.5, -2.0, 1.6, 0.0),  # A < 0: dead below 0.8, alive inside and above
        (1.1, -2.0, 2.2, 2.2),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_six_cells_of_the_clip(ratio, advantage, loss, gradient):
    assert loss_of_one_token(ratio, advantage, ALGORITHMS["grpo"]) == pytest.approx((loss, gradient), abs=1e-12)


SIGMOID = 1 / (1 + math.exp(-0.5))  # of 1.0 * (1.5 - 1)
FALLING = 1 / (1 + math.exp(-1.05 * 0.5))


@pytest.mark.parametrize(
    ("cells", "ratio", "advantage", "loss", "gradient"),
    [
        ({"surrogate": "sapo"}, 1.0, 2.0, -4.0, -2.0),  # -2A at first, with the gradient of reinforce
        ({"surrogate": "sapo"}, 1.0, -2.0, 4 / 1.05, 2.0),
        ({"surrogate": "sapo"}, 1.5, 2.0, -8 * SIGMOID, -8 * SIGMOID * (1 - SIGMOID) * 1.5),
        ({"surrogate": "sapo"}, 1.5, -2.0, 8 / 1.05 * FALLING, 8 * FALLING * (1 - FALLING) * 1.5),
        ({"surrogate": "geometric"}, 1.2, 2.0, -2.4, -2.4),  # alive within e^0.2 = 1.22, dead beyond
        ({"surrogate": "geometric"}, 1.5, 2.0, -2 * math.exp(0.2), 0.0),
        ({"surrogate": "geometric"}, 0.5, 2.0, -1.0, -1.0),
        ({"surrogate": "geometric"}, 0.5, -2.0, 2 * math.exp(-0.2), 0.0),
        ({"surrogate": "geometric"}, 1.5, -2.0, 3.0, 3.0),
        ({"cap": 3.0}, 2.0, -1.0, 2.0, 2.0),
        ({"cap": 3.0}, 4.0, -1.0, 3.0, 0.0),  # the corner that clipping leaves open
        ({"cap": 3.0}, 4.0, 1.0, -1.2, 0.0),
        ({"surrogate": "reinforce", "anchor": 0.5}, 2.0, 1.0, 0.25 * math.log(2) ** 2, 0.5 * math.log(2) - 1),
        # From 2/3 up to 1, beyond the bound: what rewards no longer move is pulled back all the same.
        ({"surrogate": "dppo", "anchor": 0.5}, 1.5, 1.0, 0.25 * math.log(1.5) ** 2, 0.5 * math.log(1.5)),
    ],
)
def test_the_other_surrogates_and_terms_by_hand(cells, ratio, advantage, loss, gradient):
    assert loss_of_one_token(ratio, advantage, Algorithm(**cells)) == pytest.approx((loss, gradient), abs=1e-12)


@pytest.mark.parametrize(
    ("probability", "ratio", "advantage", "gradient"),
    [
        (0.5, 1.5, 1.0, -1.5),  # from 1/3 up to 1/2, by less than 0.2
        (0.9, 1.5, 1.0, 0.0),  # from 0.6 up to 0.9
        (0.03, 30.0, 1.0, -30.0),  # a rare token may change its ratio as it likes
        (0.3, 0.5, -1.0, 0.0),  # from 0.6 down to 0.3
        (0.3, 0.5, 1.0, -0.5),  # and back up
        (0.9, 1.5, -1.0, 1.5),
        (0.01, 0.1, -1.0, 0.1),
    ],
)
def test_dppo_bounds_the_probability(probability, ratio, advantage, gradient):
    row = Algorithm(surrogate="dppo")
    loss = 0.0 if gradient == 0 else -ratio * advantage
    found = loss_of_one_token(ratio, advantage, row, logp=math.log(probability))
    assert found == pytest.approx((loss, gradient), rel=1e-12)


def test_geometric_bounds_each_token_before_the_mean_and_gspo_after_it():
    """Log-ratios 0.5 and -0.5: the first is held at 0.2, so that the mean is -0.15; GSPO's is 0, within its bounds."""
    logp = torch.tensor([[0.5, -0.5, 99.0]], dtype=torch.float64, requires_grad=True)
    mask, zero = torch.tensor([[True, True, False]]), torch.zeros(1, 3).double()
    for cells, value, gradient in (
        ({"surrogate": "geometric"}, -math.exp(-0.15), [0.0, -math.exp(-0.15) / 2, 0.0]),
        ({"ratio": "sequence"}, -1.0, [-0.5, -0.5, 0.0]),
    ):
        loss, _ = policy_loss(logp, zero, torch.ones(1).double(), mask, Algorithm(beta=0.0, **cells))
        assert loss.item() == pytest.approx(value, abs=1e-12)
        assert torch.autograd.grad(loss, logp)[0].tolist()[0] == pytest.approx(gradient, abs=1e-12)


def test_the_anchor_is_a_sum_of_squares_and_the_tokens_also_under_a_sequence_ratio():
    logp, mask = torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    row = Algorithm(ratio="sequence", aggregate="token_mean", anchor=0.5)
    loss, _ = policy_loss(logp, torch.zeros(1, 2).double(), torch.zeros(1).double(), mask, row)
    assert loss.item() == pytest.approx(0.25)  # the row's log-ratio is 0, but not those of its tokens


def test_rows_that_have_become_rare_are_dropped_where_they_should_be_made_rarer_still():
    """Mean log-ratios -0.3, -0.3 and -0.1 against a limit of 0.2; the row that is dropped still has its KL term."""
    log_ratio = torch.tensor([[-0.6, 0.0], [-0.6, 0.0], [-0.2, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    row = Algorithm(surrogate="reinforce", aggregate="token_mean", beta=0.0, off_policy_limit=0.2)
    for beta in (0.0, 0.1):
        logp = (log_ratio - 1).requires_grad_()
        row = dataclasses.replace(row, beta=beta, kl_estimator="k2")
        advantages = torch.tensor([-1.0, 1.0, -1.0]).double()
        ref = logp.detach() - 0.5 if beta else None
        loss, _ = policy_loss(logp, -torch.ones(3, 2).double(), advantages, mask, row, ref)
        expected = torch.tensor([[0.0, 0.0], [-0.2, -0.2], [0.2, 0.0]]).double() + mask * beta * 0.5 / 5
        torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], expected, rtol=1e-6, atol=1e-9)


SURROGATES = commands.choices_of(Algorithm.__annotations__["surrogate"])


@pytest.mark.parametrize("aggregate", ["sequence_mean", "token_mean", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_at_the_first_update_every_surrogate_has_the_gradient_of_reinforce(surrogate, ratio, aggregate):
    """Whose ratio is 1; a sequence's too, as its mean over the tokens and the sum over them cancel."""
    if ratio == "sequence" and surrogate in ("geometric", "dppo"):
        return
    epsilons = {"epsilon": 1.0, "epsilon_high": 4.0} if surrogate == "cispo" else {}
    gradients = []
    for cells in ({"surrogate": "reinforce"}, {"surrogate": surrogate, "ratio": ratio, **epsilons, "anchor": 0.3}):
        logp, _, _, advantages, mask = random_batch()
        logp.requires_grad_()
        row = Algorithm(aggregate=aggregate, cap=6.0, **cells)
        policy_loss(logp, logp.detach(), advantages, mask, row)[0].backward()
        gradients.append(logp.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"surrogate": "dppo", "ratio": "sequence"}, "--surrogate dppo bounds each token"),
        ({"surrogate": "geometric", "ratio": "sequence"}, "--surrogate geometric bounds each token"),
        ({"cap": 1.1}, "--cap is 1.1; it must be 1 \\+ --epsilon-high, 1.2, or above"),
        ({"advantage": "max_rl", "overlong_buffer": 0.2}, "--advantage max_rl takes no reward below 0"),
        ({"advantage": "max_at_k", "k": 1}, "--k is 1; it must be 2 or above"),
        ({"combine": "each"}, "--combine each has divided by stds"),
    ],
)
def test_cells_that_do_not_go_together_are_refused(cells, words):
    with pytest.raises(UserError, match=words):
        Algorithm(**cells)
    with pytest.raises(UserError, match="--k is 4; it must be at most --num-generations, 3"):
        GRPOConfig(algorithm="passk", num_generations=3)


@pytest.mark.parametrize(
    ("name", "ratio", "advantage", "loss"),
    [
        ("dapo", 1.25, 1.0, -1.25),  # 1 + 0.28 lets it through
        ("dapo", 1.5, 1.0, -1.28),
        ("dapo", 0.7, -1.0, 0.8),
        ("gspo", 1.001, 1.0, -1.0004),
        ("gspo", 0.999, -1.0, 0.9997),
        ("rloo", 1.5, 1.0, -1.2),
    ],
)
def test_the_two_sides_of_the_clip_are_the_rows_own(name, ratio, advantage, loss):
    assert loss_of_one_token(ratio, advantage, ALGORITHMS[name])[0] == pytest.approx(loss, abs=1e-12)


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (1.1, 1.1), (5.0, 5.0), (7.0, 5.0)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_caps_the_weight_and_keeps_the_gradient(ratio, weight, advantage):
    """The loss is -weight * A * logp with a weight that is a number: alive on every side."""
    loss, gradient = loss_of_one_token(ratio, advantage, ALGORITHMS["cispo"], logp=-3.0)
    assert (loss, gradient) == pytest.approx((3 * weight * advantage, -weight * advantage), abs=1e-12)


def test_the_sequence_ratio_is_the_geometric_mean():
    """Ratios 2, 1 and 4 over three tokens make 2, the same for each; the padding has no part in it."""
    logp = torch.tensor([[2.0, 1.0, 4.0, 99.0]], dtype=torch.float64).log().requires_grad_()
    mask = torch.tensor([[True, True, True, False]])
    algorithm = Algorithm(ratio="sequence", epsilon=0.5, epsilon_high=2.0, beta=0.0)
    loss, stats = policy_loss(logp, torch.zeros(1, 4).double(), torch.tensor([3.0]), mask, algorithm)
    loss.backward()
    assert loss.item() == pytest.approx(-6) and stats["ratio_max"].item() == pytest.approx(2)
    assert logp.grad.tolist()[0] == pytest.approx([-2, -2, -2, 0])  # -A * r / 3, three times over three


def test_stats_count_what_the_clip_removed():
    logp = torch.log(torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]]))
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages = torch.tensor([1.0, -1.0])
    _, stats = policy_loss(logp, torch.zeros(2, 3), advantages, mask, ALGORITHMS["grpo"])
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {"tokens": 5, "clip_low": 1, "clip_high": 1, "ratio_max": 1.5}
    )
    row = Algorithm(surrogate="geometric", epsilon=0.8, epsilon_high=0.3)  # bounds of the logarithm, 0.45 and 2.2
    assert policy_loss(logp, torch.zeros(2, 3), advantages, mask, row)[1]["clip_low"] == 0
    assert policy_loss(logp, torch.zeros(2, 3), advantages, mask, row)[1]["clip_high"] == 1
    _, stats = policy_loss(logp, torch.zeros(2, 3), -advantages, mask, Algorithm(cap=1.3))
    assert (stats["clip_low"], stats["clip_high"]) == (1, 1), "the cap takes a ratio of 1.5 with A < 0"
    _, stats = policy_loss(logp - 1, torch.zeros(2, 3) - 1, advantages, mask, Algorithm(surrogate="dppo", epsilon=0.1))
    assert (stats["clip_low"], stats["clip_high"]) == (1, 0), "pi is 0.18 of 0.37 there, 0.55 here"
    for name in ("pairwise", "cispo", "sapo"):
        _, stats = policy_loss(logp + 3, torch.zeros(2, 3), advantages, mask, ALGORITHMS[name])
        assert stats["clip_low"] == stats["clip_high"] == 0, "plain clips nothing, cispo caps and keeps the gradient"


# Rows of 1, 2 and 4 tokens with A = 1 and log-probabilities -1, -2 and -4: each token's plain loss is 1, 2 or 4.
ROWS = torch.tensor([[-1.0] * 4, [-2.0] * 4, [-4.0] * 4], dtype=torch.float64)
ROWS_MASK = torch.arange(4) < torch.tensor([[1], [2], [4]])


@pytest.mark.parametrize(
    ("aggregate", "loss", "weights"),
    [
        ("sequence_mean", (1 + 2 + 4) / 3, [1 / 3, 1 / 6, 1 / 12]),
        ("token_mean", (1 * 1 + 2 * 2 + 4 * 4) / 7, [1 / 7] * 3),
        ("constant", (1 * 1 + 2 * 2 + 4 * 4) / 12, [1 / 12] * 3),
    ],
)
def test_aggregates_of_rows_of_1_2_and_4_tokens(aggregate, loss, weights):
    logp = ROWS.clone().requires_grad_()
    algorithm = dataclasses.replace(PLAIN, aggregate=aggregate)
    value, _ = policy_loss(logp, ROWS, torch.ones(3), ROWS_MASK, algorithm)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(logp.grad, -torch.tensor(weights).double()[:, None] * ROWS_MASK, rtol=1e-6, atol=0)


def test_under_a_sequence_ratio_and_the_constant_each_token_weighs_the_same():
    """At ratio 1 rows of 1, 2 and 4 tokens with A = 1 weigh 1, 2 and 4 twelfths, a twelfth for each token."""
    logp = ROWS.clone().requires_grad_()
    value, _ = policy_loss(logp, ROWS, torch.ones(3).double(), ROWS_MASK, ALGORITHMS["luspo"])
    value.backward()
    assert value.item() == pytest.approx(-7 / 12, abs=1e-12)
    torch.testing.assert_close(logp.grad, -ROWS_MASK.double() / 12, rtol=1e-12, atol=0)


def test_denominators_by_hand():
    """Three rows of 7 tokens in all, completions of at most 10 tokens."""
    assert [loss_denominator(ROWS_MASK, name, 10) for name in ("sequence_mean", "token_mean", "constant")] == [3, 7, 30]


def test_loss_at_the_first_update_is_minus_the_mean_advantage_but_its_gradient_is_not_zero():
    logp = ROWS.repeat(2, 1).requires_grad_()
    mask = ROWS_MASK.repeat(2, 1)
    advantages = group_advantages(torch.tensor([[0.0, 0.0, 1.0, 0.0, 1.0, 0.0]], dtype=torch.float64))[0]
    loss, _ = policy_loss(logp, logp.detach(), advantages, mask, ALGORITHMS["grpo"])
    loss.backward()
    assert abs(loss.item()) < 1e-12
    expected = -(advantages / mask.sum(1) / 6)[:, None] * mask
    torch.testing.assert_close(logp.grad, expected, rtol=1e-12, atol=0)


def test_kl_estimates_by_hand():
    """Policy at half the reference's probability (d = ln 2), then at twice; a ratio of 3 for the unbiased one."""
    logp, ref = torch.tensor([[0.0, math.log(2)], [math.log(2), 0.0]], dtype=torch.float64)
    expected = {
        "k1": [-math.log(2), math.log(2)],
        "k2": [math.log(2) ** 2 / 2] * 2,
        "k3": [2 - math.log(2) - 1, 0.5 + math.log(2) - 1],
        "k3_unbiased": [3 * (1 - math.log(2)), 3 * (math.log(2) - 0.5)],
    }
    for estimator, values in expected.items():
        ratio = torch.full((2,), 3.0).double()
        assert kl_penalty(logp, ref, estimator, ratio).tolist() == pytest.approx(values, abs=1e-12)


def test_kl_estimate_is_clamped_where_exp_would_overflow():
    value = kl_penalty(torch.tensor([-1000.0]), torch.tensor([0.0]))
    assert value.item() == pytest.approx(math.exp(20) - 21, rel=1e-6)
    assert kl_penalty(torch.tensor([0.0]), torch.tensor([-1000.0])).item() == pytest.approx(999, rel=1e-6)


def test_the_kl_is_measured_whatever_the_estimator_of_the_loss():
    """`kl` is k3 and `kl_k1` is k1, summed over the tokens, also where the loss takes another one."""
    logp, ref = torch.full((1, 3), math.log(2)), torch.zeros(1, 3)
    mask = torch.tensor([[True, True, False]])
    for estimator in ("k2", "k3", "k3_unbiased"):
        algorithm = Algorithm(kl_estimator=estimator)
        _, stats = policy_loss(logp, logp, torch.zeros(1), mask, algorithm, ref)
        assert stats["kl"].item() == pytest.approx(2 * (math.log(2) - 0.5), rel=1e-5)
        assert stats["kl_k1"].item() == pytest.approx(2 * math.log(2), rel=1e-6) and stats["kl_clamped"] == 0
    assert policy_loss(logp - 100, logp, torch.zeros(1), mask, algorithm, ref)[1]["kl_clamped"] == 2


def random_batch(rows: int = 6, length: int = 5):
    """logp, old, ref, advantages and a mask with rows of length 1 to `length`, in float64."""
    generator = torch.Generator().manual_seed(1)
    logp, old, ref = (-torch.rand(rows, length, dtype=torch.float64, generator=generator) * 3 for _ in range(3))
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    advantages = torch.randn(rows, dtype=torch.float64, generator=generator)
    return logp, logp + 0.3 * (old - old.mean()), ref, advantages, mask


def test_loss_equals_the_formula_written_out_with_loops():
    logp, old, ref, advantages, mask = random_batch()
    rows = []
    for i in range(len(logp)):
        terms = []
        for t in range(int(mask[i].sum())):
            ratio = math.exp(logp[i, t] - old[i, t])
            a = advantages[i].item()
            d = (ref[i, t] - logp[i, t]).item()
            surrogate = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
            terms.append(-surrogate + 0.04 * (math.exp(d) - d - 1))
        rows.append(sum(terms) / len(terms))
    loss, _ = policy_loss(logp, old, advantages, mask, ALGORITHMS["grpo"], ref)
    assert loss.item() == pytest.approx(sum(rows) / len(rows), abs=1e-12)


ROWS_AND_ESTIMATORS = itertools.product(ALGORITHMS, ["k2", "k3", "k3_unbiased"])


@pytest.mark.parametrize(
    ("name", "kl_estimator"), [pair for pair in ROWS_AND_ESTIMATORS if pair != ("cispo", "k3_unbiased")]
)
def test_gradients_are_finite_differences(name, kl_estimator):
    """`gradcheck` in float64, away from the kinks.

    cispo's weight is a number, so there the ratio is held constant; that leaves out k3_unbiased, whose ratio is not.
    """
    algorithm = dataclasses.replace(ALGORITHMS[name], beta=0.1, kl_estimator=kl_estimator)
    logp, old, ref, advantages, mask = random_batch()
    log_ratio = logp - old
    if algorithm.ratio == "sequence":
        log_ratio = (torch.where(mask, log_ratio, 0.0).sum(1) / mask.sum(1))[:, None]
    change = {"dppo": logp.exp() - old.exp(), "geometric": log_ratio}.get(algorithm.surrogate, log_ratio.exp() - 1)
    for kink in (-algorithm.epsilon, algorithm.epsilon_high):
        assert (change - kink).abs().min() > 1e-5, "or the differences straddle it"

    def loss(x: torch.Tensor) -> torch.Tensor:
        before = x.detach() - (logp - old) if name == "cispo" else old
        return policy_loss(x, before, advantages, mask, algorithm, ref)[0]

    assert torch.autograd.gradcheck(loss, logp.clone().requires_grad_(), eps=1e-6, atol=1e-7, rtol=1e-6)


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 2) == pytest.approx(1 - 3 / 6)  # 3 of the 6 pairs miss it
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
    assert (pass_at_k(4, 0, 2), pass_at_k(4, 3, 2)) == (0, 1)


def test_wilson_by_hand():
    """Half of 4: 0.5 +- z * sqrt(0.25 / 4 + z^2 / 64) / (1 + z^2 / 4), with z = 1.959964."""
    half = 1.959964 * math.sqrt(0.0625 + 1.959964**2 / 64) / (1 + 1.959964**2 / 4)
    assert wilson(2, 4) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_intervals(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(total - right, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_stays_within_0_and_1():
    for total in range(1, 300):
        assert 0 <= wilson(0, total)[0] < wilson(0, total)[1] <= 1
        assert 0 <= wilson(total, total)[0] < wilson(total, total)[1] <= 1


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for total in range(1, 8):
        for right, k in itertools.product(range(total + 1), range(1, total + 1)):
            subsets = list(itertools.combinations([i < right for i in range(total)], k))
            assert pass_at_k(total, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
