"""Expectations as exact sums over every completion: what each estimator estimates, to 1e-10."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from enumeration import (
    COMPLETIONS,
    LENGTH,
    MASK,
    REWARDS,
    TRUNCATED,
    algorithm_row,
    bias,
    bias_row,
    correction_row,
    expected_loss,
    expected_reward,
    gradient_of,
    log_probs,
    older,
    table_of_logits,
)

from algorithms import pairwise_advantages
from grpo import ALGORITHMS, Algorithm, kl_penalty, policy_loss

pytestmark = pytest.mark.math

PLAIN = {"beta": 0.0, "aggregate": "constant"}


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(params=[0, 1, 2])
def logits(request):
    return table_of_logits(request.param).requires_grad_()


def test_the_listed_completions_are_all_there_are(logits):
    assert len(COMPLETIONS) == 7 and log_probs(logits).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "surrogate"),
    [
        *itertools.product(("token", "sequence"), ("clip", "cispo", "reinforce", "sapo")),
        *(("token", "geometric"), ("token", "dppo")),
    ],
)
@pytest.mark.parametrize(("advantage", "factor"), [("centered", 2 / 3), ("leave_one_out", 1.0)])
def test_the_constant_aggregate_is_unbiased(logits, advantage, factor, ratio, surrogate):
    """E[gradient] = -gradient of E[R], over max_new_tokens, and times (G - 1) / G where the mean holds the row itself.

    The sequence ratio too: its mean over the tokens and the sum over them cancel.
    """
    algorithm = Algorithm(advantage=advantage, ratio=ratio, surrogate=surrogate, **PLAIN)
    step = -gradient_of(expected_loss([logits], [REWARDS], 3, algorithm), logits)
    truth = factor / LENGTH * gradient_of(expected_reward(logits), logits)
    close(step, truth)


def test_without_truncated_rows_they_count_as_average_ones(logits):
    """The step climbs the sum over complete answers y of pi(y) * (R(y) - J), J = E[R] being held fixed."""
    row = Algorithm(advantage="leave_one_out", mask_truncated=True, **PLAIN)
    fixed = expected_reward(logits).detach()
    complete = (log_probs(logits).sum(1).exp() * (REWARDS - fixed))[~TRUNCATED].sum()
    close(-gradient_of(expected_loss([logits], [REWARDS], 3, row), logits), gradient_of(complete, logits) / LENGTH)


RIGHT = (REWARDS > 0.5).double()  # three of the seven completions


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("advantage", ["group", "max_rl"])
def test_what_right_and_wrong_climb_towards(advantage, size):
    """`group` a weighted gradient of p, the share of right ones; `max_rl` that of log p, cut after order G - 1."""
    logits = table_of_logits(0).requires_grad_()
    share = expected_reward(logits, RIGHT)
    p, weight = share.item(), 0.0
    for c in range(1, size):
        std = math.sqrt(c * (size - c) / (size * (size - 1))) + 1e-4
        chance = math.comb(size, c) * p**c * (1 - p) ** (size - c)
        weight += chance * (c / size) * (1 - c / size) / std / (p * (1 - p))
    weight = {"group": weight, "max_rl": (1 - (1 - p) ** (size - 1)) / p}[advantage]
    step = -gradient_of(expected_loss([logits], [RIGHT], size, Algorithm(advantage=advantage, **PLAIN)), logits)
    close(step, weight / LENGTH * gradient_of(share, logits), 1e-9)


@pytest.mark.parametrize("rewards", [REWARDS, RIGHT])
@pytest.mark.parametrize(("size", "k"), [(2, 2), (3, 2), (3, 3), (4, 3)])
def test_max_at_k_climbs_the_best_of_k(rewards, size, k):
    """With real rewards, too: the gradient of E[the largest of k]."""
    logits = table_of_logits(1).requires_grad_()
    pi, best = log_probs(logits).sum(1).exp(), 0.0
    for picks in itertools.product(range(len(COMPLETIONS)), repeat=k):
        best = best + pi[list(picks)].prod() * rewards[list(picks)].max()
    row = Algorithm(advantage="max_at_k", k=k, **PLAIN)
    close(-gradient_of(expected_loss([logits], [rewards], size, row), logits), gradient_of(best, logits) / LENGTH)


@pytest.mark.parametrize("name", ["rloo", "dr_grpo"])
def test_rloo_and_dr_grpo_are_unbiased_as_rows_of_the_table(logits, name):
    truth = gradient_of(expected_reward(logits), logits) / LENGTH * {"rloo": 1, "dr_grpo": 1 / 2}[name]
    close(-gradient_of(expected_loss([logits], [REWARDS], 2, ALGORITHMS[name]), logits), truth)


def test_the_gradient_goes_through_the_exploration_mixture(logits):
    """With the mixture as the policy the estimate is that of the mixture's expected reward, not of the softmax's."""
    algorithm = Algorithm(advantage="leave_one_out", **PLAIN)
    step = -gradient_of(expected_loss([logits], [REWARDS], 2, algorithm, noise=0.3), logits)
    close(step, gradient_of(expected_reward(logits, noise=0.3), logits) / LENGTH)
    assert (step - gradient_of(expected_reward(logits), logits) / LENGTH).abs().max() > 1e-3


def test_the_other_aggregates_and_scales_are_biased_as_the_readme_says():
    """Some rows of its tables (`python tests/enumeration.py`) whole, and a seed of two others."""
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    rows = [bias_row("centered", "sequence_mean"), *map(algorithm_row, ("gspo", "prime", "gdpo"))]
    for row in (*rows, *map(correction_row, ("none", "mask, token", "no bound, sequence"))):
        assert f"\n{row}\n" in readme
    ((angle, _),) = bias(Algorithm(advantage="group", aggregate="constant"), range(1))
    assert angle > 15
    ((angle, length),) = bias(Algorithm(advantage="centered", aggregate="constant"), range(1))
    assert angle < 1e-4 and length == pytest.approx(1, abs=1e-9)


def plain_step(logits: torch.Tensor, sampler: torch.Tensor, weigh) -> torch.Tensor:
    """The expected step of rloo's cells in loops, on completions that come from the table `sampler`.

    That is the sum over completions y of mu(y) * (R(y) - E_mu[R]) * the gradient of its tokens' log-probabilities, each
    times a weight: `weigh` makes the row's weights of its tokens' pi / mu.
    """
    pi, mu = logits.softmax(-1), sampler.softmax(-1).tolist()
    # Each token by its place in the table, (0, first) and (first, second).
    places = [list(zip((0, *completion), completion, strict=False)) for completion in COMPLETIONS]
    chances = [math.prod(mu[i][j] for i, j in row) for row in places]
    mean = sum(chance * reward for chance, reward in zip(chances, REWARDS.tolist(), strict=True))
    total = 0.0
    for row, chance, reward in zip(places, chances, REWARDS.tolist(), strict=True):
        weights = weigh([pi[i, j].item() / mu[i][j] for i, j in row])
        for weight, (i, j) in zip(weights, row, strict=True):
            total = total + chance * (reward - mean) * weight * pi[i, j].log()
    return gradient_of(total, logits) / LENGTH


def in_bounds(rho: float) -> float:
    return rho if 0.8 <= rho <= 1.1 else 0.0


BOUNDS = {"correction_low": 0.8, "correction_high": 1.1}
WEIGHTS = {  # cells, and the weights that they should give a row
    "none": ({"correction": "none"}, lambda rho: [1.0] * len(rho)),
    "token, no bound": ({"correction": "truncate", "correction_high": 1e9}, lambda rho: rho),
    "token, truncated": ({"correction": "truncate", **BOUNDS}, lambda rho: [min(r, 1.1) for r in rho]),
    "token, masked": ({"correction": "mask", **BOUNDS}, lambda rho: [in_bounds(r) for r in rho]),
    "row, truncated": (
        {"correction": "truncate", "correction_level": "sequence", **BOUNDS},
        lambda rho: [min(math.prod(rho), 1.1)] * len(rho),
    ),
    "row, masked": (
        {"correction": "mask", "correction_level": "sequence", **BOUNDS},
        lambda rho: [in_bounds(math.prod(rho))] * len(rho),
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_corrections_for_another_sampler_are_biased_by_exactly_what_they_leave_out(logits, name):
    """All but the product over the row: neither no weight, nor the tokens' own, nor one with bounds is unbiased."""
    cells, weigh = WEIGHTS[name]
    sampler = older(logits, 0, 0.5)
    row = Algorithm(advantage="leave_one_out", **PLAIN, **cells)
    step = -gradient_of(expected_loss([logits], [REWARDS], 3, row, sampler=[sampler]), logits)
    close(step, plain_step(logits, sampler, weigh))
    truth = gradient_of(expected_reward(logits), logits) / LENGTH
    assert (step - truth).abs().max() > 2e-3


@pytest.mark.parametrize(("advantage", "factor"), [("centered", 2 / 3), ("leave_one_out", 1.0)])
def test_the_product_over_the_row_alone_makes_another_samplers_rollouts_unbiased(logits, advantage, factor):
    """The other rows come from the sampler too, but a baseline of them does not depend on the row, and so falls out."""
    row = Algorithm(
        advantage=advantage, correction="truncate", correction_level="sequence", correction_high=1e9, **PLAIN
    )
    loss = expected_loss([logits], [REWARDS], 3, row, sampler=[older(logits, 0, 0.5)])
    truth = gradient_of(expected_reward(logits), logits)
    close(-gradient_of(loss, logits), factor / LENGTH * truth)
    loss = expected_loss([logits], [REWARDS], 3, row, old=[older(logits, 0, 0.5)])  # where the sampler is the old one
    assert (-gradient_of(loss, logits) - factor / LENGTH * truth).abs().max() > 2e-3


@pytest.mark.parametrize(
    ("cells", "weigh"),
    [
        ({"epsilon": 1.0, "epsilon_high": 1e9}, lambda ratio: ratio),
        ({"surrogate": "reinforce"}, lambda ratio: [1.0] * len(ratio)),
        ({"surrogate": "cispo", "epsilon": 0.2, "epsilon_high": 0.1}, lambda r: [min(max(x, 0.8), 1.1) for x in r]),
    ],
)
def test_the_ratio_to_an_old_policy_is_a_correction_by_token(logits, cells, weigh):
    """Without bounds it is the token's own weight; under cispo a bounded one; `reinforce` has none."""
    old = older(logits, 0, 0.5)
    row = Algorithm(advantage="leave_one_out", **PLAIN, **cells)
    close(-gradient_of(expected_loss([logits], [REWARDS], 3, row, old=[old]), logits), plain_step(logits, old, weigh))


def test_the_entropy_bonus_climbs_the_entropy_where_the_policy_goes(logits):
    """On-policy, how often each prefix is visited being held fixed: so it is not the entropy of whole sequences."""
    bonus = Algorithm(entropy_bonus=0.3, **PLAIN)
    step = -gradient_of(expected_loss([logits], [torch.zeros(7).double()], 2, bonus), logits)
    pi = logits.softmax(-1)
    entropies = [-sum(p * p.log() for p in line) for line in pi[:3]]
    visited = [1.0, pi[0, 1].item(), pi[0, 2].item()]
    close(step, 0.3 / LENGTH * gradient_of(sum(v * h for v, h in zip(visited, entropies, strict=True)), logits))
    whole = sum(v * h for v, h in zip([1.0, pi[0, 1], pi[0, 2]], entropies, strict=True))
    assert (step - 0.3 / LENGTH * gradient_of(whole, logits)).abs().max() > 1e-3


def one_token(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (3,) of a policy, differentiable by its logits, and of a reference."""
    logits = table_of_logits(seed)[0].requires_grad_()
    return logits, table_of_logits(seed + 10)[0].log_softmax(-1)


@pytest.mark.parametrize("seed", range(3))
def test_expected_values_of_the_kl_estimators(seed):
    logits, ref = one_token(seed)
    logp = logits.detach().log_softmax(-1)
    pi = logp.exp()
    exact = (pi * (logp - ref)).sum()
    for estimator, expected in (
        ("k1", exact),
        ("k2", (pi * (logp - ref) ** 2).sum() / 2),
        ("k3", exact),
        ("k3_unbiased", exact),
    ):
        close((pi * kl_penalty(logp, ref, estimator, torch.ones(3, dtype=torch.float64))).sum(), expected)
    assert (kl_penalty(logp, ref) >= 0).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_unbiased"])
def test_expected_gradients_of_the_kl_estimators(seed, estimator):
    """In the loss, on-policy, one token: k1 pulls nowhere, k2 and k3_unbiased along KL(pi || ref), k3 the other way."""
    logits, ref = one_token(seed)
    logp = logits.log_softmax(-1)
    pi = logp.detach().exp()
    ratio = (logp - logp.detach()).exp()
    gradient = gradient_of((pi * kl_penalty(logp, ref, estimator, ratio)).sum(), logits)
    reverse = gradient_of((logp.exp() * (logp - ref)).sum(), logits)
    forward = gradient_of((ref.exp() * (ref - logp)).sum(), logits)
    close(gradient, {"k1": torch.zeros(3).double(), "k2": reverse, "k3": forward, "k3_unbiased": reverse}[estimator])
    assert (reverse - forward).abs().max() > 1e-3


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_unbiased"])
def test_over_sequences_the_kl_term_holds_the_visited_prefixes_fixed(logits, estimator):
    """Its expected gradient is that of the KL at each prefix, weighted by how often the prefix is visited.

    What a token does to the KL of later ones is left out, so it is not the gradient of the KL of whole sequences.
    """
    algorithm = Algorithm(beta=1.0, kl_estimator=estimator, aggregate="constant")
    other = table_of_logits(9)
    logp, ref = log_probs(logits), log_probs(other)
    weights = logp.detach().sum(1).exp()
    total = 0.0
    for i in range(len(COMPLETIONS)):
        row = slice(i, i + 1)
        args = (logp[row], logp[row].detach(), torch.zeros(1).double(), MASK[row], algorithm, ref[row])
        total = total + weights[i] * policy_loss(*args)[0]
    gradient = gradient_of(total, logits)

    def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.exp() * (p - q)).sum()

    pi, rho = logits.log_softmax(-1), other.log_softmax(-1)
    pairs = [(rho[i], pi[i]) if estimator == "k3" else (pi[i], rho[i]) for i in range(3)]
    visited = [1.0, *pi[0, 1:].detach().exp()]
    close(gradient, gradient_of(sum(v * divergence(*p) for v, p in zip(visited, pairs, strict=True)) / LENGTH, logits))
    log_pi = log_probs(logits)
    whole = (log_pi.sum(1).exp() * (log_pi - ref).sum(1)).sum() / LENGTH
    assert (gradient - gradient_of(whole, logits)).abs().max() > 1e-3


def test_k1_as_a_loss_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="exactly 0 in expectation.*kl_k1.*k2, k3 or k3_unbiased"):
        Algorithm(kl_estimator="k1")


def objective(mean_logp: torch.Tensor, rewards: torch.Tensor, strength: float) -> torch.Tensor:
    """The pairwise objective written out with loops: the mean over groups of the mean over pairs."""
    groups = []
    for line, given in zip(mean_logp, rewards.tolist(), strict=True):
        wins = [i for i, reward in enumerate(given) if reward == max(given)]
        losses = [i for i, reward in enumerate(given) if reward != max(given)]
        pairs = [-torch.log(torch.sigmoid(strength * (line[w] - line[k]))) for w, k in itertools.product(wins, losses)]
        if pairs:
            groups.append(sum(pairs) / len(pairs))
    return sum(groups) / max(1, len(groups))


@pytest.mark.parametrize("strength", [2.0, 0.5])
def test_pairwise_coefficients_are_the_objectives_derivative(strength):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [0.2, 0.1, 0.3, 0.0], [1, 1, 1, 0]])
    logp = torch.randn(16, 5, dtype=torch.float64, generator=generator).requires_grad_()
    mask = torch.arange(5) < torch.randint(1, 6, (16, 1), generator=generator)
    means = (torch.where(mask, logp, 0.0).sum(1) / mask.sum(1)).view(4, 4)
    expected = gradient_of(objective(means, rewards, strength), logp)
    advantages = pairwise_advantages(rewards, means, strength)
    assert not advantages.requires_grad and not advantages[1].any(), "a group without losers teaches nothing"
    close(advantages.sum(1), torch.zeros(4).double())
    loss, _ = policy_loss(logp, logp.detach(), advantages.flatten(), mask, ALGORITHMS["pairwise"])
    close(gradient_of(loss, logp), expected)


def test_pairwise_by_hand():
    """One winner, one loser, equally likely: -log sigmoid(0) has slope -s/2, and there are two rows."""
    advantages = pairwise_advantages(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), 2.0)
    assert advantages.tolist() == [[2.0, -2.0]]
    far = pairwise_advantages(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -3.0]]), 2.0)
    assert far.tolist()[0] == pytest.approx([4 / (1 + math.exp(6)), -4 / (1 + math.exp(6))], rel=1e-5)
