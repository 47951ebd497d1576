"""What a training step with a model will need in memory and work, before any weight is read: `--dry-run`."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from attention import Cache
from checkpoints import choose_device, choose_dtype, load
from commands import UserError
from model_toy import Llama
from policy import Policy, TokenPolicy, most_logits
from rewards import Rewards
from tasks import find_task, load_task


@dataclass(frozen=True)
class Plan:
    """What a training step needs, estimated: bytes by part with the flag that lowers them, and operations."""

    parts: dict[str, tuple[float, str]]  # name: bytes, the flag that lowers it
    operations: float
    device_bytes: float | None  # what the device has free, or None where it does not say

    @property
    def peak(self) -> float:
        """Bytes at the larger of the two moments: sampling, and update (gradients, activations, logits)."""
        size = {name: number for name, (number, _) in self.parts.items()}
        kept = size["process"] + size["weights"] + size["optimizer"] + size["reference"] + size["samplers"]
        return kept + max(size["sampling"], sum(size[name] for name in ("gradients", "activations", "gaps", "logits")))

    def table(self) -> str:
        lines = [f"{name:<12} {number / 1e9:8.2f} GB   {flag}" for name, (number, flag) in self.parts.items()]
        have = "unknown" if self.device_bytes is None else f"{self.device_bytes / 1e9:.2f} GB"
        lines += [f"{'peak, about':<12} {self.peak / 1e9:8.2f} GB   free on the device: {have}"]
        lines += [f"{'a step':<12} {self.operations / 1e12:8.2f} tera floating-point operations at full length"]
        if self.device_bytes is not None and self.peak > self.device_bytes:
            _, flag = max(part for name, part in self.parts.items() if name != "process")
            lines.append(f"does not fit: begin with the largest part, {flag}")
        return "\n".join(lines)


def sampler_dtypes(policy: Policy, config) -> list[torch.dtype]:
    """The dtype of each copy that samples in the policy's place: of the last --rollout-lag steps, and of now."""
    dtype = getattr(torch, config.sampler_dtype) if config.sampler_dtype else policy.dtype
    return [dtype] * (config.rollout_lag + 1) if config.rollout_lag or config.sampler_dtype else []


def copy_bytes(policy: TokenPolicy, dtype: torch.dtype) -> int:
    """Bytes of a frozen copy: in bfloat16 linear layers have two a weight, embedding and output layer four."""
    weights, config = sum(weight.numel() for weight in policy.model.parameters()), policy.model.config
    if dtype == torch.float32:
        return 4 * weights
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return 2 * (weights + config.vocab_size * config.hidden_size * (2 - tied))


def plan(
    policy: TokenPolicy, rows: int, prompts: int, prompt_tokens: int, max_new_tokens: int, common: int = 0, *,
    micro_batch_tokens: int, inner_updates: int, reference: int, samplers: list[torch.dtype], device: torch.device,
) -> Plan:  # fmt: skip
    """The memory and work of a step of `rows` completions of `prompts` prompts, at full length.

    All prompts begin with the same `common` tokens; `reference` frozen copies, and `samplers`, the dtype of each.
    """
    model, config, low = policy.model, policy.model.config, policy.dtype != torch.float32
    weights, size = sum(weight.numel() for weight in model.parameters()), 2 if low else 4
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width *= getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    group, own, budget = rows // prompts, prompt_tokens - common, micro_batch_tokens - common
    # The largest micro-batch: whole groups, or as much of one as fits.
    groups = min(prompts, max(0, budget) // (own + group * max_new_tokens))
    batch = groups * group or min(group, max(1, (budget - own) // max_new_tokens))
    activations, heap = activation_bytes(policy, max(1, groups), batch, own, max_new_tokens, common)
    whole, scores = getattr(model, "full_logits", False), batch * max_new_tokens * config.vocab_size
    most = scores if whole else policy.chunk_logits or most_logits(device)
    # Of a single chunk on a CPU only logits, log-softmax and gradient are whole, the rest is in pieces.
    alive = 3 if device.type == "cpu" and scores <= most else 4
    ours = isinstance(model, Llama)
    least = Cache.share_fixed_from if device.type == "cuda" else Cache.share_from
    shared = ours and own >= least  # else each row has a copy of its prompt's keys and values
    seen = common + (prompts if shared else rows) * own + rows * max_new_tokens
    cache = 2 * size * config.num_hidden_layers * width * seen + 5 * 4 * rows * config.vocab_size
    copy, made_ready = copy_bytes(policy, policy.dtype), low or (ours and device.type != "mps")
    # On a CPU passes of several sizes leave gaps in the heap, about half of what the largest keeps there.
    gaps = heap / 2 if device.type == "cpu" and batch < rows else 0.0
    parts = {
        # The first step on a CPU adds 0.2 GB, whatever the model: kernels that oneDNN makes, threads.
        "process": (own_bytes(device) + 2e8 * (device.type == "cpu"), "Python and its libraries"),
        "weights": (4 * weights, "a smaller --model"),
        "optimizer": (8 * weights, "a smaller --model"),
        "reference": (copy * reference, "--dtype bfloat16, or --beta 0"),
        "samplers": (sum(copy_bytes(policy, dtype) for dtype in samplers), "a smaller --rollout-lag"),
        "sampling": (cache + copy * made_ready, "--batch-size, --num-generations or --max-new-tokens"),
        "gradients": ((6 if low else 4) * weights, "a smaller --model"),  # bfloat16: with autocast's copies
        "activations": (activations, "--gradient-checkpointing, then --micro-batch-tokens"),
        "gaps": (gaps, "--micro-batch-tokens"),
        "logits": (4 * alive * min(most, scores), "--micro-batch-tokens" if whole else "bounded by chunks"),
    }
    passes = 2 + 2 * reference + (8 if model.checkpointing else 6) * inner_updates
    work = weights * passes * (common + prompts * own + rows * max_new_tokens)
    return Plan(parts, work, free_bytes(device))


def activation_bytes(
    policy: TokenPolicy, prompts: int, rows: int, own: int, new: int, common: int
) -> tuple[float, float]:
    """What a packed Llama keeps for the backward pass of a micro-batch, and how much of it in tensors below 32 MB.

    Seven vectors of the hidden size and four of the intermediate size for each token and layer, and the padded queries,
    keys, values and scores of attention; of `prompts` with `own` tokens after the `common` ones, and `rows` of `new`.
    """
    config, size = policy.model.config, 4 if policy.dtype == torch.float32 else 2
    layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    inner, before = getattr(config, "intermediate_size", None) or 4 * hidden, common + prompts * own
    tokens = before + rows * new
    vectors = [4 * hidden] * 7 + [inner * size] * 4  # bytes of a token
    layer = tokens * sum(vectors) + 4 * before * hidden * size
    # Short rows read the common tokens where they are (`Packed.attend`), and fold their weights; long ones copy them.
    seen, folded = own + new + common, common and new <= hidden // heads
    keys, scores = (seen - common, seen + common) if folded else (seen, seen)
    wide = 4 * seen if folded and size == 2 else 0  # such a softmax is in float32
    layer += rows * (size * (2 * keys * hidden + new * (hidden + heads * scores)) + new * heads * wide)
    kept = layers * tokens * hidden * 4 + layer if policy.model.checkpointing else layers * layer
    kept += 3 * tokens * inner * size
    # glibc gives larger ones a mapping of their own, see `keep_memory`.
    return kept, kept * sum(vector for vector in vectors if tokens * vector < 2**25) / sum(vectors)


def own_bytes(device: torch.device) -> float:
    """Resident bytes of this process where the model lies in the same memory and the system says so, else 0."""
    pages = Path("/proc/self/statm")
    if device.type != "cpu" or not pages.exists():
        return 0.0
    return float(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> float | None:
    """Bytes that a device has for this process, what it holds already included, or None where that is not known."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024.0 * int(lines["MemAvailable"].split()[0]) + own_bytes(device)
    except (OSError, KeyError, ValueError):  # not Linux
        return None


def dry_run(config) -> str:
    """What a step of grpo.py with these settings will need, as a table; nothing is written; raises UserError."""
    if config.model is None:
        raise UserError("--dry-run needs a --model to measure")
    task, row = find_task(config.task), config.resolved_algorithm
    chat = {"chat_template": config.chat_template, "thinking": config.thinking}
    policy = load(config.model, "meta", config.dtype, **chat)
    device = choose_device(config.device)
    policy.dtype = choose_dtype(config.dtype, policy, device)
    policy.model.checkpointing = config.gradient_checkpointing
    if not isinstance(policy, TokenPolicy):
        raise UserError("--dry-run is for language models; an autoencoder needs next to nothing")
    width = config.max_new_tokens or task.max_new_tokens
    data = load_task(task, policy.chat, config.limit, config.shots, data=config.data)
    data = policy.fitting(data, width)
    encoded = policy.encode([example.prompt for example in data["train"]])
    common = len(os.path.commonprefix(encoded))
    common = common if common >= Cache.share_from and config.batch_size > 1 else 0
    alone = config.ref_update_every or row.beta == 0  # so that the scorer is no reference
    rewards = Rewards.from_settings(dataclasses.replace(config, rewards=config.rewards or task.rewards))
    copied = rewards.needs_scorer and bool(alone or config.scorer)
    estimate = plan(
        policy, config.batch_size * config.num_generations, config.batch_size, max(map(len, encoded)), width,
        common, micro_batch_tokens=config.micro_batch_tokens, inner_updates=config.num_inner_updates,
        reference=(row.beta > 0) + copied, device=device, samplers=sampler_dtypes(policy, config),
    )  # fmt: skip
    return estimate.table()
