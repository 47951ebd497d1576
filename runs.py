"""What everything that trains shares: settings, the bookkeeping of its loop, and steps that memory has room for.

Randomness is a function of seed and step, so weights, optimizer and `Position` are a run's whole state.
"""

import contextlib
import copy
import dataclasses
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

import torch
from tqdm import tqdm

import commands
import ranks
from commands import NotFinite, UserError, append_json, check_settings, describe, flag_of, option, parser_for, read_json
from states import FORMAT, Position, lines_until, load_state, note_stretch, save_state, states


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
        8192, "Most tokens in one pass; changes no gradient.", "memory and device", above_zero=True, may_change=True
    )
    compile: bool = option(
        False, "Compile the blocks of a Llama or Qwen2, on a GPU: half a minute, then faster.", "memory and device",
        may_change=True,
    )  # fmt: skip
    deterministic: bool = option(
        False, "Only operations whose result does not vary; on a GPU slower.", "memory and device", may_change=True
    )
    shard: bool = option(
        False, "Split weights, gradients and optimizer among torchrun's processes; the reference stays whole.",
        "memory and device", may_change=True,
    )  # fmt: skip
    eval_every: int = option(5, "Measure on validation problems every so many steps.", "how long", above_zero=True)
    patience: int | None = option(
        None, "Stop after so many validations without a better one. Default: never.", "how long", above_zero=True
    )
    max_bad_steps: int = option(
        5, "Stop after so many steps in a row that were skipped for a NaN or an infinity.", "how long", above_zero=True
    )
    save_every: int = option(10, "Save a state to resume from every so many steps.", "run folder", above_zero=True)
    resume: bool = option(False, "Continue the run in --out from its newest state.", "run folder")
    overwrite: bool = option(False, "Replace the run that --out holds.", "run folder")

    def __post_init__(self):
        check_settings(self)
        if self.shard and ranks.WORLD == 1:
            raise UserError("--shard needs torchrun with at least 2 processes; leave it out")
        if self.shard and self.policy == "autoencoder":
            raise UserError("--shard is for transformers, an autoencoder is small; leave it out")


def parse_settings(settings: type, description: str, examples: str):
    """Settings from the command line; with --resume, those of the run folder, of which flags may change some."""
    parser = parser_for(settings, description, examples)
    arguments = parser.parse_args()
    path = Path(arguments.out) / "run.json"
    # Or torchrun has started this process again, and the run that is there is the one that it had begun.
    restarted = ranks.RESTARTS and path.is_file() and read_json(path).get("launch") == ranks.launch()
    if arguments.resume or restarted:
        if not path.is_file():
            raise UserError(f"--resume: {arguments.out!r} holds no run; leave out --resume to start one")
        run, known = read_json(path), {f.name: f for f in fields(settings)}
        stored = run.get("settings")
        if run.get("format") != FORMAT:
            can = "inference.py evaluates it, plot_metrics.py draws it, and --model starts from its weights"
            raise UserError(f"--resume: the run in {arguments.out!r} is of another version of this program; {can}")
        if not isinstance(stored, dict) or "task" not in stored or not stored.keys() <= known.keys():
            raise UserError(f"--resume: {path} does not hold the settings of such a run; start again with --overwrite")
        stored = {name: f.default for name, f in known.items()} | stored  # an older run lacks newer settings
        refuse_strange_code(stored, arguments)
        stored["shard"] = stored["shard"] and ranks.WORLD > 1  # one process goes on with the whole
        parser.set_defaults(**stored | {"out": arguments.out, "resume": True, "overwrite": False})
        arguments = parser.parse_args()
        fixed = [name for name, f in known.items() if not f.metadata["may_change"]]
        changed = [name for name in fixed if getattr(arguments, name) != stored[name]]
        if changed:
            old = [f"{flag_of(name)} {'left out' if stored[name] is None else stored[name]}" for name in changed]
            made = f"the run in {arguments.out!r} was made with {', '.join(old)}"
            raise UserError(f"--resume: {made}; leave the flag out")
    return settings(**vars(arguments))


def refuse_strange_code(stored: dict, given) -> None:
    """Raise UserError where a stored run would run a file, or send a key to an address, that the user did not name."""
    rewards, url = stored.get("rewards"), stored.get("judge_url")
    for name, value, does in (
        ("rewards", rewards if ".py:" in str(rewards) else None, "run a file"),
        ("judge_url", url, "send completions, and JUDGE_API_KEY, to an address"),
    ):
        if value is not None and getattr(given, name) is None:
            what = f"the run in {given.out!r} would {does} that only it names"
            raise UserError(f"--resume: {what}; if you trust it, add {flag_of(name)} {value}")


ENDS = (signal.SIGINT, signal.SIGTERM)


@dataclass(kw_only=True)
class Run:
    """A training run: what it trains, where it stands, and the bookkeeping of its loop, which runs inside `with run:`.

    A step is a function of state and number, so whatever stops it, SIGINT and SIGTERM among others, the state before
    it is saved; but where the update has begun it is finished first. A second signal acts at once. SIGUSR1 saves and
    goes on.
    """

    name: ClassVar[str]  # on the progress bar
    shown: ClassVar[tuple[str, ...]]  # metrics beside the progress bar
    warnings: ClassVar[dict[str, tuple[Callable[[dict], bool], str]]] = {}  # name: is it sick, a sentence with the mend

    config: RunSettings
    policy: object  # with a `model`
    optimizer: torch.optim.Optimizer
    last_step: int
    position: Position = field(default_factory=Position)
    settled: Position | None = None  # what the weights in memory belong to; None from an optimizer step to its record
    stopped: str | None = None  # why training ends early, in words
    warned: set = field(default_factory=set)
    unwritten: dict[str, list[dict]] = field(default_factory=dict)  # lines by file, while the disk is full
    signal: int = 0
    save_asked: bool = False
    busy: bool = False  # where a signal has to wait

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def models(self) -> dict:
        """The models that training changes, by the name that their file has in a state."""
        return {"weights": self.policy.model}

    def __enter__(self):
        bar = {"initial": self.position.step, "total": self.last_step, "unit": "step", "disable": not ranks.FIRST}
        self.bar = tqdm(desc=self.name, **bar)
        numbers = [signal.SIGINT, signal.SIGTERM, *[signal.SIGUSR1] * hasattr(signal, "SIGUSR1")]
        self.handlers = {number: signal.signal(number, self.interrupt) for number in numbers}
        self.settled = copy.deepcopy(self.position)
        self.optimizer.register_step_pre_hook(lambda *_: setattr(self, "settled", None))
        return self

    def interrupt(self, number, frame) -> None:
        if number not in ENDS:  # SIGUSR1
            self.save_asked = True
            return
        self.signal = number
        self.restore_handlers()
        if self.busy or ranks.WORLD > 1:  # ranks stop together, at the end of a step
            self.say("finishing the step, then saving; once more stops at once", file=sys.stderr)
        # While a graph is captured nothing can be read from a GPU.
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if ranks.WORLD > 1 and not self.busy and not ranks.is_sharded(self.policy.model) and not capturing:
            self.save()  # lest whoever sent the signal does not wait for the end of the step
        self.heed()

    def heed(self) -> None:
        """Stop if a signal asks for it and nothing is in the way."""
        if self.signal and not self.busy and ranks.WORLD == 1:
            raise KeyboardInterrupt(self.signal)

    @contextlib.contextmanager
    def unbroken(self):
        """What a signal lets come to its end."""
        before, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = before
        self.heed()

    def restore_handlers(self, among: tuple = ENDS) -> None:
        for number, handler in self.handlers.items():
            if number in among:
                signal.signal(number, handler)

    def __exit__(self, kind, error, traceback) -> None:
        self.restore_handlers(tuple(self.handlers))
        self.bar.close()
        if error is None and (self.stopped or self.position.step == self.last_step):
            self.save(last=True)  # if the disk was full when it should have been
        if isinstance(error, (Exception, KeyboardInterrupt)):
            told = self.save_before_leaving()
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(*(error.args or (signal.SIGINT,)), told) from error
            if isinstance(error, (UserError, NotFinite)):
                what = f"step {self.position.step + 1}: {error}"
                raise UserError(f"{what}; {told}, --resume goes on from there") from error

    @property
    def begun(self) -> bool:
        """Whether the weights in memory are a state that a run can go on from."""
        return self.settled is not None and (self.settled.step > 0 or self.settled.best_step is not None)

    def save_before_leaving(self) -> str:
        """Save the state that the weights in memory are, if they are one; what to go on from, in words."""
        if self.begun and (not ranks.is_sharded(self.policy.model) or ranks.all_leave()):
            self.save()
        if not ranks.FIRST:
            return "what is saved the first process says"
        kept = states(self.out)
        return f"saved after step {kept[0][0]}" if kept else "no state is saved yet"

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left: to the last, to a signal, or to a reason, which is printed."""
        self.stopped = self.reason_to_stop(self.last_metrics())
        while True:
            numbers, asked = zip(*ranks.gather((self.signal, self.save_asked)), strict=True)  # of one all do
            if any(asked):
                self.save_asked = False
                self.save()
            if any(numbers):
                raise KeyboardInterrupt(max(numbers))
            if self.position.step >= self.last_step or self.stopped:
                break
            yield self.position.step + 1
        if self.stopped:
            self.say(f"stopped after step {self.position.step}: {self.stopped}")

    def attempt(self, train_step: Callable, step: int) -> dict[str, float]:
        """The metrics of a step; one that meets a NaN or an infinity is skipped, counted, and its rows kept.

        Where the run was stopped after the step's update, they are those that it had measured.
        """
        position, before = self.position, copy.deepcopy(self.position.reward_state)
        if position.updated:
            return position.updated
        try:
            return train_step(self, step)
        except NotFinite as error:
            self.optimizer.zero_grad()
            position.bad_steps, position.reward_state = position.bad_steps + 1, before
            self.append("samples.jsonl", *({"step": step, "skipped": error.what} | row for row in error.rows))
            if position.bad_steps >= self.config.max_bad_steps:
                if self.settled is None:  # it failed in a later inner update: the weights are those after the step
                    self.log(step, {"skipped": 1.0})
                many = f"{position.bad_steps} steps in a row were skipped (--max-bad-steps), the last since {error}"
                raise UserError(f"{many}; lower --learning-rate, or look at samples.jsonl") from error
            self.say(f"warning: step {step} is skipped: {error}", file=sys.stderr)
            return {"skipped": 1.0}

    def append(self, name: str, *values: dict) -> None:
        """Append lines to a file of the run; where the disk is full they wait until the next are written."""
        with self.unbroken():
            self.unwritten.setdefault(name, []).extend(values if ranks.FIRST else ())
            try:
                self.write_lines()
            except OSError as error:
                self.say(f"warning: lines wait to be written: {describe(error)}", file=sys.stderr)

    def write_lines(self) -> None:
        """Write the lines that wait; raises OSError."""
        for name, lines in self.unwritten.items():
            if lines:
                append_json(self.out / name, *lines)
            lines.clear()

    def record(self, metrics: dict[str, float]) -> dict[str, float]:
        """Note what a step measured once its update is done, so that a run that is stopped has not lost it."""
        self.position.updated, self.position.bad_steps = metrics, 0
        self.settled = copy.deepcopy(self.position)
        return metrics

    def within_memory(self, function: Callable, *given):
        """What `function(*given, micro_batch_tokens)` gives, with as many tokens a pass as memory has room for."""
        result, tokens = within_memory(function, given, self.config.micro_batch_tokens, self.optimizer)
        self.lower_micro_batch_tokens(tokens)
        return result

    def lower_micro_batch_tokens(self, tokens: int) -> None:
        """Go on with passes of so many tokens, if a step found that more do not fit into memory."""
        if tokens < self.config.micro_batch_tokens:
            self.config = dataclasses.replace(self.config, micro_batch_tokens=tokens)
            self.say(f"out of memory: from here on --micro-batch-tokens {tokens}", file=sys.stderr)

    def keep_best(self, write: Callable) -> None:
        """Write the best checkpoint; where that fails the one before it, whose files are there, stays the best."""

        def attempt() -> str | None:
            try:
                return write()
            except OSError as error:
                return describe(error)

        failed, *_ = ranks.every(attempt)
        if failed:
            before = self.settled  # without a best step before the first: whatever comes next is taken then
            self.position.best_step, self.position.best_score = before.best_step or 0, before.best_score
            self.say(f"warning: the best checkpoint is not saved: {failed}", file=sys.stderr)

    def is_due(self, step: int, every: int) -> bool:
        """Whether what is done every so many steps, and at the end, is done after this one."""
        return step % every == 0 or step == self.last_step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """End a step: a line of metrics.jsonl, the progress bar, warnings, a state to resume from, an early stop."""
        with self.unbroken():
            self.position.step, self.position.updated = step, {}
            self.append("metrics.jsonl", {"step": step, **metrics})
            self.settled = copy.deepcopy(self.position)
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
        lines = lines_until(self.out / "metrics.jsonl", sys.maxsize).splitlines()
        return json.loads(lines[-1]) if lines else {}

    def warn(self, metrics: dict[str, float]) -> None:
        """Say in a plain sentence what is sick about a step, each thing once."""
        for name, (is_sick, sentence) in self.warnings.items():
            if name not in self.warned and is_sick(metrics):
                self.warned.add(name)
                self.say(f"warning: step {self.position.step}: {sentence}", file=sys.stderr)

    def say(self, text: str, file=None) -> None:
        """Print above the progress bar."""
        if ranks.FIRST:
            self.bar.write(text, file=file)

    def save(self, last: bool = False) -> None:
        """Save a state; where that fails the run goes on without, and tries again when the next is due.

        The `last` time there is no next: it raises OSError.
        """
        try:
            if self.begun:
                save_state(self.out, self.settled, self.models, self.optimizer, self.write_lines)
        except OSError as error:
            if last:
                raise
            self.say(f"warning: step {self.settled.step}: no state saved: {describe(error)}", file=sys.stderr)

    def restore(self, write: bool = True) -> None:
        """Go back to the newest state, or to before the first step where none has been saved yet.

        Without `write` the folder, in which another process may be at work, stays as it is.
        """
        position = load_state(self.out, self.models, self.optimizer, write)
        if position is not None:
            self.position = position
        elif self.last_metrics().get("step", 0) > self.config.save_every:  # by when there had been a state
            what = f"{str(self.out)!r} has a log of steps, and no state to go on from"
            raise UserError(f"--resume: {what}; begin again with --overwrite, from its weights with --model")
        elif write and ranks.FIRST:
            for name in ("metrics.jsonl", "samples.jsonl"):
                (self.out / name).unlink(missing_ok=True)
        if len(set(ranks.gather((self.position.folder, self.position.best_step)))) > 1:
            raise UserError(f"--out: the processes find different states in {str(self.out)!r}; let all see one folder")
        if write and self.config.resume:
            ranks.first(note_stretch, self.config, self.position.step)


def adamw(model, weight_decay: float) -> torch.optim.AdamW:
    """The optimizer of every run; its learning rate is set at each step."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)


def descend(optimizer: torch.optim.Optimizer, largest: float, rollout) -> float:
    """Take an optimizer step along the clipped gradient of a rollout, clear it, and return its norm before clipping.

    Raises NotFinite, before the optimizer moves, if that is no number.
    """
    norm = ranks.full(torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], largest)).item()
    if not math.isfinite(norm):
        raise NotFinite(f"the norm of the gradient is {norm}", sum(ranks.gather(rollout.records()), []))
    optimizer.step()
    optimizer.zero_grad()
    return norm


def within_memory(function: Callable, given: tuple, token_budget: int, optimizer: torch.optim.Optimizer) -> tuple:
    """What `function(*given, token_budget)` gives, and the budget: halved, gradients cleared, while memory runs out."""
    awaited = ranks.is_sharded(optimizer.param_groups[0]["params"][0])  # by the other ranks, who are in the same pass
    while True:
        try:
            with ranks.talking(only=False) if awaited else contextlib.nullcontext():
                return function(*given, token_budget), token_budget
        except (MemoryError, RuntimeError) as error:
            if not commands.is_out_of_memory(error) or awaited or token_budget < 32:  # of which hardly a row needs less
                raise
        optimizer.zero_grad()
        token_budget //= 2
        torch.cuda.empty_cache()  # if CUDA has been begun
