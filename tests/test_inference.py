"""Sampler and scorer against `transformers`, draws by hand, checkpoints and saved states, the command line."""

import dataclasses
import io
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import inference
from inference import (
    InferenceConfig,
    Rollout,
    TokenPolicy,
    atomic_write,
    bootstrap,
    choose_device,
    evaluate,
    inverse_cdf,
    load,
    load_state,
    log_distribution,
    micro_batches,
    out_of_memory,
    pass_at_k,
    printable,
    results_table,
    row_uniforms,
    run_main,
    save,
    save_state,
    show_answer,
    start_run,
    wilson,
)
from model_toy import character_tokenizer
from rewards import UserError
from tasks import Example, find_task

SCRIPT = Path(inference.__file__)
CPU = torch.device("cpu")
# Prompts of 10, 3, 8 and 10 tokens.
EXAMPLES = [Example(f"What is {text}?") for text in ("(4 - 9) * 6", "", "12+34", "(0 + 0) + 0")]
LENGTH = 12
ENDS = "05"  # with these as further end ids a random policy's completions have very different lengths


def sample(policy: TokenPolicy, examples=EXAMPLES, group_size=3, key=(0, 0, 0), length=LENGTH, **options) -> Rollout:
    return policy.sample(examples, group_size, key, length, **options)


def reference_logits(model, policy: TokenPolicy, rollout: Rollout) -> list[torch.Tensor]:
    """Logits (tokens, V) of each row by `transformers`, one row at a time, without padding or cache."""
    logits = []
    for row, completion in enumerate(rollout.completion_ids):
        group = rollout.group[row]
        prompt = rollout.prompts[group][rollout.prompt_mask[group]].tolist()
        with torch.no_grad():
            x = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logits.append(x / policy.temperature)
    return logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, check_dtype=False)


# --- Sampler and scorer ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1.0, 0.7])
def case(request, random_policy, reopen):
    """A policy with several end ids, `transformers`' model of it, and a rollout with rows of different lengths."""
    policy = random_policy(temperature=request.param, end=ENDS)
    rollout = sample(policy)
    lengths = rollout.mask.sum(1)
    assert lengths.min() < lengths.max() and rollout.truncated.any() and not rollout.truncated.all()
    assert not rollout.prompt_mask.all()
    return policy, reopen(policy)[0], rollout


def test_shapes_of_a_rollout(case):
    _, _, rollout = case
    assert rollout.prompts.shape == rollout.prompt_mask.shape == (4, 10)
    assert rollout.prompt_mask.sum(1).tolist() == [10, 3, 8, 10]
    assert rollout.prompt_mask[:, -1].all()  # padded on the left
    assert rollout.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert rollout.actions.shape == rollout.mask.shape == rollout.sampler_logp.shape == (12, LENGTH)
    assert rollout.truncated.shape == (12,) and len(rollout.texts) == 12


@pytest.mark.parametrize("share_prompts", [True, False])
def test_scorer_is_transformers(case, share_prompts, monkeypatch):
    """Log-probabilities and exact entropies of each row by another implementation, alone and without padding."""
    policy, reference, rollout = case
    monkeypatch.setattr(policy, "joined_hidden" if share_prompts else "shared_hidden", None)  # not the other pass
    with torch.no_grad():
        logp, entropy = policy.log_probs(rollout, share_prompts)
    assert logp.dtype == entropy.dtype == torch.float32
    assert (logp[~rollout.mask] == 0).all() and (entropy[~rollout.mask] == 0).all()
    for row, logits in enumerate(reference_logits(reference, policy, rollout)):
        keep = rollout.mask[row]
        distribution = torch.distributions.Categorical(logits=logits)
        assert_close(logp[row, keep], distribution.log_prob(rollout.actions[row, keep]))
        assert_close(entropy[row, keep], distribution.entropy())


@pytest.mark.parametrize("drop_below", [0.0, 0.9, 1.0])
def test_sampler_agrees_with_scorer_whatever_is_dropped(case, drop_below, monkeypatch):
    policy, _, rollout = case
    monkeypatch.setattr(policy, "drop_below", drop_below)
    again = sample(policy)
    assert torch.equal(again.actions, rollout.actions) and torch.equal(again.mask, rollout.mask)
    assert torch.equal(again.truncated, rollout.truncated) and again.texts == rollout.texts
    assert (again.sampler_logp[~again.mask] == 0).all()
    with torch.no_grad():
        for share_prompts in (True, False):
            assert_close(again.sampler_logp, policy.log_probs(again, share_prompts)[0])


@pytest.mark.parametrize("group_size", [1, 3])
def test_rows_do_not_depend_on_the_batch(case, group_size):
    """Prompts one at a time with their numbers, in two halves, or together: the same rows."""
    policy, _, _ = case
    together = sample(policy, group_size=group_size)
    for size in (1, 2):
        ids, texts, truncated = [], [], []
        for first in range(0, len(EXAMPLES), size):
            part = sample(policy, EXAMPLES[first : first + size], group_size, first=first)
            ids += part.completion_ids
            texts += part.texts
            truncated += part.truncated.tolist()
        assert ids == together.completion_ids and texts == together.texts
        assert truncated == together.truncated.tolist()


def test_a_larger_group_or_limit_begins_with_the_same_rows(case):
    policy, _, rollout = case
    larger = sample(policy, group_size=5).completion_ids
    assert [larger[5 * p + g] for p in range(4) for g in range(3)] == rollout.completion_ids
    longer = sample(policy, length=2 * LENGTH).completion_ids
    assert [ids[:LENGTH] for ids in longer] == rollout.completion_ids


def test_key_and_number_of_the_prompt_change_the_rows(case):
    policy, _, rollout = case
    for change in ({"key": (1, 0, 0)}, {"key": (0, 1, 0)}, {"key": (0, 0, 1)}, {"first": 4}):
        assert sample(policy, **change).completion_ids != rollout.completion_ids
    same_prompt = sample(policy, [EXAMPLES[0]] * 2, 2).completion_ids
    assert len({tuple(ids) for ids in same_prompt}) == 4  # neither prompts nor completions share their numbers


def test_decoding_with_a_cache_is_decoding_without(case):
    """Draw each row again from `transformers`' logits of its own prefix and the row's own uniforms."""
    policy, reference, rollout = case
    uniforms = row_uniforms((0, 0, 0), range(4), 3, LENGTH)
    for row, logits in enumerate(reference_logits(reference, policy, rollout)):
        count = len(logits)
        weights = torch.softmax(logits.double(), -1).cumsum(-1)
        tokens = [int((line <= u).sum()) for line, u in zip(weights, uniforms[row, :count], strict=True)]
        assert tokens == rollout.completion_ids[row]


def test_gradients_of_the_scorer_are_those_of_transformers(case):
    """A weighted sum of log-probabilities: a relative 1e-5 for every parameter, with shared prompts and without."""
    policy, reference, rollout = case
    weights = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(2))
    reference.zero_grad()
    reference.get_input_embeddings().padding_idx = None  # a sampled pad token is a token like any other
    for row, completion in enumerate(rollout.completion_ids):
        group = rollout.group[row]
        prompt = rollout.prompts[group][rollout.prompt_mask[group]].tolist()
        logits = reference(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / policy.temperature
        logp = torch.distributions.Categorical(logits=logits).log_prob(torch.tensor(completion))
        (logp * weights[row, : len(completion)]).sum().backward()
    for share_prompts in (True, False):
        policy.model.zero_grad()
        logp, entropy = policy.log_probs(rollout, share_prompts)
        assert not entropy.requires_grad
        (logp * weights).sum().backward()
        for name, other in reference.named_parameters():
            gradient = policy.model.get_parameter(name).grad
            assert other.grad.norm() > 1e-3, name
            assert (gradient - other.grad).norm() <= 1e-5 * other.grad.norm(), name
    policy.model.zero_grad()


def test_select_is_the_full_computation(case):
    policy, _, rollout = case
    with torch.no_grad():
        logp, entropy = policy.log_probs(rollout)
        for rows in ([0], [4], [3, 5], [6, 7, 8], [1, 4, 7, 10], [11, 3, 0], list(range(12))):
            part = rollout.select(torch.tensor(rows))
            lengths = rollout.mask[rows].sum(1)
            width = int(lengths.max())
            assert part.actions.shape == (len(rows), width)
            assert part.prompts.shape[1] == max(rollout.prompt_mask[rollout.group[rows]].sum(1))
            assert part.completion_ids == [rollout.completion_ids[row] for row in rows]
            assert part.texts == [rollout.texts[row] for row in rows]
            assert torch.equal(part.truncated, rollout.truncated[rows])
            assert torch.equal(part.sampler_logp, rollout.sampler_logp[rows, :width])
            for share_prompts in (True, False):
                part_logp, part_entropy = policy.log_probs(part, share_prompts)
                assert_close(part_logp, logp[rows, :width])
                assert_close(part_entropy, entropy[rows, :width])


def test_micro_batches_give_the_full_computation(case):
    policy, _, rollout = case
    with torch.no_grad():
        logp, _ = policy.log_probs(rollout)
        for budget in (1, 40, 100, 10_000):
            for rows in micro_batches(rollout, budget):
                part = rollout.select(rows)
                assert_close(policy.log_probs(part)[0], logp[rows, : part.actions.shape[1]])


def test_completions_of_one_token(case):
    policy, reference, _ = case
    rollout = sample(policy, length=1)
    assert rollout.actions.shape == (12, 1) and rollout.mask.all()
    expected = torch.stack([torch.log_softmax(x[0], -1) for x in reference_logits(reference, policy, rollout)])
    expected = expected.gather(1, rollout.actions)
    with torch.no_grad():
        for logp in (policy.log_probs(rollout)[0], policy.log_probs(rollout, False)[0], rollout.sampler_logp):
            assert_close(logp, expected)


def test_frequencies_follow_the_softmax(case):
    """Chi-square of 4,000 first tokens, at a fixed seed, against `transformers`' distribution."""
    policy, reference, _ = case
    rollout = sample(policy, EXAMPLES[:1], 4000, length=1)
    with torch.no_grad():
        logits = reference(rollout.prompts[:1]).logits[0, -1] / policy.temperature
    expected = 4000 * torch.softmax(logits.double(), -1)
    seen = torch.bincount(rollout.actions[:, 0], minlength=len(expected)).double()
    rare = expected < 5  # pooled, as the approximation asks
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((seen - expected) ** 2 / expected).sum()
    p_value = torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2).double(), statistic / 2)
    assert len(seen) > 10 and p_value > 0.01


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_mask_ends_with_the_end_token(random_policy, reopen, pad_is_eos):
    """Every row's mask covers all up to and including the first end token, also where padding has the same id."""
    policy = random_policy(end=ENDS)
    if pad_is_eos:
        policy.tokenizer.pad_token = policy.tokenizer.eos_token
        policy = TokenPolicy(policy.model, policy.tokenizer, 1.0, policy.end_ids)
        assert policy.pad_id == policy.tokenizer.eos_token_id
    rollout = sample(policy, group_size=32)
    by_eos = 0
    for actions, mask, truncated in zip(rollout.actions.tolist(), rollout.mask, rollout.truncated, strict=True):
        count = int(mask.sum())
        assert mask.tolist() == [True] * count + [False] * (LENGTH - count)
        assert not set(actions[: count - 1]) & set(policy.end_ids)
        assert actions[count:] == [policy.pad_id] * (LENGTH - count)
        if truncated:
            assert count == LENGTH and actions[-1] not in policy.end_ids
        else:
            assert actions[count - 1] in policy.end_ids
        by_eos += actions[count - 1] == policy.tokenizer.eos_token_id
    assert by_eos > 0 and rollout.truncated.any()
    last_is_end = rollout.mask.all(1) & ~rollout.truncated
    assert last_is_end.any()  # an end token in the last place is no truncation
    reference = reopen(policy)[0]
    part = rollout.select(torch.arange(0, 128, 8))
    with torch.no_grad():
        logp, _ = policy.log_probs(part)
    for row, logits in enumerate(reference_logits(reference, policy, part)):
        distribution = torch.distributions.Categorical(logits=logits)
        assert_close(logp[row, part.mask[row]], distribution.log_prob(part.actions[row, part.mask[row]]))


def test_every_end_id_ends(random_policy):
    policy = random_policy(end=ENDS)
    rollout = sample(policy, group_size=64)
    last = Counter(ids[-1] for ids, cut in zip(rollout.completion_ids, rollout.truncated, strict=True) if not cut)
    assert set(last) == set(policy.end_ids) and len(policy.end_ids) == 3


def test_truncated_rows_have_a_mask_of_all_ones(random_policy):
    policy = random_policy()
    policy.end_ids = [policy.tokenizer.unk_token_id]
    with torch.no_grad():
        policy.model.model.norm.weight.zero_()  # every token equally likely
    rollout = sample(policy, group_size=20, length=3)
    ended = [policy.end_ids[0] in ids for ids in rollout.completion_ids]
    assert rollout.truncated.tolist() == [not end for end in ended] and True in ended
    assert rollout.mask[rollout.truncated].all()


@pytest.mark.parametrize("end", ["", ENDS], ids=["eos", "several"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_greedy_is_generate_of_transformers(random_policy, reopen, end, tied):
    policy = random_policy(temperature=0.7, end=end, seed=3, tie_word_embeddings=tied)
    reference, tokenizer, _ = reopen(policy)
    rollout = sample(policy, group_size=1, greedy=True, length=20)
    tokenizer.padding_side = "left"
    inputs = tokenizer([example.prompt for example in EXAMPLES], return_tensors="pt", padding=True)
    output = reference.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=20
    )
    for row, ids in enumerate(output[:, inputs["input_ids"].shape[1] :].tolist()):
        ends = [i for i, token in enumerate(ids) if token in policy.end_ids]
        assert rollout.completion_ids[row] == ids[: ends[0] + 1 if ends else None]
    assert len({len(ids) for ids in rollout.completion_ids}) > 1 or not end
    again = sample(policy, group_size=1, greedy=True, length=20, key=(5, 5, 5))
    assert torch.equal(again.actions, rollout.actions)  # no randomness


def test_text_is_that_of_the_ids_without_special_tokens(case):
    policy, _, rollout = case
    for text, ids in zip(rollout.texts, rollout.completion_ids, strict=True):
        tokens = policy.tokenizer.convert_ids_to_tokens(ids)
        assert text == "".join(token for token in tokens if token not in ("<pad>", "<eos>", "<unk>"))


def test_pack_holds_given_completions(random_policy):
    policy = random_policy()
    eos = policy.tokenizer.eos_token_id
    rollout = policy.pack([[5, 6, 7], [8]], [[9, eos], [10, 11, 12]], ["a", "b"])
    assert rollout.prompts.tolist() == [[5, 6, 7], [policy.pad_id, policy.pad_id, 8]]
    assert rollout.prompt_mask.tolist() == [[True] * 3, [False, False, True]]
    assert rollout.actions.tolist() == [[9, eos, policy.pad_id], [10, 11, 12]]
    assert rollout.mask.tolist() == [[True, True, False], [True] * 3]
    assert rollout.group.tolist() == [0, 1] and rollout.truncated.tolist() == [False, True]


def test_unknown_and_empty_questions_are_refused(random_policy):
    policy = random_policy()
    with pytest.raises(UserError, match="does not know % é ÷; leave it out"):
        policy.encode(["What is 1?", "é 8 ÷ 2 % 2"])
    for empty in ("", " \n "):
        with pytest.raises(UserError, match="empty"):
            policy.encode([empty])
    with pytest.raises(UserError) as caught:
        policy.encode(["What is \x1b[2J?"])
    assert "\x1b" not in str(caught.value)


# --- Draws ----------------------------------------------------------------------------------------------------------

TINY, NEARLY_ONE = 2.0**-53, 1 - 2.0**-53


@pytest.mark.parametrize(
    ("probabilities", "uniform", "token"),
    [
        ([0.25, 0.5, 0.25], TINY, 0),
        ([0.25, 0.5, 0.25], 0.2499999, 0),
        ([0.25, 0.5, 0.25], 0.25, 1),  # the first whose cumulative weight exceeds u
        ([0.25, 0.5, 0.25], 0.7499999, 1),
        ([0.25, 0.5, 0.25], 0.75, 2),
        ([0.25, 0.5, 0.25], NEARLY_ONE, 2),
        ([0.0, 0.5, 0.5], TINY, 1),
        ([0.0, 0.5, 0.5], 0.0, 1),
        ([0.0, 0.0, 1.0], TINY, 2),
        ([0.5, 0.0, 0.5], 0.4999999, 0),
        ([0.5, 0.0, 0.5], 0.5, 2),
        ([0.5, 0.0, 0.0, 0.5], 0.5, 3),
        ([0.5, 0.5, 0.0], NEARLY_ONE, 1),
        ([0.5, 0.5, 0.0], 1.0, 1),  # even where rounding makes u * total the total itself
        ([0.5, 0.5, 0.0, 0.0], 1.0, 1),
        ([1.0, 0.0, 0.0], NEARLY_ONE, 0),
        ([1.0], NEARLY_ONE, 0),
        ([1.0], TINY, 0),
    ],
)
def test_inverse_cdf_by_hand(probabilities, uniform, token):
    log_probs = torch.tensor([probabilities]).log()
    assert inverse_cdf(log_probs, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


@pytest.mark.parametrize("u", [TINY, NEARLY_ONE, 0.5], ids=["near 0", "near 1", "middle"])
def test_inverse_cdf_never_leaves_the_support(u):
    """2,000 distributions over 1,000 tokens whose float32 weights do not sum to 1; two thirds are impossible."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 1000, generator=generator)
    possible = torch.rand(2000, 1000, generator=generator) < 1 / 3
    log_probs = log_distribution(logits.masked_fill(~possible, float("-inf")), 1.0)
    token = inverse_cdf(log_probs, torch.full((2000,), u, dtype=torch.float64))
    assert possible.gather(1, token[:, None]).all()
    if u != 0.5:
        ends = possible.int().argmax(1) if u == TINY else 999 - possible.flip(1).int().argmax(1)
        assert torch.equal(token, ends)


def test_inverse_cdf_is_numpy_search():
    generator = torch.Generator().manual_seed(0)
    log_probs = log_distribution(torch.randn(500, 40, generator=generator), 1.0)
    uniform = torch.rand(500, generator=generator, dtype=torch.float64)
    for row, token in enumerate(inverse_cdf(log_probs, uniform).tolist()):
        weights = np.exp(log_probs[row].numpy()).astype(np.float64).cumsum()
        assert token == np.searchsorted(weights, uniform[row].item() * weights[-1], side="right")


def test_log_distribution_works_in_float32():
    logits = torch.tensor([[300.0, 299.0, -300.0]], dtype=torch.bfloat16)
    expected = torch.log_softmax(logits.double() / 0.5, -1)
    actual = log_distribution(logits, 0.5)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


def test_weights_that_are_not_finite_are_an_error_not_a_token(random_policy):
    policy = random_policy()
    with torch.no_grad():
        policy.model.model.norm.weight[0] = float("nan")
    for greedy in (False, True):
        with pytest.raises(FloatingPointError, match="not finite"):
            sample(policy, greedy=greedy)
    token = inverse_cdf(torch.full((1, 5), float("nan")), torch.tensor([0.5], dtype=torch.float64))
    assert 0 <= token.item() < 5


def test_row_uniforms_are_these_on_every_machine():
    expected = [
        [0.5998858591544199, 0.7456635094685379, 0.04998757583934921],
        [0.5513101606924525, 0.832356979547722, 0.4686145678674133],
    ]
    actual = row_uniforms((1, 2, 3), [4], 2, 3)
    assert actual.dtype == torch.float64
    assert actual.tolist() == expected


def test_row_uniforms_belong_to_the_row():
    key, whole = (7, 8, 9), row_uniforms((7, 8, 9), range(5), 4, 16)
    assert whole.shape == (20, 16)
    for prompt, completion in itertools.product(range(5), range(4)):
        alone = row_uniforms(key, [prompt], completion + 1, 9)[completion]
        assert torch.equal(alone, whole[4 * prompt + completion, :9])
        assert torch.equal(row_uniforms(key, [3, prompt], 4, 16)[4 + completion], whole[4 * prompt + completion])
    assert len(set(whole.flatten().tolist())) == whole.numel()
    for other in ((8, 8, 9), (7, 9, 9), (7, 8, 10)):
        assert not (row_uniforms(other, range(5), 4, 16) == whole).any()


def test_row_uniforms_lie_in_the_open_interval(monkeypatch):
    values = row_uniforms((0, 0, 0), range(100), 10, 100).flatten()
    assert values.min() > 0 and values.max() < 1
    expected = torch.arange(1, 10) / 10
    assert_close(torch.quantile(values, expected.double()), expected, atol=0.006)  # four standard errors
    for bits, end in ((0, 2.0**-53), (2**64 - 1, 1 - 2.0**-53)):
        monkeypatch.setattr(np.random, "Philox", lambda _, bits=bits: Constant(bits))
        assert row_uniforms((0, 0, 0), [0], 1, 2).tolist() == [[end, end]]


class Constant:
    """A bit generator at one end of its range."""

    def __init__(self, bits: int):
        self.bits = bits

    def random_raw(self, length: int) -> np.ndarray:
        return np.full(length, self.bits, dtype=np.uint64)


# --- Micro-batches --------------------------------------------------------------------------------------------------


def rollout_of(prompt_lengths: list[int], lengths: list[list[int]]) -> Rollout:
    """A rollout with these prompt lengths and, for each prompt, these completion lengths."""
    group = torch.tensor([p for p, row in enumerate(lengths) for _ in row])
    flat = torch.tensor([length for row in lengths for length in row])
    prompt_mask = torch.arange(max(prompt_lengths)) >= max(prompt_lengths) - torch.tensor(prompt_lengths)[:, None]
    mask = torch.arange(int(flat.max())) < flat[:, None]
    return Rollout(
        prompts=prompt_mask.long(),
        prompt_mask=prompt_mask,
        group=group,
        actions=mask.long(),
        mask=mask,
        sampler_logp=mask.float(),
        truncated=torch.zeros(len(group), dtype=torch.bool),
        texts=[""] * len(group),
    )


def tokens_of(part: Rollout) -> int:
    """What a micro-batch costs with its padding: each prompt once, each completion at the longest one's width."""
    return part.prompts.numel() + part.actions.numel()


@pytest.mark.parametrize("seed", range(30))
def test_micro_batches_cover_each_row_once_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    prompts, group_size = int(rng.integers(1, 9)), int(rng.integers(1, 9))
    prompt_lengths = rng.integers(1, 30, prompts).tolist()
    lengths = rng.geometric(rng.uniform(0.03, 0.5), (prompts, group_size)).tolist()
    rollout = rollout_of(prompt_lengths, lengths)
    budget = int(rng.integers(1, 400))
    batches = micro_batches(rollout, budget)
    assert sorted(torch.cat(batches).tolist()) == list(range(prompts * group_size))
    widths = []
    for rows in batches:
        part = rollout.select(rows)
        assert tokens_of(part) <= budget or len(rows) == 1
        widths.append(max(max(lengths[group]) for group in rollout.group[rows].tolist()))
    assert widths == sorted(widths, reverse=True)  # the longest first
    for group, row in enumerate(lengths):
        if prompt_lengths[group] + group_size * max(row) <= budget:
            assert sum((rollout.group[rows] == group).any().item() for rows in batches) == 1  # whole


def test_micro_batches_by_hand():
    """Groups of 2 rows, prompts of 4: the longest first, 2 * 4 + 4 * 10 tokens for two groups in one pass."""
    rollout = rollout_of([4, 4, 4, 4], [[3, 2], [10, 1], [8, 9], [6, 6]])

    def rows(budget: int) -> list[list[int]]:
        return [batch.tolist() for batch in micro_batches(rollout, budget)]

    assert rows(1000) == [[2, 3, 4, 5, 6, 7], [0, 1]]  # 3 is less than half of 10
    assert rows(72) == [[2, 3, 4, 5, 6, 7], [0, 1]]  # 3 * 4 + 6 * 10
    assert rows(71) == [[2, 3, 4, 5], [0, 1, 6, 7]]  # 3 is not less than half of 6
    assert rows(48) == [[2, 3, 4, 5], [0, 1, 6, 7]]
    assert rows(47) == [[2, 3], [4, 5, 6, 7], [0, 1]]
    assert rows(43) == [[2, 3], [4, 5], [0, 1, 6, 7]]  # the middle one took 2 * 4 + 4 * 9
    assert rows(24) == [[2, 3], [4, 5], [6, 7], [0, 1]]
    assert rows(23) == [[2], [3], [4, 5], [6, 7], [0, 1]]  # the longest group takes 4 + 2 * 10
    assert rows(1) == [[2], [3], [4], [5], [6], [7], [0], [1]]


# --- Statistics -----------------------------------------------------------------------------------------------------


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


def test_bootstrap_brackets_the_mean():
    values = np.array([0.0] * 300 + [1.0] * 100)
    low, high = bootstrap(values)
    spread = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.25 - spread, 0.25 + spread), abs=0.006)
    assert bootstrap(values) == (low, high) and bootstrap(np.ones(5)) == (1.0, 1.0)


def test_evaluate_counts_right_answers(chain_policy):
    """A policy that always answers 7, on 40 problems of which 3 have that answer."""
    policy = chain_policy("?", "<answer>", "7", "</answer>", "<eos>")
    examples = [Example(f"What is {i}?", {"answer": "7" if i in (0, 20, 39) else "-7"}) for i in range(40)]
    result = evaluate(policy, find_task("arithmetic"), examples, 8, samples=4, batch_rows=12)
    low, high = wilson(3, 40)
    expected = {"problems": 40, "accuracy": 3 / 40, "accuracy_low": low, "accuracy_high": high}
    expected |= {"sampled_accuracy": 3 / 40, "pass@2": 3 / 40, "pass@4": 3 / 40, "working": 0, "sampled_working": 0}
    expected |= {"length": 4, "truncated": 0, "sampled_length": 4, "sampled_truncated": 0}
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    table = results_table({"base": result}).splitlines()
    assert table[0].split() == ["base"]
    assert [line for line in table if line.startswith("greedy accuracy")][0].endswith("7.5% [2.6%, 19.9%]")


def test_evaluate_does_not_depend_on_the_batch(random_policy):
    policy = random_policy(end=ENDS)
    examples = [Example(f"What is {i}?", {"answer": str(i % 10)}) for i in range(20)]
    results = [evaluate(policy, find_task("arithmetic"), examples, 8, 3, batch_rows=rows) for rows in (1, 7, 512)]
    assert results[0] == results[1] == results[2]
    assert evaluate(policy, find_task("arithmetic"), examples, 8, 3, seed=1) != results[0]


# --- Checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_comes_back_bit_by_bit(random_policy, tmp_path, tied):
    policy = random_policy(end="05", tie_word_embeddings=tied)
    save(policy, tmp_path / "run")
    back = load(tmp_path / "run", CPU, temperature=0.5)
    assert back.temperature == 0.5 and back.model.config == policy.model.config
    for (name, weight), (other_name, other) in zip(
        policy.model.state_dict().items(), back.model.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(weight, other)
    assert (back.model.lm_head.weight is back.model.model.embed_tokens.weight) == tied
    assert (back.end_ids, back.pad_id) == (policy.end_ids, policy.pad_id) and len(back.end_ids) == 3
    assert back.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert sample(back).completion_ids != sample(policy).completion_ids  # another temperature
    back.temperature = 1.0
    assert torch.equal(sample(back).actions, sample(policy).actions)


def test_a_checkpoint_holds_no_pickle(random_policy, tmp_path):
    save(random_policy(), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert all(name.endswith((".json", ".safetensors")) for name in names)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")  # tied: written once


def test_both_configs_of_a_checkpoint_name_the_end_and_pad_ids(random_policy, tmp_path):
    policy = random_policy(end=ENDS)
    save(policy, tmp_path)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / name).read_text())
        assert (values["eos_token_id"], values["pad_token_id"]) == (policy.end_ids, policy.pad_id)


def test_every_end_id_of_config_and_generation_config_counts(random_policy, tmp_path):
    save(random_policy(), tmp_path)
    for name, ends in (("config.json", 7), ("generation_config.json", [8, 9])):
        values = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(values | {"eos_token_id": ends}))
    assert load(tmp_path, CPU).end_ids == [1, 7, 8, 9]


def edit_json(name: str, **changes):
    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value != "deleted"}))

    return edit


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def rename(old: str, new: str):
    return lambda folder: (folder / old).rename(folder / new)


def larger_tokenizer() -> str:
    return character_tokenizer(["0123456789()+-*=;?abcdefgh"]).backend_tokenizer.to_str()


def cut(name: str):
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return edit


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        *((lambda folder, name=name: (folder / name).unlink(), [f"lacks {name}"]) for name in (
            "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"
        )),
        (rename("model.safetensors", "pytorch_model.bin"), ["lacks model.safetensors"]),
        (cut("model.safetensors"), ["model.safetensors cannot be read"]),
        (write("model.safetensors", ""), ["model.safetensors cannot be read"]),
        (write("model.safetensors", "no tensors" * 100), ["model.safetensors cannot be read"]),
        (write("config.json", "{"), ["config.json cannot be read"]),
        (write("config.json", "[]"), ["config.json does not hold a JSON object"]),
        (write("generation_config.json", "eos"), ["generation_config.json cannot be read"]),
        (write("tokenizer.json", "garbage"), ["tokenizer.json cannot be read"]),
        (write("tokenizer.json", "{}"), ["tokenizer.json cannot be read"]),
        (cut("tokenizer.json"), ["tokenizer.json cannot be read"]),
        (write("tokenizer_config.json", "garbage"), ["tokenizer_config.json cannot be read"]),
        (write("tokenizer.json", larger_tokenizer()), ["tokenizer.json has more tokens than config.json"]),
        (edit_json("config.json", model_type="gpt2"), ["config.json: model_type is 'gpt2'"]),
        (edit_json("config.json", vocab_size="deleted"), ["config.json: vocab_size is missing"]),
        (edit_json("config.json", hidden_size="32"), ["config.json: "]),
        (edit_json("config.json", num_attention_heads=0), ["config.json: "]),
        (edit_json("config.json", rope_parameters="long"), ["config.json: "]),
        (edit_json("config.json", vocab_size=1000), ["model.safetensors does not fit its config.json", "embed_tokens"]),
        (edit_json("config.json", num_hidden_layers=3), ["does not fit its config.json", "layers.2"]),
        (edit_json("config.json", num_hidden_layers=1), ["does not fit its config.json", "layers.1"]),
        (edit_json("config.json", num_key_value_heads=4), ["does not fit its config.json", "k_proj"]),
        (edit_json("config.json", tie_word_embeddings=False), ["does not fit its config.json", "lm_head"]),
        (edit_json("config.json", hidden_size=64, head_dim=16), ["does not fit its config.json"]),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(random_policy, tmp_path, edit, parts):
    save(random_policy(), tmp_path)
    load(tmp_path, CPU)
    edit(tmp_path)
    with pytest.raises(UserError) as caught:
        load(tmp_path, CPU)
    for part in [str(tmp_path), *parts]:
        assert part in str(caught.value)


def test_a_folder_of_pickle_alone_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nabort\n)R.")
    with pytest.raises(UserError, match="lacks config.json"):
        load(tmp_path, CPU)


def test_a_missing_checkpoint_names_the_command_that_makes_one(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError) as caught:
            load(folder, CPU)
        assert f"python grpo.py --task arithmetic --out {folder}" in str(caught.value)


def test_atomic_write_leaves_the_old_file_if_the_writer_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half of the n")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    atomic_write(path, lambda partial: partial.write_text("new"))
    assert path.read_text() == "new" and [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_run_is_not_overwritten_unasked(tmp_path):
    out = start_run(str(tmp_path / "run"), {"model": None, "seed": 1}, overwrite=False)
    run = json.loads((out / "run.json").read_text())
    assert run["settings"] == {"model": None, "seed": 1} and run["versions"]["torch"] == torch.__version__
    (out / "metrics.jsonl").write_text("{}\n")
    (out / "resume").mkdir()
    with pytest.raises(UserError, match="already holds a run; --resume continues it, --overwrite replaces it"):
        start_run(str(out), {"model": None, "resume": False, "seed": 2}, overwrite=False)
    assert (out / "metrics.jsonl").exists() and json.loads((out / "run.json").read_text()) == run
    start_run(str(out), {"model": None, "resume": False, "seed": 2}, overwrite=True)
    assert not (out / "metrics.jsonl").exists() and not (out / "resume").exists()
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="cannot be made"):
                start_run(str(folder), {"model": None}, overwrite)
    assert (tmp_path / "file").read_text() == "mine"


# --- Saved states ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Progress:
    step: int
    best: float = 0.5


def step(policy: TokenPolicy, optimizer: torch.optim.Optimizer, number: int) -> None:
    """An optimizer step with gradients that follow from its number alone."""
    generator = torch.Generator().manual_seed(number)
    for weight in policy.model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()


def with_optimizer(policy: TokenPolicy) -> tuple[TokenPolicy, torch.optim.Optimizer]:
    return policy, torch.optim.AdamW(policy.model.parameters(), lr=0.01)


def weights_of(policy: TokenPolicy) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in policy.model.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def interrupted(random_policy, tmp_path):
    """A run saved after steps 1, 2 and 10, that went on to step 12; the weights after steps 10 and 11."""
    policy, optimizer = with_optimizer(random_policy())
    kept = {}
    for number in range(1, 13):
        step(policy, optimizer, number)
        kept[number] = weights_of(policy)
        if number in (1, 2, 10):
            (tmp_path / "model.safetensors").unlink(missing_ok=True)
            (tmp_path / "model.safetensors").write_bytes(b"best at %d" % number)
            save_state(tmp_path, number, policy.model, optimizer, {"step": number, "best": 0.25})
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"step": {number}, "text": "→"}}\n' for number in range(13)))
    return tmp_path, kept


def test_a_run_continues_from_its_saved_state_bit_by_bit(interrupted, random_policy):
    out, kept = interrupted
    policy, optimizer = with_optimizer(random_policy(seed=9))
    assert load_state(out, policy.model, optimizer, Progress) == Progress(10, 0.25)
    assert same(weights_of(policy), kept[10])
    for number in (11, 12):
        step(policy, optimizer, number)
        assert same(weights_of(policy), kept[number])


def test_only_the_newest_two_states_stay(interrupted):
    out, _ = interrupted
    assert sorted(path.name for path in (out / "resume").iterdir()) == ["000002", "000010", "latest"]
    assert (out / "resume" / "latest").read_text() == "000010"
    files = [path.name for path in (out / "resume").rglob("*") if path.is_file() and path.name != "latest"]
    assert all(name.endswith((".json", ".safetensors")) for name in files)  # no pickle


def test_metrics_are_cut_back_to_the_saved_step(interrupted, random_policy):
    out, _ = interrupted
    kept = "".join(f'{{"step": {number}, "text": "→"}}\n' for number in range(11))
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "rew')
    load_state(out, *model_and_optimizer(random_policy), Progress)
    assert (out / "metrics.jsonl").read_text() == (out / "samples.jsonl").read_text() == kept


def model_and_optimizer(random_policy) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    policy, optimizer = with_optimizer(random_policy())
    return policy.model, optimizer


def test_the_best_checkpoint_is_that_of_the_saved_step(interrupted, random_policy):
    out, _ = interrupted
    atomic_write(out / "model.safetensors", lambda path: path.write_bytes(b"best at 12"))
    load_state(out, *model_and_optimizer(random_policy), Progress)
    assert (out / "model.safetensors").read_bytes() == b"best at 10"


def test_a_half_written_state_is_ignored_and_replaced(interrupted, random_policy):
    """The run died while it wrote the state of step 12, or between the folder's rename and the pointer's."""
    out, kept = interrupted
    (out / "resume" / ".partial").mkdir()
    (out / "resume" / ".partial" / "weights.safetensors").write_bytes(b"half")
    (out / "resume" / "000012").mkdir()
    policy, optimizer = with_optimizer(random_policy(seed=9))
    assert load_state(out, policy.model, optimizer, Progress).step == 10
    assert same(weights_of(policy), kept[10])
    save_state(out, 12, policy.model, optimizer, dataclasses.asdict(Progress(12)))
    assert sorted(path.name for path in (out / "resume").iterdir()) == ["000010", "000012", "latest"]
    assert load_state(out, policy.model, optimizer, Progress) == Progress(12)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "progress.json"])
@pytest.mark.parametrize("edit", [cut, lambda name: lambda folder: (folder / name).unlink()], ids=["cut", "missing"])
def test_a_damaged_state_is_an_error_that_names_the_file(interrupted, random_policy, name, edit):
    out, _ = interrupted
    edit(name)(out / "resume" / "000010")
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"--resume: .*000010/{name}.*--overwrite"):
        load_state(out, *model_and_optimizer(random_policy), Progress)
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("resume/latest", ""),
        ("resume/latest", "../../elsewhere"),
        ("resume/latest", "000011"),
        ("resume/000010/progress.json", "{}"),
        ("resume/000010/progress.json", '{"step": "10"}'),
        ("resume/000010/progress.json", '{"step": 10, "luck": 1}'),
        ("metrics.jsonl", '{"step": 1}\nno json\n'),
        ("samples.jsonl", '{"reward": 1}\n'),
    ],
)
def test_a_state_with_odd_content_is_refused(interrupted, random_policy, file, text):
    out, _ = interrupted
    (out / file).write_text(text)
    with pytest.raises(UserError, match="--resume: .* damaged .*--overwrite"):
        load_state(out, *model_and_optimizer(random_policy), Progress)


def test_a_run_without_a_saved_state_says_so(tmp_path, random_policy):
    with pytest.raises(UserError, match="--resume: .*latest.*--overwrite"):
        load_state(tmp_path, *model_and_optimizer(random_policy), Progress)


def test_the_state_is_saved_where_there_are_no_hard_links(tmp_path, random_policy, monkeypatch):
    def fail(*_):
        raise OSError("not supported")

    monkeypatch.setattr("os.link", fail)
    (tmp_path / "model.safetensors").write_bytes(b"best")
    model, optimizer = model_and_optimizer(random_policy)
    save_state(tmp_path, 0, model, optimizer, {"step": 0})
    assert (tmp_path / "resume" / "000000" / "best.safetensors").read_bytes() == b"best"


# --- Command line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("4-9=-5;-5*6=-30", "4-9=-5;-5*6=-30"),
        ("two\nlines", "two\nlines"),
        ("é → 漢 😀", "é → 漢 😀"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),  # the one-character form of ESC [
        ("a\rb\tc\x00\x08\x7f", r"a\rb\tc\x00\x08\x7f"),
        ("\u202e30\u2066-\u2069", r"\u202e30\u2066-\u2069"),  # reversed reading order
        ("3\u200b0\ufeff\u00ad", r"3\u200b0\ufeff\xad"),
        ("\u2028\u2029\x85", r"\u2028\u2029\x85"),
        ("\U000e0041\ud800", r"\U000e0041\ud800"),
    ],
)
def test_printable_escapes_what_a_terminal_would_obey_or_hide(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("completion", "shown"),
    [
        ("4-9=-5;-5*6=-30<answer>-30</answer>", "4-9=-5;-5*6=-30  →  -30"),
        ("<answer> 5 </answer>", "→  5"),
        ("4-9=-5", "4-9=-5  (no <answer>...</answer> at the end)"),
        ("\x1b[31m<answer>\x1b[0m5</answer>", r"\x1b[31m  →  \x1b[0m5"),
        ("\x1b]8;;", r"\x1b]8;;  (no <answer>...</answer> at the end)"),
    ],
)
def test_show_answer(completion, shown):
    assert show_answer(completion) == shown


@pytest.fixture(scope="module")
def folders(chain_policy, tmp_path_factory):
    """Two checkpoints: one answers 7 to everything, the other prints an escape sequence."""
    root = tmp_path_factory.mktemp("models")
    save(chain_policy("?", "<answer>", "7", "</answer>", "<eos>"), root / "seven")
    save(chain_policy("?", "\x1b", "[", "\u202e", "<eos>"), root / "escape")
    return root


def command(*words: object, cwd: Path, text: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)], cwd=cwd, input=text, capture_output=True, encoding="utf-8"
    )


def run(monkeypatch, capsys, *words: object, text: str = "") -> tuple[int, str, str]:
    """The command in this process: exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    monkeypatch.setattr(inference.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        run_main(inference.main)
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


def test_the_command_answers_side_by_side_without_escape_sequences(folders):
    result = command("What is (4 - 9) * 6?", "--model", "seven", "escape", cwd=folders)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "seven:\n→  7\nescape:\n" + r"\x1b[\u202e  (no <answer>...</answer> at the end)" + "\n"


def test_the_command_names_unknown_characters_in_one_line(folders):
    result = command("What is 8 ÷ 2 % \x1b[2J?", "--model", "seven", cwd=folders)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("inference.py: error: question ") and result.stderr.count("\n") == 1
    assert "does not know" in result.stderr and "÷" in result.stderr and "\x1b" not in result.stderr


def test_questions_come_from_standard_input(monkeypatch, capsys, folders):
    text = "What is (4 - 9) * 6?\nWhat is 1?\n"
    status, out, err = run(monkeypatch, capsys, "--model", folders / "seven", text=text)
    assert (status, out, err) == (0, "→  7\n→  7\n", "")
    status, out, err = run(monkeypatch, capsys, "--model", folders / "seven", text=f"é\n\n{text}")
    assert (status, out) == (2, "→  7\n→  7\n")  # a bad line is named, a blank one skipped
    assert err.startswith("inference.py: error: ") and "é" in err and err.count("\n") == 1


def test_samples_are_drawn_at_a_temperature(monkeypatch, capsys, folders):
    words = ["What is 1?", "--model", folders / "seven", "--samples", 5, "--temperature", 1000, "--max-new-tokens", 6]
    status, out, err = run(monkeypatch, capsys, *words)
    assert (status, err) == (0, "") and len(set(out.splitlines())) > 1
    assert run(monkeypatch, capsys, *words)[1] == out
    assert run(monkeypatch, capsys, *words, "--seed", 1)[1] != out
    greedy = run(monkeypatch, capsys, *words[:5], "--temperature", 0)[1]
    assert greedy == "→  7\n" * 5


def test_eval_prints_a_table(monkeypatch, capsys, folders):
    words = ["--eval", "--task", "arithmetic", "--limit", 20, "--model", folders / "seven", folders / "escape"]
    status, out, err = run(monkeypatch, capsys, *words)
    assert (status, err) == (0, "")
    examples = find_task("arithmetic").load(copies=1)["held_out"][:20]
    share = sum(example.columns["answer"] == "7" for example in examples) / 20
    lines = out.splitlines()
    assert lines[0].split() == [str(folders / "seven"), str(folders / "escape")]
    assert lines[1].split() == ["problems", "20", "20"]
    (accuracy,) = [line for line in lines if line.startswith("greedy accuracy")]
    assert accuracy.split()[2] == f"{share:.1%}" and "0.0% [0.0%, 16.1%]" in accuracy
    assert any(line.startswith("pass@4") for line in lines)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["q", "--samples", "0"], ["--samples is 0"]),
        (["q", "--max-new-tokens", "-1"], ["--max-new-tokens is -1"]),
        (["--eval", "--limit", "0"], ["--limit is 0"]),
        (["q", "--temperature", "-1"], ["--temperature is -1.0"]),
        (["q", "--temperature", "nan"], ["--temperature is nan"]),
        (["q", "--temperature", "1e-300"], ["--temperature is 1e-300"]),
        (["q", "--seed", "-1"], ["--seed is -1"]),
        (["q", "--samples", "many"], ["--samples", "'many'"]),
        (["q", "--colour", "red"], ["--colour", "--help"]),
        (["q", "--sample", "2"], ["--sample"]),  # no abbreviations
        (["q", "--model"], ["--model"]),
        (["q", "--model", "nowhere"], ["'nowhere'", "python grpo.py --task arithmetic --out nowhere"]),
        (["q", "--eval", "--model", "seven"], ["--eval"]),
        (["q", "--device", "abacus"], ["--device", "'abacus'"]),
        (["--eval", "--task", "chess"], ["--task", "'chess'", "arithmetic"]),
        ([" ", "--model", "seven"], ["empty"]),
        (["What is é?", "--model", "seven"], ["does not know é"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(monkeypatch, capsys, folders, words, parts):
    monkeypatch.chdir(folders)
    status, out, err = run(monkeypatch, capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith("inference.py: error: ") and err.count("\n") == 1 and err.endswith("\n")
    for part in parts:
        assert part in err


def test_run_main_passes_statuses_on(monkeypatch, capsys):
    def end(error: BaseException | None = None) -> tuple[int | None, str]:
        def main() -> None:
            if error:
                raise error

        with pytest.raises(SystemExit) as caught:
            run_main(main)
        return caught.value.code, capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["/some/where/grpo.py"])
    monkeypatch.setattr(inference.signal, "signal", lambda *_: None)
    assert end() == (None, "")
    assert end(UserError("two\nlines  \x1b[2J")) == (2, "grpo.py: error: two lines \\x1b[2J\n")
    assert end(KeyboardInterrupt()) == (130, "grpo.py: error: interrupted\n")
    assert end(KeyboardInterrupt(15)) == (143, "grpo.py: error: interrupted\n")
    status, err = end(FloatingPointError("the loss is nan"))
    assert status == 2 and err.startswith("grpo.py: error: the loss is nan; ") and err.count("\n") == 1
    status, err = end(OSError(28, "No space left on device", "run/metrics.jsonl"))
    assert (status, err.partition(";")[0]) == (2, "grpo.py: error: run/metrics.jsonl: No space left on device")
    with pytest.raises(RuntimeError, match="a bug"):  # which must not look like a mistake of the user's
        end(RuntimeError("a bug"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_running_out_of_memory_names_the_flags_that_help(error):
    with pytest.raises(UserError, match="out of memory; lower --samples"), out_of_memory("--samples"):
        raise error
    with pytest.raises(RuntimeError, match="a bug"), out_of_memory("--samples"):
        raise RuntimeError("a bug")


def test_settings_are_all_on_the_command_line():
    assert {field.metadata["help"].endswith(".") for field in dataclasses.fields(InferenceConfig)} == {True}


def test_choose_device():
    assert choose_device("cpu") == CPU
    with pytest.raises(UserError, match="--device"):
        choose_device("abacus")
