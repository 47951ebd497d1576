"""A checkpoint becomes a policy and back: the toy, llama and qwen2 files, any other causal model of `transformers`.

Also `plan`: what a training step with a model will need. No pickle is read and no code of a checkpoint is run.
"""

import dataclasses
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from attention import Cache
from model_toy import Autoencoder, AutoencoderConfig, Llama, LlamaConfig
from policy import GaussianPolicy, Policy, TokenPolicy, most_logits
from rewards import Rewards
from runs import UserError, load_tensors, load_weights, read_json, save_weights, write_json
from tasks import Task, find_task, load_task


class HubCache:
    """The cache of any model of `transformers`, with `Cache`'s two verbs; what rows share is repeated for each."""

    def __init__(self):
        from transformers import DynamicCache

        self.inner = DynamicCache()
        self.key_mask: torch.Tensor | None = None  # (B, L) true on real tokens of what rows shared; None: on all

    def share(self, group: torch.Tensor, room: int = 0, key_mask: torch.Tensor | None = None) -> None:
        """See `Cache.share`; it grows by concatenation, so `room` is not needed."""
        self.key_mask = key_mask
        self.select(group)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows (int64 indices, repeats allowed)."""
        self.inner.batch_select_indices(rows)
        self.key_mask = None if self.key_mask is None else self.key_mask[rows]


class HubModel(nn.Module):
    """Any causal language model of `transformers` behind the two calls of `Llama`; raises ValueError for some."""

    def __init__(self, model: nn.Module):
        super().__init__()
        if getattr(model, "_is_stateful", False):
            raise ValueError(f"{model.config.model_type} is recurrent: its state cannot be cut back to single rows")
        self.model, self.config, self.full_logits = model, model.config.get_text_config(), False
        self.max_length = getattr(self.config, "max_position_embeddings", None) or 2**31
        for module in model.modules():  # the policy that samples is the policy that is scored: no dropout
            for name, value in list(vars(module).items()):
                if isinstance(value, float) and (name == "p" or "drop" in name):
                    setattr(module, name, 0.0)
        if model.device.type == "meta":  # sizes without numbers, for a dry run
            caps = (getattr(self.config, name, None) for name in ("final_logit_softcapping", "logit_scale"))
            self.full_logits = any(cap not in (None, 1.0) for cap in caps)
            return
        ids = torch.arange(4)[None].to(model.device)
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            hidden, cache = self(ids, ids), self.new_cache()
            parts = torch.cat([self(ids[:, i:j], ids[:, i:j], cache) for i, j in ((0, 2), (2, 4))], 1)
            ours = self.logits(hidden)
        if hidden.shape != parts.shape or not torch.allclose(hidden, parts, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"{model.config.model_type} reads ahead or keeps no cache: it cannot be sampled token by token"
            )
        # Some models scale or cap their logits: there the "hidden states" are the logits themselves.
        self.full_logits = ours.shape != expected.shape or not torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)

    @property
    def checkpointing(self) -> bool:
        return self.model.is_gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def forward(self, ids, positions, cache: HubCache | None = None, key_mask: torch.Tensor | None = None):
        """Last hidden states (B, T, C), or logits (B, T, V) where `full_logits`; arguments as in `Llama.forward`."""
        # `transformers` checkpoints in training mode only, and then drops the cache; dropout is 0 in either mode.
        self.model.train(self.checkpointing and torch.is_grad_enabled() and cache is None)
        if cache is not None and cache.key_mask is not None:
            new = ids.shape[1] + cache.inner.get_seq_length() - cache.key_mask.shape[1]
            key_mask = torch.nn.functional.pad(cache.key_mask, (0, new), value=True)
        output = (self.model if self.full_logits else self.model.base_model)(
            input_ids=ids,
            position_ids=positions,
            attention_mask=None if key_mask is None else key_mask.long(),
            past_key_values=None if cache is None else cache.inner,
            use_cache=cache is not None,
        )
        return output.logits if self.full_logits else output.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of what `forward` returned."""
        return hidden if self.full_logits else self.model.get_output_embeddings()(hidden)

    def new_cache(self) -> HubCache:
        return HubCache()

    def weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds: of tied tensors the first."""
        seen, kept = set(), {}
        for name, x in self.model.state_dict().items():
            if (x.data_ptr(), x.shape) not in seen:
                kept[name] = x
            seen.add((x.data_ptr(), x.shape))
        return kept

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Take the weights of a checkpoint; raises RuntimeError if they do not fit."""
        if weights.keys() != self.weights().keys():
            raise RuntimeError("other names than the model has")
        self.model.load_state_dict(weights, strict=False)


def save(policy: Policy, folder: Path) -> None:
    """Write a standard checkpoint: config.json, generation_config.json, tokenizer files, model.safetensors last.

    An autoencoder's has its config.json and its weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(policy, GaussianPolicy):
        write_json(folder / "config.json", policy.model.config.to_json())
        save_weights(folder / "model.safetensors", policy.model)
        return
    policy.tokenizer.save_pretrained(folder)
    ends = policy.end_ids if len(policy.end_ids) > 1 else policy.end_ids[0]
    ids = {"eos_token_id": ends, "pad_token_id": policy.pad_id, "bos_token_id": policy.tokenizer.bos_token_id}
    ours = isinstance(policy.model, Llama)
    values = policy.model.config.to_json() if ours else policy.model.model.config.to_dict()
    write_json(folder / "config.json", values | ids)
    write_json(folder / "generation_config.json", {"do_sample": True} | ids)
    save_weights(folder / "model.safetensors", policy.model)


def find_checkpoint(name: str | Path, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local one, or the hub's model of that name, downloaded; raises UserError."""
    folder = Path(name)
    if folder.is_dir() and any(folder.iterdir()):
        return folder
    make = f"no saved model in {str(name)!r}; make one with: python grpo.py --task arithmetic --out {name}"
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise UserError(f"--model: {make}")
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.model", "*.txt", "*.jinja", *["*.safetensors"] * weights]  # no pickle, no code
    try:
        return Path(snapshot_download(str(name), allow_patterns=kinds))
    except Exception as error:  # the hub's errors have no common base: name, network, permission, disk
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--model: {make}; or, if it is a model of the hub: {first}") from error


def load_model(folder: Path, weights: bool = True) -> Llama | HubModel:
    """The model of a checkpoint, in float32: `Llama` where that computes it, else that of `transformers`.

    Without `weights` it stands on PyTorch's meta device, which has sizes and no numbers. Raises UserError naming
    the file that is missing, damaged or of a kind that cannot be used. No code of the checkpoint's is run and no
    pickle is read.
    """
    values = read_json(folder / "config.json")
    file = folder / "model.safetensors"
    if not file.is_file() and (folder / "model.safetensors.index.json").is_file():
        file = folder / "model.safetensors.index.json"
    if weights and not file.is_file():
        mend = "restore the file, make the run again, or convert the checkpoint to safetensors"
        raise UserError(f"--model: {folder} lacks model.safetensors; {mend}")
    try:
        config = LlamaConfig.from_json(values)
        with torch.device("meta"):  # so that no random weights are drawn only to be overwritten
            model = Llama(config)
    except (ArithmeticError, AttributeError, TypeError, ValueError, RuntimeError) as unfit:
        return load_hub_model(folder, unfit, weights)
    if weights:
        load_weights(file, model, read_shards(file))
    return model


def read_shards(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of those beside it that an index names; raises UserError."""
    if path.suffix != ".json":
        return load_tensors(path)
    names = read_json(path).get("weight_map")
    names = sorted(set(names.values())) if isinstance(names, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{path} names no files beside it; restore the checkpoint")
    tensors = {}
    for name in names:
        tensors |= load_tensors(path.parent / name)
    return tensors


def load_hub_model(folder: Path, unfit: Exception, weights: bool = True) -> HubModel:
    """The checkpoint's model as `transformers` computes it, since `Llama` does not, for the reason `unfit`."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of names in its next version
    options = {"dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    try:
        if not weights:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            with torch.device("meta"):
                return HubModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
        absent = [*report["missing_keys"], *report["mismatched_keys"]]
        if absent:  # the library would leave them at random
            raise ValueError(f"no fitting weights for {absent[0]} in the files")
        return HubModel(model)
    except Exception as error:  # each of the library's models finds its own faults with a config
        first = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "give a checkpoint of a causal language model, as transformers or this program writes it"
        raise UserError(f"{folder / 'config.json'}: {unfit}; transformers: {first}; {mend}") from error


def load_tokenizer(folder: Path, model_type: str, vocab_size: int):
    """The tokenizer of a checkpoint; raises UserError."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"--model: {folder} lacks {name}; restore the file or make the run again")
    kind = read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    try:
        generic = kind in ("PreTrainedTokenizerFast", "TokenizersBackend")
        if generic and model_type == "llama":  # as the toy's; AutoTokenizer takes two seconds to import
            from transformers import PreTrainedTokenizerFast as Loader
        else:
            from transformers import AutoTokenizer as Loader
        tokenizer = Loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # the tokenizers library raises a bare Exception for a damaged file
        raise UserError(f"{folder / 'tokenizer.json'} cannot be read ({error}); restore the file") from error
    if largest >= vocab_size:
        raise UserError(f"{folder / 'tokenizer.json'} has more tokens than config.json; restore the file")
    return tokenizer


def load(
    name: str | Path,
    device: torch.device | str,
    dtype: str = "float32",
    temperature: float = 1.0,
    exploration_noise: float | None = None,
) -> Policy:
    """The policy of a checkpoint folder or of a model of the hub; raises UserError.

    Weights are float32; `dtype` is that of the matrix products. On the device `meta` they are neither fetched nor read.
    """
    device = torch.device(device)
    weights = device.type != "meta"
    folder = find_checkpoint(name, weights)
    if (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == "autoencoder":
        return load_autoencoder(folder, device, exploration_noise)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            raise UserError(f"--model: {folder} lacks {file}; restore the file or make the run again")
    model = load_model(folder, weights)
    tokenizer = load_tokenizer(folder, model.config.model_type, model.config.vocab_size)
    generation = folder / "generation_config.json"
    sources = [read_json(folder / "config.json"), read_json(generation) if generation.is_file() else {}]
    ends = [source.get("eos_token_id") for source in sources]
    ends = [i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None]
    if not {tokenizer.eos_token_id, *ends} - {None}:
        raise UserError(f"{folder / 'config.json'} names no eos_token_id, so no completion could end; add it")
    policy = TokenPolicy(model.to(device), tokenizer, temperature, ends, exploration_noise or 0.0)
    policy.dtype = getattr(torch, dtype)
    return policy


def load_autoencoder(folder: Path, device: torch.device, exploration_noise: float | None) -> GaussianPolicy:
    """The Gaussian policy of an autoencoder's checkpoint, with noise 0.5 unless it is given; raises UserError."""
    try:
        model = Autoencoder(AutoencoderConfig.from_json(read_json(folder / "config.json")))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}; restore the file or make the run again") from error
    if device.type != "meta":
        load_weights(folder / "model.safetensors", model)
    return GaussianPolicy(model.to(device), *([] if exploration_noise is None else [exploration_noise]))


def open_policy(config, task: Task, **sampling) -> Policy | None:
    """The policy that a run's --model names, None where it is left to make a toy; raises UserError."""
    if config.model is None and not task.toy:
        raise UserError(f"--task {task.name} needs a --model: a checkpoint folder, or the name of a model on the hub")
    if config.model is None:
        return None
    policy = load(config.model, choose_device(config.device), config.dtype, **sampling)
    found = "autoencoder" if isinstance(policy, GaussianPolicy) else "transformer"
    if found != config.policy:
        raise UserError(f"--model: {config.model} is no {config.policy}; add --policy {found}")
    return policy


def choose_device(name: str) -> torch.device:
    """`auto` takes cuda, then mps, then cpu; raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: {name!r} is not here; leave the flag out, or use cpu") from error
    return device


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
        kept = size["process"] + size["weights"] + size["optimizer"] + size["reference"]
        return kept + max(size["sampling"], size["gradients"] + size["activations"] + size["logits"])

    def table(self) -> str:
        lines = [f"{name:<12} {number / 1e9:8.2f} GB   {flag}" for name, (number, flag) in self.parts.items()]
        have = "unknown" if self.device_bytes is None else f"{self.device_bytes / 1e9:.2f} GB"
        lines += [f"{'peak, about':<12} {self.peak / 1e9:8.2f} GB   free on the device: {have}"]
        lines += [f"{'a step':<12} {self.operations / 1e12:8.2f} tera floating-point operations at full length"]
        if self.device_bytes is not None and self.peak > self.device_bytes:
            _, (number, flag) = max(self.parts.items(), key=lambda part: part[1][0])
            lines.append(f"does not fit: begin with the largest part, {flag}")
        return "\n".join(lines)


def plan(policy: TokenPolicy, rows: int, prompts: int, prompt_tokens: int, max_new_tokens: int, **settings) -> Plan:
    """The memory and work of a step of `rows` completions of `prompts` prompts, at full length.

    `settings`: micro_batch_tokens, inner_updates, reference (how many frozen copies), device. Counted is what a packed
    Llama keeps for the backward pass of its largest micro-batch: seven vectors of the hidden size and four of the
    intermediate size for each token and layer, and the padded queries, keys, values and scores of its attention.
    """
    model, config = policy.model, policy.model.config
    low, layers, hidden = policy.dtype != torch.float32, config.num_hidden_layers, config.hidden_size
    weights, size = sum(weight.numel() for weight in model.parameters()), 2 if low else 4
    inner, heads = getattr(config, "intermediate_size", None) or 4 * hidden, config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    width *= getattr(config, "num_key_value_heads", None) or heads
    length, group, budget = prompt_tokens + max_new_tokens, rows // prompts, settings["micro_batch_tokens"]
    # The largest micro-batch: whole groups, or as much of one as fits.
    groups = min(prompts, budget // (prompt_tokens + group * max_new_tokens))
    batch = groups * group or min(group, max(1, budget // length))
    before = max(1, groups) * prompt_tokens  # tokens of its prompts
    tokens = before + batch * max_new_tokens
    layer = tokens * (28 * hidden + 4 * inner * size) + 4 * before * hidden * size
    layer += batch * size * (2 * length * hidden + max_new_tokens * (hidden + heads * length))
    kept = layers * tokens * hidden * 4 + layer if model.checkpointing else layers * layer
    whole, scores = getattr(model, "full_logits", False), batch * max_new_tokens * config.vocab_size
    most = scores if whole else policy.chunk_logits or most_logits(settings["device"])
    copy = 4 * weights
    if low:  # linear layers in two bytes; the embedding in four, and no longer one with the output layer
        embedding = config.vocab_size * hidden
        copy = 2 * (weights + embedding * (1 + bool(getattr(config, "tie_word_embeddings", False))))
    ours = isinstance(model, Llama)
    shared = ours and prompt_tokens >= Cache.share_from  # else each row has a copy of its prompt's keys and values
    seen = (prompts if shared else rows) * prompt_tokens + rows * max_new_tokens
    cache = 2 * size * layers * width * seen + 5 * 4 * rows * config.vocab_size
    decoding = copy if low else 4 * weights * (ours and settings["device"].type == "cpu")  # weights made ready for it
    parts = {
        "process": (own_bytes(settings["device"]), "Python and its libraries"),
        "weights": (4 * weights, "a smaller --model"),
        "optimizer": (8 * weights, "a smaller --model"),
        "reference": (copy * settings["reference"], "--dtype bfloat16, or --beta 0"),
        "sampling": (cache + decoding, "--batch-size, --num-generations or --max-new-tokens"),
        "gradients": ((6 if low else 4) * weights, "a smaller --model"),  # bfloat16: with autocast's copies
        "activations": (kept + 3 * tokens * inner * size, "--gradient-checkpointing, then --micro-batch-tokens"),
        "logits": (4 * 4 * min(most, scores), "--micro-batch-tokens" if whole else "bounded by chunks"),
    }
    passes = 2 + 2 * settings["reference"] + (8 if model.checkpointing else 6) * settings["inner_updates"]
    work = weights * passes * (prompts * prompt_tokens + rows * max_new_tokens)
    return Plan(parts, work, free_bytes(settings["device"]))


def own_bytes(device: torch.device) -> float:
    """Resident bytes of this process where the model lies in the same memory and the system says so, else 0."""
    pages = Path("/proc/self/statm")
    if device.type != "cpu" or not pages.exists():
        return 0.0
    return float(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> float | None:
    """Bytes that are free on a device, or None where it does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # not Linux
        return None


def dry_run(config) -> str:
    """What a step of grpo.py with these settings will need, as a table; nothing is written; raises UserError."""
    if config.model is None:
        raise UserError("--dry-run needs a --model to measure")
    task, row, policy = find_task(config.task), config.resolved_algorithm, load(config.model, "meta", config.dtype)
    policy.model.checkpointing = config.gradient_checkpointing
    if not isinstance(policy, TokenPolicy):
        raise UserError("--dry-run is for language models; an autoencoder needs next to nothing")
    width = config.max_new_tokens or task.max_new_tokens
    data = policy.fitting(load_task(task, policy.chat, config.limit, data=config.data), width)
    longest = max(map(len, policy.encode([example.prompt for example in data["train"]])))
    alone = config.ref_update_every or row.beta == 0  # so that the scorer is no reference
    rewards = Rewards.from_settings(dataclasses.replace(config, rewards=config.rewards or task.rewards))
    copied = rewards.needs_scorer and bool(alone or config.scorer)
    estimate = plan(
        policy, config.batch_size * config.num_generations, config.batch_size, longest, width,
        micro_batch_tokens=config.micro_batch_tokens, inner_updates=config.num_inner_updates,
        reference=(row.beta > 0) + copied, device=choose_device(config.device),
    )  # fmt: skip
    return estimate.table()
