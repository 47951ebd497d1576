"""What only a GPU does, as far as a CPU can show it: graphs, sequences without padding, compiled blocks, precision."""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
from test_oracle_sampler import sample

import attention
import checkpoints
import linear
import model_toy
import policy as policies
from commands import UserError

GPU = torch.device("cuda")


@pytest.fixture
def grouped(random_policy):
    """A policy with fewer key-value heads than heads, and a rollout of different lengths, one of a single token."""
    policy = random_policy(end="1234", num_key_value_heads=1)
    rollout = sample(policy, group_size=6)
    lengths = rollout.mask.sum(1)
    assert lengths.min() == 1 < lengths.max() and not rollout.prompt_mask.all()
    return policy, rollout


@pytest.mark.parametrize("share_from", [1, 64], ids=["shared", "repeated"])
def test_the_sampler_draws_the_same_with_a_fixed_cache(grouped, share_from, monkeypatch):
    policy, rollout = grouped
    fixed, share = [], attention.Cache.share

    def fix(cache, group, room=0, key_mask=None):
        share(cache, group, room, key_mask)
        if room:
            cache.fix(group.device)
            fixed.append(cache)

    monkeypatch.setattr(attention.Cache, "share", fix)
    monkeypatch.setattr(attention.Cache, "share_from", share_from)
    again = sample(policy, group_size=6)
    assert again.completion_ids == rollout.completion_ids
    torch.testing.assert_close(again.sampler_logp, rollout.sampler_logp, rtol=0, atol=1e-5)
    (cache,) = fixed
    last = rollout.mask.sum(1).max() - 1  # it is no input
    assert cache.place == last + (0 if share_from == 1 else rollout.prompts.shape[1])


def test_a_graph_is_replayed_for_each_step_after_the_first_two(monkeypatch):
    """The first step is made, the second captured and replayed (capturing computes nothing), and so are the others."""
    events, state = [], {"capturing": False}

    class Graph:
        def capture_begin(self, capture_error_mode):
            state["capturing"] = True

        def capture_end(self):
            state["capturing"] = False

        def replay(self):
            events.append("replayed")

    cuda = {"CUDAGraph": Graph, "empty_cache": lambda: None, "stream": lambda _: contextlib.nullcontext()}
    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, fake in (cuda | dict.fromkeys(("current_stream", "Stream"), lambda _: stream)).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    steps = policies.replayed(lambda: events.append("captured" if state["capturing"] else "made"), GPU)
    for _ in range(4):
        next(steps)
    assert events == ["made", "captured", *["replayed"] * 3]
    events.clear()
    steps = policies.replayed(lambda: events.append("made"), None)
    for _ in range(4):
        next(steps)
    assert events == ["made"] * 4


def by_row(q, k, v, q_ends, k_ends, longest_q, longest_k):
    """What `varlen_attn` computes, a sequence at a time, in float64."""
    seen = []
    assert q_ends.dtype == k_ends.dtype == torch.int32
    for i in range(len(q_ends) - 1):
        rows = slice(k_ends[i], k_ends[i + 1])
        mine, keys, values = (x.double().transpose(0, 1) for x in (q[q_ends[i] : q_ends[i + 1]], k[rows], v[rows]))
        assert mine.shape[1] <= longest_q and keys.shape[1] <= longest_k
        keys, values = (x.repeat_interleave(len(mine) // len(keys), 0) for x in (keys, values))
        scores = mine @ keys.mT * q.shape[-1] ** -0.5
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + keys.shape[1] - mine.shape[1])
        seen.append((scores.masked_fill(later, -torch.inf).softmax(-1) @ values).transpose(0, 1).to(q.dtype))
    return torch.cat(seen)


def test_scoring_by_sequences_without_padding_is_scoring_by_padded_rows(grouped, monkeypatch):
    policy, rollout = grouped
    found = []
    for _ in ("padded", "varlen"):
        policy.model.zero_grad()
        logp, _ = policy.log_probs(rollout)
        (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum().backward()
        found.append([logp.detach(), *(weight.grad.clone() for weight in policy.model.parameters())])
        monkeypatch.setattr(attention, "has_varlen", lambda q: True)
        monkeypatch.setattr(attention, "varlen", by_row)
        monkeypatch.setattr(attention.Packed, "padded", lambda *_: pytest.fail("rows were padded"))
    for ours, expected in zip(*found[::-1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=5e-5)


def test_the_kernel_without_padding_gets_causal_grouped_heads(monkeypatch):
    """The public function of PyTorch, as it is from 2.12 on and as it was."""
    from torch.nn.attention import varlen

    given = []

    def before(*places, window_size=(-1, -1)):
        given.append((places, window_size))

    def since(*places, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa
        given.append((places, window_size))

    for function in (before, since):
        monkeypatch.setattr(varlen, "varlen_attn", function)
        attention.varlen(*range(7))
    assert given == [(tuple(range(7)), (-1, 0))] * 2


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "there"),
    [
        (torch.bfloat16, 64, (9, 0), True),
        (torch.float32, 64, (9, 0), False),
        (torch.bfloat16, 20, (9, 0), False),
        (torch.bfloat16, 264, (9, 0), False),
        (torch.bfloat16, 64, (7, 5), False),
    ],
)
def test_where_the_kernel_without_padding_is(dtype, width, capability, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    q = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(5, 4, width), device=GPU)
    assert attention.has_varlen(q) == there
    assert not attention.has_varlen(torch.zeros(5, 4, 64, dtype=torch.bfloat16))


def test_weights_are_held_ready_on_a_gpu():
    def model(device, dtype=torch.float32):
        weight = SimpleNamespace(dtype=dtype, device=torch.device(device))
        return SimpleNamespace(products=list, output_layer=SimpleNamespace(weight=weight))

    assert linear.can_prepack(model("cuda"), torch.bfloat16) and linear.can_prepack(model("cuda"), torch.float32)
    assert not linear.can_prepack(model("cuda", torch.float64), torch.float32)
    assert not linear.can_prepack(model("mps"), torch.float32)
    assert not linear.can_prepack(SimpleNamespace(), torch.float32)  # a model of another library


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float32_products_are_rounded_on_a_gpu_beside_bfloat16_ones_only(dtype, monkeypatch):
    said = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    checkpoints.set_precision(dtype, torch.device("cpu"))
    assert said == []
    checkpoints.set_precision(dtype, GPU)
    assert said == ["high" if dtype == torch.bfloat16 else "highest"]


def test_compiled_blocks_compute_the_same(grouped, monkeypatch):
    """As PyTorch traces them, for any number of tokens; what it makes of that for a GPU is not compiled here."""
    policy, rollout = grouped
    compiled = []

    def trace(part, dynamic):
        assert dynamic
        compiled.append(part.__name__)
        return compile_as_it_is(part, dynamic=True, backend="eager")

    compile_as_it_is = torch.compile
    monkeypatch.setattr(torch, "compile", trace)
    monkeypatch.setattr(linear, "ONEDNN_FROM", 2**40)  # oneDNN's products are no business of a GPU's
    expected, _ = policy.log_probs(rollout)
    for part in ("before", "after"):
        monkeypatch.setattr(model_toy.Block, part, getattr(model_toy.Block, part))
    model_toy.compile_blocks()
    assert compiled == ["before", "after"]
    logp, _ = policy.log_probs(rollout)
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-5)
    logp.sum().backward()
    assert all(weight.grad is not None for weight in policy.model.parameters())


@pytest.mark.parametrize("problem", ["none", "cpu", "shard", "other model"])
def test_what_can_be_compiled(problem, random_policy, monkeypatch):
    called = []
    monkeypatch.setattr(checkpoints, "compile_blocks", lambda: called.append(True))
    model = torch.nn.Identity() if problem == "other model" else random_policy().model
    policy = SimpleNamespace(model=model, device=torch.device("cpu" if problem == "cpu" else "cuda"))
    settings = {"compile": True, "gradient_checkpointing": True, "shard": problem == "shard"}
    make_ready = functools.partial(checkpoints.make_ready, policy)
    if problem == "none":
        make_ready(SimpleNamespace(**settings))
        assert called == [True] and model.checkpointing
    else:
        with pytest.raises(
            UserError, match="--compile is for a Llama or Qwen2 on a GPU, without --shard; leave it out"
        ):
            make_ready(SimpleNamespace(**settings))
        assert called == []
    make_ready(SimpleNamespace(**settings | {"compile": False, "gradient_checkpointing": False}))
    assert called == [True] * (problem == "none") and not policy.model.checkpointing


def test_deterministic_runs_can_draw_on_a_gpu(monkeypatch):
    """There PyTorch refuses all cumulative sums of floating-point numbers to them, and those of rows need not be."""
    cumsum = torch.Tensor.cumsum

    def refuse(x, *places, **named):
        assert not torch.are_deterministic_algorithms_enabled()
        return cumsum(x, *places, **named)

    log_probs = torch.randn(5, 700).log_softmax(-1)
    uniform = torch.rand(5, dtype=torch.float64)
    expected = policies.inverse_cdf(log_probs, uniform)
    monkeypatch.setattr(torch.Tensor, "cumsum", refuse)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(policies.inverse_cdf(log_probs, uniform), expected)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
