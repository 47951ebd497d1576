"""Llama, a decoder-only transformer in plain PyTorch (toy-sized by default), and the toy's character tokenizer.

Parameter names and `config.json` keys are those of `transformers`, so a saved toy opens with
`AutoModelForCausalLM` and gives the same logits (tests/test_model_toy.py).

Shapes: B rows, T new tokens, L tokens in the cache after this call, H attention heads, K key-value heads,
D width of a head, C hidden size, V vocabulary.
"""

from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn

WORDS = ("What", "is", "<answer>", "</answer>")  # strings that the toy's tokenizer keeps whole
SPECIAL = ("<pad>", "<eos>", "<unk>")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama, under the names that `transformers` uses."""

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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def to_json(self) -> dict:
        """The dictionary for `config.json`; the rotary base stands there twice, for transformers 4 and 5."""
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        return asdict(self) | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "head_dim": self.head_dim,
            "rope_parameters": rope,
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": "float32",
        }

    @classmethod
    def from_json(cls, values: dict) -> "LlamaConfig":
        """Read the dictionary of a `config.json`; raises ValueError for a model that `Llama` does not compute."""
        expected = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        for key, value in expected.items():
            if values.get(key, value) != value or "model_type" not in values:
                raise ValueError(f"{key} is {values.get(key)!r}, this program computes {value!r} only")
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ValueError(f"rope_type is {rope_type!r}, this program computes 'default' only")
        known = {name: value for name, value in (rope | values).items() if name in cls.__dataclass_fields__}
        # The defaults of `transformers` differ from the toy's, so nothing that changes the numbers is guessed.
        missing = [name for name in cls.__dataclass_fields__ if name not in known and name != "initializer_range"]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing")
        for field in fields(cls):
            value, kinds = known.get(field.name), (int, float) if field.type is float else field.type
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) != (field.type is bool)):
                raise ValueError(f"{field.name} is {value!r}, not of type {field.type.__name__}")
        config = cls(**known)
        size = (values.get("head_dim") or config.head_dim) * config.num_attention_heads
        if size != config.hidden_size:
            raise ValueError(f"head_dim times num_attention_heads is {size}, not hidden_size {config.hidden_size}")
        return config


class Cache:
    """Keys and values of every layer, (B, K, L, D) each.

    Without spare room it grows by concatenation, which autograd can follow (the scorer). With spare room, made by
    `select(rows, room)`, new tokens are written in place, which is what decoding wants (the sampler).
    """

    def __init__(self, num_layers: int):
        self.layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers
        self.length = 0
        self.room = 0

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, K, T, D) keys and values to a layer and return all of them, (B, K, L, D)."""
        if self.layers[layer] is None:
            self.layers[layer] = (key, value)
        elif not self.room:
            past_key, past_value = self.layers[layer]
            self.layers[layer] = (torch.cat([past_key, key], 2), torch.cat([past_value, value], 2))
        else:
            end = self.length + key.shape[2]
            for buffer, new in zip(self.layers[layer], (key, value), strict=True):
                buffer[:, :, self.length : end] = new
            return tuple(buffer[:, :, :end] for buffer in self.layers[layer])
        return self.layers[layer]

    def select(self, rows: torch.Tensor, room: int = 0) -> "Cache":
        """These rows (int64 indices, repeats allowed), with space for `room` more tokens than there was."""
        copy = Cache(len(self.layers))
        copy.length, copy.room = self.length, self.room + room
        for i, pair in enumerate(self.layers):
            copy.layers[i] = tuple(
                F.pad(x.index_select(0, rows), (0, 0, 0, room)) if room else x.index_select(0, rows) for x in pair
            )
        return copy


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) of (B, heads, T, D); cos and sin are (B, 1, T, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, rotary, cache, mask):
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # (B, H or K, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        causal = mask is None and length > 1
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotary, cache, mask):
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU (arXiv 2302.13971)."""

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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw normal weights; those that write to the residual stream get std / sqrt(2 * layers), as in GPT-2."""
        residual_std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                residual = "o_proj" in name or "down_proj" in name
                std = residual_std if residual else self.config.initializer_range
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last hidden states (B, T, C) of int64 ids (B, T) at int64 positions (B, T).

        key_mask (B, L) is true on real tokens, over cached and new ones; None means that nothing is padding.
        """
        x = self.model.embed_tokens(ids)
        length = ids.shape[1] + (cache.length if cache is not None else 0)
        mask = attention_mask(ids.shape[1], length, key_mask, ids.device)
        rotary = self.rotary(positions, x.dtype)
        for block in self.model.layers:
            x = block(x, rotary, cache, mask)
        if cache is not None:
            cache.length = length
        return self.model.norm(x)

    def rotary(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (B, 1, T, D), in float32 or wider until the last step."""
        wide = torch.promote_types(dtype, torch.float32)
        exponent = torch.arange(0, self.config.head_dim, 2, device=positions.device, dtype=wide) / self.config.head_dim
        angle = positions[:, None, :, None].to(wide) * self.config.rope_theta**-exponent  # (B, 1, T, D / 2)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        return self.lm_head(hidden)


def attention_mask(new: int, length: int, key_mask: torch.Tensor | None, device) -> torch.Tensor | None:
    """Boolean mask (B or 1, 1, T, L), true where a query may look, or None where plain causal attention will do."""
    if key_mask is None and (new == 1 or new == length):
        return None
    causal = torch.ones(new, length, dtype=torch.bool, device=device).tril(length - new)
    if key_mask is None:
        return causal[None, None]
    # A padding query must see something, or its softmax is 0/0 and the NaN spreads: let it see itself.
    diagonal = torch.ones(new, length, dtype=torch.bool, device=device).tril(length - new).triu(length - new)
    return (causal & key_mask[:, None, None, :]) | diagonal


def character_tokenizer(texts: list[str]):
    """A `transformers` tokenizer with one token per character of `texts`, and one for each of WORDS.

    White space is dropped: the toy reads "What is (4 - 9) * 6?" as ten tokens.
    """
    from transformers import PreTrainedTokenizerFast

    pattern = "|".join(WORDS) + "|."
    characters = sorted({character for text in texts for character in text if not character.isspace()})
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
