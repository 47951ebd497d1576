"""Any causal language model of `transformers` behind the calls of `Llama`: forward, logits, a cache, weights.

Shapes: B rows, T new tokens, L tokens in the cache, C hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn


class HubCache:
    """The cache of any model of `transformers`, with `Cache`'s two verbs; what rows share is repeated for each."""

    def __init__(self):
        from transformers import DynamicCache

        self.inner = DynamicCache()
        self.key_mask: torch.Tensor | None = None  # (B, L) true on real tokens of what rows shared; None: on all

    def share(self, group: torch.Tensor, room: int = 0, key_mask: torch.Tensor | None = None, fixed=False) -> None:
        """See `Cache.share`; it grows by concatenation, so `room` is not needed, and it is never `fixed`."""
        self.key_mask = None if key_mask is None else self.widened(key_mask)
        self.select(group)

    def widened(self, key_mask: torch.Tensor, new: int = 0) -> torch.Tensor:
        """A mask of the last of the tokens that are cached and of `new` more, for all of them: the others are real."""
        return F.pad(key_mask, (self.inner.get_seq_length() + new - key_mask.shape[1], 0), value=True)

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
        self.windowed = getattr(self.config, "sliding_window", None) is not None  # a token sees so many before it
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
            what = f"{model.config.model_type} reads ahead or keeps no cache"
            raise ValueError(f"{what}: it cannot be sampled token by token")
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
        if key_mask is not None and cache is not None:
            key_mask = cache.widened(key_mask, ids.shape[1])
        elif cache is not None and cache.key_mask is not None:
            new = ids.shape[1] + cache.inner.get_seq_length() - cache.key_mask.shape[1]
            key_mask = F.pad(cache.key_mask, (0, new), value=True)
        output = (self.model if self.full_logits else self.model.base_model)(
            input_ids=ids, position_ids=positions, attention_mask=None if key_mask is None else key_mask.long(),
            past_key_values=None if cache is None else cache.inner, use_cache=cache is not None,
        )  # fmt: skip
        return output.logits if self.full_logits else output.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of what `forward` returned."""
        return hidden if self.full_logits else self.output_layer(hidden)

    @property
    def output_layer(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def new_cache(self) -> HubCache:
        return HubCache()

    def weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds: of tied tensors the first."""
        every, first = (self.model.named_parameters(remove_duplicate=same) for same in (False, True))
        tied = {name for name, _ in every} - {name for name, _ in first}
        return {name: x for name, x in self.model.state_dict().items() if name not in tied}

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Take the weights of a checkpoint; raises RuntimeError if they do not fit."""
        if weights.keys() != self.weights().keys():
            raise RuntimeError("other names than the model has")
        self.model.load_state_dict(weights, strict=False)
