"""A checkpoint becomes a policy and back: the toy, llama and qwen2 files, GGUF, any causal model of `transformers`.

`new_policy` makes a toy from nothing. No pickle is read and no code of a checkpoint is run.
"""

import importlib.util
import os
import re
import tempfile
import warnings
from pathlib import Path

import torch

import ranks
from commands import UserError, load_tensors, load_weights, os_error, read_json, save_tensors, write_json
from model_hub import HubModel
from model_toy import Llama, LlamaConfig, character_tokenizer, compile_blocks
from policy import Policy, TokenPolicy
from policy_gaussian import Autoencoder, AutoencoderConfig, GaussianPolicy
from tasks import Task

TOY_WEIGHTS = 10**7  # a toy has fewer


def save(policy: Policy, folder: Path) -> None:
    """Write a standard checkpoint: config.json, generation_config.json, tokenizer files, model.safetensors last.

    An autoencoder's has its config.json and its weights. The first rank writes, what is sharded all give.
    """
    weights = policy.model.weights()
    if not ranks.FIRST:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(policy, GaussianPolicy):
        write_json(folder / "config.json", policy.model.config.to_json())
        save_tensors(folder / "model.safetensors", weights)
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as partial:
        try:
            policy.tokenizer.save_pretrained(partial)
        except Exception as error:  # of tokenizers, whose errors have no type
            raise os_error(error, folder) from error
        for path in Path(partial).iterdir():
            os.replace(path, folder / path.name)
    ends = policy.end_ids if len(policy.end_ids) > 1 else policy.end_ids[0]
    ids = {"eos_token_id": ends, "pad_token_id": policy.pad_id, "bos_token_id": policy.tokenizer.bos_token_id}
    ours = isinstance(policy.model, Llama)
    values = policy.model.config.to_json() if ours else policy.model.model.config.to_dict()
    write_json(folder / "config.json", values | ids)
    write_json(folder / "generation_config.json", {"do_sample": True} | ids)
    save_tensors(folder / "model.safetensors", weights)


def find_checkpoint(name: str | Path, weights: bool = True) -> Path:
    """A checkpoint's folder or GGUF file: a local one, or a model of the hub, downloaded; raises UserError."""
    folder = Path(name)
    if folder.is_file() and folder.suffix == ".gguf":
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        files = sorted(folder.glob("*.gguf")) if not (folder / "config.json").exists() else []
        if len(files) > 1:
            raise UserError(f"--model: {folder} holds {len(files)} GGUF files; name one of them, as in {files[0]}")
        return files[0] if files else folder
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
    the file that is missing, damaged or of a kind that cannot be used.
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


def load_gguf(path: Path, weights: bool = True) -> tuple[Llama | HubModel, object]:
    """The model of a GGUF file, dequantized to float32 by `transformers`, and its tokenizer; raises UserError."""
    if not importlib.util.find_spec("gguf"):
        raise UserError(f"--model: {path} needs the package gguf; python -m pip install gguf")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    logging.set_verbosity_error()
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer, values = AutoTokenizer.from_pretrained(**where), AutoConfig.from_pretrained(**where)
        with torch.device("meta"):
            theirs = AutoModelForCausalLM.from_config(values, dtype=torch.float32)
            try:
                model = Llama(LlamaConfig.from_json(values.to_dict()))
            except ValueError:
                model = None
        if not weights:
            return model or HubModel(theirs), tokenizer
        if model is None:
            return HubModel(AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)), tokenizer
        # Not by from_pretrained, which asks for a package more to do the same.
        model.load_weights(load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"])
        return model, tokenizer
    except Exception as error:  # of the gguf package, of transformers, of tokenizers: they have no common base
        first = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "fetch the file again, or give a kind of model that transformers reads from GGUF, with its tokenizer"
        raise UserError(f"--model: {path} cannot be read ({first}); {mend}") from error


def read_shards(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of those beside it that an index names; raises UserError."""
    if path.suffix != ".json":
        return load_tensors(path)
    names = read_json(path).get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{path} names no files beside it; restore the checkpoint")
    tensors = {}
    for name in sorted(set(names)):
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
    kind = read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    try:
        generic = kind in ("PreTrainedTokenizerFast", "TokenizersBackend")
        if generic and model_type == "llama":  # as the toy's; AutoTokenizer takes two seconds to import
            from transformers import PreTrainedTokenizerFast as Loader
        else:
            from transformers import AutoTokenizer as Loader
        tokenizer = Loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        special = [getattr(tokenizer, f"{kind}_token_id") for kind in ("unk", "bos", "eos", "pad")]
        ids = tokenizer("1").input_ids  # finds faults of its settings
        largest = max([*tokenizer.get_vocab().values(), *filter(None, special), *ids])
    except Exception as error:  # the tokenizers library raises a bare Exception for a damaged file
        raise UserError(f"{folder / 'tokenizer.json'} cannot be read ({error}); restore the file") from error
    if largest >= vocab_size:
        raise UserError(f"{folder / 'tokenizer.json'} has more tokens than config.json; restore the file")
    return tokenizer


def load(
    name: str | Path, device: torch.device | str, dtype: str | None = "float32", temperature: float = 1.0,
    exploration_noise: float | None = None, chat_template: str | None = None, thinking: str | None = None,
) -> Policy:  # fmt: skip
    """The policy of a checkpoint folder, a GGUF file or a model of the hub; raises UserError.

    Weights are float32; `dtype` is that of the matrix products (None: see `choose_dtype`). On the device `meta` weights
    are neither fetched nor read. `chat_template` is a file, or none; `thinking` is on or off.
    """
    device = torch.device(device)
    weights = device.type != "meta"
    folder = find_checkpoint(name, weights)
    if (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == "autoencoder":
        return load_autoencoder(folder, device, exploration_noise)
    if folder.suffix == ".gguf":
        (model, tokenizer), ends = load_gguf(folder, weights), []
    else:
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            if not (folder / file).is_file():
                raise UserError(f"--model: {folder} lacks {file}; restore the file or make the run again")
        model = load_model(folder, weights)
        tokenizer = load_tokenizer(folder, model.config.model_type, model.config.vocab_size)
        generation = folder / "generation_config.json"
        sources = [read_json(folder / "config.json"), read_json(generation) if generation.is_file() else {}]
        ends = [source.get("eos_token_id") for source in sources]
        ends = [i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None]
    strange = [i for i in ends if type(i) is not int or not 0 <= i < model.config.vocab_size]
    if strange:
        raise UserError(f"{folder}: eos_token_id {strange[0]!r:.80} is no token of the model; restore its JSON files")
    if not {tokenizer.eos_token_id, *ends} - {None}:
        raise UserError(f"{folder / 'config.json'} names no eos_token_id, so no completion could end; add it")
    policy = TokenPolicy(model.to(device), tokenizer, temperature, ends, exploration_noise or 0.0)
    policy.dtype = choose_dtype(dtype, policy, device)
    policy.revision = folder.name if folder.parent.name == "snapshots" else None
    set_template(policy, chat_template, thinking)
    return policy


def choose_dtype(name: str | None, policy: Policy, device: torch.device) -> torch.dtype:
    """Of matrix products: as named, else float32, and on a GPU bfloat16 if the model is no toy."""
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" and not is_toy(policy) else "float32"))


def make_ready(policy: Policy, config) -> None:
    """Let a policy's passes be compiled and checkpointed as the settings of a run say; raises UserError."""
    if config.compile and (not isinstance(policy.model, Llama) or policy.device.type != "cuda" or config.shard):
        raise UserError("--compile is for a Llama or Qwen2 on a GPU, without --shard; leave it out")
    if config.compile:
        compile_blocks()
    policy.model.checkpointing = config.gradient_checkpointing


def introduce(policy: Policy, config, prompt: str | list[dict]) -> None:
    """Say of a model that is no toy what was chosen for it, and what it reads."""
    if not is_toy(policy):
        weights = sum(weight.numel() for weight in policy.model.parameters())
        products = str(policy.dtype).removeprefix("torch.")
        print(f"{config.model}: {weights:,} weights, products in {products}, learning rate {config.learning_rate:g}")
        print(policy.show_prompt(prompt))


def is_toy(policy: Policy | None) -> bool:
    """Whether a policy is so small that it was made here (None: it will be), and learns at a toy's rate."""
    return policy is None or sum(weight.numel() for weight in policy.model.parameters()) < TOY_WEIGHTS


def set_template(policy: TokenPolicy, file: str | None, thinking: str | None) -> None:
    """Give a policy the chat template of a file, or none, switch its thinking, and end answers as it ends them."""
    tokenizer = policy.tokenizer
    if file == "none":
        tokenizer.chat_template = None
    elif file is not None:
        try:
            tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"--chat-template: {file} cannot be read ({error}); name a file, or none") from error
    if thinking is not None:
        if "enable_thinking" not in (tokenizer.chat_template or ""):
            raise UserError("--thinking: the model's chat template has no such switch; leave it out")
        policy.thinking = thinking == "on"
    if policy.chat:
        policy.end_ids = sorted({*policy.end_ids, *policy.end_of_turn()})


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
    sampling |= {"chat_template": config.chat_template, "thinking": config.thinking}
    policy = load(config.model, choose_device(config.device), config.dtype, **sampling)
    found = "autoencoder" if isinstance(policy, GaussianPolicy) else "transformer"
    if found != config.policy:
        raise UserError(f"--model: {config.model} is no {config.policy}; add --policy {found}")
    return policy


def new_policy(texts: list[str], seed: int, device: torch.device, kind: str = "transformer") -> Policy:
    """A toy with random weights: a Llama and a character tokenizer that knows these texts, or an autoencoder.

    The autoencoder's inputs are the integers up to the largest in the texts.
    """
    if kind == "autoencoder":
        numbers = 1 + max(int(digits) for text in texts for digits in re.findall("[0-9]{1,4}", text))
        model = Autoencoder(AutoencoderConfig(numbers))
    else:
        tokenizer = character_tokenizer(texts)
        model = Llama(LlamaConfig(vocab_size=len(tokenizer)))
    model.init_weights(torch.Generator().manual_seed(seed))
    return GaussianPolicy(model.to(device)) if kind == "autoencoder" else TokenPolicy(model.to(device), tokenizer)


def choose_device(name: str) -> torch.device:
    """`auto` takes cuda, then mps, then cpu; each rank a GPU of its own. Raises UserError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and ranks.WORLD > 1:
        name = f"cuda:{ranks.LOCAL_RANK}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: {name!r} is not here; leave the flag out, or use cpu") from error
    return device
