"""A run's states: what continuing it needs, written whole, checked by checksums, the newest whole one taken."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

import ranks
from commands import (
    UserError,
    atomic_write,
    load_tensors,
    load_weights,
    read_json,
    save_tensors,
    write_json,
)

REPLACED = ".replaced"  # where --overwrite keeps the old run until the new one has a state of its own


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
    found = [path for path in (out / "resume").glob("[0-9]*") if path.name.removesuffix("+").isdigit()]
    return sorted(((int(path.name.removesuffix("+")), path) for path in found), reverse=True)


def save_state(out: Path, position: Position, models: dict, optimizer: torch.optim.Optimizer) -> None:
    """Write all that continuing after the position needs to out/resume/STEP; the newest two stay.

    The folder is written under another name and renamed, so that a state is there whole or not at all; one that is
    there stays as it is. `models` are those that training changes, by the name of their file; the optimizer's is
    "weights". The best checkpoint so far is kept by a hard link. The first rank writes, what is sharded all give.
    """
    folder, partial = out / "resume" / position.folder, out / "resume" / ".partial"
    weights, moments = {name: model.weights() for name, model in models.items()}, moments_of(models, optimizer)
    if folder.exists() or not ranks.FIRST:
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
        write_json(partial / "checksums.json", checksums(partial))
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
    if read_json(folder / "checksums.json") != checksums(folder):
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
            state["state"][i] = {key: ranks.split(x, weight) for key, x in kept.items()}
    for name, model in models.items():
        load_weights(folder / f"{name}.safetensors", model)
    optimizer.load_state_dict(state)
    return position


def lines_until(path: Path, step: int) -> str:
    """The whole lines of a metrics file up to and including a step; raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"--resume: {path} is damaged ({error}); use --overwrite to start again") from error
