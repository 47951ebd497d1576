"""What only a GPU does, as far as a CPU can show it: graphs, sequences without padding, compiled blocks, precision."""

import contextlib
import functools
import signal
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from test_oracle_sampler import sample
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attention
import checkpoints
import linear
import model_toy
import policy as policies
import ranks
import runs
from commands import UserError
from tasks import Example

GPU = torch.device("cuda")


@pytest.fixture
def grouped(random_policy):
    """A policy with fewer key-value heads than heads, and a rollout of different lengths, one of a single token."""
    policy = random_policy(end="1234", num_key_value_heads=1)
    rollout = sample(policy, group_size=6)
    lengths = rollout.mask.sum(1)
    assert lengths.min() == 1 < lengths.max() and not rollout.prompt_mask.all()
    return policy, rollout


class Tape(TorchDispatchMode):
    """The operations of a step, to be repeated on the memory that they used: what a CUDA graph does, but for speed."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        assert "_local_scalar_dense" not in str(function) and "nonzero" not in str(function), "the host has to wait"
        out = function(*arguments, **(named or {}))
        self.operations.append((function, arguments, named or {}, tensors(out)))
        return out

    def replay(self):
        for function, arguments, named, made in self.operations:
            known = {x.untyped_storage().data_ptr() for x in tensors((arguments, named))}
            for old, new in zip(made, tensors(function(*arguments, **named)), strict=True):
                if old.untyped_storage().data_ptr() not in known:
                    old.copy_(new)


def tensors(values) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if torch.is_tensor(x)]


@pytest.mark.parametrize("common", [False, True], ids=["different", "common"])
@pytest.mark.parametrize("share_from", [1, 256], ids=["shared", "repeated"])
def test_a_step_that_is_repeated_on_its_memory_draws_the_same(random_policy, share_from, common, monkeypatch):
    """With rows that are dropped and a new tape on the way, under noise; a step reads no number from the device."""
    policy = random_policy(end="12", num_key_value_heads=1, temperature=0.8, max_position_embeddings=256)
    policy.exploration_noise = 0.1
    examples = [Example("1234567890" * 8 * common + text) for text in ("1+2", "(", "3*4=", "7")]
    expected = sample(policy, examples, group_size=8, length=40)
    tapes, kept = [], [32]

    def taped(step, device):
        assert device == policy.device
        step()
        yield
        tapes.append(Tape())
        with tapes[-1]:
            step()
        yield
        while True:
            tapes[-1].replay()
            yield

    cache = policy.model.new_cache()
    cache.share_fixed_from, select = share_from, cache.select
    monkeypatch.setattr(cache, "select", lambda rows: kept.append(len(rows)) or select(rows))
    monkeypatch.setattr(policy.model, "new_cache", lambda: cache)
    monkeypatch.setattr(policies.TokenPolicy, "captures", True)
    monkeypatch.setattr(policies, "replayed", taped)
    policy.look_every = 8
    again = sample(policy, examples, group_size=8, length=40)
    assert again.completion_ids == expected.completion_ids
    torch.testing.assert_close(again.sampler_logp, expected.sampler_logp, rtol=0, atol=1e-5)
    assert len(tapes) == len(kept) > 2 and all(2 * now <= before for before, now in pairwise(kept))
    own = expected.prompts.shape[1] - 80 * common
    assert cache.room == 39 + own * (share_from > 1) and len(cache.shared) == common + (share_from == 1)
    monkeypatch.undo()
    monkeypatch.setattr(policies.TokenPolicy, "captures", True)
    monkeypatch.setattr(policies, "replayed", taped)
    for length in (1, 2, 3):
        expected = sample(policy, examples, group_size=2, length=length)
        assert expected.actions.shape == (8, length)


def test_whose_steps_become_graphs(random_policy):
    captures = policies.TokenPolicy.captures.fget
    llama = random_policy().model
    assert captures(SimpleNamespace(model=llama, device=GPU))
    assert not captures(SimpleNamespace(model=llama, device=torch.device("cpu")))
    assert not captures(SimpleNamespace(model=torch.nn.Identity(), device=GPU))


def test_a_graph_is_replayed_for_each_step_after_the_first_two(monkeypatch):
    """The first step is made, the second captured and replayed (capturing computes nothing), and so are the others."""
    events, state = [], {"capturing": False}

    class Graph:
        def replay(self):
            events.append("replayed")

    @contextlib.contextmanager
    def capture(graph, capture_error_mode):
        assert isinstance(graph, Graph) and capture_error_mode == "thread_local"  # other threads may use the GPU
        state["capturing"] = True
        yield
        state["capturing"] = False

    for name, fake in {"CUDAGraph": Graph, "graph": capture, "device": contextlib.nullcontext}.items():
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


@pytest.mark.parametrize("case", ["ragged", "common", "single tokens"])
def test_scoring_by_sequences_without_padding_is_scoring_by_padded_rows(grouped, case, monkeypatch):
    """Where prompts begin alike, or no completion has a token that is an input, rows are padded as on a CPU."""
    policy, rollout = grouped
    if case == "common":
        policy = policies.TokenPolicy(policy.model, policy.tokenizer, end_ids=policy.end_ids)
        rollout = sample(policy, [Example("1234567890" * 8 + text) for text in ("1+2", "3")])
        assert rollout.common == 80
    elif case == "single tokens":
        rollout = sample(policy, length=1)
    found, used = [], []
    for _ in ("padded", "varlen"):
        policy.model.zero_grad()
        logp, _ = policy.log_probs(rollout)
        (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum().backward()
        found.append([logp.detach(), *(weight.grad.clone() for weight in policy.model.parameters())])
        monkeypatch.setattr(attention, "has_varlen", lambda q: True)
        monkeypatch.setattr(attention, "varlen", lambda *given: used.append(given) or by_row(*given))
    assert bool(used) == (case == "ragged")
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
        (torch.bfloat16, 64, (8, 0), True),
        (torch.float16, 256, (9, 0), True),
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
    """Each time that a policy computes, since another one may have other products."""
    said, here = [], SimpleNamespace(device=torch.device("cpu"), dtype=dtype, model=None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    policies.TokenPolicy.autocast(here)
    assert said == []
    here.device = GPU
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: None)
    policies.TokenPolicy.autocast(here)
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
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    model_toy.compile_blocks()
    assert compiled == ["before", "after"] and torch._dynamo.config.recompile_limit == 64
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


@pytest.mark.parametrize("capturing", [False, True])
def test_a_rank_saves_at_a_signal_unless_a_graph_is_being_captured(capturing, monkeypatch):
    """Since then nothing can be read from the GPU; the end of the step saves as well."""
    done, run = [], SimpleNamespace(busy=False, policy=SimpleNamespace(model=None))
    run.save, run.say = lambda: done.append("saved"), lambda *_, **__: done.append("said")
    run.restore_handlers, run.heed = lambda: None, lambda: done.append("heeded")
    monkeypatch.setattr(ranks, "WORLD", 2)
    monkeypatch.setattr(ranks, "is_sharded", lambda _: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    runs.Run.interrupt(run, signal.SIGINT, None)
    assert done == ["said", *["saved"] * (not capturing), "heeded"]


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
