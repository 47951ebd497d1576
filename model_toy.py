"""Llama, a decoder-only transformer in plain PyTorch (toy-sized by default), and the toy's character tokenizer.

Parameter names and `config.json` keys are those of `transformers`, so a saved toy opens with
`AutoModelForCausalLM` and gives the same logits (tests/test_model_toy.py).

Shapes: B rows, T new tokens, L tokens in the cache after this call, H attention heads, K key-value heads,
D width of a head, C hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import Cache, attention, attention_mask, attention_with
from linear import Linear, side_by_side

WORDS = ("What", "is", "<answer>", "</answer>")  # strings that the toy's tokenizer keeps whole
SPECIAL = ("<pad>", "<eos>", "<unk>")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama or a Qwen2, under the names that `transformers` uses."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100.0  # short texts need no slow rotations
    tie_word_embeddings: bool = True
    initializer_range: float = 0.05
    model_type: str = "llama"  # or qwen2, which adds a bias to queries, keys and values
    rope_scaling: dict | None = None  # the keys of Llama 3's scaling, or None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def to_json(self) -> dict:
        """The dictionary for `config.json`; the rotary base stands there twice, for transformers 4 and 5."""
        rope = {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}
        biases = {"attention_bias": False, "mlp_bias": False, "head_dim": self.head_dim}
        return asdict(self) | {
            "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[self.model_type]],
            "hidden_act": "silu",
            "rope_parameters": rope,
            "dtype": "float32",
            **(biases if self.model_type == "llama" else {}),
        }

    @classmethod
    def from_json(cls, values: dict) -> "LlamaConfig":
        """Read the dictionary of a `config.json`; raises ValueError for a model that `Llama` does not compute."""
        if values.get("model_type") not in ("llama", "qwen2"):
            raise ValueError(f"model_type is {values.get('model_type')!r}, Llama computes 'llama' and 'qwen2' only")
        plain = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
        for key, value in plain.items():
            if values.get(key, value) != value:
                raise ValueError(f"{key} is {values[key]!r}, Llama computes {value!r} only")
        rope = {**(values.get("rope_parameters") or values.get("rope_scaling") or {})}
        theta = rope.pop("rope_theta", values.get("rope_theta"))
        rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
        if rope["rope_type"] not in ("default", "llama3"):
            raise ValueError(f"rope_type is {rope['rope_type']!r}, Llama computes 'default' and 'llama3' only")
        known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        known["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        known |= {} if theta is None else {"rope_theta": theta}
        # The defaults of `transformers` differ from the toy's, so nothing that changes the numbers is guessed.
        missing = [name for name in cls.__dataclass_fields__ if name not in known and name != "initializer_range"]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing")
        for field in fields(cls):
            kinds = {float: (int, float), int: int, bool: bool, str: str}.get(field.type, (dict, type(None)))
            value = known.get(field.name, field.default)
            if not isinstance(value, kinds) or isinstance(value, bool) != (field.type is bool):
                raise ValueError(f"{field.name} is {value!r}, not of type {getattr(field.type, '__name__', 'dict')}")
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} is {value}, not above 0")
        config = cls(**known)
        size = (values.get("head_dim") or config.head_dim) * config.num_attention_heads
        if size != config.hidden_size:
            raise ValueError(f"head_dim times num_attention_heads is {size}, not hidden_size {config.hidden_size}")
        if config.num_attention_heads % config.num_key_value_heads:
            raise ValueError("num_attention_heads is no multiple of num_key_value_heads")
        config.inverse_frequencies()
        return config

    def inverse_frequencies(self) -> torch.Tensor:
        """Radians per position (D / 2,) float32 of each pair of dimensions, slowed down for long texts as in Llama 3.

        Wavelengths above original_max_position_embeddings / low_freq_factor are stretched by `factor`, those below
        original / high_freq_factor stay, and those between are interpolated (Llama 3.1's reference code).
        """
        exponent = torch.arange(0, self.head_dim, 2, device="cpu") / self.head_dim  # also where weights are on meta
        frequency = self.rope_theta**-exponent
        if self.rope_scaling is None:
            return frequency
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        try:
            factor, low, high, original = (float(self.rope_scaling[name]) for name in names)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"rope_scaling of type llama3 needs the numbers {', '.join(names)}") from error
        share = ((original * frequency / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)  # of the unscaled one
        return (1 - share) * frequency / factor + share * frequency


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) of (..., heads, D); cos and sin are those of `Llama.rotary`."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), sin)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        bias = config.model_type == "qwen2"
        self.q_proj = Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, rotary, asking=None):
        """Queries, keys and values (..., heads, D); what these make of each other is the caller's."""
        if asking is None:
            q, k, v = side_by_side(x, self.q_proj, self.k_proj, self.v_proj)
            places = rotary
        else:
            q, k, v = self.q_proj(x.index_select(0, asking)), self.k_proj(x), self.v_proj(x)
            places = [y.index_select(0, asking) for y in rotary]
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        return rotate(q, *places).to(v.dtype), rotate(k, *rotary).to(v.dtype), v  # under autocast they come in float32


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = side_by_side(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.self_attn = layer, Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotary, attend, asking=None):
        seen = attend(self.layer, *self.before(x, rotary, asking))
        return self.after(x if asking is None else x.index_select(0, asking), seen)

    def before(self, x, rotary, asking):
        return self.self_attn(self.input_layernorm(x), rotary, asking)

    def after(self, x, seen):
        x = x + self.self_attn.o_proj(seen.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))


def compile_blocks() -> None:
    """Fuse what stands between products and attention, for the rest of this process, after half a minute.

    On a GPU (H200, a model of 0.5 billion weights) sampling takes 0.7 to 0.9 of its time, an update 0.87.
    """
    torch._dynamo.config.recompile_limit = 64  # a run has 8 kinds of passes, more than which would not be compiled
    Block.before, Block.after = (torch.compile(part, dynamic=True) for part in (Block.before, Block.after))


class Llama(nn.Module):
    """Decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU (arXiv 2302.13971)."""

    checkpointing = False  # keep only each block's input for the backward pass, and compute the rest again
    windowed = False  # every token sees all before it

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers)),
                "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("frequency", config.inverse_frequencies(), persistent=False)

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw normal weights; those that write to the residual stream get std / sqrt(2 * layers), as in GPT-2."""
        residual_std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                residual = "o_proj" in name or "down_proj" in name
                std = residual_std if residual else self.config.initializer_range
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, ids, positions, cache: Cache | None = None, key_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states (B, T, C) of int64 ids (B, T) at int64 positions (B, T).

        key_mask (B, L) is true on real tokens, over the rows' own cached and new ones; None: nothing is padding.
        """
        shared = cache.shared if cache is not None else []
        length = ids.shape[1] + (cache.length if cache is not None else 0)
        if cache is not None and cache.place is not None:
            mask = cache.visible()
        else:
            if cache is not None and cache.key_mask is not None:
                key_mask = F.pad(cache.key_mask, (0, length - cache.key_mask.shape[1]), value=True)
            if shared and key_mask is None and ids.shape[1] > 1:  # `attention_with` knows no causal flag
                key_mask = torch.ones(1, length, dtype=torch.bool, device=ids.device)
            mask = attention_mask(ids.shape[1], length, key_mask, ids.device)

        def attend(layer, q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            k, v = (k, v) if cache is None else cache.extend(layer, k, v)
            if shared:
                texts = [(text, *text.layers[layer]) for text in shared]
                return attention_with(texts, q, k, v, mask).transpose(1, 2)
            return attention(q, k, v, mask, causal=mask is None and ids.shape[1] > 1).transpose(1, 2)

        hidden = Llama.packed(self, ids, positions, attend)  # without the hooks that sharding puts around both
        if cache is not None:
            cache.advance(ids.shape[1])
        return hidden

    def packed(self, ids, positions, attend: Callable, asking: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states (..., C) of ids (...) at positions (...), where `attend` lets tokens see each other.

        With `asking` (M,), of ids (N,), only those of these tokens: of the others the last block computes no more than
        keys and values, which saves the toy's fine-tuning about 6 % of its time.
        """
        x = self.model.embed_tokens(ids)
        rotary = self.rotary(positions, x.dtype)
        for i, block in enumerate(self.model.layers, 1):
            arguments = (x, rotary, attend, asking if i == len(self.model.layers) else None)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return self.model.norm(x)

    def rotary(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (..., 1, D), the first half of these negative; rounded to `dtype` at the end."""
        angle = positions[..., None, None] * self.frequency  # (..., 1, D / 2)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        return self.lm_head(hidden)

    @property
    def output_layer(self) -> nn.Module:
        return self.lm_head

    def products(self) -> list[tuple[Linear, ...]]:
        """The linear layers, those of one input together."""
        groups = [(self.lm_head,)]
        for block in self.model.layers:
            seen, mlp = block.self_attn, block.mlp
            groups += [(seen.q_proj, seen.k_proj, seen.v_proj), (seen.o_proj,)]
            groups += [(mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)]
        return groups

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and completion together."""
        return self.config.max_position_embeddings

    def new_cache(self) -> Cache:
        return Cache(self.config.num_hidden_layers)

    def weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds: a tied output layer is left out, as `transformers` does."""
        tied = self.config.tie_word_embeddings
        return {name: x for name, x in self.state_dict().items() if not (tied and name == "lm_head.weight")}

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Take the weights of a checkpoint, in float32 where the model had none yet; raises RuntimeError."""
        weights = {name: x for name, x in weights.items() if not name.endswith("rotary_emb.inv_freq")}  # old files
        if self.config.tie_word_embeddings:
            weights["lm_head.weight"] = weights.get("model.embed_tokens.weight", torch.empty(0))
        new = self.lm_head.weight.is_meta
        self.load_state_dict({name: x.float() for name, x in weights.items()} if new else weights, assign=new)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


def character_tokenizer(texts: list[str]):
    """A `transformers` tokenizer with one token per character of `texts`, and one for each of WORDS.

    White space is dropped: the toy reads "What is (4 - 9) * 6?" as ten tokens.
    """
    from transformers import PreTrainedTokenizerFast

    characters = sorted({character for text in texts for character in text if not character.isspace()})
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    split = pre_tokenizers.Split(Regex("|".join([*WORDS, "."])), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
