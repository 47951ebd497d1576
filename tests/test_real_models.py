"""Checkpoints that `transformers` writes, of the kinds that users have: the same logits, decoding and gradients."""

import contextlib
import dataclasses
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from steps import rewards_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import checkpoints
import commands
import grpo
import grpo_run
import inference
import plan as planner
import rewards
import runs
import sft
from attention import spare
from checkpoints import HubModel, load
from commands import UserError
from model_toy import Llama
from plan import plan
from policy import frozen
from rollouts import micro_batches
from tasks import Example, find_task

CPU = torch.device("cpu")
TEXT = ["What is 17 times 3? Natalia sold clips to 48 of her friends.", "The answer is 51. 0123456789 abc xyz"]
EXAMPLES = [Example("What is 17 times 3?"), Example("Natalia"), Example("How many clips did she sell?")]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 1024}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}
KINDS = {  # name: configuration class, its settings, whether `Llama` computes it
    "llama": ("LlamaConfig", SIZES, True),
    "llama3": ("LlamaConfig", SIZES | {"rope_parameters": SCALED, "tie_word_embeddings": True}, True),
    "qwen2": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}, True),
    "qwen2-untied": ("Qwen2Config", SIZES, True),
    "llama-biased": ("LlamaConfig", SIZES | {"attention_bias": True}, False),
    "phi3": ("Phi3Config", SIZES | {"pad_token_id": 0}, False),
    "gemma2": ("Gemma2Config", SIZES | {"head_dim": 8, "sliding_window": 8}, False),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 16}, False),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}, False),
}


def byte_tokenizer(bos: bool = False, texts=TEXT, size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE as the hub's models have, trained on texts; no pad token unless it is set."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>", "<|bos|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )


def write_checkpoint(folder, kind: str, shard: str = "5GB", seed: int = 0, **more):
    """What `transformers` writes for a small random model of this kind; returns that model."""
    name, settings, _ = KINDS[kind]
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = getattr(transformers, name)(
        **{"vocab_size": 304, "eos_token_id": 0, "bos_token_id": None} | settings | more
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn(weight.shape)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = write_checkpoint(folder, request.param)
    policy = load(folder, CPU)
    assert isinstance(policy.model, Llama if KINDS[request.param][2] else HubModel)
    return policy, reference


def reference_logp(model, rollout, temperature: float) -> torch.Tensor:
    """Log-probabilities (B, T) by `transformers`, a row at a time, without padding or cache."""
    logp = torch.zeros(rollout.actions.shape)
    for row, group in enumerate(rollout.group.tolist()):
        prompt = rollout.prompts[group][rollout.prompt_mask[group]]
        completion = rollout.actions[row][rollout.mask[row]]
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        picked = (logits / temperature).log_softmax(-1).gather(1, completion[:, None])[:, 0]
        logp[row, : len(completion)] = picked
    return logp


def test_sampler_and_scorer_are_transformers(pair):
    """Cached decoding of left-padded prompts, groups and dropped rows; the scorer with the prompt shared and not."""
    policy, reference = pair
    policy.end_ids = list(range(40))  # so that rows end at different lengths
    rollout = policy.sample(EXAMPLES, 4, (0, 0, 0), 16)
    lengths = rollout.mask.sum(1)
    assert lengths.min() < lengths.max() and not rollout.prompt_mask.all()
    with torch.no_grad():
        expected = reference_logp(reference, rollout, 1.0)
        for share in (True, False):
            torch.testing.assert_close(policy.log_probs(rollout, share)[0], expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(rollout.sampler_logp, expected, rtol=0, atol=2e-5)


def test_only_our_own_whole_model_samples_in_inference_mode(pair, monkeypatch):
    """Others may keep tensors for later. What a rollout holds is ordinary, so that autograd takes it."""
    policy, _ = pair
    modes = []
    hook = policy.model.output_layer.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    rollout = policy.sample(EXAMPLES, 2, (0, 0, 0), 4)
    assert set(modes) == {isinstance(policy.model, Llama)}
    assert not any(x.is_inference() for x in vars(rollout).values() if isinstance(x, torch.Tensor))
    monkeypatch.setattr("ranks.is_sharded", lambda _: True)
    modes.clear()
    policy.sample(EXAMPLES, 2, (0, 0, 0), 4)
    assert set(modes) == {False}
    hook.remove()


BEGINNING = "What is 17 times 3? The answer is 51. Natalia sold clips to 48 of her friends, 0123456789. " * 3
BEGUN = [Example(BEGINNING + example.prompt) for example in EXAMPLES]


def test_what_all_prompts_begin_with_is_read_once(pair, monkeypatch):
    """In sampling and in scoring, to 1e-5 of `transformers`, gradients included; and no token of it twice."""
    policy, reference = pair
    policy.end_ids, packed = list(range(40)), isinstance(policy.model, Llama)
    seen = []
    kind, name = type(policy.model), "packed" if packed else "forward"
    forward = getattr(kind, name)
    counted = lambda self, ids, *more, **named: seen.append(ids.numel()) or forward(self, ids, *more, **named)  # noqa: E731
    monkeypatch.setattr(kind, name, counted)
    rollout = policy.sample(BEGUN, 4, (0, 0, 0), 6)
    lengths = rollout.prompt_mask.sum(1)
    ids = [prompt[mask].tolist() for prompt, mask in zip(rollout.prompts, rollout.prompt_mask, strict=True)]
    common = next(i for i, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)
    assert rollout.common == common > 64
    if not policy.model.windowed:
        assert seen[0] == rollout.common and seen[1] <= 3 * (int(lengths.max()) - rollout.common)
    expected = reference_logp(reference, rollout, 1.0)
    torch.testing.assert_close(rollout.sampler_logp, expected.detach(), rtol=0, atol=2e-5)
    seen.clear()
    logp, _ = policy.log_probs(rollout)
    torch.testing.assert_close(logp, expected, rtol=0, atol=2e-5)
    own = int((lengths - rollout.common).sum())
    if packed:
        inputs = int(rollout.mask.sum()) - len(rollout.mask)
        more = spare(len(lengths) + inputs, rollout.mask.device)  # idle tokens
        count = rollout.common + own + inputs + more
        assert seen == [count + spare(count, rollout.mask.device)]
    weights = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for model, values in ((policy.model, logp), (reference, expected)):
        model.zero_grad()
        (values * weights).sum().backward()
        inner = model.model if isinstance(model, HubModel) else model
        gradients.append({name: weight.grad for name, weight in inner.named_parameters()})
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name
    batches = micro_batches(rollout, 3 * rollout.common, policy.layout)
    assert (len(batches) > 1) == policy.model.windowed  # three whole prompts alone would take more than that
    policy.model.zero_grad()


def test_gradients_are_transformers(pair):
    """With and without checkpointing, shared prompts and chunked logits: a relative 1e-4 for every parameter."""
    policy, reference = pair
    rollout = policy.sample(EXAMPLES, 2, (0, 0, 0), 8)
    weights = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0))
    reference.zero_grad()
    (reference_logp(reference, rollout, 1.0) * weights).sum().backward()
    wanted = {name: weight.grad for name, weight in reference.named_parameters()}
    for checkpointing, chunk in ((False, 2**24), (True, 2**24), (False, 3 * 304)):
        policy.model.checkpointing, policy.chunk_logits = checkpointing, chunk
        policy.model.zero_grad()
        (policy.log_probs(rollout)[0] * weights).sum().backward()
        inner = policy.model.model if isinstance(policy.model, HubModel) else policy.model
        found = dict(inner.named_parameters())
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (found[name].grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, (name, checkpointing, chunk)
    policy.model.checkpointing, policy.chunk_logits = False, 2**24


def test_a_saved_policy_opens_in_transformers_and_here_again(pair, tmp_path):
    policy, reference = pair
    checkpoints.save(policy, tmp_path)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, reference(ids).logits, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path)("What is 17")["input_ids"] == policy.encode(["What is 17"])[0]
    assert type(load(tmp_path, CPU).model) is type(policy.model)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_shards_and_half_precision_files(tmp_path, kind):
    reference = write_checkpoint(tmp_path, kind, shard="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        policy = load(tmp_path, CPU)
        logits = policy.model.logits(policy.model(ids, torch.arange(5)[None]))
        torch.testing.assert_close(logits, reference(ids).logits, rtol=0, atol=1e-5)
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    byte_tokenizer().save_pretrained(tmp_path / "half")
    assert {weight.dtype for weight in load(tmp_path / "half", CPU).model.parameters()} == {torch.float32}


def test_a_shard_that_is_missing_or_elsewhere_is_named(tmp_path):
    write_checkpoint(tmp_path, "llama", shard="40KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first = next(iter(values["weight_map"]))
    index.write_text(json.dumps(values | {"weight_map": values["weight_map"] | {first: "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="names no files beside it"):
        load(tmp_path, CPU)
    index.write_text(json.dumps(values))
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match="model-0000.*cannot be read"):
        load(tmp_path, CPU)


@pytest.mark.parametrize(
    ("kind", "words"), [("MambaConfig", "recurrent"), ("T5Config", "transformers: "), ("BertModel", "model_type")]
)
def test_models_that_cannot_be_used_are_refused_by_name(tmp_path, kind, words):
    if kind == "BertModel":
        (tmp_path / "config.json").write_text('{"model_type": "no_such_thing"}')
        (tmp_path / "model.safetensors").write_bytes(b"")
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "d_model": 32, "num_layers": 1, "d_ff": 32, "d_kv": 8}
        config = getattr(transformers, kind)(vocab_size=304, **sizes)
        auto = AutoModelForCausalLM if kind == "MambaConfig" else transformers.AutoModelForSeq2SeqLM
        auto.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        load(tmp_path, CPU)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    write_checkpoint(tmp_path, "gpt2")
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError):
        load(tmp_path, CPU)
    assert not (tmp_path / "ran").exists()


def test_questions_that_do_not_fit_are_left_out_or_named(tmp_path, capsys):
    write_checkpoint(tmp_path, "gpt2", n_positions=24)
    policy = load(tmp_path, CPU)
    short, long = Example("What is 17"), Example("What is 17 times 3? " * 10)
    assert policy.fitting({"train": [short, long, short]}, 8) == {"train": [short, short]}
    assert "train: 1 of 3 left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="--max-new-tokens 8"):
        policy.fitting({"train": [long]}, 8)
    with pytest.raises(UserError, match="do not fit into the model's 24"):
        policy.sample([long], 1, (0, 0, 0), 8)
    assert policy.sample([short], 1, (0, 0, 0), 8).actions.shape[1] <= 8


def test_code_of_a_tokenizer_is_not_run(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, "llama")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with contextlib.suppress(UserError):
        load(tmp_path, CPU)
    assert not (tmp_path / "ran").exists()


def test_models_that_read_ahead_are_refused(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=304, eos_token_id=0, **sizes))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reads ahead or keeps no cache"):
        load(tmp_path, CPU)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_checkpointing_computes_the_blocks_again(tmp_path, kind):
    write_checkpoint(tmp_path, kind)
    policy = load(tmp_path, CPU)
    inner = policy.model.model
    block = (inner.transformer.h if kind == "gpt2" else inner["layers"] if kind == "llama" else inner.model.layers)[0]
    calls = []
    block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    rollout = policy.sample(EXAMPLES, 2, (0, 0, 0), 4)
    passes = 1 if kind == "llama" else 2  # packed, or one over the prompts and one over the completions
    for checkpointing, forward, backward in ((False, passes, 0), (True, 1, 1)):
        policy.model.checkpointing = checkpointing
        calls.clear()
        logp, _ = policy.log_probs(rollout)
        assert len(calls) == forward
        logp.sum().backward()
        assert len(calls) == forward + backward


@pytest.mark.parametrize("kind", ["llama3", "qwen3", "gpt2"])
def test_a_reference_in_bfloat16_is_the_policy_to_the_bit(tmp_path, kind):
    """Also 900 tokens on: neither rotary frequencies nor the residual stream are rounded."""
    write_checkpoint(tmp_path, kind)
    policy = load(tmp_path, CPU, "bfloat16")
    policy.end_ids = [303]
    reference = frozen(policy)
    low = set() if kind == "gpt2" else {torch.bfloat16}  # whose only linear layer is that of the output
    assert {weight.dtype for weight in reference.model.parameters()} == {torch.float32, *low}
    rollout = policy.pack(
        [[5, 6, 7]], [torch.randint(300, (900,), generator=torch.Generator().manual_seed(0)).tolist()], [""]
    )
    with torch.no_grad():
        assert torch.equal(policy.log_probs(rollout)[0], reference.log_probs(rollout)[0])
        exact = load(tmp_path, CPU).log_probs(rollout)[0][0]
        assert (exact - policy.log_probs(rollout)[0][0]).abs().mean() < 0.1


def test_chunks_add_up_their_gradients_in_float32(tmp_path):
    write_checkpoint(tmp_path, "qwen2-untied")
    policy, exact = load(tmp_path, CPU, "bfloat16"), load(tmp_path, CPU)
    generator = torch.Generator().manual_seed(0)
    rollout = policy.pack([[5]] * 4, torch.randint(300, (4, 400), generator=generator).tolist(), [""] * 4)
    errors = []
    exact.log_probs(rollout)[0].sum().backward()
    truth = exact.model.lm_head.weight.grad
    for chunk in (2**24, 304 * 20):
        policy.chunk_logits = chunk
        policy.model.zero_grad()
        policy.log_probs(rollout)[0].sum().backward()
        errors.append(((policy.model.lm_head.weight.grad - truth).norm() / truth.norm()).item())
    assert errors[1] <= 1.2 * errors[0] + 1e-4, errors


def test_weights_that_are_missing_are_not_left_at_random(tmp_path):
    write_checkpoint(tmp_path, "gpt2")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no fitting weights for transformer.h.1.mlp.c_fc.weight"):
        load(tmp_path, CPU)


def test_end_tokens_are_those_of_config_generation_config_and_tokenizer(tmp_path):
    write_checkpoint(tmp_path, "qwen2", eos_token_id=[0, 7])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 0], "temperature": 0.7}')
    policy = load(tmp_path, CPU)
    assert policy.end_ids == [0, 1, 7] and policy.pad_id == policy.tokenizer.eos_token_id == 0


def test_a_bos_is_added_to_plain_prompts_once_and_left_to_the_chat_template(tmp_path):
    write_checkpoint(tmp_path, "llama")
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.save_pretrained(tmp_path)
    plain = load(tmp_path, CPU)
    (ids,) = plain.encode(["What is 17"])
    assert ids[0] == 2 and ids.count(2) == 1 and not plain.chat
    tokenizer.chat_template = "<|bos|>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    chat = load(tmp_path, CPU)
    (ids,) = chat.encode([[{"role": "user", "content": "What is 17"}]])
    assert ids[0] == 2 and ids.count(2) == 1 and chat.chat
    assert chat.tokenizer.decode(ids) == "<|bos|>user: What is 17<|im_end|>"


CHATML = (
    "{% for m in messages %}<|im_end|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>assistant\n{% endif %}"
)


def command(monkeypatch, module, *words) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
    monkeypatch.setattr(runs.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        commands.run_main(module.main)
    assert not stopped.value.code


def write_data(task: str, shared_data, folder):
    """Real texts in the schema of the task's source; returns what --data takes."""

    def read(name: str, count: int = 300) -> list[dict]:
        return [json.loads(line) for line in (shared_data / name).read_text().splitlines()[:count]]

    if task == "gsm8k":
        return shared_data / "gsm8k"
    if task == "smoltldr":
        records = [
            {"prompt": f"POST: {' '.join(record['source'])}\n\nTL;DR:", "completion": f" {record['target'][0]}"}
            for record in read("scitldr/train.jsonl")
        ]
    elif task == "alpaca":
        records = [
            {"instruction": record["instruction"], **record["instances"][0]}
            for record in read("self_instruct/seed_tasks.jsonl")
        ]
        records[0]["output"], records[1]["input"] = "", "<noinput>"
    else:
        records = [(record["question"], *record["answer"].split("#### ")) for record in read("gsm8k/train.jsonl")]
        records = [
            {"problem": question, "answer": f"{int(number.replace(',', '')):03}"}
            if task == "aimo"
            else {"problem": question, "solution": rf"{working}So it is $\boxed{{{number}}}$.", "level": "Level 1"}
            for question, working, number in records
        ]
    path = folder / f"{task}.json"
    path.write_text(json.dumps(records))
    return path


def follow_recipe(task, shared_data, tmp_path, monkeypatch, capsys, kind: str, chat: bool, flags: list) -> list[dict]:
    """Fine-tune, train, resume, evaluate, ask, open in `transformers`; returns the lines of metrics."""
    base, run, fine_tuned = tmp_path / "base", tmp_path / "run", tmp_path / "sft"
    write_checkpoint(base, kind, vocab_size=1024)
    data = ["--task", task, "--data", write_data(task, shared_data, tmp_path), "--limit", 8]
    lines = data[3].read_text().splitlines() if data[3].is_file() else []
    lines = lines or (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:500]
    tokenizer = byte_tokenizer(texts=lines, size=1000)
    tokenizer.chat_template = CHATML if chat else None
    tokenizer.save_pretrained(base)
    if task == "aimo":  # has answers and no demonstrations
        fine_tuned = base
    else:
        command(monkeypatch, sft, *data, "--model", base, "--out", fine_tuned, "--epochs", 0.5, "--batch-size", 2)
    small = ["--batch-size", 2, "--num-generations", 2, "--max-new-tokens", 12, "--eval-every", 2, "--save-every", 1]
    small += ["--learning-rate", 1e-5]
    command(monkeypatch, grpo, *data, "--model", fine_tuned, "--out", run, *small, "--steps", 2, *flags)
    judge = flags[:2] if "--judge-url" in flags else []  # whose address must be given again
    command(monkeypatch, grpo, "--out", run, "--resume", "--steps", 3, *judge)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[1]["sampler_gap"] < (0.2 if "bfloat16" in flags else 1e-4) and lines[1]["ratio_max"] == 1
    capsys.readouterr()
    few = ["--limit", 4, "--max-new-tokens", 8, "--report", tmp_path / "report.json"]
    command(monkeypatch, inference, "--eval", *data[:4], "--model", base, run, *few)
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    score = find_task(task).score
    assert all(r[f"{score}_low"] <= r[score] <= r[f"{score}_high"] and r["problems"] == 4 for r in results.values())
    out = capsys.readouterr().out
    assert all(word in out for word in (f"greedy {score}", "truncated", "length"))
    command(monkeypatch, inference, "What is 17 times 3?", "--task", task, "--model", run, "--max-new-tokens", 8)
    assert AutoModelForCausalLM.from_pretrained(run).config.model_type == KINDS[kind][0].removesuffix("Config").lower()
    assert AutoTokenizer.from_pretrained(run).chat_template == (CHATML if chat else None)
    return lines


@pytest.mark.parametrize(
    ("task", "kind", "chat", "flags"),
    [
        ("gsm8k", "qwen2", True, ["--dtype", "bfloat16", "--gradient-checkpointing"]),
        ("gsm8k", "gpt2", False, ["--dtype", "bfloat16", "--exploration-noise", "0.1", "--rewards", "hard=1"]),
        ("gsm8k", "qwen2", True, ["--rewards", "soft=1"]),
        ("gsm8k", "llama", True, ["--rewards", "perplexity=1"]),
        ("alpaca", "qwen2", True, ["--rewards", "perplexity=1", "--beta", 0]),
        ("smoltldr", "llama", False, ["--ideal-length", 10]),
        ("smoltldr", "gemma2", False, ["--rewards", "char_length=1,perplexity=1,overlap=1", "--beta", 0]),
        ("aimo", "llama3", True, ["--algorithm", "dapo", "--max-resample", "1"]),
        ("math", "phi3", True, ["--algorithm", "pairwise", "--gradient-checkpointing"]),
    ],
)
def test_the_recipes_end_to_end(task, shared_data, tmp_path, monkeypatch, capsys, kind, chat, flags):
    follow_recipe(task, shared_data, tmp_path, monkeypatch, capsys, kind, chat, flags)


def test_the_dry_run_counts_what_is_there_and_writes_nothing(shared_data, tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "base", "qwen2")
    words = ["--task", "gsm8k", "--data", shared_data / "gsm8k", "--limit", 8, "--model", tmp_path / "base"]
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, grpo, *words, "--max-new-tokens", 16, "--dry-run", "--device", "cpu")
    out = capsys.readouterr().out
    assert all(word in out for word in ("weights", "activations", "logits", "--gradient-checkpointing", "peak, about"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    policy = load(tmp_path / "base", CPU)
    count = sum(weight.numel() for weight in policy.model.parameters())
    settings = {"micro_batch_tokens": 1000, "inner_updates": 2, "reference": True, "samplers": [], "device": CPU}
    estimate = plan(policy, 8, 2, 10, 20, **settings)
    size = {name: number for name, (number, _) in estimate.parts.items()}
    assert size["weights"] == size["gradients"] == size["reference"] == 4 * count and size["optimizer"] == 8 * count
    rollout = policy.sample([Example("12")] * 2, 4, (0, 0, 0), 20)
    cache = policy.model.new_cache()
    policy.prefill(rollout, cache)
    token = sum(x.element_size() * x[0, :, 0].numel() for layer in cache.layers for x in layer)
    decoding = 4 * count  # weights in the order of decoding
    assert size["sampling"] == token * 8 * (10 + 20) + 5 * 4 * 8 * policy.model.config.vocab_size + decoding
    long = plan(policy, 8, 2, 100, 20, **settings).parts["sampling"][0]  # prompts that are shared
    assert long - size["sampling"] == token * (2 * 100 + 8 * 20 - 8 * (10 + 20))
    assert estimate.operations == count * (2 * 10 + 8 * 20) * (2 + 2 + 2 * 6)
    assert size["samplers"] == 0
    for name in ("float32", "bfloat16"):
        copies = grpo_run.copies_to_sample(policy, grpo.GRPOConfig(rollout_lag=1, sampler_dtype=name))
        kept = sum(weight.nbytes for copy in copies for weight in copy.model.parameters())
        lagging = plan(policy, 8, 2, 10, 20, **settings | {"samplers": [getattr(torch, name)] * 2})
        counted = lagging.parts["samplers"][0]
        assert len(copies) == 2 and counted == pytest.approx(kept, rel=0.01)  # norms and biases stay float32
        assert lagging.peak - lagging.parts["process"][0] - counted == estimate.peak - size["process"]
    policy.model.checkpointing = True
    less = plan(policy, 8, 2, 10, 20, **settings)
    assert less.parts["activations"][0] < size["activations"]
    assert (
        estimate.peak - less.peak
        == size["activations"] - less.parts["activations"][0] + size["process"] - less.parts["process"][0]
    )
    assert size["gaps"] == 0  # all in one pass
    parts = plan(policy, 8, 2, 10, 20, **settings | {"micro_batch_tokens": 90}).parts
    assert parts["gaps"][0] == parts["activations"][0] / 2 > 0
    part, three = (plan(policy, n, 1, 40, 8, **settings | {"micro_batch_tokens": 64}).parts for n in (8, 3))
    assert part["activations"] == three["activations"]  # of a group of 8 three rows fit beside the prompt
    small = dataclasses.replace(estimate, device_bytes=estimate.peak - 1)
    assert "does not fit" in small.table() and "does not fit" not in estimate.table()
    assert "Python" not in small.table().splitlines()[-1]  # which no flag makes smaller
    monkeypatch.setattr(planner, "own_bytes", lambda device: 1e15)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < planner.free_bytes(CPU) - 1e15 <= installed  # what this process holds is not missing


@pytest.mark.parametrize("kind", ["qwen2", "phi3"])
def test_the_dry_run_needs_no_weights(shared_data, tmp_path, monkeypatch, capsys, kind):
    """It says the same of a checkpoint whose weights are not there: of a hub's model only the rest is fetched."""
    write_checkpoint(tmp_path, kind)
    words = ["--task", "gsm8k", "--data", shared_data / "gsm8k", "--limit", 8, "--model", tmp_path, "--dry-run"]
    (tmp_path / "model.safetensors").unlink()
    command(monkeypatch, grpo, *words, "--device", "cpu", "--max-new-tokens", 16)
    count = sum(weight.numel() for weight in load(tmp_path, torch.device("meta")).model.parameters())
    reference = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert count == sum(weight.numel() for weight in reference.parameters())
    assert "weights" in capsys.readouterr().out


def make_scorer(policy, same_tokens: bool):
    """The scorer of a policy that is given, or of one that --scorer would name."""
    config = SimpleNamespace(scorer=None if same_tokens else "named", micro_batch_tokens=64)
    return grpo_run.make_scorer(config, policy)


def test_the_scorer_is_the_policy_at_the_start_or_another_model(tmp_path):
    """Mean log-probabilities at temperature 1, of the sampled ids or of the text as the other model's tokens."""
    write_checkpoint(tmp_path / "a", "qwen2")
    write_checkpoint(tmp_path / "b", "gpt2", seed=1)
    policy, other = load(tmp_path / "a", CPU, temperature=2.0), load(tmp_path / "b", CPU)
    rollout = policy.sample(EXAMPLES, 2, (0, 0, 0), 6)
    rows = [example for example in EXAMPLES for _ in range(2)]
    mix = rewards.parse_rewards("perplexity=1")
    for scorer, same in ((policy, True), (other, False)):
        inputs = {"scorer": make_scorer(scorer, same)}
        total, _ = rewards_of(mix, EXAMPLES, rollout, **inputs)
        ids = rollout.completion_ids if same else scorer.tokenizer(rollout.texts).input_ids
        packed = scorer.pack(scorer.encode([example.prompt for example in rows]), ids, rollout.texts)
        with torch.no_grad():
            expected = reference_logp(scorer.model.model if not same else hub_view(tmp_path / "a"), packed, 1.0)
        expected = (expected.sum(1) / packed.mask.sum(1)).exp()
        torch.testing.assert_close(total.flatten(), expected, rtol=1e-4, atol=0)


def hub_view(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
