"""How a model is asked: worked examples before the question, chat templates, what is chosen for a model's size."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from test_real_models import byte_tokenizer, command, write_checkpoint

import checkpoints
import commands
import grpo
import inference
import sft
from checkpoints import introduce, load
from commands import UserError
from inference import as_trained
from tasks import Example, find_task, load_task, pose, worked_examples

CPU = torch.device("cpu")
CHATML = """{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>{% endif %}{% endif %}"""


def test_shots_are_the_first_worked_training_problems_and_no_longer_train():
    task = find_task("arithmetic")
    plain, shown = load_task(task, True), load_task(task, True, shots=3)
    assert [len(shown[name]) - len(plain[name]) for name in ("train", "validation", "held_out")] == [-3, 0, 0]
    taken = [example.question for example in plain["train"][:3]]
    assert [example.question for example in shown["train"]] == [example.question for example in plain["train"][3:]]
    for name, examples in shown.items():
        for example, before in zip(
            examples[:2], (plain[name][3:] if name == "train" else plain[name])[:2], strict=True
        ):
            *shots, last = example.prompt
            assert [last] == before.prompt and example.columns == before.columns
            assert [turn["role"] for turn in shots] == ["user", "assistant"] * 3
            assert [turn["content"] for turn in shots[::2]] == [f"{text}\n{task.chat_instruction}" for text in taken]
            for turn, question in zip(shots[1::2], taken, strict=True):
                a, first, b, second, c = question[8:].replace(")", "").rstrip("?").replace("(", "").split()
                middle, right = eval(f"{a}{first}{b}"), eval(f"({a}{first}{b}){second}{c}")  # our own text
                working = f"{a} {first} {b} = {middle}; {middle} {second} {c} = {right}"
                assert turn["content"] == f"{working} <answer>{right}</answer>"


def test_shots_do_not_follow_the_settings_of_the_demonstrations():
    task = find_task("arithmetic")
    sloppy = load_task(task, True, shots=2, worked=0.0, copies=1)
    assert sloppy["train"][0].prompt[:4] == load_task(task, True, shots=2)["train"][0].prompt[:4]


def test_shots_in_plain_text_end_before_the_question():
    task = find_task("gsm8k")
    shots = [Example("1 + 1?", {}, ("2 <answer>2</answer>", "other"))]
    prompt = pose(task, Example("2 + 2?"), False, shots).prompt
    asked = [
        task.plain.format(question=question, instruction=task.chat_instruction) for question in ("1 + 1?", "2 + 2?")
    ]
    assert prompt == f"{asked[0]} 2 <answer>2</answer>\n\n{asked[1]}"


def test_problems_without_a_demonstration_are_no_shots():
    task = find_task("odd_even")
    shots = worked_examples(task, 5)
    assert all(int(shot.columns["answer"]) % 2 for shot in shots)
    with pytest.raises(UserError, match="--shots is 400, but task odd_even has"):
        worked_examples(task, 400)


@pytest.mark.parametrize(
    ("limit", "eval_limit", "sizes"), [(None, 7, (7500, 7, 7)), (5, 7, (5, 5, 5)), (9, 7, (9, 7, 7))]
)
def test_eval_limit_bounds_what_is_not_trained_on(limit, eval_limit, sizes):
    splits = load_task(find_task("arithmetic"), False, limit, eval_limit=eval_limit)
    assert tuple(len(splits[name]) for name in ("train", "validation", "held_out")) == sizes


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A checkpoint with a chat template whose turns end otherwise than its texts."""
    folder = tmp_path_factory.mktemp("chat")
    write_checkpoint(folder, "qwen2")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def test_an_answer_ends_where_the_template_ends_a_turn(chat):
    policy = load(chat, CPU)
    assert policy.tokenizer.convert_ids_to_tokens(policy.end_ids) == ["<|endoftext|>", "<|im_end|>"]
    assert load(chat, CPU, chat_template="none").end_ids == [0]


def test_another_template_none_and_thinking(chat, tmp_path):
    messages = [{"role": "user", "content": "1"}]
    assert load(chat, CPU).render(messages) == "<|user|>1<|im_end|>\n<|assistant|>"
    assert load(chat, CPU, thinking="on").render(messages).endswith("<|assistant|><think>")
    assert load(chat, CPU, thinking="off").render(messages).endswith("<|assistant|>")
    assert not load(chat, CPU, chat_template="none").chat
    (tmp_path / "other.jinja").write_text("{{ messages[0].content }}!")
    other = load(chat, CPU, chat_template=str(tmp_path / "other.jinja"))
    assert other.render(messages) == "1!"
    assert set(other.end_ids) == {0}
    with pytest.raises(UserError, match="--thinking: the model's chat template has no such switch"):
        load(chat, CPU, chat_template=str(tmp_path / "other.jinja"), thinking="on")
    with pytest.raises(UserError, match="--chat-template: .* cannot be read"):
        load(chat, CPU, chat_template=str(tmp_path / "absent"))
    (tmp_path / "broken.jinja").write_text("{{ raise_exception('no \x1b roles') }}")
    with pytest.raises(UserError, match=r"the chat template fails \(no .* roles\)") as caught:
        load(chat, CPU, chat_template=str(tmp_path / "broken.jinja"))
    assert "\x1b" not in str(caught.value)


def test_the_prompt_is_shown_token_by_token(chat):
    policy = load(chat, CPU)
    shown = policy.show_prompt([{"role": "user", "content": "What is 17"}])
    (ids,) = policy.encode([[{"role": "user", "content": "What is 17"}]])
    head, _, tokens = shown.partition(": ")
    assert head == f"the first prompt, {len(ids)} tokens" and len(tokens.split("<|im_end|>|\\n|")) == 2
    assert "|".join(policy.tokenizer.decode([i]) for i in ids).replace("\n", "\\n") == tokens


def test_what_an_evaluation_costs_is_said_before(chat, tmp_path, monkeypatch, capsys):
    words = ["--task", "arithmetic", "--model", chat, "--device", "cpu", "--max-new-tokens", 2, "--limit", 4]
    words += ["--steps", 1, "--batch-size", 2, "--num-generations", 2, "--eval-limit", 3]
    command(monkeypatch, grpo, *words, "--out", tmp_path / "toy")
    assert "evaluating" not in capsys.readouterr().err
    monkeypatch.setattr(checkpoints, "TOY_WEIGHTS", 10)
    returned = []
    monkeypatch.setattr(commands, "return_memory", lambda: returned.append(1))
    command(monkeypatch, grpo, *words, "--out", tmp_path / "model")
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "evaluating" in line]
    assert (
        len(lines) == len(returned) in (4, 5)
    )  # before, validation before and after, at the end the last policy and maybe another
    assert "3 held-out problems, one greedy completion and 4 samples of each, at most 2 tokens long" in lines[0]
    assert "3 validation problems, one greedy completion and 2 samples of each" in lines[1]


def test_what_is_chosen_for_a_model_is_said(chat, monkeypatch, capsys):
    policy, config = load(chat, CPU, None), SimpleNamespace(model="named", learning_rate=5e-6)
    introduce(policy, config, "12")
    assert capsys.readouterr().out == "" and policy.dtype == torch.float32  # a toy
    monkeypatch.setattr(checkpoints, "TOY_WEIGHTS", 10)
    introduce(policy, config, "12")
    first, second, _ = capsys.readouterr().out.split("\n")
    count = sum(weight.numel() for weight in policy.model.parameters())
    assert first == f"named: {count:,} weights, products in float32, learning rate 5e-06"
    assert second == policy.show_prompt("12")
    assert checkpoints.choose_dtype(None, policy, torch.device("cuda")) == torch.bfloat16
    assert checkpoints.choose_dtype("float32", policy, torch.device("cuda")) == torch.float32
    monkeypatch.setattr(checkpoints, "TOY_WEIGHTS", 10**9)
    assert checkpoints.choose_dtype(None, policy, torch.device("cuda")) == torch.float32


@pytest.mark.parametrize(("most", "rates"), [(10**7, [1e-4, 2e-3]), (10, [5e-6, 1e-5])], ids=["toy", "model"])
def test_the_rate_is_of_the_models_own_order(chat, tmp_path, monkeypatch, most, rates):
    monkeypatch.setattr(checkpoints, "TOY_WEIGHTS", most)
    given = ["--task", "arithmetic", "--model", chat, "--limit", 8, "--device", "cpu"]
    few = ["--max-new-tokens", 2, "--steps", 1, "--batch-size", 2, "--num-generations", 2, "--warmup-steps", 1]
    command(monkeypatch, grpo, *given, *few, "--out", tmp_path / "grpo")
    command(monkeypatch, sft, *given, "--epochs", 0.1, "--warmup-steps", 1, "--copies", 1, "--out", tmp_path / "sft")
    for name, rate in zip(("grpo", "sft"), rates, strict=True):
        assert json.loads((tmp_path / name / "run.json").read_text())["settings"]["learning_rate"] == rate
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["learning_rate"] == rate


def test_a_run_asks_as_it_was_trained(chat, tmp_path, monkeypatch, capsys):
    """With its shots: in training, in the question command, and in evaluation."""
    asked = []
    sample = checkpoints.TokenPolicy.sample

    def noted(self, examples, *more, **named):
        asked.append(examples[0].prompt)
        return sample(self, examples, *more, **named)

    monkeypatch.setattr(checkpoints.TokenPolicy, "sample", noted)
    given = ["--task", "arithmetic", "--model", chat, "--device", "cpu", "--max-new-tokens", 2]
    few = ["--steps", 1, "--batch-size", 2, "--num-generations", 2, "--shots", 2, "--thinking", "on", "--eval-limit", 3]
    command(monkeypatch, grpo, *given, *few, "--out", tmp_path / "run")
    shots = asked[0][:-1]
    assert len(shots) == 4 and all(prompt[:-1] == shots for prompt in asked)
    asked.clear()
    asking = ["--model", tmp_path / "run", "--max-new-tokens", 2, "--device", "cpu"]
    command(monkeypatch, inference, "What is (1 + 1) + 1?", *asking)
    command(monkeypatch, inference, "--eval", "--limit", 2, *asking)
    assert all(prompt[:-1] == shots for prompt in asked) and len(asked) >= 3
    asked.clear()
    command(monkeypatch, inference, "What is (1 + 1) + 1?", *asking, "--shots", 0)
    assert len(asked[0]) == 1
    config = inference.InferenceConfig(model=[str(tmp_path / "run")])
    assert as_trained(config, str(tmp_path / "run")).thinking == "on"
    for damaged in ({"shots": "4"}, {"shots": -1}, {"data": 3}, {"thinking": "maybe"}):
        stored = {"settings": {"task": "arithmetic", **damaged}}
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "run.json").write_text(json.dumps(stored))
        with pytest.raises(UserError):
            as_trained(config, str(tmp_path / "damaged"))
    other = inference.InferenceConfig(model=[str(tmp_path / "run")], task="odd_even")
    assert as_trained(other, str(tmp_path / "run")).shots is None  # another task's shots are none of this one's


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--shots", 8000], ["--shots is 8000", "7500 training problems"]),
        (["--shots", 60], ["leaves no room for any question", "--shots"]),
        (["--thinking", "on", "--chat-template", "none"], ["--thinking"]),
    ],
)
def test_mistakes_are_one_line(chat, tmp_path, monkeypatch, capsys, words, parts):
    given = ["--task", "arithmetic", "--model", chat, "--device", "cpu", "--out", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["grpo.py", *map(str, [*given, *words])])
    with pytest.raises(SystemExit) as caught:
        commands.run_main(grpo.main)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and all(part in error for part in parts) and not (tmp_path / "run").exists()
