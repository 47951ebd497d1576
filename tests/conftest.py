"""What the tests share: tiny policies with random or chosen weights, and the view that `transformers` has of them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network; set before transformers is imported

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints import save
from model_toy import Llama, LlamaConfig, character_tokenizer
from policy import TokenPolicy

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None)  # the same examples in every run
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_readme.py")  # the longest first, for two files at a time


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data in the sources' own schemas, beside the checkout or where GRPO_SHARED_DATA says."""
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("GRPO_SHARED_DATA", default))
    if not folder.is_dir():
        (pytest.fail if "GRPO_SHARED_DATA" in os.environ else pytest.skip)(f"no real data in {folder}")
    return folder


CHARACTERS = "0123456789()+-*=;?"


@pytest.fixture(scope="session")
def random_policy():
    """A factory of tiny policies whose weights, norms included, are large enough for peaked distributions."""

    def make(temperature: float = 1.0, end: str = "", seed: int = 0, **sizes) -> TokenPolicy:
        tokenizer = character_tokenizer([CHARACTERS])
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2} | sizes
        model = Llama(LlamaConfig(vocab_size=len(tokenizer), **sizes))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(0.25 * noise if weight.dim() > 1 else 1 + 0.25 * noise)
        return TokenPolicy(model, tokenizer, temperature, tokenizer.convert_tokens_to_ids(list(end)))

    return make


@pytest.fixture(scope="session")
def chain_policy():
    """A factory of policies that follow a chain of tokens: each token of `chain` is followed by the next, surely.

    The embedding is one-hot and the blocks add nothing, so that the output layer is a table of transitions.
    """

    def make(*chain: str) -> TokenPolicy:
        tokenizer = character_tokenizer([CHARACTERS, *chain])
        size = len(tokenizer) + -len(tokenizer) % 8
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=size, tie_word_embeddings=False, intermediate_size=8
        )
        model = Llama(config)
        ids = tokenizer.convert_tokens_to_ids(list(chain))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.fill_(1.0 if weight.dim() == 1 else 0.0)
                if name == "model.embed_tokens.weight":
                    weight.fill_diagonal_(1.0)
            for now, following in zip(ids, ids[1:], strict=False):
                model.lm_head.weight[following, now] = 10.0
        return TokenPolicy(model, tokenizer)

    return make


@pytest.fixture(scope="session")
def reopen(tmp_path_factory):
    """A function that saves a policy and opens the folder with `transformers` alone: (model, tokenizer, folder)."""

    def reopen(policy: TokenPolicy) -> tuple[torch.nn.Module, object, Path]:
        folder = tmp_path_factory.mktemp("checkpoint")
        save(policy, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        return model.eval(), AutoTokenizer.from_pretrained(folder), folder

    return reopen
