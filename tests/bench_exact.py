"""The largest change of a log-probability that each trick for speed makes: with it, and without.

    python tests/bench_exact.py

A toy and a small model with random weights, ragged prompts and completions, float32. Prints a table.
"""

import contextlib
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from bench_main import table
from bench_sampler import MODELS, random_policy, random_prompts

import attention


def plain_attention(q, k, v, mask=None, causal=False):
    """PyTorch's own, with expanded keys."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


def changes(policy, rollout, key: tuple) -> dict[str, float]:
    """Each trick's largest change, in nats, on one rollout."""

    def scored(**options) -> torch.Tensor:
        return policy.log_probs(rollout, **options)[0].detach()

    def sampled() -> torch.Tensor:
        again = policy.sample(*key)
        return again.sampler_logp if torch.equal(again.actions, rollout.actions) else torch.full((1,), torch.nan)

    found = {"packed against padded rows": (scored() - scored(layout="joined")).abs().max()}
    shared = scored(layout="shared")
    found["prompts shared in the scorer, against padded rows"] = (shared - scored(layout="joined")).abs().max()
    found["sampler against scorer"] = (rollout.sampler_logp - scored()).abs().max()
    with mock.patch("model_toy.attention", plain_attention), mock.patch("attention.attention", plain_attention):
        plain, fused = scored(), sampled()
    found["attention written out, in the scorer"] = (scored() - plain).abs().max()
    found["query heads folded, in the sampler"] = (rollout.sampler_logp - fused).abs().max()
    with mock.patch("policy.prepacked", lambda *_: contextlib.nullcontext()):
        found["weights joined and ordered for decoding"] = (rollout.sampler_logp - sampled()).abs().max()
    with mock.patch("torch.backends.mkldnn.is_available", lambda: False):
        other = scored()
    found["products by oneDNN, in the scorer"] = (scored() - other).abs().max()
    with mock.patch.object(attention.Cache, "share_from", 1):
        found["prompts shared while decoding"] = (rollout.sampler_logp - sampled()).abs().max()
    share = attention.Cache.share

    def fix(cache, group, *more, fixed=False):
        share(cache, group, *more, fixed=True)

    with mock.patch.object(attention.Cache, "share", fix):
        found["a cache of one length, as graphs need it"] = (rollout.sampler_logp - sampled()).abs().max()
    whole = scored()
    policy.chunk_logits = 64 * policy.model.config.vocab_size
    found["logits in chunks"] = (scored() - whole).abs().max()
    policy.chunk_logits = None
    return {name: value.item() for name, value in found.items()}


def main() -> None:
    rows = {}
    for make in MODELS.values():
        policy = random_policy(make())
        with torch.no_grad():  # larger weights than at the start, so that distributions are peaked
            for weight in policy.model.parameters():
                weight.mul_(4 if weight.dim() > 1 else 1)
        policy.end_ids = list(range(7, 7 + max(1, policy.model.config.vocab_size // 16)))
        key = (random_prompts(policy.model.config, 4, 24, True), 8, (0, 0, 0), 32)
        for trick, change in changes(policy, policy.sample(*key), key).items():
            rows.setdefault(trick, []).append(f"{change:.1e}")
    print(table([["trick", *MODELS], *([trick, *cells] for trick, cells in rows.items())]))


if __name__ == "__main__":
    main()
