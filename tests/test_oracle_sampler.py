"""Sampler and scorer: against `transformers`, draws by hand, frequencies, and rows that nothing else can change."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from attention import Cache
from commands import UserError
from policy import TokenPolicy, inverse_cdf, log_distribution
from rollouts import Rollout, micro_batches, row_uniforms
from tasks import Example

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


def test_float64_stays_float64_where_a_text_is_shared(random_policy):
    policy = random_policy()
    policy.model.double()
    start = "(4 - 9) * 6 + " * 8
    rollout = sample(policy, [Example(f"What is {start}{end}?") for end in ("1", "22", "333")])
    assert rollout.common >= Cache.share_from
    expected, _ = policy.log_probs(rollout, layout="joined")
    assert_close(policy.log_probs(rollout)[0], expected, atol=1e-12)
    assert_close(rollout.sampler_logp, expected, atol=1e-12)


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


@pytest.mark.parametrize("layout", ["packed", "shared", "joined"])
def test_scorer_is_transformers(case, layout, monkeypatch):
    """Log-probabilities and exact entropies of each row by another implementation, alone and without padding."""
    policy, reference, rollout = case
    for other in {"packed", "shared", "joined"} - {layout}:
        monkeypatch.setattr(policy, f"{other}_hidden", None)
    with torch.no_grad():
        logp, entropy = policy.log_probs(rollout, layout=layout)
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
        for layout in ("packed", "shared", "joined"):
            assert_close(again.sampler_logp, policy.log_probs(again, layout=layout)[0])


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
    for layout in ("packed", "shared", "joined"):
        policy.model.zero_grad()
        logp, entropy = policy.log_probs(rollout, layout=layout)
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
            for layout in ("packed", "shared", "joined"):
                part_logp, part_entropy = policy.log_probs(part, layout=layout)
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


VOCABULARY = 150_000  # that of Qwen2.5, about


@pytest.fixture(scope="module")
def large():
    """A peaked distribution over a large vocabulary, half of it impossible: log-probabilities (1, V)."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, VOCABULARY, generator=generator)
    return log_distribution(logits.masked_fill(torch.rand(1, VOCABULARY, generator=generator) < 0.5, -torch.inf), 1.0)


def test_frequencies_over_a_large_vocabulary(large):
    """Chi-square of 1,500 draws over 50 stretches of the vocabulary of about equal weight; none is impossible."""
    uniforms = row_uniforms((0, 0, 0), [0], 1, 1500)[0]
    draws = torch.cat([inverse_cdf(large.expand(len(part), -1), part) for part in uniforms.split(100)])
    weights = large[0].double().exp()
    assert (weights[draws] > 0).all()
    stretch = ((weights.cumsum(0) - weights / 2) / weights.sum() * 50).long().clamp(max=49)
    expected = 1500 * torch.zeros(50, dtype=torch.float64).index_add(0, stretch, weights / weights.sum())
    seen = torch.bincount(stretch[draws], minlength=50).double()
    statistic = ((seen - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor(49 / 2).double(), statistic / 2) > 0.01


def test_each_token_of_a_large_vocabulary_has_its_own_slice(large):
    """The middle of a token's slice, from sums in extended precision, draws that token: float32 sums would miss it."""
    weights = large[0].exp().numpy().astype(np.longdouble)
    ends = weights.cumsum()
    chosen = np.random.default_rng(0).choice(np.flatnonzero(weights > 1e-9), 300, replace=False)
    middles = ((ends[chosen] - weights[chosen] / 2) / ends[-1]).astype(np.float64)
    for tokens, u in zip(chosen.reshape(3, 100), middles.reshape(3, 100), strict=True):
        assert inverse_cdf(large.expand(100, -1), torch.from_numpy(u)).tolist() == tokens.tolist()


def test_the_exploration_mixture_is_sampled_and_scored(random_policy):
    """Frequencies follow (1 - noise) * softmax + noise / V, the scorer says the same, greedy ignores it."""
    noisy, plain = random_policy(), random_policy()
    noisy.exploration_noise = 0.4
    rollout = sample(noisy, EXAMPLES[:1], 4000, length=1)
    quiet = sample(plain, EXAMPLES[:1], 4000, length=1)
    with torch.no_grad():
        logp, entropy = noisy.log_probs(rollout)
        softmax = plain.log_probs(rollout)[0].exp()
    size = plain.model.config.vocab_size
    assert_close(logp.exp(), 0.6 * softmax + 0.4 / size, atol=1e-6)
    assert_close(rollout.sampler_logp, logp)
    seen = torch.bincount(rollout.actions[:, 0], minlength=size).double()
    whole = noisy.pack([rollout.prompts[0].tolist()] * size, [[i] for i in range(size)], [""] * size)
    with torch.no_grad():
        probabilities = noisy.log_probs(whole)[0][:, 0].double().exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-6)
    assert entropy[0, 0].item() == pytest.approx(-(probabilities * probabilities.log()).sum().item(), abs=1e-5)
    statistic = ((seen - 4000 * probabilities) ** 2 / (4000 * probabilities)).sum()
    assert torch.special.gammaincc(torch.tensor((size - 1) / 2).double(), statistic / 2) > 0.01
    assert torch.equal(sample(noisy, EXAMPLES[:1], 4000, length=1, explore=False).actions, quiet.actions)
    assert torch.equal(sample(noisy, greedy=True).sampler_logp, sample(plain, greedy=True).sampler_logp)


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
        [0.3084618452337059, 0.9152239776577583, 0.009937966047990021],
        [0.9508082650133921, 0.23379049658129125, 0.6649665850952432],
    ]
    actual = row_uniforms((1, 2, 3), [4], 2, 3)
    assert actual.dtype == torch.float64
    assert actual.tolist() == expected


def test_row_uniforms_are_splitmix64(monkeypatch):
    """The published first numbers of the stream that begins at 1234567."""
    monkeypatch.setattr(np.random, "Philox", lambda _: Constant(1234567))
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    expected = [((number >> 12) + 0.5) * 2.0**-52 for number in published]
    assert row_uniforms((0, 0, 0), [0], 1, 4).tolist() == [expected]


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
        monkeypatch.setattr(np.random, "Philox", lambda _, bits=bits: Constant(start_of(bits)))
        assert row_uniforms((0, 0, 0), [0], 1, 1).tolist() == [[end]]


def start_of(bits: int) -> int:
    """Where a stream begins whose first number is `bits`: SplitMix64 backwards."""
    z = bits
    for shift, factor in ((31, 1), (27, 0x94D049BB133111EB), (30, 0xBF58476D1CE4E5B9)):
        z = z * pow(factor, -1, 2**64) % 2**64 if factor > 1 else z
        high = z
        for _ in range(64 // shift):
            high = z ^ (high >> shift)
        z = high
    return (z - 0x9E3779B97F4A7C15) % 2**64


class Constant:
    """A bit generator at one end of its range."""

    def __init__(self, bits: int):
        self.bits = bits

    def random_raw(self, length: int) -> np.ndarray:
        return np.full(length, self.bits, dtype=np.uint64)
