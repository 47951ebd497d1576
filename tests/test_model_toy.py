"""Parity with `transformers`: the same checkpoint gives the same logits, cached decoding, gradients and token ids."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig as ReferenceConfig
from transformers import LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from linear import Linear, prepacked
from model_toy import SPECIAL, WORDS, Cache, Llama, LlamaConfig, attention, character_tokenizer

SIZES = {
    "grouped-tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "multi-query-untied": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "full-untied-long-base": {"num_key_value_heads": 4, "tie_word_embeddings": False, "rope_theta": 10_000.0},
    "one-head-pair-deep": {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3},
    "large-norm-eps": {"num_key_value_heads": 2, "rms_norm_eps": 0.1},
}


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES.keys())
def pair(request, random_policy, reopen):
    """Our model and what `AutoModelForCausalLM` makes of its checkpoint."""
    policy = random_policy(**request.param)
    reference, _, _ = reopen(policy)
    assert type(reference) is LlamaForCausalLM
    return policy.model, reference


def padded_batch(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids (3, 12), their mask with 0, 3 and 11 places of left padding, and positions that count real tokens.

    No id is special: `transformers` gives the pad token's embedding no gradient, whoever uses it.
    """
    ids = torch.randint(len(SPECIAL), vocabulary, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(12) >= torch.tensor([[0], [3], [11]])
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def test_parameter_names_and_shapes_are_those_of_transformers(pair):
    ours, reference = pair
    names = {name: weight.shape for name, weight in ours.named_parameters()}
    assert names == {name: weight.shape for name, weight in reference.named_parameters()}
    assert ("lm_head.weight" in names) != ours.config.tie_word_embeddings


def test_logits(pair):
    ours, reference = pair
    ids, _, _ = padded_batch(ours.config.vocab_size)
    with torch.no_grad():
        expected = reference(ids).logits
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        logits = ours.logits(ours(ids, positions))
    assert expected.std() > 0.5  # else agreement would mean little
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_logits_of_a_left_padded_batch(pair):
    ours, reference = pair
    ids, mask, positions = padded_batch(ours.config.vocab_size)
    with torch.no_grad():
        logits = ours.logits(ours(ids, positions, key_mask=mask))
        expected = reference(ids, attention_mask=mask.long(), position_ids=positions).logits
        torch.testing.assert_close(logits[mask], expected[mask], rtol=0, atol=1e-5)
        for row in range(3):  # and padding changes nothing
            alone = reference(ids[row, mask[row]][None]).logits[0]
            torch.testing.assert_close(logits[row, mask[row]], alone, rtol=0, atol=1e-5)
    assert logits.isfinite().all()


def test_cached_decoding(pair):
    """A prompt of 5 in one call, 3 tokens in the next, then one at a time: the logits of one uncached pass."""
    ours, reference = pair
    ids, mask, positions = padded_batch(ours.config.vocab_size)
    parts = []
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask.long(), position_ids=positions).logits
        cache = Cache(ours.config.num_hidden_layers)
        for start, end in [(0, 5), (5, 8), (8, 9), (9, 10), (10, 11), (11, 12)]:
            hidden = ours(ids[:, start:end], positions[:, start:end], cache, mask[:, :end])
            parts.append(ours.logits(hidden))
            assert cache.length == end
    torch.testing.assert_close(torch.cat(parts, 1)[mask], expected[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("share_from", [1, 64], ids=["shared", "repeated"])
@pytest.mark.parametrize("room", [0, 6, -6], ids=["growing", "preallocated", "fixed"])
def test_rows_that_share_a_cache(pair, share_from, room):
    """Uneven groups after padded texts, three tokens at once and then one by one, rows dropped on the way."""
    ours, reference = pair
    ids, mask, positions = padded_batch(ours.config.vocab_size)
    group = torch.tensor([0, 0, 0, 1, 2, 2])
    new = torch.randint(3, ours.config.vocab_size, (6, 6), generator=torch.Generator().manual_seed(1))
    whole, real = torch.cat([ids[group, :6], new], 1), torch.cat([mask[group, :6], torch.ones(6, 6, dtype=bool)], 1)
    places = (real.cumsum(1) - 1).clamp(min=0)
    rows = torch.arange(6)
    with torch.no_grad():
        expected = reference(whole, attention_mask=real.long(), position_ids=places).logits
        cache = Cache(ours.config.num_hidden_layers)
        cache.share_from = share_from
        ours(ids[:, :6], positions[:, :6], cache, mask[:, :6])
        cache.share_fixed_from = share_from
        cache.share(group, abs(room), mask[:, :6], fixed=room < 0)  # as a CUDA graph needs it: one token at a time
        parts = [(6, 9)] if room >= 0 else [(6, 7), (7, 8), (8, 9)]
        for start, end in [*parts, (9, 10), (10, 11), (11, 12)]:
            hidden = ours(whole[rows, start:end], places[rows, start:end], cache)
            torch.testing.assert_close(ours.logits(hidden), expected[rows, start:end], rtol=0, atol=1e-5)
            if end in (9, 10):
                keep = torch.tensor([0, 2, 3, 5]) if end == 9 else torch.tensor([1, 2, 3])
                rows = rows[keep]
                cache.select(keep)
    assert len(cache.shared) == (share_from == 1)


def test_what_all_texts_share_and_what_rows_share(pair):
    """A beginning that all prompts have, then prompts, then rows: read once each, with the logits of one pass."""
    ours, reference = pair
    ids = torch.randint(3, ours.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(1))
    ids[:, :4] = ids[0, :4].clone()
    ids[1::2, :8] = ids[::2, :8].clone()
    positions = torch.arange(12).expand(4, 12)
    with torch.no_grad():
        expected = reference(ids).logits
        cache = Cache(ours.config.num_hidden_layers)
        cache.share_from = 1
        ours(ids[:1, :4], positions[:1, :4], cache)
        cache.share(torch.tensor([0, 0]))
        hidden = ours(ids[::2, 4:8], positions[::2, 4:8], cache)
        torch.testing.assert_close(ours.logits(hidden), expected[::2, 4:8], rtol=0, atol=1e-5)
        cache.share(torch.tensor([0, 0, 1, 1]), room=4)
        for t in range(8, 12):
            hidden = ours(ids[:, t : t + 1], positions[:, t : t + 1], cache)
            torch.testing.assert_close(ours.logits(hidden), expected[:, t : t + 1], rtol=0, atol=1e-5)
    assert [len(shared.layers[0][0]) for shared in cache.shared] == [1, 2]


def test_parameter_gradients(pair):
    """Cross-entropy on a left-padded batch: every parameter's gradient within a relative 1e-5."""
    ours, reference = pair
    ids, mask, positions = padded_batch(ours.config.vocab_size)
    ids, mask, positions = ids[:2], mask[:2], positions[:2]
    logits = ours.logits(ours(ids, positions, key_mask=mask))
    expected = reference(ids, attention_mask=mask.long(), position_ids=positions).logits
    gradients = []
    for model, x in ((ours, logits), (reference, expected)):
        model.zero_grad()
        F.cross_entropy(x[:, :-1][mask[:, :-1]], ids[:, 1:][mask[:, :-1]]).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert other.norm() > 1e-4, name
        assert (gradient - other).norm() <= 1e-5 * other.norm(), name


def test_a_saved_policy_opens_in_transformers(random_policy, reopen):
    policy = random_policy()
    _, tokenizer, folder = reopen(policy)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == SPECIAL
    text = "What is (4 - 9) * 6? 4-9=-5;-5*6=-30 <answer>-30</answer>"
    ids = policy.tokenizer(text)["input_ids"]
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == policy.tokenizer.decode(ids) == text.replace(" ", "")
    config = json.loads((folder / "config.json").read_text())
    assert config["head_dim"] == 8 and config["model_type"] == "llama"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100.0  # for transformers 4 and 5
    assert config["eos_token_id"] == tokenizer.eos_token_id and config["pad_token_id"] == tokenizer.pad_token_id


def test_config_survives_json():
    config = LlamaConfig(30, 48, 64, 3, 6, 2, 99, 1e-4, 500.0, False, 0.1)
    assert LlamaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.head_dim == 8


def test_both_forms_of_llama_3s_scaling_are_read():
    """That of files on the hub, rope_theta beside rope_scaling, and that of transformers 5, all in rope_parameters."""
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    plain = {
        name: value for name, value in GOOD.items() if name not in ("rope_theta", "rope_parameters", "rope_scaling")
    }
    old = LlamaConfig.from_json(plain | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = LlamaConfig.from_json(plain | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    assert old == new and old.rope_theta == 5e5
    assert LlamaConfig.from_json(json.loads(json.dumps(old.to_json()))) == old
    ours = old.inverse_frequencies()
    config = ReferenceConfig(hidden_size=32, num_attention_heads=4, rope_parameters=scaling | {"rope_theta": 5e5})
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert not torch.allclose(
        ours,
        LlamaConfig.from_json(plain | {"rope_theta": 5e5, "rope_scaling": None}).inverse_frequencies(),
    )


def test_the_config_of_transformers_is_read():
    """Both the rope_theta of transformers 4, at the top, and that of transformers 5, inside rope_parameters."""
    sizes = {"vocab_size": 30, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-4}
    rope = {"rope_type": "default", "rope_theta": 500.0}
    values = ReferenceConfig(**sizes, rope_parameters=rope, tie_word_embeddings=False).to_dict()
    assert "rope_theta" not in values
    config = LlamaConfig.from_json(values)
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert config.rope_theta == 500.0 and config.tie_word_embeddings is False
    del values["rope_parameters"]
    assert LlamaConfig.from_json(values | {"rope_theta": 500.0}) == config


GOOD = LlamaConfig(vocab_size=30, hidden_size=32).to_json()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba', Llama computes 'llama' and 'qwen2'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "needs the numbers factor"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": "x"}}, "needs the numbers factor"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"head_dim": 16}, "head_dim"),
        ({"num_attention_heads": 5}, "head_dim"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, not above 0"),
    ],
)
def test_models_that_are_not_computed_are_refused(change, part):
    with pytest.raises(ValueError) as caught:
        LlamaConfig.from_json(GOOD | change)
    assert part in str(caught.value)


def test_what_is_missing_is_named_not_guessed():
    """`transformers` has other defaults than the toy (a rotary base of 10,000, untied): no silent difference."""
    with pytest.raises(ValueError, match="model_type"):
        LlamaConfig.from_json({name: value for name, value in GOOD.items() if name != "model_type"})
    for missing in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "tie_word_embeddings"):
        with pytest.raises(ValueError, match=f"{missing} is missing"):
            LlamaConfig.from_json({name: value for name, value in GOOD.items() if name != missing})
    with pytest.raises(ValueError, match="rope_theta is missing"):
        LlamaConfig.from_json({k: v for k, v in GOOD.items() if k not in ("rope_theta", "rope_parameters")})


def test_init_weights_follows_its_generator_and_its_stated_widths():
    config = LlamaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2)
    weights = []
    for seed in (0, 0, 1):
        model = Llama(config)
        model.init_weights(torch.Generator().manual_seed(seed))
        weights.append(dict(model.named_parameters()))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["model.embed_tokens.weight"], weights[2]["model.embed_tokens.weight"])
    for name, weight in weights[0].items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            std = 0.025 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.05
            assert abs(weight.std().item() / std - 1) < 0.05, name


def test_character_tokenizer_round_trip():
    texts = ["What is (4 - 9) * 6?", "4-9=-5;-5*6=-30<answer>-30</answer>", "isWhat", "é→\x1b"]
    tokenizer = character_tokenizer(texts)
    characters = sorted(set("".join("".join(texts).split())))
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == [*SPECIAL, *WORDS, *characters]
    assert tokenizer.tokenize(texts[0]) == ["What", "is", "(", "4", "-", "9", ")", "*", "6", "?"]
    assert tokenizer.tokenize("<answer>-30</answer>") == ["<answer>", "-", "3", "0", "</answer>"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == "".join(text.split())


def test_character_tokenizer_drops_white_space_and_marks_the_unknown():
    tokenizer = character_tokenizer(["1 + 2"])
    assert tokenizer("1+2")["input_ids"] == tokenizer(" 1\t+ \n2 ")["input_ids"]
    assert tokenizer.tokenize("1x2") == ["1", "<unk>", "2"]
    assert tokenizer("")["input_ids"] == tokenizer(" \n")["input_ids"] == []
    assert not any(token.isspace() for token in tokenizer.get_vocab())


def test_character_tokenizer_does_not_depend_on_the_order_of_texts():
    assert character_tokenizer(["12", "3"]).get_vocab() == character_tokenizer(["3", "21", "1"]).get_vocab()


@pytest.mark.parametrize("shape", [(9, 200), (2, 3, 200), (900, 200), (0, 200)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_of_onednn_and_its_gradient(shape, bias):
    """Those of the plain layer, whichever side is transposed: of few rows, of many, and of none."""
    generator = torch.Generator().manual_seed(0)
    layer, plain = Linear(200, 180, bias=bias), torch.nn.Linear(200, 180, bias=bias).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape, generator=generator, requires_grad=True)
    grad = torch.randn(*shape[:-1], 180, generator=generator)
    out, expected = layer(x), plain(x.double())
    assert type(out.grad_fn).__name__ == "ProductBackward"
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    ours = torch.autograd.grad(out, (x, *layer.parameters()), grad)
    for found, right in zip(ours, torch.autograd.grad(expected, (x, *plain.parameters()), grad.double()), strict=True):
        torch.testing.assert_close(found.double(), right.double(), rtol=0, atol=3e-4)


def test_the_product_of_onednn_is_of_large_float32_weights_alone():
    """Else the layer is PyTorch's own; a frozen weight gets no gradient."""
    layer, x = Linear(256, 160), torch.ones(2, 256, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.requires_grad_(False)
    out = layer(x)
    assert type(out.grad_fn).__name__ == "ProductBackward"
    out.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 256), rtol=0, atol=1e-5)
    assert layer.weight.grad is None
    assert type(Linear(128, 65)(torch.ones(2, 128)).grad_fn).__name__ == "ProductBackward"
    for other in (Linear(256, 160).double(), Linear(128, 64)):
        x = torch.ones(2, other.in_features, dtype=other.weight.dtype)
        assert type(other(x).grad_fn).__name__ == "AddmmBackward0"


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepacked_weights_give_the_same_products_and_are_given_up(kind, dtype):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no products in bfloat16")
    sizes = {"hidden_size": 80, "intermediate_size": 100, "num_key_value_heads": 2}  # some large enough to be ordered
    model = Llama(LlamaConfig(30, **sizes, model_type=kind, tie_word_embeddings=False))
    model.init_weights(torch.Generator().manual_seed(0))
    for name, weight in model.named_parameters():  # a bias of 0 would not be missed
        weight.data += 0.1 * name.endswith("bias")
    ids, positions = torch.arange(8).view(2, 4), torch.arange(4).expand(2, 4)
    names, counts = set(model.state_dict()), []
    for module in (group[0] for group in model.products()):
        module.register_forward_hook(lambda module, *_: counts.append(module.joined is not None))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        expected = model(ids, positions)
        with pytest.raises(KeyError), prepacked(model, 8, dtype):
            packed = model(ids, positions)
            with torch.autocast("cpu", enabled=False):
                logits = model.logits(packed.float())
            held = [group[0].joined[0] for group in model.products()]
            raise KeyError
    assert {weight.dtype for weight in held} == {dtype, torch.float32} and held[0].dtype == torch.float32
    assert [weight.is_mkldnn for weight in held[:5]] == [False, True, False, True, False]  # joined ones
    assert logits.dtype == torch.float32 and packed.dtype == expected.dtype
    torch.testing.assert_close(packed, expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-2)
    torch.testing.assert_close(logits, F.linear(packed.float(), model.lm_head.weight), rtol=0, atol=1e-5)
    assert all(layer.joined is None for group in model.products() for layer in group)
    assert set(model.state_dict()) == names
    # Of three layers of one input the first alone is not called while they are together; alone, each is.
    assert counts.count(True) == 2 * 2 + 1


def test_prepacked_weights_are_given_up_where_memory_ran_out(monkeypatch):
    def full(*_):
        raise MemoryError

    model = Llama(LlamaConfig(30, hidden_size=264))
    monkeypatch.setattr("torch.ops.mkldnn._reorder_linear_weight", full)
    with pytest.raises(MemoryError), prepacked(model, 8):
        pass
    assert all(layer.joined is None for group in model.products() for layer in group)


@pytest.mark.parametrize(("length", "keys", "heads"), [(1, 9, 4), (5, 9, 4), (5, 9, 2), (5, 600, 4)])
def test_attention_is_the_formula(length, keys, heads):
    """Folded, expanded, written out and fused: softmax(q k / sqrt(D)) v with each key shared by its query heads."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, heads, length, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(3, 2, keys, 8, generator=generator) for _ in range(2))
    visible = torch.rand(3, 1, length, keys, generator=generator) < 0.7
    visible[..., 0] = True
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    scores = q @ k.repeat_interleave(heads // 2, 1).transpose(2, 3) / 8**0.5
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v.repeat_interleave(heads // 2, 1)
    torch.testing.assert_close(attention(q, k, v, mask), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v, mask), expected, rtol=0, atol=1e-6)


def test_grouped_queries_run_in_a_fused_kernel(monkeypatch):
    """One decoded token, with and without a mask, and several with one: none falls back to the plain formula."""
    monkeypatch.setattr("attention.is_written_out", lambda *_: False)  # as where there is a GPU
    q, k = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 5, 8)
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where that kernel cannot run
        assert attention(q, k, k).shape == (2, 6, 1, 8)
        assert attention(q, k, k, torch.zeros(2, 1, 1, 5)).shape == (2, 6, 1, 8)
        assert attention(q.expand(2, 6, 4, 8), k, k, torch.zeros(2, 1, 4, 5)).shape == (2, 6, 4, 8)
