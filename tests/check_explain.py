"""A case in which a function differs, worked out in three lines: what is given, how it is computed, what comes out."""

import json
import math

import numpy as np
import torch
from check_cases import Candidate, Case, Numbers, grpo


def work_out(name: str, case: Case, candidate: Candidate, seen: Numbers) -> list[str]:
    """The case in three lines: what is given, how it is computed, what is expected and what came."""
    expected = candidate.give(case)
    if name == "policy_loss":
        return work_out_loss(case, *candidate.cells, seen, expected)
    where = np.unravel_index(np.abs(seen["value"] - expected["value"]).argmax(), seen["value"].shape)
    inputs = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in case.given.items() if k != "model"}
    lines = [f"given {json.dumps(inputs)[:240]}"]
    if name == "group_advantages":
        rewards = case.given["rewards"]
        group = rewards[where[0]]
        lines.append(
            f"group {where[0]}: mean {group.mean():.6g}, unbiased std {group.std(ddof=1):.6g}; "
            f"all rewards: mean {rewards.mean():.6g}, unbiased std {rewards.std(ddof=1):.6g}"
        )
    place = f"at {list(map(int, where))} " if where else ""
    lines.append(f"{place}expected {expected['value'][where]:.8g}, you give {seen['value'][where]:.8g}")
    if "gradient" in seen:
        worst = np.abs(seen["gradient"] - expected["gradient"]).max()
        lines.append(f"the gradients differ by up to {worst:.3g}")
    return lines


def work_out_loss(case: Case, algorithm, beta: float, seen: Numbers, expected: Numbers) -> list[str]:
    """The token whose derivative differs most, or the first if only the loss does."""
    given, gaps = case.given, np.abs(seen.get("gradient", expected["gradient"]) - expected["gradient"])
    b, t = map(int, np.unravel_index(gaps.argmax(), gaps.shape))
    logp, mask, advantage = given["logp"], given["mask"], given["advantages"][b]
    old = logp if given["old_logp"] is None else given["old_logp"]
    real = torch.from_numpy(mask[b])[None]
    row = lambda x: torch.from_numpy(np.where(mask[b], x[b], 0.0))[None]  # noqa: E731
    log_ratio = row(logp - old)
    if algorithm.ratio == "sequence":
        log_ratio = grpo.row_mean(log_ratio, real)
    ratio = math.exp(log_ratio[0, t])
    sizes = (log_ratio, torch.tensor([[float(advantage)]], dtype=torch.float64), row(logp), real)
    term = grpo.surrogate(*sizes, algorithm)[0, t].item()
    formula = {
        "clip": "-min(r A, clip(r) A)",
        "cispo": "-clip(r) A logp, the weight a number",
        "reinforce": "-A logp",
        "sapo": "-4 / s sigmoid(s (r - 1)) A, s = 1 for A > 0, else 1.05",
        "geometric": "-exp(mean of clip(log r)) A",
        "dppo": "-r A, but 0 where pi - pi_old is beyond",
    }
    bounds = {
        "clip": f"clip to [{1 - algorithm.epsilon:g}, {1 + algorithm.epsilon_high:g}]: ",
        "geometric": f"clip to [{-algorithm.epsilon:g}, {algorithm.epsilon_high:g}]: ",
    }
    bounds["dppo"], bounds["cispo"] = bounds["geometric"], bounds["clip"]
    if algorithm.cap:
        bounds["clip"] += f"A < 0: r at most {algorithm.cap:g}: "
    anchor = f" + {algorithm.anchor / 2:g} log(r)^2" if algorithm.anchor else ""
    d = given["ref_logp"][b, t] - logp[b, t]
    kl = f" + {beta:g} {algorithm.kl_estimator}(d), d = ref_logp - logp = {d:.6g}" if beta else ""
    divided = {
        "sequence_mean": f"by its row's {mask[b].sum()} tokens and by {given['step_rows']} rows",
        "token_mean": f"by all {given['step_tokens']} tokens",
        "constant": f"by {given['step_rows']} rows times max_new_tokens {given['max_new_tokens']}",
    }[algorithm.aggregate]
    padding = "" if mask[b, t] else ", padding, which must have no gradient"
    mine = f", you give {seen['gradient'][b, t]:.8g}" if "gradient" in seen else ""
    place = f"row {b}, token {t}{padding}: logp {logp[b, t]:g}, old_logp {old[b, t]:g}"
    return [
        f"{place}, r = {ratio:.6g}, A = {advantage:g}",
        f"{bounds.get(algorithm.surrogate, '')}{formula[algorithm.surrogate]} = {term:.6g}{anchor}{kl}; "
        f"divided {divided}",
        f"expected derivative {expected['gradient'][b, t]:.8g}{mine}; "
        f"loss {expected['value']:.8g}, you give {seen['value']:.8g}",
    ]
