"""Checkpoints of the toy: there and back, damaged, hostile; those of real models are in test_real_models.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import choose_device, load, save
from commands import UserError
from model_toy import character_tokenizer
from policy import TokenPolicy
from rollouts import Rollout
from tasks import Example

CPU = torch.device("cpu")


# Prompts of 10, 3, 8 and 10 tokens.
EXAMPLES = [Example(f"What is {text}?") for text in ("(4 - 9) * 6", "", "12+34", "(0 + 0) + 0")]


LENGTH = 12


ENDS = "05"  # with these as further end ids a random policy's completions have very different lengths


def sample(policy: TokenPolicy, examples=EXAMPLES, group_size=3, key=(0, 0, 0), length=LENGTH, **options) -> Rollout:
    return policy.sample(examples, group_size, key, length, **options)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_comes_back_bit_by_bit(random_policy, tmp_path, tied):
    policy = random_policy(end="05", tie_word_embeddings=tied)
    save(policy, tmp_path / "run")
    back = load(tmp_path / "run", CPU, temperature=0.5)
    assert back.temperature == 0.5 and back.model.config == policy.model.config
    for (name, weight), (other_name, other) in zip(
        policy.model.state_dict().items(), back.model.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(weight, other)
    assert (back.model.lm_head.weight is back.model.model.embed_tokens.weight) == tied
    assert (back.end_ids, back.pad_id) == (policy.end_ids, policy.pad_id) and len(back.end_ids) == 3
    assert back.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert sample(back).completion_ids != sample(policy).completion_ids  # another temperature
    back.temperature = 1.0
    assert torch.equal(sample(back).actions, sample(policy).actions)


def test_a_checkpoint_holds_no_pickle(random_policy, tmp_path):
    save(random_policy(), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert all(name.endswith((".json", ".safetensors")) for name in names)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")  # tied: written once


def test_both_configs_of_a_checkpoint_name_the_end_and_pad_ids(random_policy, tmp_path):
    policy = random_policy(end=ENDS)
    save(policy, tmp_path)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / name).read_text())
        assert (values["eos_token_id"], values["pad_token_id"]) == (policy.end_ids, policy.pad_id)


def test_every_end_id_of_config_and_generation_config_counts(random_policy, tmp_path):
    save(random_policy(), tmp_path)
    for name, ends in (("config.json", 7), ("generation_config.json", [8, 9])):
        values = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(values | {"eos_token_id": ends}))
    assert load(tmp_path, CPU).end_ids == [1, 7, 8, 9]


def edit_json(name: str, **changes):
    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value != "deleted"}))

    return edit


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def rename(old: str, new: str):
    return lambda folder: (folder / old).rename(folder / new)


def larger_tokenizer() -> str:
    return character_tokenizer(["0123456789()+-*=;?abcdefgh"]).backend_tokenizer.to_str()


def cut(name: str):
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return edit


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        *((lambda folder, name=name: (folder / name).unlink(), [f"lacks {name}"]) for name in (
            "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"
        )),
        (rename("model.safetensors", "pytorch_model.bin"), ["lacks model.safetensors"]),
        (cut("model.safetensors"), ["model.safetensors cannot be read"]),
        (write("model.safetensors", ""), ["model.safetensors cannot be read"]),
        (write("model.safetensors", "no tensors" * 100), ["model.safetensors cannot be read"]),
        (write("config.json", "{"), ["config.json cannot be read"]),
        (write("config.json", "[]"), ["config.json does not hold a JSON object"]),
        (write("generation_config.json", "eos"), ["generation_config.json cannot be read"]),
        (write("tokenizer.json", "garbage"), ["tokenizer.json cannot be read"]),
        (write("tokenizer.json", "{}"), ["tokenizer.json cannot be read"]),
        (cut("tokenizer.json"), ["tokenizer.json cannot be read"]),
        (write("tokenizer_config.json", "garbage"), ["tokenizer_config.json cannot be read"]),
        (write("tokenizer.json", larger_tokenizer()), ["tokenizer.json has more tokens than config.json"]),
        (edit_json("config.json", model_type="gpt2"), ["config.json: model_type is 'gpt2'"]),
        (edit_json("config.json", vocab_size="deleted"), ["config.json: vocab_size is missing"]),
        (edit_json("config.json", hidden_size="32"), ["config.json: "]),
        (edit_json("config.json", num_attention_heads=0), ["config.json: "]),
        (edit_json("config.json", rope_parameters="long"), ["config.json: "]),
        (edit_json("config.json", vocab_size=1000), ["model.safetensors does not fit its config.json", "embed_tokens"]),
        (edit_json("config.json", num_hidden_layers=3), ["does not fit its config.json", "layers.2"]),
        (edit_json("config.json", num_hidden_layers=1), ["does not fit its config.json", "layers.1"]),
        (edit_json("config.json", num_key_value_heads=4), ["does not fit its config.json", "k_proj"]),
        (edit_json("config.json", tie_word_embeddings=False), ["does not fit its config.json", "lm_head"]),
        (edit_json("config.json", hidden_size=64, head_dim=16), ["does not fit its config.json"]),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(random_policy, tmp_path, edit, parts):
    save(random_policy(), tmp_path)
    load(tmp_path, CPU)
    edit(tmp_path)
    with pytest.raises(UserError) as caught:
        load(tmp_path, CPU)
    for part in [str(tmp_path), *parts]:
        assert part in str(caught.value)


def test_a_folder_of_pickle_alone_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nabort\n)R.")
    with pytest.raises(UserError, match="lacks config.json"):
        load(tmp_path, CPU)


def test_a_missing_checkpoint_names_the_command_that_makes_one(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError) as caught:
            load(folder, CPU)
        assert f"python grpo.py --task arithmetic --out {folder}" in str(caught.value)


def test_choose_device():
    assert choose_device("cpu") == CPU
    with pytest.raises(UserError, match="--device"):
        choose_device("abacus")


def test_loading_draws_no_random_weights_and_ties_what_is_tied(random_policy, tmp_path):
    save(random_policy(), tmp_path)
    before = torch.get_rng_state()
    model = load(tmp_path, CPU).model
    assert torch.equal(torch.get_rng_state(), before)
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert {x.dtype for x in model.parameters()} == {torch.float32} and all(x.requires_grad for x in model.parameters())


def test_weights_in_half_precision_are_loaded_as_float32(random_policy, tmp_path):
    save(random_policy(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: x.bfloat16() for name, x in weights.items()}, tmp_path / "model.safetensors")
    for name, x in load(tmp_path, CPU).model.weights().items():
        assert x.dtype == torch.float32 and torch.equal(x, weights[name].bfloat16().float())
