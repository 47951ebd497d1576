"""Faults that public implementations had, each put back into this code by a patch, and the test that catches it.

`python tests/faults.py` runs every named test on the whole code (it must pass) and on each patched copy (it must fail),
and prints a line of JSON a fault; `python tests/faults.py --table` prints the table of tests/README.md. A patch replaces a text
that stands exactly once in its file.
"""
# ruff: noqa: E501 (patches quote lines of code as they stand)

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GITHUB = "https://github.com/"


@dataclass(frozen=True)
class Fault:
    """What was wrong, where it was seen, the patch, and the test that catches it (file without test_, name)."""

    what: str
    seen: str  # owner/repository#number of an issue or pull request, owner/repository and a file, or "arXiv number, eq. n"
    file: str
    old: str
    new: str
    test: str

    @property
    def node(self) -> str:
        file, _, name = self.test.partition("::")
        return f"tests/test_{file}.py::{name}"

    @property
    def source(self) -> str:
        """Where it was seen; a paper is not where, but what may be read so."""
        if not self.seen.startswith("arXiv "):
            return f"seen in {self.seen}"
        paper, _, equation = self.seen.partition(", ")
        return f"not seen, a misreading of {equation + ' of ' if equation else ''}{paper}"


FAULTS = [
    Fault(
        "KL with the log-ratio inverted: `log pi - log ref` inside `exp(d) - d - 1`",
        "hpcaitech/ColossalAI#3696",
        "grpo.py", "    d = ref_logp - logp\n", "    d = logp - ref_logp\n",
        "oracle_enumeration::test_expected_values_of_the_kl_estimators",
    ),
    Fault(
        "`max` of the raw and the clipped term where PPO has `min`",
        "yandexdataschool/Practical_RL#248",
        "grpo.py", "-torch.minimum(", "-torch.maximum(",
        "oracle_values::test_six_cells_of_the_clip",
    ),
    Fault(
        "the surrogate negated twice, so that the loss is ascended",
        "fla-org/flash-linear-attention#1073",
        "grpo.py", "return -torch.minimum(", "return torch.minimum(",
        "grpo::test_update_raises_the_reward_it_is_given",
    ),
    Fault(
        "the end token masked out, so that stopping is never trained",
        "open-thought/tiny-grpo `train.py`",
        "policy.py", "group=group, actions=actions, mask=mask,", "group=group, actions=actions, mask=mask & ~torch.isin(actions, torch.tensor(self.end_ids)),",
        "oracle_sampler::test_the_mask_ends_with_the_end_token",
    ),
    Fault(
        "the sampling temperature missing in the scorer",
        "huggingface/trl#3029",
        "policy.py", "log_distribution(logits, self.temperature, self.exploration_noise)", "log_distribution(logits, 1.0, self.exploration_noise)",
        "oracle_sampler::test_scorer_is_transformers",
    ),
    Fault(
        "each micro-batch divided by its own number of tokens",
        "allenai/open-instruct#1161",
        "grpo.py", "algorithm, ref, denominator, weight, entropy)", "algorithm, ref, None, weight, entropy)",
        "oracle_properties::test_micro_batches_of_1_of_2_and_of_all_rows_give_the_same_update[dapo]",
    ),
    Fault(
        "group std with ddof 0",
        "NVIDIA-NeMo/RL#1423",
        "grpo.py", "(count - 1)).sqrt()", "count).sqrt()",
        "oracle_values::test_advantages_by_hand",
    ),
    Fault(
        "flat groups left to the epsilon, which magnifies the rounding of the mean",
        "NVIDIA-NeMo/RL#4161",
        "grpo.py", "torch.where(is_flat(rewards)[:, None], 0.0, advantages)", "advantages",
        "oracle_values::test_flat_group_is_exactly_zero",
    ),
    Fault(
        "prompts tiled, completions grouped: a group holds completions of several prompts",
        "databricks/compose-rl#147",
        "policy.py", "packed.group.repeat_interleave(group_size)\n        uniforms", "packed.group.repeat(group_size)\n        uniforms",
        "oracle_sampler::test_shapes_of_a_rollout",
    ),
    Fault(
        "rewards reshaped across groups",
        "google/tunix#820",
        "rewards.py", "dtype=torch.float64).view(len(examples), -1))", "dtype=torch.float64).view(-1, len(examples)).T)",
        "grpo::test_rewards_are_weighted_and_a_missing_one_is_the_mean_of_its_group",
    ),
    Fault(
        "advantages centred on the whole batch where the group is meant",
        "XU-YIJIE/grpo-flat#2",
        "grpo.py", "advantages = rewards - mean\n", "advantages = rewards - rewards.mean()\n",
        "oracle_properties::test_groups_do_not_see_each_other",
    ),
    Fault(
        "old log-probabilities taken again at each inner update: the ratio is always 1",
        "meta-pytorch/torchforge#571",
        "grpo.py", "        if first:", "        if True:",
        "grpo::test_ratio_is_one_at_first_and_moves_with_inner_updates",
    ),
    Fault(
        "a detach missing at the ratio: the old log-probabilities carry gradient, and that of the ratio is 0",
        "huggingface/trl#224",
        "grpo.py", "old_logp[rows, :width] = logp.detach()", "old_logp[rows, :width] = logp",
        "grpo::test_update_equals_an_independent_one_by_transformers",
    ),
    Fault(
        "an advantage that carries gradient",
        "ChenRocks/fast_abs_rl#49",
        "algorithms.py", "mean_logp.detach()[:, :, None] - mean_logp.detach()[:, None, :]", "mean_logp[:, :, None] - mean_logp[:, None, :]",
        "oracle_enumeration::test_pairwise_coefficients_are_the_objectives_derivative",
    ),
    Fault(
        "the ratio taken at padding before it is masked: inf * 0 is NaN",
        "modelscope/ms-swift#9767",
        "grpo.py", "log_ratio = torch.where(mask, logp - old_logp, 0.0)", "log_ratio = logp - old_logp",
        "oracle_properties::test_padding_changes_neither_value_nor_gradient",
    ),
    Fault(
        "metrics averaged over padding",
        "natolambert/rlhf-book#216",
        "grpo.py", '"tokens": mask.sum(),', '"tokens": mask.sum() + (~mask).sum(),',
        "oracle_values::test_stats_count_what_the_clip_removed",
    ),
    Fault(
        "prompt tokens in the loss",
        "NVIDIA-NeMo/RL#2176",
        "policy.py", "            packed, group=group, actions=actions, mask=mask,",
        "            packed, group=group, prompts=packed.prompts[:, :-1], prompt_mask=packed.prompt_mask[:, :-1],\n"
        "            actions=torch.cat([packed.prompts[group, -1:], actions], 1), mask=torch.cat([mask[:, :1], mask], 1),",
        "oracle_properties::test_completions_get_a_policy_gradient_up_to_the_end_token_and_prompts_get_none",
    ),
    Fault(
        "logits and ids shifted against each other by one",
        "verl-project/verl#3287",
        "policy.py", "hidden[:, rollout.prompts.shape[1] - 1 :]", "hidden[:, rollout.prompts.shape[1] - 2 : -1]",
        "oracle_sampler::test_scorer_is_transformers",
    ),
    Fault(
        "position ids that count left padding",
        "OpenRLHF/OpenRLHF#217",
        "policy.py", "positions = (real.cumsum(1) - 1).clamp(min=0)  # real", "positions = (torch.ones_like(ids).cumsum(1) - 1).clamp(min=0)  # real",
        "oracle_sampler::test_scorer_is_transformers",
    ),
    Fault(
        "position ids of the completion off by one",
        "microsoft/onnxruntime-genai#2354",
        "policy.py", "rollout.prompt_mask.sum(1)[rollout.group, None] + offsets", "rollout.prompt_mask.sum(1)[rollout.group, None] + offsets + 1",
        "oracle_sampler::test_scorer_is_transformers",
    ),
    Fault(
        "left padding visible to attention",
        "huggingface/trl#2708",
        "policy.py", "key_mask = None if real.all() else real\n        return", "key_mask = None\n        return",
        "oracle_sampler::test_scorer_is_transformers",
    ),
    Fault(
        "a stale cache: rows leave the batch, their keys and values stay",
        "huggingface/transformers#46612",
        "policy.py", "cache.select(keep)", "cache.select(torch.arange(len(keep)))",
        "oracle_sampler::test_greedy_is_generate_of_transformers",
    ),
    Fault(
        "top-k in the sampler, the full vocabulary in the loss",
        "NVIDIA/NeMo-Aligner#46",
        "policy.py", "token.copy_(choose(distribution,", "token.copy_(choose(distribution.where(distribution >= distribution.topk(9).values[:, -1:], -torch.inf),",
        "oracle_sampler::test_frequencies_follow_the_softmax",
    ),
    Fault(
        "the sequence ratio of GSPO summed, not averaged",
        "NVIDIA-NeMo/RL#2269",
        "grpo.py", "log_ratio = row_mean(log_ratio, mask)", "log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)",
        "oracle_values::test_the_sequence_ratio_is_the_geometric_mean",
    ),
    Fault(
        "the weight of CISPO with gradient",
        "allenai/open-instruct#1269",
        "grpo.py", "return -clipped.detach() * advantage", "return -clipped * advantage",
        "oracle_values::test_cispo_caps_the_weight_and_keeps_the_gradient",
    ),
    Fault(
        "the clipped term computed, the unclipped one averaged: nothing is clipped",
        "rllm-org/rllm#81",
        "grpo.py", "-torch.minimum(capped * advantage, clipped * advantage)", "-ratio * advantage",
        "oracle_values::test_the_two_sides_of_the_clip_are_the_rows_own",
    ),
    Fault(
        "rows divided by the padded width, not by their own length",
        "Tencent-Hunyuan/UniRL#448",
        "grpo.py", "per_row = per_row / mask.sum(1).clamp(min=1)", "per_row = per_row / mask.shape[1]",
        "oracle_values::test_aggregates_of_rows_of_1_2_and_4_tokens",
    ),
    Fault(
        "Dr. GRPO's constant replaced by the width of the batch",
        "verl-project/verl#3741",
        "grpo.py", '"constant": rows * max_new_tokens}', '"constant": rows * mask.shape[1]}',
        "oracle_values::test_denominators_by_hand",
    ),
    Fault(
        "truncated completions dropped from the loss mask and counted elsewhere",
        "huggingface/trl#4976",
        "policy.py", "group=group, actions=actions, mask=mask,", "group=group, actions=actions, mask=mask & ~truncated[:, None],",
        "oracle_sampler::test_truncated_rows_have_a_mask_of_all_ones",
    ),
    Fault(
        "only one of several end ids ends a completion",
        "huggingface/trl#7039",
        "policy.py", "sorted({tokenizer.eos_token_id, *end_ids} - {None})", "sorted({tokenizer.eos_token_id} - {None})",
        "oracle_sampler::test_every_end_id_ends",
    ),
    Fault(
        "tokens after the end token kept in the mask",
        "bingreeky/MemGen#33",
        "policy.py", "going.logical_and_((token", "going.logical_or_((token",
        "oracle_sampler::test_the_mask_ends_with_the_end_token",
    ),
    Fault(
        "cumulative sums in low precision over a large vocabulary",
        "NVIDIA/Megatron-LM#7182",
        "policy.py", "sums = blocks.sum(-1, dtype=torch.float64)", "sums = blocks.sum(-1)",
        "oracle_sampler::test_each_token_of_a_large_vocabulary_has_its_own_slice",
    ),
    Fault(
        "a token of probability 0 drawn",
        "pytorch/pytorch#48841",
        "policy.py", "searchsorted(cumulative, goal, right=True)", "searchsorted(cumulative, goal, right=False)",
        "oracle_sampler::test_inverse_cdf_by_hand",
    ),
    Fault(
        "the same random numbers for rows that should differ",
        "verl-project/verl#5179",
        "rollouts.py", "SeedSequence([*key, prompt])", "SeedSequence([*key])",
        "oracle_sampler::test_key_and_number_of_the_prompt_change_the_rows",
    ),
    Fault(
        "after a resume the reference is the trained policy, not the base",
        "NVIDIA-NeMo/RL#3722",
        "grpo_run.py", "    run.restore(write=not config.trace)\n", "    run.restore(write=not config.trace)\n    run.reference = run.reference and frozen(policy)\n",
        "grpo::test_resumed_run_is_bitwise_equal_to_the_one_not_interrupted",
    ),
    Fault(
        "gradients of the last inner update not cleared",
        "huggingface/trl#583",
        "runs.py", "    optimizer.step()\n    optimizer.zero_grad()\n", "    optimizer.step()\n",
        "oracle_golden::test_ten_updates_are_the_committed_ones",
    ),
    Fault(
        "k1 offered as a loss, whose gradient is 0 in expectation",
        "NVIDIA-NeMo/RL#2506",
        "algorithms.py", 'if self.kl_estimator == "k1":', 'if self.kl_estimator == "k1":\n            return\n        if False:',
        "oracle_enumeration::test_k1_as_a_loss_is_refused_with_the_reason",
    ),
    Fault(
        "a reward of None scored as 0",
        "huggingface/trl#5902",
        "rewards.py", "torch.where(self.values.isnan(), means, self.values)", "torch.where(self.values.isnan(), 0.0, self.values)",
        "grpo::test_rewards_are_weighted_and_a_missing_one_is_the_mean_of_its_group",
    ),
    Fault(
        "dynamic sampling that pairs kept groups with other groups' rewards",
        "NVIDIA-NeMo/RL#3794",
        "grpo.py", "kept.append((rollout.select(rows), scores[keep]))", "kept.append((rollout.select(rows), scores[: int(keep.sum())]))",
        "grpo::test_dynamic_sampling_replaces_flat_groups_and_only_those",
    ),
    Fault(
        "the soft overlong penalty beginning at the limit, not a buffer before it",
        "verl-project/verl#3856",
        "rewards.py", "(limit - len(ids)) / (buffer * limit) - 1)", "(limit - len(ids)) / (buffer * limit))",
        "oracle_values::test_overlong_penalty_by_hand",
    ),
    Fault(
        "pass@k as drawing with replacement, `1 - (1 - c/n)^k`",
        "verl-project/verl#7240",
        "inference.py", "1 - math.comb(total - right, k) / math.comb(total, k)", "1 - (1 - right / total) ** k",
        "oracle_values::test_pass_at_k_by_hand",
    ),
    Fault(
        "rows of LUSPO weighed by their length twice, and divided by the padded width",
        "huggingface/trl#6654",
        "grpo.py", "    per_row = torch.where(mask, per_token, 0.0).sum(1)  # (B,)\n",
        "    per_row = torch.where(mask, per_token, 0.0).sum(1)  # (B,)\n"
        '    if (algorithm.ratio, algorithm.aggregate) == ("sequence", "constant"):\n'
        "        per_row = per_row * mask.sum(1) / mask.shape[1]\n",
        "oracle_values::test_under_a_sequence_ratio_and_the_constant_each_token_weighs_the_same",
    ),
    Fault(
        "the gate of SAPO taken for the loss, without `-A`",
        "unslothai/unsloth-zoo#869",
        "grpo.py", "return -4 / steepness * torch.sigmoid(steepness * (ratio - 1)) * advantage", "return 4 / steepness * torch.sigmoid(steepness * (ratio - 1))",
        "oracle_values::test_the_other_surrogates_and_terms_by_hand",
    ),
    Fault(
        "the bounds of GMPO on the mean of the log-ratios, where GSPO has its own, not on each token's",
        "arXiv 2507.20673",
        "grpo.py", "        return -row_mean(torch.where(advantage > 0, above, below), mask).exp() * advantage\n",
        "        mean = row_mean(log_ratio, mask)\n"
        "        above, below = mean.clamp(max=algorithm.epsilon_high), mean.clamp(min=-algorithm.epsilon)\n"
        "        return -torch.where(advantage > 0, above, below).exp() * advantage\n",
        "oracle_values::test_geometric_bounds_each_token_before_the_mean_and_gspo_after_it",
    ),
    Fault(
        "the mask of DPPO on both sides whatever the sign of A: what moves back is masked too",
        "arXiv 2602.04879, eq. 12",
        "grpo.py", "        return -torch.where(low | high, 0.0, ratio) * advantage\n",
        "        change = logp.exp() * (1 - (-log_ratio).exp())\n"
        "        far = (change < -algorithm.epsilon) | (change > algorithm.epsilon_high)\n"
        "        return -torch.where(far, 0.0, ratio) * advantage\n",
        "oracle_values::test_dppo_bounds_the_probability",
    ),
    Fault(
        "the pull towards the old policy only on tokens that the surrogate's bound has left",
        "PrimeIntellect-ai/prime-rl#1697",
        "grpo.py", "        per_token = per_token + algorithm.anchor / 2 * token_log_ratio.square()\n",
        "        low, high = bounded(log_ratio, advantage, logp, algorithm)\n"
        "        per_token = per_token + torch.where(low | high, 0.0, algorithm.anchor / 2 * token_log_ratio.square())\n",
        "oracle_values::test_the_other_surrogates_and_terms_by_hand",
    ),
    Fault(
        "the log-ratio of Kimi's pull not squared: its gradient is 0 in expectation",
        "PrimeIntellect-ai/prime-rl#1390",
        "grpo.py", "algorithm.anchor / 2 * token_log_ratio.square()", "algorithm.anchor * token_log_ratio",
        "oracle_values::test_the_other_surrogates_and_terms_by_hand",
    ),
    Fault(
        "negative rewards under MaxRL, whose mean turns the sign of every advantage",
        "huggingface/trl#5026",
        "grpo.py", "        if rewards.min() < 0:\n", "        if False:\n",
        "oracle_values::test_max_rl_by_hand",
    ),
    Fault(
        "under pass@k, rows that add nothing to the best keep their reward as the advantage",
        "hiyouga/EasyR1#585",
        "algorithms.py", "scatter(1, order, size / math.comb(size, k) * gain)", "scatter(1, order, torch.where(gain > 0, size / math.comb(size, k) * gain, least_first))",
        "oracle_values::test_a_group_with_more_than_enough_successes_is_silent_under_max_at_k",
    ),
    Fault(
        "under GDPO, groups taken for flat by the sum of their rewards",
        "NovaSky-AI/SkyRL#2104",
        "grpo.py", 'scores.filled * scores.weights if algorithm.combine == "each" else scores.total[..., None]', "scores.total[..., None]",
        "oracle_values::test_under_each_a_group_is_flat_only_if_every_function_is",
    ),
    Fault(
        "the bound of dual clip for A > 0 too, where it lifts the clip",
        "thu-ml/tianshou#433",
        "grpo.py", "    return -torch.minimum(capped * advantage, clipped * advantage)",
        "    gain = torch.minimum(ratio * advantage, clipped * advantage)\n"
        "    return -(torch.maximum(gain, algorithm.cap * advantage) if algorithm.cap else gain)",
        "oracle_values::test_the_other_surrogates_and_terms_by_hand",
    ),
    Fault(
        "the correction by the policy as it is now, not as it was before the first inner update",
        "THUDM/slime#179",
        "grpo.py", "weight = loss_weight(part, old,", "weight = loss_weight(part, logp.detach(),",
        "stale::test_corrections_stay_as_they_were_at_the_first_inner_update",
    ),
    Fault(
        "the correction of a row as the mean over its tokens, not the product: biased",
        "huggingface/trl#5815",
        "algorithms.py", "log_rho = log_rho.sum(1, keepdim=True).expand_as(log_rho)", "log_rho = (log_rho.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand_as(log_rho)",
        "oracle_enumeration::test_the_product_over_the_row_alone_makes_another_samplers_rollouts_unbiased",
    ),
    Fault(
        "new weights that never reach the sampler: all rollouts are the base's",
        "huggingface/trl#5312",
        "grpo_run.py", "            self.samplers[-1].model.load_state_dict(self.policy.model.state_dict())\n", "",
        "stale::test_a_rollout_is_of_the_policy_so_many_steps_ago",
    ),
    Fault(
        "the threshold of the top-entropy tokens taken over padding too",
        "huggingface/trl#3709",
        "grpo.py", "entropy[loss_mask(rollout, algorithm)].cpu()", "entropy.flatten().cpu()",
        "stale::test_the_tokens_of_highest_entropy_by_hand",
    ),
    Fault(
        "the entropy bonus with the wrong sign",
        "DLR-RM/stable-baselines3#127",
        "grpo.py", "per_token = per_token + algorithm.entropy_bonus", "per_token = per_token - algorithm.entropy_bonus",
        "oracle_enumeration::test_the_entropy_bonus_climbs_the_entropy_where_the_policy_goes",
    ),
    Fault(
        "masked truncated rows counted in the tokens that the loss is divided by",
        "huggingface/trl#6369",
        "grpo.py", "    share = loss_denominator(loss_mask(rollout, algorithm), algorithm.aggregate", "    share = loss_denominator(rollout.mask, algorithm.aggregate",
        "grpo::test_truncated_rows_leave_the_loss_and_not_their_groups_mean",
    ),
    Fault(
        "rows beyond the off-policy limit dropped from the whole loss, with their KL term",
        "huggingface/trl#4689",
        "grpo.py", "        per_token = torch.where(near | (advantage >= 0), per_token, 0.0)\n", "        mask = mask & (near | (advantage >= 0))\n",
        "oracle_values::test_rows_that_have_become_rare_are_dropped_where_they_should_be_made_rarer_still",
    ),
]  # fmt: skip


def table() -> str:
    """The table of tests/README.md."""
    lines = ["| fault | seen | caught by |", "| --- | --- | --- |"]
    for fault in FAULTS:
        repository, _, number = fault.seen.partition("#")
        paper = fault.seen.partition(", ")[0]
        if paper.startswith("arXiv "):
            where = fault.source.replace(paper, f"[{paper}](https://arxiv.org/abs/{paper.split()[1]})")
        elif number:
            where = f"[{fault.seen}]({GITHUB}{repository}/issues/{number})"  # GitHub forwards to the pull request
        else:
            repository, file = fault.seen.split()
            where = f"[{repository}]({GITHUB}{repository}) {file}"
        lines.append(f"| {fault.what} | {where} | `{fault.test}` |")
    return "\n".join(lines)


def patched_copy(fault: Fault | None, folder: Path) -> None:
    """The project's code and tests in `folder`, with the fault's patch."""
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    if fault is not None:
        source = (folder / fault.file).read_text(encoding="utf-8")
        assert source.count(fault.old) == 1, f"{fault.what}: the text to patch stands {source.count(fault.old)} times"
        (folder / fault.file).write_text(source.replace(fault.old, fault.new), encoding="utf-8")


class Failures:
    """A pytest plugin that notes how many tests ran and what the failed ones raised."""

    def __init__(self):
        self.count, self.raised = 0, []

    def pytest_runtest_makereport(self, item, call):
        self.count += call.when == "call"
        if call.excinfo is not None:
            self.raised.append(f"{call.when}: {call.excinfo.typename}")


def outcome(fault: Fault | None, nodes: list[str]) -> dict:
    """Run tests on a patched copy in this process, which must not have imported the project yet."""
    import pytest

    failures = Failures()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        patched_copy(fault, folder)
        os.chdir(folder)
        arguments = ["-q", "-x", "-p", "no:cacheprovider", "--rootdir", name, *nodes]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            status = pytest.main(arguments, plugins=[failures])
        os.chdir("/")
    return {"what": fault and fault.what, "status": int(status), "tests": failures.count, "raised": failures.raised}


def main() -> None:
    """Each run in a fork of its own, so that torch and transformers are imported once."""
    import hypothesis  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    jobs = [(None, sorted({fault.node for fault in FAULTS})), *((fault, [fault.node]) for fault in FAULTS)]
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        for result in pool.starmap(outcome, jobs, chunksize=1):
            print(json.dumps(result))


if __name__ == "__main__":
    print(table()) if "--table" in sys.argv else main()
