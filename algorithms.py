"""The table of algorithms: the cells of a row, which of them go together, the rows, and formulas that few rows need.

What the other cells do is in grpo.py, in `group_advantages`, `surrogate` and `policy_loss`; the shapes are those there.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch

import commands
import ranks
from commands import UserError, option

NOTHING = (0, 1, "none", "sum")  # defaults by which a cell does nothing, and is not shown


@dataclass(frozen=True)
class Algorithm:
    """One row of the table of algorithms; every cell is a flag too. Raises UserError for an unknown value."""

    advantage: Literal[
        "group", "batch_std", "centered", "batch_mean", "leave_one_out", "max_rl", "max_at_k", "pairwise"
    ] = option("group", "What is taken from a reward, and what it is divided by.", "algorithm")
    ratio: Literal["token", "sequence"] = option("token", "The ratio of each token, or of the row.", "algorithm")
    surrogate: Literal["clip", "cispo", "sapo", "geometric", "dppo", "reinforce"] = option(
        "clip", "What the ratio does to the loss.", "algorithm"
    )
    epsilon: float = option(0.2, "The ratio is clipped below 1 - epsilon.", "algorithm")
    epsilon_high: float = option(0.2, "The ratio is clipped above 1 + this.", "algorithm")
    aggregate: Literal["sequence_mean", "token_mean", "constant"] = option(
        "sequence_mean", "Mean over each row's tokens, over all tokens, or over a constant length.", "algorithm"
    )
    beta: float = option(0.04, "Weight of the KL term; 0 loads no reference.", "algorithm")
    kl_estimator: Literal["k1", "k2", "k3", "k3_unbiased"] = option("k3", "Of the KL term; k1 is refused.", "algorithm")
    max_resample: int = option(0, "Flat groups give way to fresh prompts, at most so often a step.", "algorithm")
    overlong_buffer: float = option(0.0, "Last share of the length, with a penalty down to -1.", "algorithm", at_most=1)
    preference_strength: float = option(2.0, "Strength s of a pairwise preference.", "algorithm")
    combine: Literal["sum", "each"] = option("sum", "Advantages of the sum of rewards, or a sum of each.", "algorithm")
    k: int = option(4, "How many are drawn of which max_at_k wants the best.", "algorithm", at_least=2)
    cap: float = option(0.0, "The ratio is held below this where A < 0, too; 0 is off.", "algorithm")
    anchor: float = option(0.0, "Weight of half the squared log-ratio, towards the old policy.", "algorithm")
    off_policy_limit: float = option(
        0.0, "Rows with A < 0 are dropped once inner updates lower their mean log-ratio by this; 0 is off.", "algorithm"
    )
    mask_truncated: bool = option(False, "Leave truncated completions out of the loss.", "algorithm")
    correction: Literal["none", "truncate", "mask"] = option(
        "none", "Importance weights of what an older or cheaper policy sampled, truncated or masked.", "algorithm"
    )
    correction_level: Literal["token", "sequence"] = option(
        "token", "Each token's own weight, or their product over its row.", "algorithm"
    )
    correction_low: float = option(0.5, "By mask, weights below this become 0.", "algorithm")
    correction_high: float = option(2.0, "Weights above this become this, or by mask 0.", "algorithm", above_zero=True)
    top_entropy: float = option(
        1.0, "Share of tokens, those of highest entropy, that rewards act on.", "algorithm", above_zero=True, at_most=1
    )
    entropy_bonus: float = option(0.0, "Weight of the tokens' entropy in what is ascended.", "algorithm")

    def __post_init__(self):
        commands.check_settings(self)
        if self.kl_estimator == "k1":
            why = "the gradient of k1 is exactly 0 in expectation, so as a loss it is noise (it is logged as kl_k1)"
            raise UserError(f"--kl-estimator: {why}; take k2, k3 or k3_unbiased")
        if self.advantage == "pairwise" and (self.surrogate, self.aggregate) != ("reinforce", "sequence_mean"):
            needs = "--surrogate reinforce --aggregate sequence_mean"
            raise UserError(f"--advantage pairwise weighs mean log-probabilities; add {needs}")
        if self.advantage == "max_rl" and self.overlong_buffer:
            raise UserError("--advantage max_rl takes no reward below 0, and so no --overlong-buffer; set that to 0")
        if self.surrogate in ("geometric", "dppo") and self.ratio == "sequence":
            raise UserError(f"--surrogate {self.surrogate} bounds each token; take --ratio token")
        if 0 < self.cap < 1 + self.epsilon_high:
            raise UserError(f"--cap is {self.cap}; it must be 1 + --epsilon-high, {1 + self.epsilon_high}, or above")
        if self.correction == "mask" and self.correction_low > self.correction_high:
            raise UserError(f"--correction-low is {self.correction_low}, above --correction-high; swap them")
        if self.combine == "each" and self.advantage not in ("batch_std", "centered"):
            raise UserError("--combine each has divided by stds; take --advantage batch_std or centered")

    @property
    def idle(self) -> dict[str, str]:
        """Settings that this row does not read, and what it would take."""
        idle = {}
        if self.beta == 0:
            idle |= dict.fromkeys(("kl_estimator", "kl_limit", "ref_update_every"), "a --beta above 0")
        if self.surrogate == "reinforce" and (self.beta == 0 or self.kl_estimator != "k3_unbiased"):
            idle["ratio"] = "a --surrogate that has one, such as clip"
        if self.surrogate in ("sapo", "reinforce"):
            idle |= dict.fromkeys(("epsilon", "epsilon_high"), "a --surrogate with bounds, such as clip")
        if self.surrogate != "clip":
            idle["cap"] = "--surrogate clip"
        if self.correction != "mask":
            idle["correction_low"] = "--correction mask"
        if self.correction == "none":
            idle |= dict.fromkeys(("correction_level", "correction_high"), "a --correction")
        if self.advantage != "max_at_k":
            idle["k"] = "--advantage max_at_k"
        if self.advantage != "pairwise":
            idle["preference_strength"] = "--advantage pairwise"
        return idle

    def __str__(self) -> str:
        values = {f: getattr(self, f.name) for f in fields(self) if f.name not in self.idle}
        shown = {f.name: value for f, value in values.items() if value != f.default or value not in NOTHING}
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())


ALGORITHMS = {
    "grpo": Algorithm(),
    "dr_grpo": Algorithm(advantage="centered", aggregate="constant", beta=0.0),
    "dapo": Algorithm(epsilon_high=0.28, aggregate="token_mean", beta=0.0, max_resample=3, overlong_buffer=0.2),
    "gspo": Algorithm(ratio="sequence", epsilon=3e-4, epsilon_high=4e-4, beta=0.0),
    "cispo": Algorithm(surrogate="cispo", epsilon=1.0, epsilon_high=4.0, aggregate="token_mean", beta=0.0),
    "rloo": Algorithm(advantage="leave_one_out", aggregate="constant", beta=0.0),
    "pairwise": Algorithm(advantage="pairwise", surrogate="reinforce", beta=0.0),
    "luspo": Algorithm(ratio="sequence", epsilon=2e-3, epsilon_high=2.5e-3, aggregate="constant", beta=0.0),
    "sapo": Algorithm(surrogate="sapo", beta=0.0),
    "gmpo": Algorithm(surrogate="geometric", epsilon=0.4, epsilon_high=0.4, beta=0.0),
    "dppo": Algorithm(surrogate="dppo", epsilon=0.15, epsilon_high=0.15, aggregate="token_mean", beta=0.0),
    "prime": Algorithm(advantage="centered", surrogate="dppo", aggregate="token_mean", beta=0.0, anchor=2e-3),
    "kimi": Algorithm(advantage="centered", surrogate="reinforce", aggregate="token_mean", beta=0.0, anchor=0.2),
    "maxrl": Algorithm(advantage="max_rl", aggregate="constant", beta=0.0),
    "passk": Algorithm(advantage="max_at_k", aggregate="constant", beta=0.0),
    "gdpo": Algorithm(advantage="batch_std", beta=0.0, combine="each"),
}


def pairwise_advantages(rewards: torch.Tensor, mean_logp: torch.Tensor, strength: float) -> torch.Tensor:
    """Advantages (P, G) that make the `reinforce` loss follow a preference of winners over losers, without gradient.

    Winners W have the largest reward (P, G) of their group, L are the others. The objective is the mean over the groups
    with both of the mean over pairs of -log sigmoid(strength * (mean_logp[w] - mean_logp[l])), mean_logp (P, G) being
    mean log-probabilities per token (Bradley-Terry; DPO, arXiv 2305.18290, without reference). Its derivative by
    mean_logp, times minus the number of rows since the loss takes their mean, is the advantage.
    """
    best = rewards.nan_to_num(nan=-math.inf).amax(1, keepdim=True)
    wins, loses = rewards == best, rewards < best  # neither of which NaN does
    pairs = (wins[:, :, None] & loses[:, None, :]).to(mean_logp.dtype)  # (P, G, G): winner, loser
    share = pairs / pairs.sum((1, 2), keepdim=True).clamp(min=1) / pairs.any(2).any(1).sum().clamp(min=1)
    difference = mean_logp.detach()[:, :, None] - mean_logp.detach()[:, None, :]
    pull = strength * torch.sigmoid(-strength * difference) * share
    return rewards.numel() * (pull.sum(2) - pull.sum(1))


def pairwise_of_all(order: torch.Tensor, mean_logp: torch.Tensor, strength: float) -> torch.Tensor:
    """This rank's rows of what `pairwise_advantages` gives for the groups of all, from this rank's (P, G) and (B,)."""
    parts = (order, mean_logp.view_as(order))
    everywhere = [torch.cat([x.to(order.device) for x in ranks.gather(part)]) for part in parts]
    return ranks.own(pairwise_advantages(*everywhere, strength))


def max_at_k(rewards: torch.Tensor, k: int) -> torch.Tensor:
    """Advantages (P, G) whose gradient is that of the expected best of k, without bias (PKPO, arXiv 2505.15201).

    Sorted from the least R_1 up: G / C(G, k) * sum over j < i of C(j - 1, k - 2) * (R_i - R_j), the gain over j of the
    subsets of k in which i is the best and j the second.
    """
    size = rewards.shape[1]
    least_first, order = rewards.double().sort(1)
    weight = torch.tensor([math.comb(j, k - 2) for j in range(size)], dtype=torch.float64, device=rewards.device)
    gain = least_first * (weight.cumsum(0) - weight) - ((weight * least_first).cumsum(1) - weight * least_first)
    return torch.zeros_like(gain).scatter(1, order, size / math.comb(size, k) * gain).to(rewards.dtype)


def correction_weight(log_rho: torch.Tensor, mask: torch.Tensor, algorithm: Algorithm) -> torch.Tensor:
    """Importance weights rho (B, T) of tokens that another policy sampled: an older one, or a cheaper copy.

    `log_rho` (B, T) is old_logp minus the sampler's log-probability. By `correction_level` rho is each token's, or the
    product over the row, which alone makes the gradient unbiased, if it is not bounded; by `correction` it is held
    below `correction_high` (truncated importance sampling, Ionides 2008), or 0 out of bounds (IcePop).
    """
    log_rho = torch.where(mask, log_rho, 0.0)
    if algorithm.correction_level == "sequence":
        log_rho = log_rho.sum(1, keepdim=True).expand_as(log_rho)
    rho = log_rho.exp()
    if algorithm.correction == "truncate":
        return rho.clamp(max=algorithm.correction_high)
    return torch.where((rho >= algorithm.correction_low) & (rho <= algorithm.correction_high), rho, 0.0)
