"""A run's folder: who may write there, run.json, and the states that continuing it needs.

A state is written whole and checked by checksums, and the newest whole one is taken.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

import ranks
from commands import UserError, atomic_write, flag_of, load_tensors, load_weights, read_json, save_tensors, write_json

FORMAT = 1  # of run.json and of states; another number means that this code cannot continue them
REPLACED = ".replaced"  # where --overwrite keeps the old run until the new one has a state of its own


def about_machine() -> dict:
    """Versions, threads and commit, as run.json keeps them."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    python = sys.version.split()[0]
    return {"versions": versions, "python": python, "threads": torch.get_num_threads(), "git_commit": commit}


LOCKS = {}  # open files by folder: the lock ends with the process


def lock(out: Path) -> None:
    """Keep other processes from writing into a run's folder for as long as this one lives; raises UserError."""
    try:
        import fcntl
    except ImportError:  # not on every system
        return
    if out in LOCKS:
        return
    file = open(out / ".lock", "w")  # noqa: SIM115 - held open, which is the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        mend = "wait for it, or name another folder"
        raise UserError(f"--out: another process writes into {str(out)!r}; {mend}") from error
    LOCKS[out] = file


RUN_FILES = ("run.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "model.safetensors", "resume")
CHECKPOINT_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja"),
)


def start_run(config, **more) -> None:
    """Open the folder --out, and make its run.json unless a run goes on there; raises UserError.

    To be called when all else has been checked: with --overwrite the run that is there is moved aside.
    """
    functions = 1 + str(getattr(config, "rewards", "")).count(",")  # which the first rank alone calls
    ranks.begin(max(1800.0, (1 + functions) * getattr(config, "reward_timeout", 0.0)))
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    ranks.gather(None)  # every rank has checked what it found there
    ranks.first(open_folder, config, more)


def open_folder(config, more: dict) -> None:
    """Lock the folder, move aside what --overwrite replaces, and make run.json; raises UserError."""
    out = Path(config.out)
    if config.resume:
        return lock(out)
    inside = set()  # what the run is made of and lies in the folder
    for name in ("model", "scorer", "data"):
        path = Path(getattr(config, name, None) or "/").resolve()
        inside |= {path.name} if out.resolve() in path.parents else set()
        if path == out.resolve() or inside - {"base"}:
            raise UserError(f"--out: {config.out!r} holds --{name} itself, which must stay; name another folder")
    held = [name for name in (*RUN_FILES, "config.json") if (out / name).exists()]
    if held and not config.overwrite:
        raise UserError(f"--out: {config.out!r} already holds a run; --resume continues it, --overwrite replaces it")
    if held and "run.json" not in held:
        raise UserError(f"--out: {config.out!r} holds {held[0]} but no run, and stays as it is; name another folder")
    settings, version = dataclasses.asdict(config), {"format": FORMAT, "launch": ranks.launch()}
    about = {"settings": settings, **more, **about_machine(), **version}
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    move_aside(out, ["base"] * (not inside))
    write_json(out / "run.json", about)


def move_aside(out: Path, more: list[str]) -> None:
    """Move a run's files to `.replaced`, which goes when the new run has a state; run.json last.

    What lies there already is kept where it is a whole run, moved there for one that never came to a state.
    """
    aside = out / REPLACED
    if (aside / "run.json").exists() and states(out):
        shutil.rmtree(aside)
    if not (out / "run.json").exists():
        return
    kept = (aside / "run.json").exists()
    aside.mkdir(exist_ok=True)
    for path in [out / name for name in (*more, *CHECKPOINT_FILES, *reversed(RUN_FILES))]:
        if path.exists() and not kept:
            os.replace(path, aside / path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def pin(config, **digests: str) -> None:
    """Keep in run.json what the run starts from; raises UserError where a resumed run finds something else."""

    def compare() -> None:
        path = Path(config.out) / "run.json"
        stored = read_json(path)
        pinned = stored.get("starts_from", {})
        if not isinstance(pinned, dict):
            raise UserError(f"--resume: {path} does not say what the run starts from; start again with --overwrite")
        for name, digest in digests.items():
            if pinned.get(name, digest) != digest:
                what = f"{flag_of(name)} is not what the run was made with"
                raise UserError(f"--resume: {what}; restore it, or start another run")
        if not pinned.keys() >= digests.keys():
            write_json(path, stored | {"starts_from": digests | pinned})

    for name, digest in digests.items():
        if set(ranks.gather(digest)) != {digest}:
            raise UserError(f"{flag_of(name)} is not the same for all processes; give each the same files")
    ranks.first(compare)


def note_stretch(config, step: int) -> None:
    """Keep in run.json that a run goes on from a step, with what settings, and on which machine."""
    path, settings = Path(config.out) / "run.json", dataclasses.asdict(config)
    stored = read_json(path)
    before = stored.get("resumed")
    stretches = [*(before if isinstance(before, list) else []), {"step": step, **about_machine()}]
    write_json(path, stored | {"settings": settings, "resumed": stretches, "launch": ranks.launch()})


def digest_of(model=None, data: dict | None = None) -> str:
    """SHA-256 of a model's weights, or of the examples of each split."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.weights().items()) if model is not None else ():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for split, examples in (data or {}).items():
        digest.update(f"{split}: {examples}".encode())
    return digest.hexdigest()


@dataclass
class Position:
    """Where a run stands: everything but weights and optimizer that continuing it needs."""

    step: int = 0
    best_step: int | None = None  # None before the first validation
    best_score: float = -math.inf
    validations_since_best: int = 0
    bad_steps: int = 0  # in a row, up to this step
    reward_state: dict = field(default_factory=dict)  # of adaptive rewards
    updated: dict = field(default_factory=dict)  # what the next step measured, if only its end is missing

    @property
    def folder(self) -> str:
        return f"{self.step:06d}{'+' * bool(self.updated)}"


def states(out: Path) -> list[tuple[int, Path]]:
    """The states of a run by number, newest first."""
    found = [path for path in (out / "resume").glob("[0-9]*") if path.name.removesuffix("+").isdecimal()]
    return sorted(((int(path.name.removesuffix("+")), path) for path in found), reverse=True)


def save_state(
    out: Path, position: Position, models: dict, optimizer: torch.optim.Optimizer, write_logs: Callable = lambda: None
) -> None:
    """Write all that continuing after the position needs to out/resume/STEP; the newest two stay.

    The folder is written under another name and renamed, so that a state is there whole or not at all; one that is
    there stays as it is. `models` are those that training changes, by the name of their file; the optimizer's is
    "weights". The best checkpoint so far is kept by a hard link. The first rank writes, what is sharded all give.
    """
    folder, partial = out / "resume" / position.folder, out / "resume" / ".partial"
    weights, moments = {name: model.weights() for name, model in models.items()}, moments_of(models, optimizer)
    if not ranks.FIRST:
        return
    write_logs()  # without its lines a state would be less than the run
    if folder.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, tensors in weights.items():
            save_tensors(partial / f"{name}.safetensors", tensors)
        save_tensors(partial / "optimizer.safetensors", moments)
        write_json(partial / "position.json", dataclasses.asdict(position))
        if (out / "model.safetensors").exists():
            try:
                os.link(out / "model.safetensors", partial / "best.safetensors")
            except OSError:  # a file system without hard links
                shutil.copyfile(out / "model.safetensors", partial / "best.safetensors")
        write_json(partial / "checksums.json", {"format": FORMAT, **checksums(partial)})
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for _, old in states(out)[2:]:
        shutil.rmtree(old)
    shutil.rmtree(out / REPLACED, ignore_errors=True)


def moments_of(models: dict, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What the optimizer keeps of each weight, whole, under its name; on the other ranks nothing."""
    names, moments = [name for name, _ in models["weights"].named_parameters()], {}
    for i, kept in optimizer.state_dict()["state"].items():
        for key, x in kept.items():
            x = ranks.full(x)
            if ranks.FIRST:
                moments[f"{names[i]} {key}"] = x.cpu()  # one after the other, not all at once on the device
    return moments


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a state."""
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name != "checksums.json":
            with open(path, "rb") as file:
                sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def load_state(out: Path, models: dict, optimizer: torch.optim.Optimizer, write: bool = True) -> Position | None:
    """Restore the newest whole state and return its position, or None if there is no state at all.

    A damaged state is named and the one before it taken. With `write`, what metrics and samples have after it is cut
    off, and damaged states are removed. Raises UserError, before any file is changed, if none is whole.
    """
    damaged = []
    for step, folder in states(out):
        try:
            position = read_state(folder, step, models, optimizer)
            break
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            damaged.append(f"{folder} ({error})")
    else:
        if damaged:
            what = f"no state in {out} is whole: {', '.join(damaged)}"
            raise UserError(f"--resume: {what}; use --overwrite to start again")
        return None
    logs = [out / name for name in ("metrics.jsonl", "samples.jsonl") if (out / name).exists()]
    kept = {path: lines_until(path, position.step) for path in logs}
    if write and ranks.FIRST:
        for text in damaged:
            print(f"damaged: {text}; going on from {folder}", file=sys.stderr)
        for _, other in states(out)[: len(damaged)]:
            shutil.rmtree(other)
        for path, text in kept.items():
            atomic_write(path, lambda partial, text=text: partial.write_text(text, encoding="utf-8"))
        if (folder / "best.safetensors").exists():
            atomic_write(out / "model.safetensors", lambda path: shutil.copyfile(folder / "best.safetensors", path))
    return position


def read_state(folder: Path, step: int, models: dict, optimizer: torch.optim.Optimizer) -> Position:
    """The position of a state, its tensors given to models and optimizer; raises an error that says what is damaged."""
    known = read_json(folder / "checksums.json")
    if known.pop("format", 0) != FORMAT:
        raise ValueError("it is of another version of this program")
    if known != checksums(folder):
        raise ValueError("its files are not those that checksums.json knows")
    stored = read_json(folder / "position.json")
    for f in fields(Position):
        if not isinstance(stored[f.name], f.type):
            raise ValueError(f"{f.name} in position.json is not of type {f.type}")
    position = Position(**stored)
    if position.step != step:
        raise ValueError("position.json is not of this step")
    moments, state = load_tensors(folder / "optimizer.safetensors"), optimizer.state_dict()
    for i, (name, weight) in enumerate(models["weights"].named_parameters()):
        if f"{name} step" in moments:  # not before the first step
            kept = {key: moments[f"{name} {key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            if {x.shape for key, x in kept.items() if key != "step"} != {weight.shape}:
                raise ValueError(f"the optimizer's tensors of {name} are of another shape")
            state["state"][i] = {key: ranks.split(x, weight) for key, x in kept.items()}
    for name, model in models.items():
        load_weights(folder / f"{name}.safetensors", model)
    optimizer.load_state_dict(state)
    return position


def lines_until(path: Path, step: int) -> str:
    """The whole lines of a metrics file up to and including a step; raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"--resume: {path} is damaged ({error}); use --overwrite to start again") from error
