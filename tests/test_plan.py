"""What --dry-run says: its words to the letter, and what it counts against what autograd keeps."""

from types import SimpleNamespace

import pytest
import torch
from bench_sampler import NEVER, random_policy, random_prompts

import plan
from model_toy import LlamaConfig
from policy import frozen
from tasks import Example

PARTS = {
    "process": (9e9, "Python"),
    "weights": (1e9, "smaller"),
    "optimizer": (2e9, "smaller"),
    "reference": (0.25e9, "--beta 0"),
    "samplers": (0.5e9, "--rollout-lag"),
    "sampling": (4e9, "--batch-size"),
    "gradients": (1e9, "smaller"),
    "activations": (2.5e9, "--micro-batch-tokens"),
    "gaps": (0.125e9, "--micro-batch-tokens"),
    "logits": (0.0625e9, "bounded"),
}


def test_the_table_to_the_letter():
    """The peak has the larger of sampling and update; the part to begin with is one that a flag makes smaller."""
    text = plan.Plan(PARTS, 1.5e12, None).table().splitlines()
    assert text[0] == "process          9.00 GB   Python"
    assert text[7] == "activations      2.50 GB   --micro-batch-tokens"
    assert text[10:] == [
        "peak, about     16.75 GB   free on the device: unknown",
        "a step           1.50 tera floating-point operations at full length",
    ]
    assert plan.Plan(PARTS | {"logits": (0.4375e9, "bounded")}, 1.0, None).peak == 12.75e9 + 4.0625e9
    assert plan.Plan(PARTS, 1.5e12, 16.75e9).table().splitlines()[10:] == [
        "peak, about     16.75 GB   free on the device: 16.75 GB",
        "a step           1.50 tera floating-point operations at full length",
    ]
    assert plan.Plan(PARTS, 1.5e12, 16.7e9).table().splitlines()[12:] == [
        "does not fit: begin with the largest part, --batch-size"
    ]


def a_policy(layers: int, dtype=torch.float32, checkpointing=False, tied=True):
    policy = random_policy(LlamaConfig(64, 64, 160, layers, 4, 2, tie_word_embeddings=tied))
    policy.end_ids, policy.model.checkpointing, policy.dtype = [NEVER], checkpointing, dtype
    return policy


def test_which_copies_sample():
    policy = SimpleNamespace(dtype=torch.float16)
    asked = [(0, None), (0, "bfloat16"), (2, None), (1, "float32")]
    given = [plan.sampler_dtypes(policy, SimpleNamespace(rollout_lag=lag, sampler_dtype=name)) for lag, name in asked]
    assert given == [[], [torch.bfloat16], [torch.float16] * 3, [torch.float32] * 2]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_has_so_many_bytes(dtype, tied):
    policy = a_policy(2, dtype, tied=tied)
    kept = sum(weight.nbytes for weight in frozen(policy).model.parameters())
    norms = sum(weight.numel() for weight in policy.model.parameters() if weight.dim() == 1)
    assert plan.copy_bytes(policy, dtype) == kept - (2 * norms if dtype == torch.bfloat16 else 0)


def saved_bytes(policy, rollout) -> int:
    """Bytes that the forward pass keeps for the backward pass, each storage once, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in policy.model.parameters()}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)  # held, lest its address come again
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        policy.log_probs(rollout, entropy=False)
    return sum(size for key, (size, _) in kept.items() if key not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("prompts", "group", "length", "width", "common"),
    [(2, 8, 64, 64, 0), (4, 8, 16, 42, 0), (4, 2, 240, 8, 0), (2, 16, 16, 24, 160), (2, 16, 16, 16, 96)],
)
def test_a_layer_keeps_what_the_plan_says(dtype, checkpointing, prompts, group, length, width, common):
    """To the byte with checkpointing, where a layer keeps its input; else but for a fifteenth, small things."""
    kept, planned = [], []
    for layers in (2, 4):
        policy = a_policy(layers, dtype, checkpointing)
        examples = random_prompts(policy.model.config, prompts, length, False)
        examples = [Example([9] * common + example.prompt) for example in examples]
        rollout = policy.sample(examples, group, (0, 0, 0), width)
        assert rollout.common == common
        kept.append(saved_bytes(policy, rollout))
        planned.append(plan.activation_bytes(policy, prompts, prompts * group, length, width, common))
    matrices = sum(weight.numel() for weight in policy.model.model.layers[0].parameters() if weight.dim() == 2)
    casts = 2 * matrices if dtype == torch.bfloat16 and not checkpointing else 0  # autocast's, counted elsewhere
    layer, (total, heap) = (kept[1] - kept[0]) / 2 - casts, planned[1]
    said = (total - planned[0][0]) / 2
    assert heap == total  # everything is small here
    assert said == layer if checkpointing else 14 / 15 * layer < said <= layer
    tokens, size = common + prompts * (length + group * width), 2 if dtype == torch.bfloat16 else 4
    policy.model.checkpointing = not checkpointing
    other = plan.activation_bytes(policy, prompts, prompts * group, length, width, common)[0]
    plain, again = (other, total) if checkpointing else (total, other)
    # Beyond that a layer's gradient needs three tensors of its MLP; with checkpointing one layer is computed again.
    once = tokens * 160 * size * 3
    assert again - 4 * tokens * 64 * 4 == pytest.approx((plain - once) / 4 + once)


def test_what_lies_in_mappings_of_its_own_leaves_no_gaps():
    """glibc maps tensors of 32 MB apart: with so many tokens those of the MLP, then those of the hidden size, too."""
    policy = a_policy(2)
    for tokens, share in ((2**25 // 640 - 64, 1), (2**25 // 640 + 64, 7 * 256 / (7 * 256 + 4 * 640)), (2**17 + 64, 0)):
        kept, heap = plan.activation_bytes(policy, 1, 1, 64, tokens - 64, 0)
        assert heap == pytest.approx(share * kept)
