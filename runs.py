"""What every command shares: mistakes in one line, settings and flags, a run's folder, states and loop.

Randomness is a function of seed and step, so weights, optimizer and `Position` are a run's whole state.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.metadata
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_origin

import safetensors
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm


class UserError(ValueError):
    """A mistake of the user's; its one line names the thing and the mend."""


def printable(text: str) -> str:
    """The text with control, format and other invisible characters escaped, line breaks kept: safe for a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


FREE_GROUPS = ("how long", "run folder")  # which --resume may change; elsewhere only what its field says
GROUPS = ("model and data", "algorithm", "sampling", "rewards", "evaluation", "memory and device", *FREE_GROUPS)


def option(default, text: str, group: str, **more):
    """A field of a settings class, with its sentence of help, and the group in which --help lists it.

    `more`: `above_zero`, `at_least` and `at_most` bound a number; `may_change` says whether --resume may change it.
    """
    metadata = {"help": text, "group": group, "may_change": group in FREE_GROUPS, **more}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def flag_of(name: str) -> str:
    """A setting's flag, as it is shown."""
    return f"--{name.replace('_', '-')}"


def choices_of(kind) -> tuple:
    """The values of a Literal, or of a Literal or None; () for any other type."""
    literals = [part for part in (kind, *get_args(kind)) if get_origin(part) is Literal]
    return get_args(literals[0]) if literals else ()


def optional_fields(row: type, default: str) -> type:
    """A settings class with every field of another, None where it is not given; `default` ends each sentence."""
    described = []
    for f in fields(row):
        described.append((f.name, f.type | None, option(None, f"{f.metadata['help']} {default}", f.metadata["group"])))
    return dataclasses.make_dataclass(f"{row.__name__}Flags", described, frozen=True)


def check_settings(settings) -> None:
    """Raise UserError for a value that is not offered, and for a number that is out of bounds or not finite."""
    for f in fields(settings):
        value, offered, flag = getattr(settings, f.name), choices_of(f.type), flag_of(f.name)
        if offered and value not in (*offered, f.default):
            raise UserError(f"{flag}: {value!r} is not offered; there is {', '.join(map(str, offered))}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            positive, least = f.metadata.get("above_zero"), f.metadata.get("at_least", 0)
            most = f.metadata.get("at_most", 2**63 - 1)
            if not least <= value < math.inf or (value == 0 and positive):
                raise UserError(f"{flag} is {value}; it must be {'above 0' if positive else f'{least} or above'}")
            if value > most:
                raise UserError(f"{flag} is {value}; it must be at most {most}")


@dataclass(frozen=True)
class RunSettings:
    """Settings of everything that trains: grpo.py and sft.py extend them."""

    model: str | None = option(None, "Checkpoint folder, or model of the hub. Default: a new toy.", "model and data")
    policy: Literal["transformer", "autoencoder"] = option(
        "transformer", "Kind of policy that is trained; an autoencoder is for odd_even only.", "model and data"
    )
    data: str | None = option(None, "File or folder with the task's records. Default: the hub's.", "model and data")
    limit: int | None = option(None, "At most so many problems of each split.", "model and data", above_zero=True)
    shots: int = option(0, "Worked examples before each question, taken from the training problems.", "model and data")
    chat_template: str | None = option(
        None, "File with another chat template, or none: ask in plain text. Default: the model's.", "model and data"
    )
    thinking: Literal["on", "off"] | None = option(
        None, "Whether the chat template asks for thinking, if it can. Default: as it does.", "model and data"
    )
    seed: int = option(0, "Seed of the run's random numbers; never of the split.", "model and data")
    clip_grad_norm: float = option(
        1.0, "A gradient with a larger norm is scaled to it.", "algorithm", above_zero=True, may_change=True
    )
    device: str = option("auto", "Device: auto, cuda, mps or cpu.", "memory and device", may_change=True)
    dtype: Literal["float32", "bfloat16"] | None = option(  # float16 would need its loss scaled
        None, "Of matrix products. Default: float32; on a GPU bfloat16 if the model is no toy.", "memory and device"
    )
    gradient_checkpointing: bool = option(False, "Compute activations again in the backward pass.", "memory and device")
    micro_batch_tokens: int = option(
        16384, "Most tokens in one pass; changes no gradient.", "memory and device", above_zero=True, may_change=True
    )
    eval_every: int = option(5, "Measure on validation problems every so many steps.", "how long", above_zero=True)
    patience: int | None = option(
        None, "Stop after so many validations without a better one. Default: never.", "how long", above_zero=True
    )
    save_every: int = option(10, "Save a state to resume from every so many steps.", "run folder", above_zero=True)
    resume: bool = option(False, "Continue the run in --out from its newest state.", "run folder")
    overwrite: bool = option(False, "Replace the run that --out holds.", "run folder")

    def __post_init__(self):
        check_settings(self)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows one spelling of each flag, and its default unless that is None, off, or told by the sentence itself."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs in (0, "?"):
            return (action.option_strings or [action.dest])[-1]
        values = f"{{{','.join(map(str, action.choices))}}}" if action.choices else METAVARS.get(action.type, "TEXT")
        return f"{action.option_strings[-1]} {values}"

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.default in (None, False, argparse.SUPPRESS) or "Default:" in action.help
        return action.help if told else f"{action.help} Default: {action.default}."


METAVARS = {int: "N", float: "X"}


def parser_for(settings: type, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser with a flag per field of a settings class, in groups; a mistake is one line and exit status 2."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message):
            message = re.sub(r"--\w+/(--[\w-]+)", r"\1", message)  # one spelling is enough
            self.exit(2, f"{self.prog}: error: {printable(message)}; --help lists the flags\n")

    parts = []
    for group in GROUPS:
        flags = []
        for f in sorted(fields(settings), key=lambda f: f.name not in settings.__annotations__):  # shared ones last
            if f.metadata["group"] == group:
                metadata = {"help": f.metadata["help"].replace("%", "%%")}
                copied = field(default=f.default, default_factory=f.default_factory, metadata=metadata)
                flags.append((f.name, f.type, copied))
        parts.append(dataclasses.make_dataclass("Flags", flags, namespace={"_argument_group_name": group}))
    look = {"usage": "%(prog)s [--flag value ...]", "formatter_class": HelpFormatter}
    return Parser(parts, description=description, epilog=examples, allow_abbrev=False, **look)


def parse_settings(settings: type, description: str, examples: str):
    """Settings from the command line; with --resume, those of the run folder, of which flags may change some."""
    parser = parser_for(settings, description, examples)
    arguments = parser.parse_args()
    if arguments.resume:
        path = Path(arguments.out) / "run.json"
        if not path.is_file():
            raise UserError(f"--resume: {arguments.out!r} holds no run; leave out --resume to start one")
        stored, known = read_json(path).get("settings"), {f.name: f for f in fields(settings)}
        if not isinstance(stored, dict) or "task" not in stored or not stored.keys() <= known.keys():
            raise UserError(f"--resume: {path} does not hold the settings of such a run; start again with --overwrite")
        stored = {name: f.default for name, f in known.items()} | stored  # an older run lacks newer settings
        parser.set_defaults(**stored | {"out": arguments.out, "resume": True, "overwrite": False})
        arguments = parser.parse_args()
        fixed = [name for name, f in known.items() if not f.metadata["may_change"]]
        changed = [name for name in fixed if getattr(arguments, name) != stored[name]]
        if changed:
            old = [f"{flag_of(name)} {'left out' if stored[name] is None else stored[name]}" for name in changed]
            made = f"the run in {arguments.out!r} was made with {', '.join(old)}"
            raise UserError(f"--resume: {made}; leave the flag out")
    return settings(**vars(arguments))


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under another name, then fsync and rename it: there is never half a file at `path`."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: dict) -> None:
    atomic_write(path, lambda partial: partial.write_text(json.dumps(value, indent=2) + "\n"))


def append_json(path: Path, *values: dict) -> None:
    """Append a line of JSON for each value."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def read_json(path: Path) -> dict:
    """The JSON object in a file; raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore the file or make the run again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; restore the file or make the run again")
    return value


def save_weights(path: Path, model) -> None:
    """Write the model's `weights()` as safetensors."""
    weights = {name: value.contiguous() for name, value in model.weights().items()}
    atomic_write(path, lambda partial: save_file(weights, partial, metadata={"format": "pt"}))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; raises UserError."""
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore the file or make the run again") from error


def load_weights(path: Path, model, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Give the model the tensors of a safetensors file (or those already read from there); raises UserError."""
    try:
        model.load_weights(load_tensors(path) if tensors is None else tensors)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit its config.json ({first}); restore the checkpoint") from error


def start_run(config: RunSettings, **more) -> None:
    """Make the folder --out with its run.json, or note there the settings of a resumed run; raises UserError."""
    out, settings = Path(config.out), dataclasses.asdict(config)
    if config.resume:
        write_json(out / "run.json", read_json(out / "run.json") | {"settings": settings})
        return
    if config.model is not None and Path(config.model).resolve() == out.resolve():
        raise UserError(f"--out: {config.out!r} is --model itself, which the run would replace; name another folder")
    if not config.overwrite and any((out / name).exists() for name in ("run.json", "config.json", "metrics.jsonl")):
        raise UserError(f"--out: {config.out!r} already holds a run; --resume continues it, --overwrite replaces it")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl", "evaluation.json", "model.safetensors"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "resume", ignore_errors=True)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    machine = {"python": sys.version.split()[0], "threads": torch.get_num_threads(), "git_commit": commit}
    write_json(out / "run.json", {"settings": settings, **more, "versions": versions, **machine})


@dataclass
class Position:
    """Where a run stands: everything but weights and optimizer that continuing it needs."""

    step: int = 0
    best_step: int | None = None  # None before the first validation
    best_score: float = -math.inf
    validations_since_best: int = 0
    reward_state: dict = field(default_factory=dict)  # of adaptive rewards


def save_state(out: Path, position: Position, models: dict, optimizer: torch.optim.Optimizer) -> None:
    """Write all that continuing after the position needs to out/resume/STEP, then point to it; the newest two stay.

    The folder is written under another name and renamed, so that a state is there whole or not at all. `models` are
    those that training changes, by the name of their file; the optimizer's is "weights". The best checkpoint so far is
    kept by a hard link.
    """
    folder, partial = out / "resume" / f"{position.step:06d}", out / "resume" / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = [name for name, _ in models["weights"].named_parameters()]
    moments = {f"{names[i]} {key}": x for i, s in optimizer.state_dict()["state"].items() for key, x in s.items()}
    for name, model in models.items():
        save_weights(partial / f"{name}.safetensors", model)
    atomic_write(partial / "optimizer.safetensors", lambda path: save_file(moments, path))
    write_json(partial / "position.json", dataclasses.asdict(position))
    if (out / "model.safetensors").exists():
        try:
            os.link(out / "model.safetensors", partial / "best.safetensors")
        except OSError:  # a file system without hard links
            shutil.copyfile(out / "model.safetensors", partial / "best.safetensors")
    shutil.rmtree(folder, ignore_errors=True)  # of the same step: not before the new one is whole
    os.replace(partial, folder)
    atomic_write(out / "resume" / "latest", lambda path: path.write_text(folder.name))
    for old in sorted((path for path in (out / "resume").glob("[0-9]*")), key=lambda path: int(path.name))[:-2]:
        shutil.rmtree(old)


def load_state(out: Path, models: dict, optimizer: torch.optim.Optimizer) -> Position:
    """Restore the newest saved state and return its position; metrics and samples after it are cut off.

    Raises UserError, before any file is changed, for a state that is missing or damaged.
    """
    try:
        name = (out / "resume" / "latest").read_text(encoding="utf-8")
        if not re.fullmatch("[0-9]{6,12}", name):
            raise ValueError("resume/latest names no state")
        folder = out / "resume" / name
        stored = read_json(folder / "position.json")
        for f in fields(Position):
            if not isinstance(stored[f.name], f.type):
                raise ValueError(f"{f.name} in position.json is not of type {f.type}")
        position = Position(**stored)
        if position.step != int(name):
            raise ValueError("position.json is not of this step")
        for name, model in models.items():
            load_weights(folder / f"{name}.safetensors", model)
        moments, state = load_tensors(folder / "optimizer.safetensors"), optimizer.state_dict()
        for i, (name, _) in enumerate(models["weights"].named_parameters()):
            if position.step:  # before the first step there are none
                state["state"][i] = {key: moments[f"{name} {key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.load_state_dict(state)
        logs = [out / name for name in ("metrics.jsonl", "samples.jsonl") if (out / name).exists()]
        kept = {path: lines_until(path, position.step) for path in logs}
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"--resume: the state in {out} is damaged ({error}); use --overwrite to start again") from error
    for path, text in kept.items():
        atomic_write(path, lambda partial, text=text: partial.write_text(text, encoding="utf-8"))
    if (folder / "best.safetensors").exists():
        atomic_write(out / "model.safetensors", lambda path: shutil.copyfile(folder / "best.safetensors", path))
    return position


def lines_until(path: Path, step: int) -> str:
    """The whole lines of a metrics file up to and including a step."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)


@dataclass(kw_only=True)
class Run:
    """A training run: what it trains, where it stands, and the bookkeeping of its loop, which runs inside `with run:`.

    SIGINT and SIGTERM let the loop finish its step, save, and leave with the command that continues; a second one acts
    at once.
    """

    name: ClassVar[str]  # on the progress bar
    shown: ClassVar[tuple[str, ...]]  # metrics beside the progress bar
    warnings: ClassVar[dict[str, tuple[Callable[[dict], bool], str]]] = {}  # name: is it sick, a sentence with the mend

    config: RunSettings
    policy: object  # with a `model`
    optimizer: torch.optim.Optimizer
    last_step: int
    position: Position = field(default_factory=Position)
    stopped: str | None = None  # why training ends early, in words
    warned: set = field(default_factory=set)
    signal: int = 0

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def models(self) -> dict:
        """The models that training changes, by the name that their file has in a state."""
        return {"weights": self.policy.model}

    def __enter__(self):
        self.bar = tqdm(desc=self.name, initial=self.position.step, total=self.last_step, unit="step")
        self.handlers = {number: signal.signal(number, self.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def interrupt(self, number, frame) -> None:
        self.signal = number
        tqdm.write("finishing the step, then saving; once more stops at once", file=sys.stderr)
        self.restore_handlers()

    def restore_handlers(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def __exit__(self, kind, error, traceback) -> None:
        self.restore_handlers()
        self.bar.close()
        if isinstance(error, FloatingPointError):
            mend = "the states saved before it are kept: use --resume with a lower --learning-rate"
            raise UserError(f"step {self.position.step + 1}: not finite ({error}); {mend}") from error

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left: to the last, to a signal, or to a reason, which is printed."""
        self.stopped = self.reason_to_stop(self.last_metrics())
        while self.position.step < self.last_step and not self.stopped and not self.signal:
            yield self.position.step + 1
        if self.signal:
            self.save()
            self.bar.close()
            print(f"saved after step {self.position.step}; continue with: {continue_command()}", file=sys.stderr)
            sys.exit(128 + self.signal)
        if self.stopped:
            self.say(f"stopped after step {self.position.step}: {self.stopped}")

    def is_due(self, step: int, every: int) -> bool:
        """Whether what is done every so many steps, and at the end, is done after this one."""
        return step % every == 0 or step == self.last_step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """End a step: a line of metrics.jsonl, the progress bar, warnings, a state to resume from, an early stop."""
        self.position.step = step
        append_json(self.out / "metrics.jsonl", {"step": step, **metrics})
        self.warn(metrics)
        self.stopped = self.reason_to_stop(metrics)
        if self.is_due(step, self.config.save_every) or self.stopped:
            self.save()
        numbers = {name: f"{metrics[name]:.3f}" for name in self.shown if name in metrics}
        if "tokens_per_second" in metrics:
            numbers["tok/s"] = f"{metrics['tokens_per_second']:.0f}"
        self.bar.set_postfix(numbers, refresh=False)
        self.bar.update(step - self.bar.n)

    def note_score(self, step: int, score: float) -> bool:
        """Take note of a validation score; returns whether it is the best so far, as the first is in any case."""
        position = self.position
        best = position.best_step is None or score > position.best_score
        if best:
            position.best_step, position.best_score, position.validations_since_best = step, score, 0
        else:
            position.validations_since_best += 1
        return best

    def reason_to_stop(self, metrics: dict[str, float]) -> str | None:
        """Why training ends early, in words, or None."""
        stale, patience = self.position.validations_since_best, self.config.patience
        if patience is not None and stale >= patience:
            return f"no better validation score in {stale} evaluations (--patience)"
        return None

    def last_metrics(self) -> dict[str, float]:
        """The last line of metrics.jsonl, {} before there is one."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return json.loads(lines[-1]) if lines else {}

    def warn(self, metrics: dict[str, float]) -> None:
        """Say in a plain sentence what is sick about a step, each thing once."""
        for name, (is_sick, sentence) in self.warnings.items():
            if name not in self.warned and is_sick(metrics):
                self.warned.add(name)
                self.say(f"warning: step {self.position.step}: {sentence}", file=sys.stderr)

    def say(self, text: str, file=None) -> None:
        """Print above the progress bar."""
        self.bar.write(text, file=file)

    def save(self) -> None:
        save_state(self.out, self.position, self.models, self.optimizer)

    def restore(self) -> None:
        """Go back to the newest state, or to before the first step where none has been saved yet."""
        if (self.out / "resume" / "latest").exists():
            self.position = load_state(self.out, self.models, self.optimizer)
        else:
            for name in ("metrics.jsonl", "samples.jsonl"):
                (self.out / name).unlink(missing_ok=True)


def adamw(model, weight_decay: float) -> torch.optim.AdamW:
    """The optimizer of every run; its learning rate is set at each step."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)


def descend(optimizer: torch.optim.Optimizer, loss: float, largest: float) -> float:
    """Take an optimizer step along the clipped gradient and return its norm before clipping.

    Raises FloatingPointError, before the optimizer moves, if the loss or the gradient is not finite.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, largest).item()
    if not math.isfinite(loss + norm):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return norm


@contextlib.contextmanager
def out_of_memory(flags: str):
    """Turn running out of memory into a UserError that names the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise UserError(f"out of memory; lower {flags}") from error


def continue_command() -> str:
    return "python " + shlex.join([*sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])


def keep_memory() -> None:
    """Let glibc keep what tensors free: fresh pages for every large tensor cost 10 to 20 % of an update, and more."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing goes back to the system
    except (AttributeError, OSError, TypeError):  # no glibc
        pass


def run_main(main: Callable[[], int | None], resumable: bool = False) -> None:
    """Run a command: mistakes become one line on stderr and exit status 2, an interrupt its usual status."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal without the character must not stop a run

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, interrupt)
    keep_memory()
    status = 2
    try:
        sys.exit(main())
    except UserError as error:
        message = str(error)  # it may quote a completion
    except FloatingPointError as error:
        message = f"{error}; restore the checkpoint, or train with a lower --learning-rate"
    except OSError as error:
        message = f"{error.filename or 'output'}: {error.strerror}; free space, or give a folder that can be written"
    except KeyboardInterrupt as error:
        message = f"interrupted; continue with: {continue_command()}" if resumable else "interrupted"
        status = 128 + (error.args[0] if error.args else signal.SIGINT)
    print(f"{Path(sys.argv[0]).name}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(status)
