"""Several processes, as torchrun starts them, against one: the same gradient, the same run, no waiting for the dead.

    torchrun --nproc-per-node 2 tests/test_ranks.py BASE OUT.safetensors [sharded [NAME ...]]

is what the tests start: a step of every row of the table, or of those named, in float64, from one policy, whose weights
it writes.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_faults
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_real_models import write_checkpoint

import grpo
import ranks
import rewards
import states
from checkpoints import load
from grpo import ALGORITHMS, GRPOConfig
from policy import TokenPolicy

ROOT = Path(grpo.__file__).parent
OTHERS = ("batch_std", "batch_mean", "weighed")  # cells that no row has
SHARDED = (*ALGORITHMS, *OTHERS, "checkpointed")  # steps that are taken with sharded weights, too


def uneven(prompts, completions, completion_ids, **_) -> list[float | None]:
    """Rewards with a group that is flat, rows without a value, and spread else: by the completions alone."""
    values: list[float | None] = [len(set(ids)) / 8 for ids in completion_ids]
    values[:4] = [0.5] * 4  # the first prompt's, on the first rank
    return [None if i in (5, 6, 13) else value for i, value in enumerate(values)]


def watch_shards() -> list[int]:
    """Shard in float64, score in chunks, and note the passes of each inner update: the list grows."""
    shard, keep_step, passes = ranks.shard, ranks.keep_step, []

    def noted(model, count, again):
        passes.append(count)
        keep_step(model, count, again)

    ranks.shard, ranks.keep_step = lambda model: shard(model.double()), noted
    TokenPolicy.chunk_logits = 500
    return passes


def weights_of_a_step(base: str, out: str, sharded: str = "", *names: str) -> None:
    """The weights after a step of plain gradient descent, by the name of the row."""
    rewards.REWARDS["uneven"] = uneven
    passes = watch_shards() if sharded else []
    how = {"shard": True, "micro_batch_tokens": 40} if sharded else {}
    found, folder = {}, Path(out).with_suffix("")
    cells = {name: {"algorithm": name} for name in ALGORITHMS}
    cells["batch_std"] = {"advantage": "batch_std"}
    cells["batch_mean"] = {"advantage": "batch_mean"}
    cells["weighed"] = {"correction": "truncate", "correction_high": 0.5, "top_entropy": 0.5, "entropy_bonus": 0.1}
    cells["checkpointed"] = {"gradient_checkpointing": True}
    for name, cell in cells.items():
        if names and name not in names:
            continue
        config = GRPOConfig(
            model=base, out=str(folder / name), rewards="uneven=1", batch_size=5, num_generations=4, max_new_tokens=8,
            eval_limit=2, learning_rate=1.0, warmup_steps=0, clip_grad_norm=1e9, device="cpu", num_inner_updates=2,
            **cell, **how,
        )  # fmt: skip
        run = grpo.prepare(config)
        for policy in filter(None, (run.policy, run.reference)):
            if not ranks.is_sharded(policy.model):
                policy.model.double()
        run.optimizer = torch.optim.SGD(run.policy.model.parameters(), 1.0)
        with run:
            metrics = grpo.train_step(run, 1)
        found |= {f"{name} {key}": weight.clone() for key, weight in run.policy.model.weights().items()}
        kept = (
            "reward",
            "samples",
            "tokens",
            "kl",
            "entropy",
            "loss",
            "grad_norm",
            "ratio_max",
            "sampler_gap",
            "weight",
        )
        found[f"{name} metrics"] = torch.tensor([metrics.get(key, 0.0) for key in kept], dtype=torch.float64)
    nobodys, the_firsts = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    the_firsts.grad = torch.ones(1) if ranks.FIRST else None
    ranks.add_gradients([nobodys, the_firsts])
    assert nobodys.grad is None and the_firsts.grad == 1  # or the optimizer would move what has no gradient
    if sharded:
        assert len(set(map(tuple, ranks.gather(passes)))) == ranks.WORLD, "all ranks have as many passes"
    if ranks.FIRST:
        save_file(found, out)


def torchrun(count: int, *command: str, **how) -> subprocess.Popen:
    """A command in so many processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", "0"]
    start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*start, *how.get("more", ()), *command], env=environment, **pipes)


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return errors


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return bench_faults.tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def steps(base, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """What one, two and four processes, and two with sharded weights, make of a step of each row."""
    folder = tmp_path_factory.mktemp("steps")
    found = {how: step_of(base, folder, how) for how in ("1", "2", "4")}
    return found | {"2 sharded": step_of(base, folder, "2 sharded", *SHARDED)}


def step_of(base: Path, folder: Path, how: str, *names: str) -> dict[str, torch.Tensor]:
    count, _, sharded = how.partition(" ")
    finish(torchrun(int(count), __file__, str(base), str(folder / f"{how}.safetensors"), sharded, *names))
    return load_file(folder / f"{how}.safetensors")


def assert_equal_steps(base: Path, name: str, alone: dict[str, torch.Tensor], several: dict[str, torch.Tensor]) -> None:
    moved, difference = 0.0, 0.0
    for key, weight in load(base, "cpu").model.weights().items():
        moved += float((alone[f"{name} {key}"] - weight).square().sum())
        difference += float((several[f"{name} {key}"] - alone[f"{name} {key}"]).square().sum())
    assert moved > 0 and difference**0.5 <= 1e-6 * moved**0.5
    torch.testing.assert_close(several[f"{name} metrics"], alone[f"{name} metrics"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("how", ["2", "4"])
@pytest.mark.parametrize("name", [*ALGORITHMS, *OTHERS])
def test_a_step_of_several_ranks_is_that_of_one(base, steps, name, how):
    assert_equal_steps(base, name, steps["1"], steps[how])


@pytest.mark.parametrize("name", SHARDED)
def test_a_step_of_sharded_ranks_with_unequal_passes_is_that_of_one(base, steps, name):
    assert_equal_steps(base, name, steps["1"], steps["2 sharded"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_of_a_sharded_model_of_transformers_is_that_of_one_process(tmp_path, tied):
    write_checkpoint(tmp_path / "base", "qwen3", tie_word_embeddings=tied)
    names = ("grpo", "checkpointed")
    alone, several = (step_of(tmp_path / "base", tmp_path, how, *names) for how in ("1", "2 sharded"))
    for name in names:
        assert_equal_steps(tmp_path / "base", name, alone, several)


@pytest.fixture(scope="module")
def runs_of(base, tmp_path_factory):
    """The run of bench_faults.py by so many processes: (folder, command)."""
    folder = tmp_path_factory.mktemp("runs")

    def run(count: int, out: str, *more: str) -> Path:
        if not (folder / out / "run.json").exists() or "--resume" in more:
            command = bench_faults.command(base, folder / out, *more)[1:]
            finish(torchrun(count, *command))
        return folder / out

    return run


def metrics_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if "second" not in key} for line in lines]


def close(a: Path, b: Path) -> None:
    """Two runs are the same but for the order in which sums were taken."""
    for one, other in zip(metrics_of(a), metrics_of(b), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    first, second = (json.loads((out / "evaluation.json").read_text()) for out in (a, b))
    assert first.keys() == second.keys() and first["last"] == pytest.approx(second["last"], rel=1e-3)


def test_a_run_of_two_ranks_is_that_of_one(runs_of):
    one, two = runs_of(1, "one"), runs_of(2, "two")
    close(one, two)
    rows = [len((out / "samples.jsonl").read_text().splitlines()) for out in (one, two)]
    assert rows[0] == rows[1]  # the first rank alone writes


def test_two_ranks_saved_are_resumed_by_four_and_by_one(runs_of):
    runs_of(2, "part", "--steps", "6")
    for count, name in ((4, "four"), (1, "alone")):
        out = runs_of(2, "part").parent / name
        shutil.copytree(out.parent / "part", out)
        close(runs_of(count, name, "--resume", "--steps", "12"), runs_of(1, "one"))


def test_two_ranks_learn_from_stale_rollouts_as_one_does_and_it_goes_on_for_them(runs_of):
    flags = ("--rollout-lag", "2", "--correction", "truncate")
    one = runs_of(1, "stale", *flags)
    runs_of(2, "stale, part", *flags, "--steps", "6")
    close(runs_of(1, "stale, part", "--resume", "--steps", "12"), one)
    assert max(line.get("sampler_kl", 0) for line in metrics_of(one)) > 1e-4


def test_what_sharded_ranks_save_one_resumes_and_they_what_it_saves(runs_of):
    part, one = runs_of(2, "sharded", "--steps", "6", "--shard"), runs_of(1, "one, part", "--steps", "6")
    for name in ("weights", "optimizer", "reference"):
        kept, known = (load_file(out / "resume" / "000006" / f"{name}.safetensors") for out in (part, one))
        assert {key: x.shape for key, x in kept.items()} == {key: x.shape for key, x in known.items()}
    close(runs_of(1, "sharded", "--resume", "--steps", "12"), runs_of(1, "one"))
    close(runs_of(2, "one, part", "--resume", "--steps", "12", "--shard"), runs_of(1, "one"))


def test_fine_tuning_of_sharded_ranks_is_that_of_one_process(base, tmp_path):
    command = [str(ROOT / "sft.py"), "--model", str(base), "--limit", "24", "--batch-size", "6", "--device", "cpu"]
    command += ["--copies", "2", "--epochs", "2", "--eval-every", "3", "--learning-rate", "0.001"]
    finish(torchrun(1, *command, "--out", str(tmp_path / "one")))
    finish(torchrun(2, *command, "--out", str(tmp_path / "two"), "--shard", "--micro-batch-tokens", "60"))
    close(tmp_path / "one", tmp_path / "two")
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


def test_a_dead_rank_ends_the_others_and_a_restart_goes_on(base, tmp_path):
    """SIGKILL for one of two: torchrun starts both again, and they continue from the last state."""
    out = tmp_path / "run"
    process = torchrun(2, *bench_faults.command(base, out, "--steps", "60")[1:], more=["--max-restarts", "1"])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not states.states(out):
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    errors = finish(process)
    told = "rank 0: another process of this run has ended or is silent; |interrupted; |saved after step "  # by torchrun
    assert re.search(f"error: ({told})", errors) and "Traceback" not in errors
    assert [line["step"] for line in metrics_of(out)] == list(range(61))
    assert json.loads((out / "run.json").read_text())["resumed"]


def test_ranks_that_do_not_see_one_folder_are_told(base, tmp_path):
    for rank in range(2):
        shutil.copytree(base, tmp_path / f"run{rank}" / "base")
    run = bench_faults.command(base, tmp_path / "run0", "--steps", "1")
    subprocess.run(run, capture_output=True, check=True)
    shutil.copy(tmp_path / "run0" / "run.json", tmp_path / "run1")  # of a machine that sees no states
    again = " ".join(map(str, [*bench_faults.command(base, tmp_path / "run", "--resume")]))
    again = again.replace(str(tmp_path / "run"), str(tmp_path / "run") + "$RANK")
    process = torchrun(2, "bash", "-c", again, more=["--no-python"])
    _, errors = process.communicate(timeout=120)
    assert process.returncode and "the processes find different states in " in errors


def test_a_mistake_of_one_rank_is_told_by_all_and_none_waits(base, tmp_path):
    process = torchrun(2, *bench_faults.command(base, tmp_path / "run", "--batch-size", "1")[1:])
    _, errors = process.communicate(timeout=120)
    assert process.returncode and "2 processes need as many prompts at least" in errors
    (tmp_path / "fails.py").write_text("def mine(completions, **_):\n    raise ValueError('mine')\n")
    flags = ["--rewards", f"{tmp_path / 'fails.py'}:mine=1"]
    kept = [x for x in bench_faults.command(base, tmp_path / "other")[1:] if x not in ("--ideal-length", "5")]
    process = torchrun(2, *kept, *flags)
    _, errors = process.communicate(timeout=120)
    assert process.returncode and re.search("reward mine failed for row 0, .*: ValueError: mine", errors)


LEARNS = [
    *("--rewards", "char_length=1", "--ideal-length", "5", "--batch-size", "8", "--num-generations", "8"),
    *("--max-new-tokens", "12", "--learning-rate", "2e-3", "--steps", "25", "--eval-every", "25", "--eval-limit", "2"),
    *("--device", "cpu"),
]


def test_two_ranks_learn(base, tmp_path):
    """From random completions, nearly all of which are cut at 12 characters, to the five that are rewarded."""
    command = [str(ROOT / "grpo.py"), *LEARNS, "--model", str(base), "--out", str(tmp_path / "run")]
    finish(torchrun(2, *command))
    rewards = [line["reward"] for line in metrics_of(tmp_path / "run")[1:]]
    assert sum(rewards[:3]) / 3 < 0.55 and sum(rewards[-3:]) / 3 > 0.85, rewards


def alone(count: int, *command: str) -> list[subprocess.Popen]:
    """A command in so many processes that nothing watches over."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | meet
    return [
        subprocess.Popen([sys.executable, *command], env=environment | {"RANK": str(rank)}, **pipes)
        for rank in range(count)
    ]


def wait_for(out: Path, step: int) -> None:
    """Until a step is in the metrics."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if f'"step": {step},' in (out / "metrics.jsonl").read_text():
                return
        time.sleep(0.01)
    raise AssertionError(f"no step {step} in {out}")


def test_a_dead_rank_that_nothing_restarts_ends_the_other_with_a_line(base, tmp_path):
    """SIGKILL for the one by which they met, where no torchrun watches: the other finds it out by itself."""
    out = tmp_path / "run"
    processes = alone(2, *bench_faults.command(base, out, "--steps", "2000")[1:])
    wait_for(out, 3)
    processes[0].kill()
    _, errors = processes[1].communicate(timeout=30)
    processes[0].communicate()
    (line,) = [line for line in re.split("[\r\n]+", errors) if "error" in line.lower()]
    assert "rank 1: another process of this run has ended or is silent; the last state stays, --resume goes on" in line
    assert processes[1].returncode == 2 and "Traceback" not in errors
    for _, path in states.states(out)[:2]:
        known = json.loads((path / "checksums.json").read_text())
        assert known == {"format": states.FORMAT, **states.checksums(path)}


def test_a_signal_to_one_of_two_ranks_saves_and_ends_both(base, runs_of, tmp_path):
    """To the one that does not write, even; continued by one, the run is that of two that nothing stopped."""
    out = tmp_path / "run"
    processes = alone(2, *bench_faults.command(base, out, "--save-every", "100")[1:])
    wait_for(out, 5)
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], said
    saved = re.search(r"saved after step (\d+); continue with: torchrun --nproc-per-node 2 ", said[0])
    assert int(saved[1]) == states.states(out)[0][0] >= 5 and "Traceback" not in "".join(said)
    finish(*alone(1, *bench_faults.command(base, out, "--save-every", "100", "--resume")[1:]))
    close(out, runs_of(2, "two"))


if __name__ == "__main__":
    weights_of_a_step(*sys.argv[1:])
