"""What may happen to a run, done to it for real: kills, signals, a full disk, little memory, faults, two writers.

Whatever it is, the run goes on as if nothing had happened, or says in a line what is wrong and has lost nothing.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench_faults
import bench_hostile
import pytest
import torch

import grpo
import runs
import states
from checkpoints import load, save
from commands import UserError
from grpo import GRPOConfig
from sft import SFTConfig

ROOT = Path(grpo.__file__).parent
FLAGS = dict(zip(bench_faults.RUN[::2], bench_faults.RUN[1::2], strict=True))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return bench_faults.tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    start(base, out).communicate()
    return out


def start(base: Path, out: Path, *more: str, **how) -> subprocess.Popen:
    """The run of bench_faults.py in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(bench_faults.command(base, out, *more), **pipes, **how)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and what was said on stderr, without the progress bar."""
    _, errors = process.communicate(timeout=120)
    return process.returncode, "".join(line for line in re.split("[\r\n]+", errors) if "step/s" not in line)


def continued(base: Path, out: Path, *more: str) -> dict:
    """The outcome of a run that is continued to its end."""
    status, errors = finish(start(base, out, "--resume", *more))
    assert status == 0, errors
    return bench_faults.outcome(out)


def settings(base: Path, out: Path, **more) -> GRPOConfig:
    small = {"rewards": "char_length=1", "ideal_length": 5, "batch_size": 4, "num_generations": 4, "max_new_tokens": 8}
    small |= {"eval_limit": 6, "device": "cpu", "steps": 4, "eval_every": 2, "save_every": 2}
    return GRPOConfig(**{"model": str(base), "out": str(out)} | small | more)


def test_a_run_that_is_killed_eight_times_ends_as_if_it_never_was(base, whole, tmp_path):
    """Two of them inside a save, or where that was missed just after it."""
    expected = bench_faults.outcome(whole)
    for seed in (0, 5):
        outcomes, _ = bench_faults.survive(base, tmp_path / str(seed), seed, 6.0)
        assert all(found == expected for found in outcomes)


def wait_for(process: subprocess.Popen, out: Path, step: int) -> None:
    """Until a step is in the metrics."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if f'"step": {step},' in (out / "metrics.jsonl").read_text():
                return
        time.sleep(0.002)
    raise AssertionError(process.communicate())


TUNE = [
    *("--task", "arithmetic", "--copies", "1", "--limit", "40", "--epochs", "8", "--batch-size", "16"),
    *("--eval-every", "4", "--save-every", "3", "--device", "cpu"),
]
MADE = [
    *("--task", "odd_even", "--policy", "autoencoder", "--batch-size", "4", "--num-generations", "4"),
    *("--eval-limit", "6", "--steps", "4", "--device", "cpu"),
]


def made_by(out: Path) -> dict:
    """What a command has made, without figures and what a clock says: weights, logs, evaluation, states."""
    files = [path for path in out.rglob("*") if path.suffix in (".safetensors", ".json", ".jsonl")]
    found = {str(path.relative_to(out)): path.read_bytes() for path in files if path.name != "run.json"}
    for name in [name for name in found if name.endswith(".jsonl")]:
        rows = map(json.loads, found[name].splitlines())
        found[name] = [{key: x for key, x in row.items() if "second" not in key} for row in rows]
    return found


def killed(tmp_path: Path, script: str, flags: list[str], kills: list[tuple[str, int, str | None]]) -> list[dict]:
    """What a command makes that is never killed, and one that is killed after (folder, step, file of a save)."""
    made = []
    for name in ("whole", "killed"):
        out = tmp_path / name
        command = [sys.executable, str(ROOT / script), *flags, "--out", str(out)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        for folder, step, file in kills if name == "killed" else ():
            process = subprocess.Popen([*command, *["--resume"] * (out / "run.json").exists()], **pipes)
            wait_for(process, out / folder, step)
            while file and process.poll() is None and not (out / folder / "resume" / ".partial" / file).exists():
                time.sleep(0.0002)
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
        status, errors = finish(subprocess.Popen([*command, *["--resume"] * (out / "run.json").exists()], **pipes))
        assert status == 0, errors
        made.append(made_by(out))
    return made


def test_fine_tuning_that_is_killed_ends_as_if_it_never_was(tmp_path):
    """Before there is a state, and inside a save, whose half written folder is then there."""
    kills = [("", 1, None), ("", 4, "optimizer.safetensors")]
    whole, other = killed(tmp_path, "sft.py", TUNE, kills)
    assert whole == other and len(whole["metrics.jsonl"]) >= 15 and "evaluation.json" in whole


def test_a_base_policy_that_is_killed_while_it_is_made_is_the_same_in_the_end(tmp_path):
    """Inside the save of its first state, before which there is none, and after it."""
    kills = [("base", 950, "weights.safetensors"), ("base", 1100, None)]
    whole, other = killed(tmp_path, "grpo.py", MADE, kills)
    assert whole == other and len(whole["base/metrics.jsonl"]) > 1000 and len(whole["metrics.jsonl"]) == 5


def test_several_faults_at_once_cost_steps_and_nothing_else(base, whole, tmp_path):
    """A kill, a state with a flipped bit, half a line in the logs, half a save, and figures that were being written."""
    out = tmp_path / "run"
    process = start(base, out)
    wait_for(process, out, 7)
    process.kill()
    process.communicate()
    weights = states.states(out)[0][1] / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(out / name, "a") as file:
            file.write('{"step": 8, "half')
    (out / "resume" / ".partial").mkdir(exist_ok=True)
    for name in ("resume/.partial/weights.safetensors", ".model.safetensors.partial", ".training.png.1"):
        (out / name).write_bytes(b"half")
    code, errors = finish(start(base, out, "--resume"))
    assert code == 0 and re.search(r"damaged: \S+ \(its files are not those that checksums.json knows\)", errors), (
        errors
    )
    assert bench_faults.outcome(out) == bench_faults.outcome(whole) and not list(out.rglob("*.partial"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_once_and_the_command_that_is_shown_continues(base, whole, tmp_path, number, status):
    process = start(base, tmp_path / "run", "--save-every", "100")
    wait_for(process, tmp_path / "run", 5)
    process.send_signal(number)
    code, errors = finish(process)
    assert code == status and "Traceback" not in errors
    saved = re.search(r"saved after step (\d+); continue with: (python .*--resume)", errors)
    assert int(saved[1]) >= 5 and saved[1] in "".join(path.name for _, path in states.states(tmp_path / "run"))
    again = subprocess.run([sys.executable, *saved[2].split()[1:]], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    expected = bench_faults.outcome(whole)
    assert bench_faults.outcome(tmp_path / "run") == expected


def test_a_second_signal_stops_at_once_and_leaves_what_was_saved(base, whole, tmp_path):
    process = start(base, tmp_path / "run")
    wait_for(process, tmp_path / "run", 5)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    code, errors = finish(process)
    assert code == 130 and "continue with" in errors
    assert continued(base, tmp_path / "run") == bench_faults.outcome(whole)


@pytest.mark.parametrize(("main", "line"), [("raise UserError('no')", "error: no"), ("return None", "")])
def test_a_signal_while_the_process_ends_is_no_traceback(main, line):
    """As torchrun sends it to a rank that is about to say why it ends."""
    text = f"""
import atexit, os, signal, time
from commands import UserError, run_main
atexit.register(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(1)))
def main():
    {main}
run_main(main, resumable=True)
"""
    ended = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert line in ended.stderr and "Traceback" not in ended.stderr and ended.returncode == -signal.SIGTERM


def test_sigusr1_saves_and_the_run_goes_on(base, whole, tmp_path):
    process = start(base, tmp_path / "run", "--save-every", "100")
    wait_for(process, tmp_path / "run", 4)
    process.send_signal(signal.SIGUSR1)
    code, _ = finish(process)
    kept = [step for step, _ in states.states(tmp_path / "run")]
    assert code == 0 and kept[0] == 12 and 4 <= kept[1] < 12
    assert bench_faults.outcome(tmp_path / "run") == bench_faults.outcome(whole)


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["update", "evaluate_run"])
def test_a_run_that_stops_before_or_after_an_update_loses_nothing(base, tmp_path, monkeypatch, where):
    """Before it, the state is that of the last step; after it, the step is not taken again: only evaluated."""
    monkeypatch.setattr(grpo, "report", lambda run: None)
    one = grpo.train(settings(base, tmp_path / "one", save_every=100))
    function, calls = getattr(grpo, where), []

    def stop(*arguments, **more):
        calls.append(1)
        if len(calls) == {"update": 3, "evaluate_run": 2}[where]:  # or the evaluation after the second step
            raise KeyboardInterrupt(15)
        return function(*arguments, **more)

    monkeypatch.setattr(grpo, where, stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        grpo.train(settings(base, tmp_path / "two", save_every=100))
    name = {"update": "000002", "evaluate_run": "000001+"}[where]
    assert [path.name for _, path in states.states(tmp_path / "two")] == [name, "000000"]
    assert stopped.value.args == (15, f"saved after step {int(name[:6])}")
    monkeypatch.setattr(grpo, where, function)
    updates = []
    real = grpo.update
    monkeypatch.setattr(grpo, "update", lambda *x: updates.append(1) or real(*x))
    two = grpo.train(settings(base, tmp_path / "two", save_every=100, resume=True))
    assert len(updates) == 2  # steps 3 and 4
    for a, b in zip(one.policy.model.parameters(), two.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)
    logs = [
        [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in path.read_text().splitlines()]
        for path in (tmp_path / "one" / "metrics.jsonl", tmp_path / "two" / "metrics.jsonl")
    ]
    assert logs[0] == logs[1]


def test_a_reward_that_fails_loses_no_step(base, tmp_path):
    """Mended, the run goes on from the step before, and ends as one whose reward never failed."""
    file, count = tmp_path / "mine.py", "    return [len(text) / 8 for text in completions]\n"
    fails = "seen = []\ndef mine(completions, **_):\n    seen.append(1)\n    assert len(seen) != 6, 'six'\n"
    good = f"def mine(completions, **_):\n{count}"
    mine = ["--rewards", f"{file}:mine=1"]
    flags = [x for pair in FLAGS.items() if pair[0] not in ("--rewards", "--ideal-length") for x in pair]
    command = [sys.executable, str(ROOT / "grpo.py"), *flags, "--model", str(base), *mine]
    for name, text in (("one", good), ("two", fails + count), ("two", good)):
        file.write_text(text)
        more = ["--resume"] if (tmp_path / name).exists() else []
        result = subprocess.run([*command, "--out", str(tmp_path / name), *more], capture_output=True, text=True)
        if text == good:
            assert result.returncode == 0, result.stderr
        else:
            words = "error: step 4: reward mine failed: AssertionError: six; saved after step 3, --resume goes on"
            assert result.returncode == 2 and re.search(words, result.stderr) and "Traceback" not in result.stderr
    assert bench_faults.outcome(tmp_path / "one") == bench_faults.outcome(tmp_path / "two")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with few megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "none", str(disk)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a small file system: {mount.stderr}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_costs_a_state_but_not_the_run(base, whole, small_disk):
    """Another program fills the disk while it runs, but for what logs and a checkpoint need, and gives it back."""
    out = small_disk / "run"
    process = start(base, out)
    wait_for(process, out, 2)
    (small_disk / "gap").write_bytes(bytes(6 * 2**20))
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    (small_disk / "gap").unlink()
    wait_for(process, out, 8)
    (small_disk / "filler").unlink()
    code, errors = finish(process)
    assert code == 0, errors
    assert re.search(r"warning: step \d+: no state saved: .*No space left on device; free space", errors)
    assert not list(out.rglob("*.partial")) and len(states.states(out)) == 2
    assert bench_faults.outcome(out) == bench_faults.outcome(whole)


LITTLE_MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
import grpo, runs
from checkpoints import load
from policy import frozen
from tasks import find_task
torch.set_num_threads(1)
examples = find_task("arithmetic").load()["train"][:32]
grown = []
for limited in (False, True):
    policy = load(sys.argv[2], "cpu")
    config = grpo.GRPOConfig(max_new_tokens=24, micro_batch_tokens=2**20)
    rollout = policy.sample(examples, 16, (0, 0, 0), 24)
    advantages = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(policy.model.parameters(), 1.0)
    if limited:  # a quarter of what the update took before
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + grown[0] // 4, -1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics = grpo.update(policy, None, optimizer, rollout, advantages, None, config)
    grown.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    print(metrics["micro_batch_tokens"], metrics["grad_norm"], metrics["loss"])
"""


def test_an_update_that_does_not_fit_is_done_again_in_smaller_parts_with_the_same_result(base):
    command = [sys.executable, "-c", LITTLE_MEMORY, str(ROOT), str(base)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MALLOC_ARENA_MAX": "1"})
    assert result.returncode == 0, result.stderr
    (most, norm, loss), (tokens, *again) = ([float(x) for x in line.split()] for line in result.stdout.splitlines())
    assert most == 2**20 and tokens < 2**14
    assert again == pytest.approx([norm, loss], rel=1e-4, abs=1e-6)


def test_less_memory_is_said_once_and_kept_for_the_steps_that_follow(base, tmp_path, capsys):
    run = grpo.prepare(settings(base, tmp_path / "run", micro_batch_tokens=2**14))
    real, asked = grpo.backward, []

    def backward(*given):
        asked.append(given[-1])
        if given[-1] > 5000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    def score(policy, rollout, tokens):
        if tokens > 10000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scored(policy, rollout, tokens)

    scored = grpo.score_rollout
    with pytest.MonkeyPatch.context() as patch, run:
        patch.setattr(grpo, "backward", backward)
        patch.setattr(grpo, "score_rollout", score)
        for step in (1, 2):
            run.log(step, run.attempt(grpo.train_step, step))
    assert asked == [8192, 4096, 4096]  # after 8192 that scoring the reference had come to
    assert capsys.readouterr().err.count("out of memory: from here on --micro-batch-tokens 4096") == 1


def test_a_second_process_on_the_same_folder_is_refused_and_a_lock_of_a_dead_one_is_none(base, whole, tmp_path):
    out = tmp_path / "run"
    first = start(base, out, "--steps", "2000")
    wait_for(first, out, 3)
    for more in (["--resume"], ["--overwrite"]):
        code, errors = finish(start(base, out, *more))
        assert code == 2 and "another process writes into" in errors and "Traceback" not in errors
    first.kill()
    first.communicate()
    last = states.states(out)[0][0]
    code, errors = finish(start(base, out, "--resume", "--steps", str(last + 1)))
    assert code == 0 and (out / ".lock").exists(), errors


def test_what_is_not_finite_skips_the_step_keeps_its_rows_and_after_too_many_stops(base, tmp_path, capsys, monkeypatch):
    """A reference with an infinite weight, as a damaged file may have it: every loss is NaN."""
    monkeypatch.setattr(grpo, "report", lambda run: None)
    run = grpo.prepare(settings(base, tmp_path / "run", steps=9, max_bad_steps=3))
    run.reference.model.model.norm.weight.data[0] = torch.inf
    before = [weight.clone() for weight in run.policy.model.parameters()]
    monkeypatch.setattr(grpo, "prepare", lambda config: run)
    with pytest.raises(UserError, match="step 3: 3 steps in a row were skipped .*the loss is nan.*saved after step 2"):
        grpo.train(run.config)
    assert all(torch.equal(a, b) for a, b in zip(before, run.policy.model.parameters(), strict=True))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped") for line in lines] == [None, 1.0, 1.0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    skipped = [row for row in rows if row.get("skipped") == "the loss is nan"]
    assert {row["step"] for row in skipped} == {1, 2, 3} and len(skipped) == 3 * 16
    assert all(row.keys() == {"step", "skipped", "question", "completion"} for row in skipped)
    asked = {example.question for example in run.data["train"]}
    assert {row["question"] for row in skipped} <= asked and len({row["question"] for row in skipped}) > 4
    assert capsys.readouterr().err.count("is skipped: the loss is nan") == 2


def test_an_infinite_gradient_or_logit_is_told_with_its_rows_and_the_rewards_state_goes_back(base, tmp_path, capsys):
    run = grpo.prepare(settings(base, tmp_path / "run"))
    before, weight = run.policy.model.weights(), next(run.policy.model.parameters())
    before = {name: value.clone() for name, value in before.items()}
    real = run.rewards.mix["char_length"][0]

    def counts(completions, state, **more):
        state["calls"] = state.get("calls", 0) + 1
        return real(completions=completions, **more)

    run.rewards.mix["char_length"] = (counts, 1.0)
    with run:
        hook = weight.register_hook(lambda gradient: gradient * torch.inf)
        run.log(1, run.attempt(grpo.train_step, 1))
        hook.remove()
        assert all(torch.equal(before[name], value) for name, value in run.policy.model.weights().items())
        assert run.position.reward_state == {} and run.position.bad_steps == 1
        metrics = run.attempt(grpo.train_step, 2)
        assert run.settled.updated and run.settled.bad_steps == 0  # as a state is that is saved while it is evaluated
        run.log(2, metrics)
        assert run.position.reward_state == {"calls": 1} and run.position.bad_steps == 0
        run.policy.model.model.norm.weight.data[0] = torch.inf
        run.log(3, run.attempt(grpo.train_step, 3))
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    told = [(row["step"], row["skipped"]) for row in rows]
    assert told.count((1, "the norm of the gradient is nan")) + told.count((1, "the norm of the gradient is inf")) == 16
    assert told.count((3, "the model's log-probabilities are not finite")) == 16 == len(told) - 16
    assert all(row["question"] and "completion" in row for row in rows)


def test_lines_that_a_full_disk_does_not_take_are_written_when_there_is_room(base, small_disk, capsys):
    run = grpo.prepare(settings(base, small_disk / "run"))
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))
    long = "x" * 10**5
    with run:
        run.log(1, {"long": long})
        run.save()
        assert "lines wait to be written" in capsys.readouterr().err and not states.states(run.out)
        assert not (run.out / "metrics.jsonl").exists() or (run.out / "metrics.jsonl").read_text() == ""
        (small_disk / "filler").unlink()
        run.log(2, {"short": 1})
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "long": long}, {"step": 2, "short": 1}]
    assert [step for step, _ in states.states(run.out)] == [2]
    states.LOCKS.pop(run.out).close()  # or the disk would be busy


def test_the_last_state_is_saved_at_the_end_if_the_disk_was_full_when_it_was_due(base, small_disk):
    run = grpo.prepare(settings(base, small_disk / "run", steps=1))
    with run:
        with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(2**12))
        run.log(1, {"x": 1})
        assert not states.states(run.out)
        (small_disk / "filler").unlink()
    assert [step for step, _ in states.states(run.out)] == [1]
    assert (run.out / "metrics.jsonl").read_text() == '{"step": 1, "x": 1}\n'
    states.LOCKS.pop(run.out).close()  # or the disk would be busy


def test_a_log_that_cannot_be_written_costs_the_run_nothing(base, whole, tmp_path):
    """As where it goes to a file on a disk that is full."""
    with open("/dev/full", "w") as full:
        subprocess.run(bench_faults.command(base, tmp_path / "run"), stdout=full, stderr=full)
    assert bench_faults.outcome(tmp_path / "run") == bench_faults.outcome(whole)


def test_a_machine_without_git_starts_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert states.about_machine()["git_commit"] is None


def test_a_best_checkpoint_that_cannot_be_written_is_not_called_the_best(base, tmp_path, capsys):
    run = grpo.prepare(settings(base, tmp_path / "run"))
    with run:
        run.note_score(0, 0.5)
        run.keep_best(lambda: save(run.policy, run.out))
        run.log(0, {})
        run.note_score(1, 0.7)
        run.keep_best(lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert run.position.best_step == 0  # whose checkpoint is there
        assert "the best checkpoint is not saved" in capsys.readouterr().err
        assert not run.note_score(2, 0.4) and run.note_score(3, 0.6) and run.position.best_step == 3


@pytest.mark.parametrize("changed", ["model", "data"])
def test_a_run_that_would_start_from_something_else_is_refused_by_name(base, tmp_path, changed, monkeypatch):
    copy, file = tmp_path / "base", tmp_path / "data.jsonl"
    shutil.copytree(base, copy)
    with open(file, "w") as lines:
        lines.writelines(json.dumps({"question": f"q{i}", "answer": f"#### {i}"}) + "\n" for i in range(900))
    monkeypatch.setattr(grpo, "report", lambda run: None)
    more = {"task": "gsm8k", "data": str(file), "steps": 1, "limit": 8, "chat_template": None}
    config = settings(copy, tmp_path / "run", **more)
    grpo.train(config)
    if changed == "model":
        policy = load(copy, "cpu")
        policy.model.model.norm.weight.data[0] += 1e-3
        save(policy, copy)
    else:
        file.write_text(file.read_text().replace("#### ", "#### 1"))
    files = [tmp_path / "run" / name for name in ("metrics.jsonl", "run.json")]
    before = [path.read_bytes() for path in files]
    with pytest.raises(UserError, match=f"--resume: --{changed} is not what the run was made with; restore it"):
        grpo.train(dataclasses.replace(config, resume=True, steps=2))
    assert [path.read_bytes() for path in files] == before


def test_each_stretch_of_a_run_says_where_it_ran(base, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "report", lambda run: None)
    grpo.train(settings(base, tmp_path / "run", steps=2))
    grpo.train(settings(base, tmp_path / "run", resume=True))
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    (stretch,) = stored["resumed"]
    assert stored["settings"]["steps"] == 4 and stretch["step"] == 2
    assert stretch["versions"] == stored["versions"] and stretch["threads"] == 1
    assert stored["starts_from"] == {
        "model": states.digest_of(load(base, "cpu").model), "data": stored["starts_from"]["data"]
    }  # fmt: skip


def test_overwrite_destroys_nothing_before_all_is_checked(base, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "report", lambda run: None)
    out = tmp_path / "run"
    grpo.train(settings(base, out))
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    perplexity = {"rewards": "perplexity=1", "ideal_length": None}
    for wrong in (perplexity | {"scorer": "no_such"}, {"model": "no_such"}, {"task": "gsm8k", "data": "no_such"}):
        with pytest.raises(UserError):
            grpo.train(settings(base, out, overwrite=True, **wrong))
    for same in ({"model": str(out)}, perplexity | {"scorer": str(out)}, {"task": "gsm8k", "data": str(out)}):
        with pytest.raises(UserError):
            grpo.train(settings(base, out, overwrite=True, **same))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    with pytest.raises(UserError, match="model.safetensors but no run, and stays as it is"):
        grpo.train(settings(out, base, overwrite=True))
    assert load(base, "cpu")
    (tmp_path / "mine" / "resume").mkdir(parents=True)
    with pytest.raises(UserError, match="already holds a run"):
        grpo.train(settings(base, tmp_path / "mine"))
    assert (tmp_path / "mine" / "resume").is_dir()


def test_the_run_that_is_replaced_stays_until_the_new_one_has_a_state(base, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "report", lambda run: None)
    out = tmp_path / "run"
    grpo.train(settings(base, out))
    old = (out / "metrics.jsonl").read_bytes()
    for _ in range(2):  # the new run fails before it has a state, twice
        monkeypatch.setattr(grpo, "train_step", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
        monkeypatch.setattr(states, "save_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(RuntimeError, match="a bug"):
            grpo.train(settings(base, out, overwrite=True, seed=1))
        assert (out / states.REPLACED / "metrics.jsonl").read_bytes() == old
        assert (out / states.REPLACED / "resume" / "000004").is_dir() and not states.states(out)
        monkeypatch.undo()
        monkeypatch.setattr(grpo, "report", lambda run: None)
    grpo.train(settings(base, out, overwrite=True, seed=1))
    assert not (out / states.REPLACED).exists() and (out / "metrics.jsonl").read_bytes() != old


def test_a_finished_run_without_states_is_kept_until_the_new_one_has_one(base, tmp_path, monkeypatch):
    """Somebody has deleted `resume` to save space; and a kill while files were moved leaves the rest to be moved."""
    monkeypatch.setattr(grpo, "report", lambda run: None)
    out = tmp_path / "run"
    grpo.train(settings(base, out))
    shutil.rmtree(out / "resume")
    weights = (out / "model.safetensors").read_bytes()
    (out / states.REPLACED).mkdir()
    os.replace(out / "samples.jsonl", out / states.REPLACED / "samples.jsonl")
    states.start_run(settings(base, out, overwrite=True))
    assert (out / states.REPLACED / "model.safetensors").read_bytes() == weights
    names = {"run.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "model.safetensors", "config.json"}
    kept = {path.name for path in (out / states.REPLACED).iterdir()}
    assert kept == names | {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == {"run.json", ".lock", states.REPLACED}


def test_a_base_policy_that_was_made_is_moved_aside_too_but_not_the_one_that_is_asked_for(base, tmp_path):
    out = tmp_path / "run"
    states.start_run(settings(base, out))
    for given, kept in ((base, False), (out / "base", True)):
        shutil.copytree(base, out / "base")
        states.start_run(settings(given, out, overwrite=True))
        assert (out / "base").exists() == kept and (out / states.REPLACED / "base").exists() != kept
        shutil.rmtree(out / states.REPLACED)


def test_a_look_at_a_run_changes_nothing_in_its_folder(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grpo, "report", lambda run: None)
    out = tmp_path / "run"
    grpo.train(settings(base, out))
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "half')  # what the process that trains is writing
    (out / "resume" / "000004" / "position.json").write_text("{}")
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run = grpo.prepare(settings(base, out, resume=True, trace=True))
    assert run.position.step == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_a_run_whose_states_somebody_deleted_is_not_begun_again_over_its_logs(base, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "report", lambda run: None)
    grpo.train(settings(base, tmp_path))
    shutil.rmtree(tmp_path / "resume")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="has a log of steps, and no state to go on from; begin again with --overwrite"):
        grpo.train(settings(base, tmp_path, resume=True))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("run.json", {"resumed": None}, None),
        ("run.json", {"starts_from": []}, "does not say what the run starts from"),
        ("run.json", {"settings": {"shard": None}}, "shard: None is of another type"),
        ("evaluation.json", {"base": 5}, None),
        ("evaluation.json", None, None),
        ("evaluation.json", {"base": {"accuracy_low": []}}, None),
    ],
)
def test_values_of_another_type_in_a_runs_files_are_passed_over_or_told(
    base, tmp_path, monkeypatch, name, changed, message
):
    grpo.train(settings(base, tmp_path, steps=1))
    path, argv = tmp_path / name, ["grpo.py", "--out", str(tmp_path), "--resume", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    if changed is None:
        path.unlink()
    else:
        stored = json.loads(path.read_text())
        more = {"settings": stored["settings"] | changed["settings"]} if "settings" in changed else changed
        path.write_text(json.dumps(stored | more))
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        grpo.report(grpo.train(runs.parse_settings(GRPOConfig, "", "")))
        assert len(json.loads((tmp_path / "run.json").read_text())["resumed"]) == 1
        kept = ["best", "last"] + ["base"] * (name == "run.json")
        assert sorted(json.loads((tmp_path / "evaluation.json").read_text())) == sorted(kept)


def test_nobody_elses_code_or_address_is_used_unasked(tmp_path, monkeypatch):
    for name, value in (("rewards", f"{tmp_path}/their.py:mine=1"), ("judge_url", "http://example.com/v1")):
        stored = {"task": "arithmetic", "rewards": "judge=1" if name == "judge_url" else value, name: value}
        (tmp_path / "run.json").write_text(json.dumps({"settings": stored, "format": states.FORMAT}))
        monkeypatch.setattr(sys, "argv", ["grpo.py", "--out", str(tmp_path), "--resume"])
        with pytest.raises(UserError, match=f"that only it names; if you trust it, add --{name.replace('_', '-')} "):
            runs.parse_settings(GRPOConfig, "", "")
        flag = f"--{name.replace('_', '-')}"
        monkeypatch.setattr(sys, "argv", ["grpo.py", "--out", str(tmp_path), "--resume", flag, value])
        assert getattr(runs.parse_settings(GRPOConfig, "", ""), name) == value


def test_a_restart_by_torchrun_continues(base, tmp_path, monkeypatch):
    states.start_run(SFTConfig(model=str(base), out=str(tmp_path / "run"), epochs=2))
    monkeypatch.setattr(runs.ranks, "RESTARTS", 1)
    monkeypatch.setattr(sys, "argv", ["sft.py", "--model", str(base), "--out", str(tmp_path / "run"), "--epochs", "2"])
    assert runs.parse_settings(SFTConfig, "", "").resume
    monkeypatch.setenv("MASTER_PORT", "29501")  # another launch: the run that it found there is none of its own
    assert not runs.parse_settings(SFTConfig, "", "").resume


def test_what_another_version_wrote_says_what_can_still_be_done_with_it(base, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "report", lambda run: None)
    out = tmp_path / "run"
    grpo.train(settings(base, out, steps=1))
    for path, words in (
        (out / "resume" / "000001" / "checksums.json", "no state in .* is whole: .*000001 .it is of another version"),
        (out / "run.json", "of another version of this program; inference.py evaluates it, plot_metrics.py draws it"),
    ):
        stored = json.loads(path.read_text())
        assert stored["format"] == states.FORMAT
        path.write_text(json.dumps(stored | {"format": states.FORMAT + 1}))
        shutil.rmtree(out / "resume" / "000000", ignore_errors=True)
        monkeypatch.setattr(sys, "argv", ["grpo.py", "--out", str(out), "--resume"])
        with pytest.raises(UserError, match=words):
            grpo.train(runs.parse_settings(GRPOConfig, "", ""))


def test_hostile_completions_are_scored_in_time():
    """In a benchmark a million of them. The time is not asserted here, where other tests run beside."""
    for seed in range(20):
        bench_hostile.score(bench_hostile.completions(1000, seed))


def test_damaged_files_end_in_a_line_or_a_right_answer(tmp_path):
    found = bench_hostile.damaged(80, tmp_path)
    assert found.keys() == {"line", "answer"}, found
