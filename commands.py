"""What every command line shares: mistakes in one line, settings as flags, files written whole, how it ends."""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import json
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from types import UnionType
from typing import Literal, get_args, get_origin

import safetensors
import torch
from safetensors.torch import load_file, save_file


class UserError(ValueError):
    """A mistake of the user's; its one line names the thing and the mend."""


class NotFinite(FloatingPointError):
    """A NaN or an infinity where a number belongs, and the rows (question, completion) that it came from, if known."""

    def __init__(self, what: str, rows: list[dict] = ()):
        super().__init__(what, rows)  # both, so that it can go from one process to another
        self.what, self.rows = what, list(rows)

    def __str__(self) -> str:
        return self.what


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


def has_type(value, kind) -> bool:
    """Whether a setting is of the type that its field says; a whole number is a float, too."""
    parts = get_args(kind) if isinstance(kind, UnionType) else [kind]
    kinds = [get_origin(part) or part for part in parts]
    return type(value) in kinds or (float in kinds and type(value) is int)


def check_settings(settings) -> None:
    """Raise UserError for a value that is not offered, and for a number that is out of bounds or not finite."""
    for f in fields(settings):
        value, offered, flag = getattr(settings, f.name), choices_of(f.type), flag_of(f.name)
        if not offered and not has_type(value, f.type):
            raise UserError(f"{flag}: {value!r:.80} is of another type; leave the flag out, or give another value")
        if offered and value not in (*offered, f.default):
            raise UserError(f"{flag}: {value!r} is not offered; there is {', '.join(map(str, offered))}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            positive, least = f.metadata.get("above_zero"), f.metadata.get("at_least", 0)
            most = f.metadata.get("at_most", 2**63 - 1)
            if not least <= value < math.inf or (value == 0 and positive):
                raise UserError(f"{flag} is {value}; it must be {'above 0' if positive else f'{least} or above'}")
            if value > most:
                raise UserError(f"{flag} is {value}; it must be at most {most}")


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
    parser = Parser(parts, description=description, epilog=examples, allow_abbrev=False, **look)
    for action in parser._actions:  # a switch of the table of algorithms needs no value, like any other
        if bool | None in [f.type for f in fields(settings) if f.name == action.dest]:
            action.nargs, action.const = "?", True
    return parser


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under another name, then fsync and rename it: there is never half a file at `path`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:  # on a full disk half a file of gigabytes would be in the way of the next
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: dict) -> None:
    atomic_write(path, lambda partial: partial.write_text(json.dumps(value, indent=2) + "\n"))


def append_json(path: Path, *values: dict) -> None:
    """Append a line of JSON for each value, all or, where the disk is full, none."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(value) + "\n" for value in values)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def read_json(path: Path) -> dict:
    """The JSON object in a file; raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore the file or make the run again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; restore the file or make the run again")
    return value


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file; raises OSError, also for what the library calls otherwise."""
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    try:
        atomic_write(path, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))
    except safetensors.SafetensorError as error:
        raise os_error(error, path) from error


def os_error(error: Exception, path: Path) -> OSError:
    """What a library in Rust calls otherwise."""
    found = re.search(r"os error ([0-9]+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number), str(path))


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


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory was asked for and not there."""
    said = "allocate memory" in str(error) or str(error).strip() == "could not create a primitive"  # oneDNN, its kernel
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or said


@contextlib.contextmanager
def out_of_memory(flags: str):
    """Turn running out of memory into a UserError that names the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory; lower {flags}") from error


def continue_command() -> str:
    size = int(os.environ.get("WORLD_SIZE", 1))
    start = "python " if size == 1 else f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', size)} "
    return start + shlex.join([*sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])


def describe(error: OSError) -> str:
    """An error of the file system in words, with the mend where there is one."""
    mends = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; free space")
    mends |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; give a folder that can be written")
    return f"{error.filename or 'output'}: {error.strerror or error}{mends.get(error.errno, '')}"


def keep_memory() -> None:
    """Let glibc keep what tensors up to 32 MB free: fresh pages for each cost a fifth of an update of the toy.

    Larger ones have a mapping of their own, lest the gaps that they leave double the memory of a real model.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, the most that glibc takes
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing goes back to the system


def return_memory() -> None:
    """Give back what is free: between evaluations of the main job the gaps among lasting things grow to 0.7 GB."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


class Lasting:
    """A stream that passes over what cannot be written: a run outlives the disk, or the terminal, that shows it."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


def run_main(main: Callable[[], int | None], resumable: bool = False) -> None:
    """Run a command: mistakes become one line on stderr and exit status 2, an interrupt its usual status."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal without the character must not stop a run

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, interrupt)
    if resumable:
        sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
        if hasattr(signal, "SIGUSR1"):  # by which a run saves; while none is under way it does nothing
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    keep_memory()
    message, status = "", 2
    try:
        status = main()
    except UserError as error:
        message = str(error)  # it may quote a completion
    except FloatingPointError as error:
        message = f"not finite: {error}; restore the checkpoint, or train with a lower --learning-rate"
    except OSError as error:
        message = describe(error)
    except KeyboardInterrupt as error:
        number, told = (*error.args, *(signal.SIGINT, "interrupted")[len(error.args) :])
        message = f"{told}; continue with: {continue_command()}" if resumable else told
        status = 128 + number
    finally:  # in what follows, a signal would be a traceback
        end_by_signals(signal.SIG_IGN)
    if message:
        print(f"{Path(sys.argv[0]).name}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    end_by_signals(signal.SIG_DFL)
    sys.exit(status)


def end_by_signals(how) -> None:
    """From here on SIGINT and SIGTERM do what `how` says: end the process (SIG_DFL), or nothing (SIG_IGN)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, how)
