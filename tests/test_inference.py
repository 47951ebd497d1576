"""Micro-batches, statistics, checkpoints and saved states, the command line."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import inference
import runs
from checkpoints import choose_device, load, save
from inference import InferenceConfig, bootstrap, evaluate, results_table, show_answer, wilson
from model_toy import character_tokenizer
from policy import Rollout, TokenPolicy, micro_batches
from runs import (
    Position,
    UserError,
    atomic_write,
    load_state,
    out_of_memory,
    printable,
    run_main,
    save_state,
    start_run,
)
from sft import SFTConfig
from tasks import Example, find_task

SCRIPT = Path(inference.__file__)
CPU = torch.device("cpu")
# Prompts of 10, 3, 8 and 10 tokens.
EXAMPLES = [Example(f"What is {text}?") for text in ("(4 - 9) * 6", "", "12+34", "(0 + 0) + 0")]
LENGTH = 12
ENDS = "05"  # with these as further end ids a random policy's completions have very different lengths


def sample(policy: TokenPolicy, examples=EXAMPLES, group_size=3, key=(0, 0, 0), length=LENGTH, **options) -> Rollout:
    return policy.sample(examples, group_size, key, length, **options)


# --- Micro-batches --------------------------------------------------------------------------------------------------


def rollout_of(prompt_lengths: list[int], lengths: list[list[int]]) -> Rollout:
    """A rollout with these prompt lengths and, for each prompt, these completion lengths."""
    group = torch.tensor([p for p, row in enumerate(lengths) for _ in row])
    flat = torch.tensor([length for row in lengths for length in row])
    prompt_mask = torch.arange(max(prompt_lengths)) >= max(prompt_lengths) - torch.tensor(prompt_lengths)[:, None]
    mask = torch.arange(int(flat.max())) < flat[:, None]
    return Rollout(
        prompts=prompt_mask.long(),
        prompt_mask=prompt_mask,
        group=group,
        actions=mask.long(),
        mask=mask,
        sampler_logp=mask.float(),
        truncated=torch.zeros(len(group), dtype=torch.bool),
        texts=[""] * len(group),
    )


def tokens_of(part: Rollout) -> int:
    """What a micro-batch costs with its padding: each prompt once, each completion at the longest one's width."""
    return part.prompts.numel() + part.actions.numel()


@pytest.mark.parametrize("seed", range(30))
def test_micro_batches_cover_each_row_once_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    prompts, group_size = int(rng.integers(1, 9)), int(rng.integers(1, 9))
    prompt_lengths = rng.integers(1, 30, prompts).tolist()
    lengths = rng.geometric(rng.uniform(0.03, 0.5), (prompts, group_size)).tolist()
    rollout = rollout_of(prompt_lengths, lengths)
    budget = int(rng.integers(1, 400))
    batches = micro_batches(rollout, budget)
    assert sorted(torch.cat(batches).tolist()) == list(range(prompts * group_size))
    widths = []
    for rows in batches:
        part = rollout.select(rows)
        assert tokens_of(part) <= budget or len(rows) == 1
        widths.append(max(max(lengths[group]) for group in rollout.group[rows].tolist()))
    assert widths == sorted(widths, reverse=True)  # the longest first
    for group, row in enumerate(lengths):
        if prompt_lengths[group] + group_size * max(row) <= budget:
            assert sum((rollout.group[rows] == group).any().item() for rows in batches) == 1  # whole


def test_micro_batches_by_hand():
    """Groups of 2 rows, prompts of 4: the longest first, 2 * 4 + 4 * 10 tokens for two groups in one pass."""
    rollout = rollout_of([4, 4, 4, 4], [[3, 2], [10, 1], [8, 9], [6, 6]])

    def rows(budget: int) -> list[list[int]]:
        return [batch.tolist() for batch in micro_batches(rollout, budget)]

    assert rows(1000) == [[2, 3, 4, 5, 6, 7], [0, 1]]  # 3 is less than half of 10
    assert rows(72) == [[2, 3, 4, 5, 6, 7], [0, 1]]  # 3 * 4 + 6 * 10
    assert rows(71) == [[2, 3, 4, 5], [0, 1, 6, 7]]  # 3 is not less than half of 6
    assert rows(48) == [[2, 3, 4, 5], [0, 1, 6, 7]]
    assert rows(47) == [[2, 3], [4, 5, 6, 7], [0, 1]]
    assert rows(43) == [[2, 3], [4, 5], [0, 1, 6, 7]]  # the middle one took 2 * 4 + 4 * 9
    assert rows(24) == [[2, 3], [4, 5], [6, 7], [0, 1]]
    assert rows(23) == [[2], [3], [4, 5], [6, 7], [0, 1]]  # the longest group takes 4 + 2 * 10
    assert rows(1) == [[2], [3], [4], [5], [6], [7], [0], [1]]


# --- Statistics -----------------------------------------------------------------------------------------------------


def test_bootstrap_brackets_the_mean():
    values = np.array([0.0] * 300 + [1.0] * 100)
    low, high = bootstrap(values)
    spread = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.25 - spread, 0.25 + spread), abs=0.006)
    assert bootstrap(values) == (low, high) and bootstrap(np.ones(5)) == (1.0, 1.0)


def test_evaluate_counts_right_answers(chain_policy):
    """A policy that always answers 7, on 40 problems of which 3 have that answer."""
    policy = chain_policy("?", "<answer>", "7", "</answer>", "<eos>")
    examples = [Example(f"What is {i}?", {"answer": "7" if i in (0, 20, 39) else "-7"}) for i in range(40)]
    result = evaluate(policy, find_task("arithmetic"), examples, 8, samples=4, batch_rows=12)
    low, high = wilson(3, 40)
    expected = {"problems": 40, "accuracy": 3 / 40, "accuracy_low": low, "accuracy_high": high}
    expected |= {"sampled_accuracy": 3 / 40, "pass@2": 3 / 40, "pass@4": 3 / 40, "working": 0, "sampled_working": 0}
    expected |= {"length": 4, "truncated": 0, "sampled_length": 4, "sampled_truncated": 0}
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    table = results_table({"base": result}).splitlines()
    assert table[0].split() == ["base"]
    assert [line for line in table if line.startswith("greedy accuracy")][0].endswith("7.5% [2.6%, 19.9%]")


def test_evaluate_does_not_depend_on_the_batch(random_policy):
    policy = random_policy(end=ENDS)
    examples = [Example(f"What is {i}?", {"answer": str(i % 10)}) for i in range(20)]
    results = [evaluate(policy, find_task("arithmetic"), examples, 8, 3, batch_rows=rows) for rows in (1, 7, 512)]
    assert results[0] == results[1] == results[2]
    assert evaluate(policy, find_task("arithmetic"), examples, 8, 3, seed=1) != results[0]


# --- Checkpoints ----------------------------------------------------------------------------------------------------


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


def test_atomic_write_leaves_the_old_file_if_the_writer_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half of the n")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    atomic_write(path, lambda partial: partial.write_text("new"))
    assert path.read_text() == "new" and [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_run_is_not_overwritten_unasked(tmp_path):
    config = SFTConfig(out=str(tmp_path / "run"), seed=1)
    start_run(config, more=7)
    out = tmp_path / "run"
    stored = json.loads((out / "run.json").read_text())
    assert stored["settings"] == dataclasses.asdict(config) and stored["versions"]["torch"] == torch.__version__
    assert stored["more"] == 7
    (out / "metrics.jsonl").write_text("{}\n")
    (out / "resume").mkdir()
    with pytest.raises(UserError, match="already holds a run; --resume continues it, --overwrite replaces it"):
        start_run(dataclasses.replace(config, seed=2))
    assert (out / "metrics.jsonl").exists() and json.loads((out / "run.json").read_text()) == stored
    start_run(dataclasses.replace(config, resume=True, patience=3))  # which leaves the rest as it is
    resumed = json.loads((out / "run.json").read_text())
    assert resumed["settings"]["patience"] == 3 and resumed["more"] == 7 and (out / "metrics.jsonl").exists()
    start_run(dataclasses.replace(config, seed=2, overwrite=True))
    assert not (out / "metrics.jsonl").exists() and not (out / "resume").exists()
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="cannot be made"):
                start_run(SFTConfig(out=str(folder), overwrite=overwrite))
    assert (tmp_path / "file").read_text() == "mine"


# --- Saved states ---------------------------------------------------------------------------------------------------


def at(step: int) -> Position:
    return Position(step, best_step=0, best_score=0.25)


def step(policy: TokenPolicy, optimizer: torch.optim.Optimizer, number: int) -> None:
    """An optimizer step with gradients that follow from its number alone."""
    generator = torch.Generator().manual_seed(number)
    for weight in policy.model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()


def with_optimizer(policy: TokenPolicy) -> tuple[TokenPolicy, torch.optim.Optimizer]:
    return policy, torch.optim.AdamW(policy.model.parameters(), lr=0.01)


def weights_of(policy: TokenPolicy) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in policy.model.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def interrupted(random_policy, tmp_path):
    """A run saved after steps 1, 2 and 10, that went on to step 12; the weights after steps 10 and 11."""
    policy, optimizer = with_optimizer(random_policy())
    kept = {}
    for number in range(1, 13):
        step(policy, optimizer, number)
        kept[number] = weights_of(policy)
        if number in (1, 2, 10):
            (tmp_path / "model.safetensors").unlink(missing_ok=True)
            (tmp_path / "model.safetensors").write_bytes(b"best at %d" % number)
            save_state(tmp_path, at(number), {"weights": policy.model}, optimizer)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"step": {number}, "text": "→"}}\n' for number in range(13)))
    return tmp_path, kept


def test_a_run_continues_from_its_saved_state_bit_by_bit(interrupted, random_policy):
    out, kept = interrupted
    policy, optimizer = with_optimizer(random_policy(seed=9))
    assert load_state(out, {"weights": policy.model}, optimizer) == at(10)
    assert same(weights_of(policy), kept[10])
    for number in (11, 12):
        step(policy, optimizer, number)
        assert same(weights_of(policy), kept[number])


def test_only_the_newest_two_states_stay(interrupted):
    out, _ = interrupted
    assert sorted(path.name for path in (out / "resume").iterdir()) == ["000002", "000010", "latest"]
    assert (out / "resume" / "latest").read_text() == "000010"
    files = [path.name for path in (out / "resume").rglob("*") if path.is_file() and path.name != "latest"]
    assert all(name.endswith((".json", ".safetensors")) for name in files)  # no pickle


def test_metrics_are_cut_back_to_the_saved_step(interrupted, random_policy):
    out, _ = interrupted
    kept = "".join(f'{{"step": {number}, "text": "→"}}\n' for number in range(11))
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "rew')
    load_state(out, *model_and_optimizer(random_policy))
    assert (out / "metrics.jsonl").read_text() == (out / "samples.jsonl").read_text() == kept


def model_and_optimizer(random_policy) -> tuple[dict, torch.optim.Optimizer]:
    policy, optimizer = with_optimizer(random_policy())
    return {"weights": policy.model}, optimizer


def test_the_best_checkpoint_is_that_of_the_saved_step(interrupted, random_policy):
    out, _ = interrupted
    atomic_write(out / "model.safetensors", lambda path: path.write_bytes(b"best at 12"))
    load_state(out, *model_and_optimizer(random_policy))
    assert (out / "model.safetensors").read_bytes() == b"best at 10"


def test_a_half_written_state_is_ignored_and_replaced(interrupted, random_policy):
    """The run died while it wrote the state of step 12, or between the folder's rename and the pointer's."""
    out, kept = interrupted
    (out / "resume" / ".partial").mkdir()
    (out / "resume" / ".partial" / "weights.safetensors").write_bytes(b"half")
    (out / "resume" / "000012").mkdir()
    policy, optimizer = with_optimizer(random_policy(seed=9))
    assert load_state(out, {"weights": policy.model}, optimizer).step == 10
    assert same(weights_of(policy), kept[10])
    save_state(out, at(12), {"weights": policy.model}, optimizer)
    assert sorted(path.name for path in (out / "resume").iterdir()) == ["000010", "000012", "latest"]
    assert load_state(out, {"weights": policy.model}, optimizer) == at(12)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "position.json"])
@pytest.mark.parametrize("edit", [cut, lambda name: lambda folder: (folder / name).unlink()], ids=["cut", "missing"])
def test_a_damaged_state_is_an_error_that_names_the_file(interrupted, random_policy, name, edit):
    out, _ = interrupted
    edit(name)(out / "resume" / "000010")
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"--resume: .*000010/{name}.*--overwrite"):
        load_state(out, *model_and_optimizer(random_policy))
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("resume/latest", ""),
        ("resume/latest", "../../elsewhere"),
        ("resume/latest", "000011"),
        ("resume/000010/position.json", "{}"),
        ("resume/000010/position.json", '{"step": "10"}'),
        ("resume/000010/position.json", '{"step": 10, "luck": 1}'),
        ("metrics.jsonl", '{"step": 1}\nno json\n'),
        ("samples.jsonl", '{"reward": 1}\n'),
    ],
)
def test_a_state_with_odd_content_is_refused(interrupted, random_policy, file, text):
    out, _ = interrupted
    (out / file).write_text(text)
    with pytest.raises(UserError, match="--resume: .* damaged .*--overwrite"):
        load_state(out, *model_and_optimizer(random_policy))


def test_a_run_without_a_saved_state_says_so(tmp_path, random_policy):
    with pytest.raises(UserError, match="--resume: .*latest.*--overwrite"):
        load_state(tmp_path, *model_and_optimizer(random_policy))


def test_the_state_is_saved_where_there_are_no_hard_links(tmp_path, random_policy, monkeypatch):
    def fail(*_):
        raise OSError("not supported")

    monkeypatch.setattr("os.link", fail)
    (tmp_path / "model.safetensors").write_bytes(b"best")
    models, optimizer = model_and_optimizer(random_policy)
    save_state(tmp_path, at(0), models, optimizer)
    assert (tmp_path / "resume" / "000000" / "best.safetensors").read_bytes() == b"best"


# --- Command line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("4-9=-5;-5*6=-30", "4-9=-5;-5*6=-30"),
        ("two\nlines", "two\nlines"),
        ("é → 漢 😀", "é → 漢 😀"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),  # the one-character form of ESC [
        ("a\rb\tc\x00\x08\x7f", r"a\rb\tc\x00\x08\x7f"),
        ("\u202e30\u2066-\u2069", r"\u202e30\u2066-\u2069"),  # reversed reading order
        ("3\u200b0\ufeff\u00ad", r"3\u200b0\ufeff\xad"),
        ("\u2028\u2029\x85", r"\u2028\u2029\x85"),
        ("\U000e0041\ud800", r"\U000e0041\ud800"),
    ],
)
def test_printable_escapes_what_a_terminal_would_obey_or_hide(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("completion", "shown"),
    [
        ("4-9=-5;-5*6=-30<answer>-30</answer>", "4-9=-5;-5*6=-30  →  -30"),
        ("<answer> 5 </answer>", "→  5"),
        ("4-9=-5", "4-9=-5  (no <answer>...</answer> at the end)"),
        ("\x1b[31m<answer>\x1b[0m5</answer>", r"\x1b[31m  →  \x1b[0m5"),
        ("\x1b]8;;", r"\x1b]8;;  (no <answer>...</answer> at the end)"),
    ],
)
def test_show_answer(completion, shown):
    assert show_answer(completion) == shown


@pytest.fixture(scope="module")
def folders(chain_policy, tmp_path_factory):
    """Two checkpoints: one answers 7 to everything, the other prints an escape sequence."""
    root = tmp_path_factory.mktemp("models")
    save(chain_policy("?", "<answer>", "7", "</answer>", "<eos>"), root / "seven")
    save(chain_policy("?", "\x1b", "[", "\u202e", "<eos>"), root / "escape")
    return root


def command(*words: object, cwd: Path, text: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)], cwd=cwd, input=text, capture_output=True, encoding="utf-8"
    )


def run(monkeypatch, capsys, *words: object, text: str = "") -> tuple[int, str, str]:
    """The command in this process: exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    monkeypatch.setattr(runs.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        run_main(inference.main)
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


def test_the_command_answers_side_by_side_without_escape_sequences(folders):
    result = command("What is (4 - 9) * 6?", "--model", "seven", "escape", cwd=folders)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "seven:\n→  7\nescape:\n" + r"\x1b[\u202e  (no <answer>...</answer> at the end)" + "\n"


def test_the_command_names_unknown_characters_in_one_line(folders):
    result = command("What is 8 ÷ 2 % \x1b[2J?", "--model", "seven", cwd=folders)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("inference.py: error: question ") and result.stderr.count("\n") == 1
    assert "does not know" in result.stderr and "÷" in result.stderr and "\x1b" not in result.stderr


def test_questions_come_from_standard_input(monkeypatch, capsys, folders):
    text = "What is (4 - 9) * 6?\nWhat is 1?\n"
    status, out, err = run(monkeypatch, capsys, "--model", folders / "seven", text=text)
    assert (status, out, err) == (0, "→  7\n→  7\n", "")
    status, out, err = run(monkeypatch, capsys, "--model", folders / "seven", text=f"é\n\n{text}")
    assert (status, out) == (2, "→  7\n→  7\n")  # a bad line is named, a blank one skipped
    assert err.startswith("inference.py: error: ") and "é" in err and err.count("\n") == 1


def test_samples_are_drawn_at_a_temperature(monkeypatch, capsys, folders):
    words = ["What is 1?", "--model", folders / "seven", "--samples", 5, "--temperature", 1000, "--max-new-tokens", 6]
    status, out, err = run(monkeypatch, capsys, *words)
    assert (status, err) == (0, "") and len(set(out.splitlines())) > 1
    assert run(monkeypatch, capsys, *words)[1] == out
    assert run(monkeypatch, capsys, *words, "--seed", 1)[1] != out
    greedy = run(monkeypatch, capsys, *words[:5], "--temperature", 0)[1]
    assert greedy == "→  7\n" * 5


def test_eval_prints_a_table(monkeypatch, capsys, folders):
    words = ["--eval", "--task", "arithmetic", "--limit", 20, "--model", folders / "seven", folders / "escape"]
    status, out, err = run(monkeypatch, capsys, *words)
    assert status == 0
    lines = [
        f"{folders / name}: 20 problems, one greedy completion and 4 samples of each" for name in ("seven", "escape")
    ]
    assert err.splitlines() == lines
    examples = find_task("arithmetic").load(copies=1)["held_out"][:20]
    share = sum(example.columns["answer"] == "7" for example in examples) / 20
    lines = out.splitlines()
    assert lines[0].split() == [str(folders / "seven"), str(folders / "escape")]
    assert lines[1].split() == ["problems", "20", "20"]
    (accuracy,) = [line for line in lines if line.startswith("greedy accuracy")]
    assert accuracy.split()[2] == f"{share:.1%}" and "0.0% [0.0%, 16.1%]" in accuracy
    assert any(line.startswith("pass@4") for line in lines)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["q", "--samples", "0"], ["--samples is 0"]),
        (["q", "--max-new-tokens", "-1"], ["--max-new-tokens is -1"]),
        (["--eval", "--limit", "0"], ["--limit is 0"]),
        (["q", "--temperature", "-1"], ["--temperature is -1.0"]),
        (["q", "--temperature", "nan"], ["--temperature is nan"]),
        (["q", "--temperature", "1e-300"], ["--temperature is 1e-300"]),
        (["q", "--seed", "-1"], ["--seed is -1"]),
        (["q", "--samples", "many"], ["--samples", "'many'"]),
        (["q", "--colour", "red"], ["--colour", "--help"]),
        (["q", "--sample", "2"], ["--sample"]),  # no abbreviations
        (["q", "--model"], ["--model"]),
        (["q", "--model", "nowhere"], ["'nowhere'", "python grpo.py --task arithmetic --out nowhere"]),
        (["q", "--eval", "--model", "seven"], ["--eval"]),
        (["q", "--device", "abacus"], ["--device", "'abacus'"]),
        (["--eval", "--task", "chess"], ["--task", "'chess'", "arithmetic"]),
        ([" ", "--model", "seven"], ["empty"]),
        (["What is é?", "--model", "seven"], ["does not know é"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(monkeypatch, capsys, folders, words, parts):
    monkeypatch.chdir(folders)
    status, out, err = run(monkeypatch, capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith("inference.py: error: ") and err.count("\n") == 1 and err.endswith("\n")
    for part in parts:
        assert part in err


def test_run_main_passes_statuses_on(monkeypatch, capsys):
    def end(error: BaseException | None = None) -> tuple[int | None, str]:
        def main() -> None:
            if error:
                raise error

        with pytest.raises(SystemExit) as caught:
            run_main(main)
        return caught.value.code, capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["/some/where/grpo.py"])
    monkeypatch.setattr(runs.signal, "signal", lambda *_: None)
    assert end() == (None, "")
    assert end(UserError("two\nlines  \x1b[2J")) == (2, "grpo.py: error: two lines \\x1b[2J\n")
    assert end(KeyboardInterrupt()) == (130, "grpo.py: error: interrupted\n")
    assert end(KeyboardInterrupt(15)) == (143, "grpo.py: error: interrupted\n")
    status, err = end(FloatingPointError("the loss is nan"))
    assert status == 2 and err.startswith("grpo.py: error: the loss is nan; ") and err.count("\n") == 1
    status, err = end(OSError(28, "No space left on device", "run/metrics.jsonl"))
    assert (status, err.partition(";")[0]) == (2, "grpo.py: error: run/metrics.jsonl: No space left on device")
    with pytest.raises(RuntimeError, match="a bug"):  # which must not look like a mistake of the user's
        end(RuntimeError("a bug"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_running_out_of_memory_names_the_flags_that_help(error):
    with pytest.raises(UserError, match="out of memory; lower --samples"), out_of_memory("--samples"):
        raise error
    with pytest.raises(RuntimeError, match="a bug"), out_of_memory("--samples"):
        raise RuntimeError("a bug")


def test_settings_are_all_on_the_command_line():
    assert {field.metadata["help"].endswith(".") for field in dataclasses.fields(InferenceConfig)} == {True}


def test_choose_device():
    assert choose_device("cpu") == CPU
    with pytest.raises(UserError, match="--device"):
        choose_device("abacus")


def test_eval_writes_a_report_and_every_completion(monkeypatch, capsys, folders, tmp_path):
    files = ["--report", tmp_path / "report.json", "--outputs", tmp_path / "outputs.jsonl"]
    words = ["--eval", "--limit", 3, "--model", folders / "seven", "--samples", 2, *files]
    assert run(monkeypatch, capsys, *words)[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    (result,) = report["results"].values()
    lines = [json.loads(line) for line in (tmp_path / "outputs.jsonl").read_text().splitlines()]
    assert report["settings"]["task"] == "arithmetic" and result["problems"] == 3
    greedy, sampled = ([line for line in lines if line["greedy"] is kind] for kind in (True, False))
    assert len(greedy) == 3 and len(sampled) == 3 * 4
    assert sum(line["accuracy"] for line in greedy) / 3 == pytest.approx(result["accuracy"])
    assert {line["completion"] for line in lines} == {"<answer>7</answer>"}
    assert [line["question"] for line in greedy] == [e.prompt for e in find_task("arithmetic").load()["held_out"][:3]]
    for line in lines:
        assert line["accuracy"] == (line["answer"] == "7") and line["length"] == 4 and not line["truncated"]
    status, _, errors = run(monkeypatch, capsys, *words)
    assert status == 2 and "report.json exists" in errors
    status, _, errors = run(monkeypatch, capsys, "What is 1?", "--report", tmp_path / "x.json")
    assert status == 2 and "--eval" in errors
