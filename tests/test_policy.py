"""Rollouts, micro-batches and what makes sampler and scorer fast; that they are right is in test_oracle_sampler.py."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_oracle_sampler import sample
from torch.utils._python_dispatch import TorchDispatchMode

import policy as policies
from attention import Packed, spare
from policy import frozen, inverse_cdf, most_logits, score_rollout
from rollouts import Rollout, micro_batches


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


def tokens_of(part: Rollout, layout: str) -> int:
    """What a micro-batch costs: real tokens, or with its padding, each prompt once or with each of its rows."""
    if layout == "packed":
        return int(part.prompt_mask.sum() + part.mask.sum())
    prompts = len(part.group) * part.prompts.shape[1] if layout == "joined" else part.prompts.numel()
    return prompts + part.actions.numel()


@pytest.mark.parametrize("layout", ["packed", "shared", "joined"])
@pytest.mark.parametrize("seed", range(30))
def test_micro_batches_cover_each_row_once_within_the_budget(seed, layout):
    rng = np.random.default_rng(seed)
    prompts, group_size = int(rng.integers(1, 9)), int(rng.integers(1, 9))
    prompt_lengths = rng.integers(1, 30, prompts).tolist()
    lengths = rng.geometric(rng.uniform(0.03, 0.5), (prompts, group_size)).tolist()
    rollout = rollout_of(prompt_lengths, lengths)
    budget = int(rng.integers(1, 400))
    batches = micro_batches(rollout, budget, layout)
    assert sorted(torch.cat(batches).tolist()) == list(range(prompts * group_size))
    widths = []
    for rows in batches:
        part = rollout.select(rows)
        assert tokens_of(part, layout) <= budget or len(rows) == 1
        widths.append(max(max(lengths[group]) for group in rollout.group[rows].tolist()))
    assert widths == sorted(widths, reverse=True)  # the longest first
    for group in range(prompts):
        if tokens_of(rollout.select(torch.arange(group * group_size, (group + 1) * group_size)), layout) <= budget:
            assert sum((rollout.group[rows] == group).any().item() for rows in batches) == 1  # whole


def test_micro_batches_by_hand():
    """Groups of 2 rows, prompts of 4: the longest first; real tokens are 9, 15, 21 and 16."""
    rollout = rollout_of([4, 4, 4, 4], [[3, 2], [10, 1], [8, 9], [6, 6]])

    def rows(budget: int) -> list[list[int]]:
        return [batch.tolist() for batch in micro_batches(rollout, budget)]

    assert rows(200) == [[2, 3, 4, 5, 6, 7], [0, 1]]  # 3 is less than half of 10, and a quarter of 200 is passed
    assert rows(300) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert rows(52) == [[2, 3, 4, 5, 6, 7], [0, 1]]  # 15 + 21 + 16
    assert rows(51) == [[2, 3, 4, 5], [0, 1, 6, 7]]  # 3 is not less than half of 6
    assert rows(36) == [[2, 3, 4, 5], [0, 1, 6, 7]]
    assert rows(35) == [[2, 3], [4, 5], [0, 1, 6, 7]]
    assert rows(24) == [[2, 3], [4, 5], [6, 7], [0, 1]]
    assert rows(20) == [[2, 3], [4], [5], [6, 7], [0, 1]]  # the second group takes 4 + 8 + 9
    assert rows(1) == [[2], [3], [4], [5], [6], [7], [0], [1]]


def test_the_parts_of_a_group_count_its_prompt_once():
    """Eight rows of 8 tokens after a prompt of 40: three of them fit into 64, but one where each row has the prompt."""
    rollout = rollout_of([40], [[8] * 8])
    for layout in ("packed", "shared", "windowed"):
        assert [len(rows) for rows in micro_batches(rollout, 64, layout)] == [3, 3, 2]
    assert [len(rows) for rows in micro_batches(rollout, 64, "joined")] == [1] * 8


def test_what_all_prompts_begin_with_is_counted_once_a_pass():
    """Three groups of two rows of 10, each 26 tokens after the 64 that all begin with."""
    rollout = rollout_of([70] * 3, [[10, 10]] * 3)
    rollout.prompts = torch.cat([torch.full((3, 64), 9), torch.arange(18).view(3, 6)], 1)
    assert rollout.common == 64

    def sizes(budget: int, layout: str = "packed") -> list[int]:
        return [len(rows) for rows in micro_batches(rollout, budget, layout)]

    assert [sizes(budget) for budget in (142, 141, 116, 115)] == [[6], [4, 2], [4, 2], [2, 2, 2]]
    assert sizes(90) == [2, 2, 2] and sizes(89) == sizes(80) == [1] * 6  # each part has its prompt
    assert [sizes(budget, "joined") for budget in (320, 319, 160, 159)] == [[4, 2], [2, 2, 2], [2, 2, 2], [1] * 6]


@pytest.fixture
def ragged(random_policy):
    """A policy and a rollout of prompts and completions of different lengths."""
    policy = random_policy(end="1234")
    rollout = sample(policy)
    assert not rollout.prompt_mask.all() and not rollout.mask.all()
    return policy, rollout


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_scorer_computes_each_prompt_once_and_no_padding(ragged, checkpointing, monkeypatch):
    policy, rollout = ragged
    policy.model.checkpointing = checkpointing
    seen = []
    monkeypatch.setattr(
        policy.model, "packed", lambda ids, *more, f=policy.model.packed: seen.append(ids) or f(ids, *more)
    )
    policy.log_probs(rollout)[0].sum().backward()
    inputs = rollout.mask.sum() - len(rollout.mask)  # the last token of a completion predicts nothing
    real = int(rollout.prompt_mask.sum() + inputs)
    more = spare(len(rollout.prompts) + int(inputs), inputs.device)  # of the tokens that predict
    assert [ids.shape for ids in seen] == [(real + more + spare(real + more, inputs.device),)]
    assert policy.layout == "packed"


def test_idle_tokens_make_few_numbers_of_tokens():
    """At most 16 between a number and its double, for at most a sixteenth more; on a GPU there are none."""
    sums = {count: count + spare(count, torch.device("cpu")) for count in range(1, 20_000)}
    assert all(count <= total < max(count + 64, 17 / 16 * count) for count, total in sums.items())
    assert len({total for count, total in sums.items() if 4096 <= count < 8192}) <= 17
    cpu = torch.device("cpu")
    assert [count + spare(count, cpu, 1) for count in (1, 31, 33, 129, 257, 512)] == [1, 31, 34, 136, 272, 512]
    assert spare(100, cpu) == 28
    assert spare(100, torch.device("meta")) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "rows",
    [range(12), [0, 1, 2, 3, 4, 11], [7], [11, 0, 4, 3]],
    ids=["even groups", "uneven groups", "one row", "in another order"],
)
def test_packed_gradients_are_those_of_padded_rows(ragged, rows, checkpointing):
    policy, rollout = ragged
    part = rollout.select(torch.tensor(list(rows)))
    weights = torch.rand(part.mask.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for layout in ("packed", "joined"):
        policy.model.zero_grad()
        policy.model.checkpointing = checkpointing and layout == "packed"
        (policy.log_probs(part, layout=layout)[0] * weights).sum().backward()
        gradients.append([weight.grad.clone() for weight in policy.model.parameters()])
    for packed, joined in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, joined, rtol=0, atol=2e-5 * joined.abs().max().item())


class SeesAdditionsByIndex(TorchDispatchMode):
    """Keeps the index of what is added up by index, as the backward pass of a selection is."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if any(name in str(function) for name in ("index_add", "scatter_add", "index_put")):
            index = arguments[1][0] if isinstance(arguments[1], (list, tuple)) else arguments[2]
            self.kept.append((str(function), index))
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("rows", [range(12), [0, 1, 2, 3, 4, 11]], ids=["even groups", "uneven groups"])
def test_no_two_rows_are_added_up_by_index_in_the_backward_pass(ragged, rows, layout):
    """On a GPU that is done in another order every time."""
    policy, rollout = ragged
    part = rollout.select(torch.tensor(list(rows)))
    loss = policy.log_probs(part, layout=layout)[0].sum()
    with SeesAdditionsByIndex() as seen:
        loss.backward()
    assert seen.kept or layout == "shared"
    for name, index in seen.kept:
        if index.dim() == 1:
            assert len(index.unique()) == len(index), name


def test_entropy_is_computed_only_where_it_is_asked_for(ragged, monkeypatch):
    """Not for a reference, and not again when chunks of logits are made again in the backward pass."""
    policy, rollout = ragged
    calls = []
    entr = torch.special.entr
    monkeypatch.setattr(policies.torch.special, "entr", lambda x: calls.append(len(x)) or entr(x))
    policy.chunk_logits = 7 * policy.model.config.vocab_size
    assert policy.log_probs(rollout, entropy=False)[1] is None and calls == []
    logp, spread = policy.log_probs(rollout)
    logp.sum().backward()
    assert sum(calls) == rollout.mask.sum() and max(calls) == 7
    policy.chunk_logits = 10**9
    torch.testing.assert_close(spread, policy.log_probs(rollout)[1], rtol=0, atol=1e-6)


def test_what_follows_the_logits_goes_in_pieces_and_gives_what_it_gives_as_a_whole(random_policy, monkeypatch):
    policy, sizes = random_policy(), []
    vocabulary, most = policy.model.config.vocab_size, 2**22
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(most // vocabulary + 3, policy.model.config.hidden_size, generator=generator).requires_grad_()
    ids = torch.randint(vocabulary, hidden.shape[:1], generator=generator)
    plain = policies.log_distribution
    monkeypatch.setattr(policies, "log_distribution", lambda *x: sizes.append(x[0].numel()) or plain(*x))
    logp, spread = policy.score_tokens(hidden, ids)
    assert sizes == [most // vocabulary * vocabulary, 3 * vocabulary]
    whole = F.log_softmax(policy.logits(hidden), -1)
    expected = whole.gather(1, ids[:, None])[:, 0]
    assert torch.equal(logp, expected)
    torch.testing.assert_close(spread, torch.distributions.Categorical(logits=whole.detach()).entropy())
    weight = torch.randn(ids.shape, generator=generator)
    grads = [torch.autograd.grad((weight * x).sum(), [hidden, policy.model.lm_head.weight]) for x in (logp, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_products_of_float32_in_bfloat16_too(random_policy, tied):
    policy = random_policy(tie_word_embeddings=tied)
    policy.dtype = torch.bfloat16
    hidden = torch.randn(5, policy.model.config.hidden_size).bfloat16()
    for actor in (policy, frozen(policy)):
        with torch.no_grad(), actor.autocast():
            logits = actor.logits(hidden)
        assert logits.dtype == torch.float32
        expected = hidden.double() @ policy.model.lm_head.weight.detach().double().T
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_in_bfloat16_gives_the_policys_own_log_probabilities(random_policy, tied):
    """To the bit, so that the KL towards the reference begins at 0; only matrices of products are bfloat16."""
    policy = random_policy(tie_word_embeddings=tied)
    policy.dtype = torch.bfloat16
    rollout = sample(policy)
    reference = frozen(policy)
    with torch.no_grad():
        assert torch.equal(policy.log_probs(rollout)[0], reference.log_probs(rollout)[0])
    kinds = {name: weight.dtype for name, weight in reference.model.named_parameters()}
    assert kinds.pop("model.embed_tokens.weight") == torch.float32
    assert tied or kinds.pop("lm_head.weight") == torch.float32
    assert {kind for name, kind in kinds.items() if "norm" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in reference.model.parameters())
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in policy.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_learns_starts_where_the_reference_is(ragged, dtype):
    """Log-probabilities with gradient are to the bit those without: the KL of the first update is exactly 0."""
    policy, rollout = ragged
    policy.dtype = dtype
    of_reference = score_rollout(frozen(policy), rollout, 64)
    batches = micro_batches(rollout, 64, policy.layout)
    assert len(batches) > 1
    for rows in batches:
        logp, _ = policy.log_probs(rollout.select(rows))
        assert logp.requires_grad and torch.equal(logp.detach(), of_reference[rows, : logp.shape[1]])


@pytest.mark.parametrize("look_every", [2, 5, 100])
def test_looking_less_often_for_ended_rows_changes_nothing(ragged, look_every):
    policy, rollout = ragged
    policy.look_every = look_every
    again = sample(policy)
    assert again.completion_ids == rollout.completion_ids and torch.equal(again.truncated, rollout.truncated)
    torch.testing.assert_close(again.sampler_logp, rollout.sampler_logp, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [1, 7, 64, 999, 1000, 5000])
def test_block_sums_draw_the_token_that_one_sum_draws(block):
    generator = torch.Generator().manual_seed(block)
    logits = 3 * torch.randn(400, 1000, generator=generator)
    logits[torch.rand(400, 1000, generator=generator) < 0.5] = -torch.inf
    log_probs = logits.log_softmax(-1)
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    uniform[0] = 2.0**-53
    cumulative = log_probs.exp().double().cumsum(-1)
    plain = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    assert torch.equal(inverse_cdf(log_probs, uniform, block), plain)


def test_the_logits_at_once_are_a_64th_of_the_memory(monkeypatch):
    sizes = {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(policies.os, "sysconf", sizes.__getitem__)
    assert 4 * most_logits(torch.device("cpu")) == 2**32 // 64


def test_the_sampler_keeps_one_cache(ragged, monkeypatch):
    """Rows that end move out of the buffers in which the others stay; on a CPU a few remain, where there are many."""
    policy, _ = ragged
    kept = []
    cache = policy.model.new_cache()
    monkeypatch.setattr(policy.model, "new_cache", lambda: cache)
    select = cache.select

    def noted(rows):
        assert rows.tolist() == sorted(set(rows.tolist()))
        select(rows)
        kept.append(cache.layers[0][0])

    monkeypatch.setattr(cache, "select", noted)
    monkeypatch.setattr(policy, "drop_below", 1.0)
    lengths = sample(policy, group_size=12).mask.sum(1)
    assert len({keys.data_ptr() for keys in kept}) == 1
    going = [int((lengths > t).sum()) for t in range(1, int(lengths.max()))]
    wanted = [count + count % 2 if count >= 32 else count for count in going]
    assert [len(keys) for keys in kept] == [now for last, now in pairwise([48, *wanted]) if now < last]
    assert len(kept) > 3


def test_the_last_block_is_asked_for_what_predicts(ragged):
    """Of a packed pass over all tokens the rows that predict are those of a pass that is asked for them only."""
    policy, rollout = ragged
    lengths, inputs = rollout.prompt_mask.sum(1), rollout.mask[:, 1:]
    ids = torch.cat([rollout.prompts[rollout.prompt_mask], rollout.actions[:, :-1][inputs]])
    packed = Packed(lengths, inputs.sum(1), rollout.group)
    assert packed.asked == len(lengths) + int(inputs.sum()) < len(ids) == packed.tokens
    assert packed.asking[: len(lengths)].tolist() == (lengths.cumsum(0) - 1).tolist()
    ids = F.pad(ids, (0, packed.idle))
    positions = torch.arange(len(ids)) % 7  # any will do
    with torch.no_grad():
        whole = policy.model.packed(ids, positions, packed)
        asked = policy.model.packed(ids, positions, packed, packed.asking)
    torch.testing.assert_close(asked, whole[packed.asking], rtol=0, atol=1e-5)


def test_frozen_in_float32_keeps_a_tied_output_layer_tied(random_policy):
    policy = random_policy(tie_word_embeddings=True)
    copy = frozen(policy).model
    assert copy.lm_head.weight is copy.model.embed_tokens.weight is not policy.model.lm_head.weight
    assert torch.equal(copy.lm_head.weight, policy.model.lm_head.weight)
