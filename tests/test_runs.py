"""Settings, run folders, saved states, and what a command does with mistakes and signals."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import commands
import runs
import states
from commands import NotFinite, UserError, atomic_write, out_of_memory, printable, run_main
from grpo import GRPOConfig
from policy import TokenPolicy
from sft import SFTConfig
from states import Position, load_state, save_state, start_run

ROOT = Path(runs.__file__).parent


def cut(name: str):
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return edit


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
    assert json.loads((out / "run.json").read_text()) == stored and (out / "metrics.jsonl").exists()
    start_run(dataclasses.replace(config, seed=2, overwrite=True))
    assert not (out / "metrics.jsonl").exists() and not (out / "resume").exists()
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        for overwrite in (False, True):
            with pytest.raises(OSError, match="file"):  # which a command tells in one line
                start_run(SFTConfig(out=str(folder), overwrite=overwrite))
    assert (tmp_path / "file").read_text() == "mine"


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
    assert sorted(path.name for path in (out / "resume").iterdir()) == ["000002", "000010"]
    files = [path.name for path in (out / "resume").rglob("*") if path.is_file()]
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
    """The run died while it wrote the state of step 12."""
    out, kept = interrupted
    (out / "resume" / ".partial").mkdir()
    (out / "resume" / ".partial" / "weights.safetensors").write_bytes(b"half")
    policy, optimizer = with_optimizer(random_policy(seed=9))
    assert load_state(out, {"weights": policy.model}, optimizer).step == 10
    assert same(weights_of(policy), kept[10])
    save_state(out, at(12), {"weights": policy.model}, optimizer)
    assert sorted(path.name for path in (out / "resume").iterdir()) == ["000010", "000012"]
    assert load_state(out, {"weights": policy.model}, optimizer) == at(12)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "position.json"])
@pytest.mark.parametrize("edit", [cut, lambda name: lambda folder: (folder / name).unlink()], ids=["cut", "missing"])
def test_a_damaged_state_is_named_and_the_one_before_it_taken(interrupted, random_policy, name, edit, capsys):
    out, kept = interrupted
    edit(name)(out / "resume" / "000010")
    policy, optimizer = with_optimizer(random_policy(seed=9))
    assert load_state(out, {"weights": policy.model}, optimizer) == at(2) and same(weights_of(policy), kept[2])
    err = capsys.readouterr().err
    assert err.startswith(f"damaged: {out / 'resume' / '000010'} (") and err.endswith(
        f"going on from {out}/resume/000002\n"
    )
    assert [path.name for path in (out / "resume").iterdir()] == ["000002"]  # so that step 10 can be saved again
    assert (out / "model.safetensors").read_bytes() == b"best at 2"
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3  # steps 0 to 2
    for number in range(3, 11):
        step(policy, optimizer, number)
    assert same(weights_of(policy), kept[10])


def test_without_a_whole_state_nothing_is_touched(interrupted, random_policy):
    out, _ = interrupted
    for folder in ("000002", "000010"):
        cut("weights.safetensors")(out / "resume" / folder)
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--resume: no state in .* is whole: .*000010 .*000002 .*--overwrite"):
        load_state(out, *model_and_optimizer(random_policy))
    assert (out / "metrics.jsonl").read_bytes() == before and len(list((out / "resume").iterdir())) == 2


@pytest.mark.parametrize("text", ["{}", '{"step": "10"}', '{"step": 10, "luck": 1}', "[" * 100_000, "null"])
def test_a_position_of_another_form_is_damage_even_if_its_checksum_is_right(interrupted, random_policy, text):
    out, _ = interrupted
    folder = out / "resume" / "000010"
    (folder / "position.json").write_text(text)
    (folder / "checksums.json").write_text(json.dumps({"format": states.FORMAT, **states.checksums(folder)}))
    assert load_state(out, *model_and_optimizer(random_policy)).step == 2


def test_moments_of_another_shape_are_damage_even_if_the_checksum_is_right(interrupted, random_policy):
    out, _ = interrupted
    folder = out / "resume" / "000010"
    moments = load_file(folder / "optimizer.safetensors")
    name = next(name for name, x in moments.items() if name.endswith("exp_avg_sq") and x.dim() == 2)
    save_file(moments | {name: moments[name][:1].clone()}, folder / "optimizer.safetensors")  # would be broadcast
    (folder / "checksums.json").write_text(json.dumps({"format": states.FORMAT, **states.checksums(folder)}))
    assert load_state(out, *model_and_optimizer(random_policy)).step == 2


@pytest.mark.parametrize(
    ("file", "text"), [("metrics.jsonl", '{"step": 1}\nno json\n'), ("samples.jsonl", '{"reward": 1}\n')]
)
def test_a_damaged_log_is_refused(interrupted, random_policy, file, text):
    out, _ = interrupted
    (out / file).write_text(text)
    with pytest.raises(UserError, match=f"--resume: .*{file} is damaged .*--overwrite"):
        load_state(out, *model_and_optimizer(random_policy))


def test_a_failing_save_leaves_the_good_states_and_no_half_one(interrupted, random_policy, monkeypatch):
    out, kept = interrupted
    models, optimizer = model_and_optimizer(random_policy)

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(states, "save_tensors", full)
    with pytest.raises(OSError, match="no space left"):
        save_state(out, at(12), models, optimizer)
    assert sorted(path.name for path in (out / "resume").iterdir()) == ["000002", "000010"]
    save_state(out, at(10), models, optimizer)  # is there, and stays
    policy, optimizer = with_optimizer(random_policy(seed=9))
    assert load_state(out, {"weights": policy.model}, optimizer) == at(10) and same(weights_of(policy), kept[10])


def test_the_newest_states_are_those_of_the_largest_numbers(interrupted, random_policy):
    out, _ = interrupted
    for number in (999_999, 1_000_000, 1_000_001):
        save_state(out, at(number), *model_and_optimizer(random_policy))
    assert sorted(path.name for path in (out / "resume").iterdir()) == ["1000000", "1000001"]


def test_a_run_without_a_saved_state_begins_again(tmp_path, random_policy):
    assert load_state(tmp_path, *model_and_optimizer(random_policy)) is None


def test_the_state_is_saved_where_there_are_no_hard_links(tmp_path, random_policy, monkeypatch):
    def fail(*_):
        raise OSError("not supported")

    monkeypatch.setattr("os.link", fail)
    (tmp_path / "model.safetensors").write_bytes(b"best")
    models, optimizer = model_and_optimizer(random_policy)
    save_state(tmp_path, at(0), models, optimizer)
    assert (tmp_path / "resume" / "000000" / "best.safetensors").read_bytes() == b"best"


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
    assert end(KeyboardInterrupt(2, "saved after step 7")) == (130, "grpo.py: error: saved after step 7\n")
    status, err = end(FloatingPointError("the loss is nan"))
    assert status == 2 and err.startswith("grpo.py: error: not finite: the loss is nan; ") and err.count("\n") == 1
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
        RuntimeError("could not create a primitive"),
    ],
)
def test_running_out_of_memory_names_the_flags_that_help(error):
    with pytest.raises(UserError, match="out of memory; lower --samples"), out_of_memory("--samples"):
        raise error
    for bug in ("a bug", "could not create a primitive descriptor for the inner product"):  # of a wrong shape
        with pytest.raises(RuntimeError, match=bug), out_of_memory("--samples"):
            raise RuntimeError(bug)


def help_of(script: str) -> str:
    command = [sys.executable, str(ROOT / script), "--help"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"}).stdout


@pytest.mark.parametrize(("script", "settings"), [("grpo.py", GRPOConfig), ("sft.py", SFTConfig)])
def test_help_has_each_flag_once_in_a_group_with_its_default(script, settings):
    text = help_of(script)
    lines = text.splitlines()
    assert lines[0] == f"usage: {script} [--flag value ...]"
    groups = [line for line in lines if line.endswith(":") and not line.startswith((" ", "options", "the commonest"))]
    assert groups == [f"{group}:" for group in commands.GROUPS if any(f"{group}:" == line for line in lines)]
    assert len(groups) >= 5
    for field in dataclasses.fields(settings):
        flag = commands.flag_of(field.name)
        assert len(re.findall(rf"^  {flag}(?= |$)", text, re.MULTILINE)) == 1, flag
        assert "_" not in flag and (f"--{field.name} " not in text or "_" not in field.name)
    sentence = {"grpo.py": "--steps N Steps; one step is one rollout. Default: 40.", "sft.py": "--batch-size N"}[script]
    assert sentence in " ".join(text.split()) and "None" not in text
    assert f"python {script} --task arithmetic" in lines[-3]  # the commonest commands


def test_both_spellings_of_a_flag_are_taken_and_choices_are_offered(monkeypatch, capsys):
    for flag in ("--batch-size", "--batch_size"):
        monkeypatch.setattr(sys, "argv", ["grpo.py", flag, "7"])
        assert runs.parse_settings(GRPOConfig, "", "").batch_size == 7
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--kl-estimator", "k9"])
    with pytest.raises(SystemExit):
        runs.parse_settings(GRPOConfig, "", "")
    error = capsys.readouterr().err
    assert error.startswith("grpo.py: error: argument --kl-estimator: invalid choice: 'k9'") and "k3_unbiased" in error


def test_settings_that_are_not_from_the_command_line_are_checked_too():
    for settings, words in (
        ({"dtype": "float16"}, "--dtype: 'float16' is not offered; there is float32, bfloat16"),
        ({"aggregate": "row"}, "--aggregate: 'row' is not offered; there is sequence_mean, token_mean, constant"),
        ({"judge_scale": 3}, "--judge-scale: 3 is not offered; there is 1, 2"),
        ({"steps": 0}, "--steps is 0; it must be above 0"),
        ({"overlong_buffer": 1.5}, "--overlong-buffer is 1.5; it must be at most 1"),
    ):
        with pytest.raises(UserError) as caught:
            GRPOConfig(**settings)
        assert str(caught.value) == words


def tiny_run(out: Path, **more) -> runs.Run:
    """A run of one weight, whose loss is the weight."""

    class Model(torch.nn.Linear):
        def weights(self):
            return self.state_dict()

        def load_weights(self, weights):
            self.load_state_dict(weights)

    config = SFTConfig(out=str(out), **{"save_every": 3, "eval_every": 2} | more)
    model = Model(1, 1, bias=False)
    out.mkdir(exist_ok=True)
    named = type("Named", (runs.Run,), {"name": "tiny", "shown": ("loss",)})
    return named(config=config, policy=SimpleNamespace(model=model), optimizer=runs.adamw(model, 0.0), last_step=7)


def take(run: runs.Run, step: int) -> dict[str, float]:
    run.optimizer.param_groups[0]["lr"] = 0.1
    loss = run.policy.model.weight.sum()
    loss.backward()
    return run.record(
        {"loss": loss.item(), "grad_norm": runs.descend(run.optimizer, 1.0, SimpleNamespace(records=list))}
    )


def test_the_loop_saves_where_it_should_and_ends_with_the_last_step(tmp_path):
    run, saved = tiny_run(tmp_path / "a"), []
    run.save = lambda last=False: saved.append((run.position.step, last))
    with run:
        assert [step for step in run.steps() if run.log(step, take(run, step)) is None] == [1, 2, 3, 4, 5, 6, 7]
    assert saved == [(3, False), (6, False), (7, False), (7, True)]
    assert [step for step in range(8) if run.is_due(step, 2)] == [0, 2, 4, 6, 7]


def test_a_run_goes_on_from_its_state_and_before_the_first_from_nothing(tmp_path):
    whole, cut = tiny_run(tmp_path / "whole"), tiny_run(tmp_path / "cut")
    cut.policy.model.load_state_dict(whole.policy.model.state_dict())
    start = {name: x.clone() for name, x in whole.policy.model.state_dict().items()}
    for run, end in ((whole, 7), (cut, 5)):
        with run:
            for step in run.steps():
                run.log(step, take(run, step))
                if step == end:
                    break
    again = tiny_run(tmp_path / "cut")
    again.restore()
    assert again.position.step == 3  # what came after the last saved state is done again
    with again:
        for step in again.steps():
            again.log(step, take(again, step))
    assert torch.equal(again.policy.model.weight, whole.policy.model.weight)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert lines[0] == lines[1]
    fresh = tiny_run(tmp_path / "fresh")
    fresh.policy.model.load_state_dict(start)
    (tmp_path / "fresh" / "metrics.jsonl").write_text('{"step": 0}\n')  # of a run that died in its first save
    (tmp_path / "fresh" / "resume" / ".partial").mkdir(parents=True)
    fresh.restore()
    assert fresh.position == Position() and not (tmp_path / "fresh" / "metrics.jsonl").exists()


def test_patience_counts_validations_and_the_first_is_the_best(tmp_path, capsys):
    run = tiny_run(tmp_path / "a", patience=2)
    best = []
    with run:
        for step, score in zip(run.steps(), [-math.inf, 1.0, 1.0, 0.5, 9.0], strict=False):
            best.append(run.note_score(step, score))
            run.log(step, take(run, step))
        assert [*run.steps()] == []
    assert best == [True, True, False, False] and run.position.best_step == 2 and run.position.best_score == 1.0
    assert "no better validation score in 2 evaluations (--patience)" in capsys.readouterr().out
    again = tiny_run(tmp_path / "a", patience=2)  # resumed, it stops at once
    again.restore()
    with again:
        assert [*again.steps()] == [] and again.stopped


def test_a_step_that_is_not_finite_is_skipped_counted_and_in_the_end_too_many(tmp_path, capsys):
    def bad(run: runs.Run, step: int) -> dict:
        if step == 2:  # after a good one, which starts the count again
            return take(run, step)
        run.policy.model.weight.grad = torch.full((1, 1), math.nan)
        runs.descend(run.optimizer, 1.0, SimpleNamespace(records=list))

    run = tiny_run(tmp_path / "a", max_bad_steps=2)
    kept = []
    with pytest.raises(UserError, match=r"step 4: 2 steps in a row were skipped \(--max-bad-steps\), .* nan; "), run:
        for step in run.steps():
            run.log(step, run.attempt(bad, step))
            kept.append(run.policy.model.weight.clone())
            assert run.policy.model.weight.grad is None
    assert torch.equal(kept[1], kept[2]) and not torch.equal(kept[0], kept[1])
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped") for line in lines] == [1.0, None, 1.0]
    assert "warning: step 1 is skipped: the norm of the gradient is nan" in capsys.readouterr().err
    assert [step for step, _ in states.states(run.out)] == [3]  # the state before the step that was one too many


def test_rows_that_are_not_finite_are_kept(tmp_path):
    def bad(run: runs.Run, step: int) -> dict:
        raise NotFinite("the loss is nan", [{"completion": "1+1"}])

    run = tiny_run(tmp_path / "a")
    with run:
        run.attempt(bad, 1)
    row = {"step": 1, "skipped": "the loss is nan", "completion": "1+1"}
    assert json.loads((run.out / "samples.jsonl").read_text()) == row


def test_a_budget_is_halved_until_a_pass_fits_and_the_gradient_begun_is_cleared(tmp_path):
    run, asked = tiny_run(tmp_path / "a"), []

    def backward(weight, tokens: int) -> str:
        asked.append((tokens, weight.grad))
        weight.sum().backward()
        if tokens > 100:
            raise MemoryError
        return "done"

    weight = run.policy.model.weight
    assert runs.within_memory(backward, (weight,), 400, run.optimizer) == ("done", 100)
    assert asked == [(400, None), (200, None), (100, None)] and weight.grad == 1
    with pytest.raises(MemoryError):
        runs.within_memory(lambda tokens: bytearray(2**62), (), 64, run.optimizer)
    with pytest.raises(RuntimeError, match="a bug"):
        runs.within_memory(lambda tokens: (_ for _ in ()).throw(RuntimeError("a bug")), (), 64, run.optimizer)
