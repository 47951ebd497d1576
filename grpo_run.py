"""A run of grpo.py from its settings to its report, and what its steps need besides mathematics.

The steps themselves, and their loop, are in grpo.py.
"""

import copy
import dataclasses
import shlex
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import commands
import ranks
import runs
import sft
import states
from algorithms import ALGORITHMS, Algorithm
from checkpoints import choose_device, introduce, is_toy, load, make_ready, open_policy
from commands import NotFinite, UserError, flag_of, option, out_of_memory
from inference import evaluate, results_table
from plan import sampler_dtypes
from policy import Policy, TokenPolicy, frozen, mean_log_probs
from rewards import Rewards, RewardSettings, soft_overlong, text_of
from rollouts import Rollout, join
from runs import Run, RunSettings
from tasks import TASKS, Example, Task, find_task, load_task


@dataclass(frozen=True)
class GRPOConfig(commands.optional_fields(Algorithm, "Default: the algorithm's."), RewardSettings, RunSettings):
    """Settings of grpo.py."""

    task: Literal[*TASKS] = option("arithmetic", "Task to train on.", "model and data")
    algorithm: Literal[*ALGORITHMS] = option("grpo", "Row of the table of algorithms.", "algorithm")
    batch_size: int = option(32, "Prompts in one step (P).", "algorithm", above_zero=True)
    num_generations: int = option(16, "Completions of each prompt (G).", "algorithm", above_zero=True)
    num_inner_updates: int = option(1, "Optimizer steps on each rollout.", "algorithm", above_zero=True)
    learning_rate: float | None = option(
        None, "After the warm-up. Default: 1e-4 for a toy, else 5e-6.", "algorithm", above_zero=True, may_change=True
    )
    warmup_steps: int = option(5, "Steps in which the learning rate rises from 0.", "algorithm")
    ref_update_every: int | None = option(
        None, "The policy becomes the reference every so many steps. Default: never.", "algorithm", above_zero=True
    )
    temperature: float = option(1.0, "Of the policy and of the reference alike.", "sampling", at_least=0.001)
    exploration_noise: float | None = option(
        None, "Share of uniform noise in the policy; an autoencoder's sigma. Default: 0, and 0.5.", "sampling"
    )
    rollout_lag: int = option(
        0, "Rollouts are of the policy so many steps ago, the first ones of the first.", "sampling"
    )
    sampler_dtype: Literal["float32", "bfloat16"] | None = option(
        None, "Precision in which a copy of the policy samples. Default: the policy itself does.", "sampling"
    )
    max_new_tokens: int | None = option(None, "Longest completion. Default: the task's.", "sampling", above_zero=True)
    steps: int = option(40, "Steps; one step is one rollout.", "how long", above_zero=True)
    eval_limit: int | None = option(
        None, "At most so many validation and held-out problems.", "how long", above_zero=True
    )
    kl_limit: float | None = option(
        None, "Stop when the KL, in nats per token, exceeds this. Default: never.", "how long", above_zero=True
    )
    out: str = option("saved_model", "Checkpoint, metrics, samples, figures and states.", "run folder")
    dry_run: bool = option(False, "Say what a step will need in memory and work, and stop.", "run folder")
    trace: bool = option(False, "Show one step for one question, (1) to (6), but no update, and stop.", "run folder")

    def __post_init__(self):
        super().__post_init__()
        row = self.resolved_algorithm
        if self.num_generations < 2 and row.advantage != "batch_mean":
            raise UserError(f"--num-generations is {self.num_generations}; a group needs at least 2 to be compared")
        if row.advantage == "max_at_k" and row.k > self.num_generations:
            raise UserError(f"--k is {row.k}; it must be at most --num-generations, {self.num_generations}")
        if self.policy == "autoencoder" and self.exploration_noise == 0:
            raise UserError("--exploration-noise is the autoencoder's standard deviation; it must be above 0")
        if self.policy == "transformer" and (self.exploration_noise or 0.0) >= 1:
            raise UserError(f"--exploration-noise is {self.exploration_noise}, a share; it must be below 1")
        if self.shard and (self.rollout_lag or self.sampler_dtype):
            raise UserError("--rollout-lag and --sampler-dtype keep whole copies of the policy; leave out --shard")
        if self.rollout_lag >= self.steps:
            raise UserError(f"--rollout-lag is {self.rollout_lag}; it must be below --steps, {self.steps}")
        if self.policy == "autoencoder" and self.sampler_dtype:
            raise UserError("--sampler-dtype is for transformers, an autoencoder is small; leave it out")
        if self.policy == "autoencoder" and (row.entropy_bonus or row.top_entropy < 1):
            raise UserError("--entropy-bonus and --top-entropy: an autoencoder's entropy is constant; leave them out")
        for name, needed in row.idle.items():
            if getattr(self, name) is not None:
                raise UserError(f"{flag_of(name)} does nothing without {needed}; leave it out, or give both")

    @property
    def sampling(self) -> dict[str, float | None]:
        """How the policy samples, as `load` takes it."""
        return {"temperature": self.temperature, "exploration_noise": self.exploration_noise or None}

    @property
    def resolved_algorithm(self) -> Algorithm:
        """The algorithm's row with the cells that flags override."""
        cells = {field.name: getattr(self, field.name) for field in fields(Algorithm)}
        given = {name: value for name, value in cells.items() if value is not None}
        return dataclasses.replace(ALGORITHMS[self.algorithm], **given)


@dataclass(kw_only=True)
class GRPORun(Run):
    """A run of GRPO: policy and reference, problems by split, and the rewards."""

    name = "grpo"
    shown = ("reward", "accuracy", "kl")
    warnings = {  # each said once, in a sentence that names what helps
        "truncated": (lambda m: m.get("truncated", 0) >= 0.9, "9 in 10 completions are cut: raise --max-new-tokens"),
        "flat": (
            lambda m: m.get("zero_std_groups") == 1 and m.get("accuracy", 0) < 1,
            "all rewards of each group are equal, so nothing is learned: raise --num-generations or --temperature",
        ),
        "format": (lambda m: m.get("format") == 0, "no completion has an answer's format: teach it first, with sft.py"),
        "judge": (
            lambda m: m.get("missing/judge") == 1,
            "the judge scored nothing and is left out: check --judge-url, --judge-model and JUDGE_API_KEY",
        ),
        "kl": (lambda m: m.get("kl", 0) > 1, "KL above 1 nat per token: lower --learning-rate or raise --beta"),
    }

    task: Task
    data: dict[str, list[Example]]  # by split
    rewards: Rewards
    reference: Policy | None
    samplers: deque[Policy] = field(default_factory=deque)  # of the last steps, oldest first; none: the policy itself

    @property
    def models(self) -> dict:
        """With the reference, where steps change it, and with what samples."""
        models = super().models | {f"sampler_{i}": sampler.model for i, sampler in enumerate(self.samplers)}
        return models | ({"reference": self.reference.model} if self.config.ref_update_every else {})

    @property
    def sampler(self) -> Policy:
        return self.samplers[0] if self.samplers else self.policy

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """As for every run; and after each step, a skipped one too, the oldest sampler becomes the policy as it is."""
        with self.unbroken():
            if self.samplers:
                self.samplers.rotate(-1)
                self.samplers[-1].model.load_state_dict(self.policy.model.state_dict())
            super().log(step, metrics)

    @property
    def scored_task(self) -> Task:
        """The task as it is evaluated: by its accuracy, or by the total reward where it has none."""
        if self.task.score == "accuracy":
            return self.task
        return dataclasses.replace(self.task, metrics={"total_reward": self.rewards.total, **self.task.metrics})

    def warn(self, metrics: dict[str, float]) -> None:
        alive = self.config.resolved_algorithm.advantage == "batch_mean"  # under which flat groups teach, too
        super().warn(metrics | ({"zero_std_groups": 0.0} if alive else {}))

    def reason_to_stop(self, metrics: dict[str, float]) -> str | None:
        kl, limit = metrics.get("kl") or 0, self.config.kl_limit
        if limit is not None and kl > limit:
            return f"KL {kl:.3f} is above --kl-limit {limit}"
        return super().reason_to_stop(metrics)

    def sample_groups(self, examples: list[Example], key: tuple[int, int, int]) -> Rollout:
        """A group of completions of each example; key is (seed, step, draw) and names the random numbers."""
        start, end = ranks.share(len(examples))
        size, width = self.config.num_generations, self.config.max_new_tokens

        def sample() -> Rollout | None:
            rollout = self.sampler.sample(examples[start:end], size, key, width, first=start) if start < end else None
            return rollout if rollout is None or ranks.WORLD == 1 else rollout.to("cpu")  # to be told to the others

        parts = [part.to(self.policy.device) for part in ranks.every(sample) if part is not None]
        return parts[0] if len(parts) == 1 else join(parts)

    def show_group(self, step: int) -> None:
        """Sample a group of the first validation question into samples.jsonl, and print its best and its worst.

        The question and the random numbers are those of every other step: what differs is the policy.
        """
        if not ranks.FIRST:
            return
        config, examples = self.config, self.data["validation"][:1]
        key, width = (config.seed, 0, 0), config.max_new_tokens
        rollout = self.policy.sample(examples, config.num_generations, key, width, explore=False)
        state = copy.deepcopy(self.position.reward_state)  # to look changes nothing
        try:
            scores, _ = self.rewards(examples, rollout, state)
        except NotFinite as error:  # as in a step, of which this is none
            return self.say(f"warning: no samples are shown: {error}", file=sys.stderr)
        group = []
        for text, reward in zip(rollout.texts, scores.total[0].tolist(), strict=True):
            group.append({"step": step, "question": examples[0].question, "completion": text, "reward": reward})
        self.append("samples.jsonl", *group)
        self.say(f"  {commands.printable(examples[0].question)} The best and the worst of {len(group)}:")
        for choose in (max, min):
            row = choose(group, key=lambda row: row["reward"])
            self.say(f"  {row['reward']:4.1f}  {commands.printable(row['completion'])}")


def prepare(config: GRPOConfig) -> GRPORun:
    """Check everything, open the run folder, make the base policy if there is none, or restore all with --resume."""
    task, out = find_task(config.task), Path(config.out)
    config, policy, data, rewards, pins = checked(config, task)
    algorithm = config.resolved_algorithm
    if not config.trace:
        states.start_run(config, algorithm=dataclasses.asdict(algorithm), revision=getattr(policy, "revision", None))
    if policy is None and not config.resume:
        print(f"no --model: first a toy base policy, fine-tuned into {out / 'base'}, about 1 or 2 minutes on two cores")
    completions = f"{config.batch_size} x {config.num_generations} completions"
    print(f"{config.steps} steps on {config.task}, each of {completions} (a second or less for a toy), into {out}")
    print(f"{config.algorithm}: {algorithm}")
    if policy is None:
        policy = load(sft.toy(config), choose_device(config.device), config.dtype, **config.sampling)
        data = policy.fitting(data, config.max_new_tokens)
    introduce(policy, config, data["train"][0].prompt)
    make_ready(policy, config)
    reference = frozen(policy) if algorithm.beta > 0 else None
    if rewards.needs_scorer and not config.scorer:
        start = reference if reference and not config.ref_update_every else policy
        rewards.take_scorer(make_scorer(config, start))
    if config.shard and not config.trace:
        ranks.shard(policy.model)
    run = GRPORun(
        config=config, policy=policy, optimizer=runs.adamw(policy.model, weight_decay=0.0), last_step=config.steps,
        task=task, data=data, rewards=rewards, reference=reference, samplers=copies_to_sample(policy, config),
    )  # fmt: skip
    if not config.trace:
        states.pin(config, **pins | {"model": states.digest_of(policy.model)})
    if config.resume or not config.trace:  # whose --out may hold another run
        run.restore(write=not config.trace)
    if run.position.best_step is None and not config.trace:
        before = evaluate_run(run, policy, "held_out", samples=4)
        ranks.first(commands.write_json, out / "evaluation.json", {"base": {"step": 0, **before}})
    return run


def copies_to_sample(policy: Policy, config: GRPOConfig) -> deque[Policy]:
    """The frozen copies of a policy that sample in its place, oldest first; none where it samples itself.

    The newest holds the weights of now: by the step that samples from it, the policy itself will have moved on.
    """
    copies = deque()
    with out_of_memory("--rollout-lag"):
        for dtype in sampler_dtypes(policy, config):
            source = copy.copy(policy)
            source.dtype = dtype
            copies.append(frozen(source))
    return copies


def checked(config: GRPOConfig, task: Task) -> tuple[GRPOConfig, Policy | None, dict, Rewards, dict[str, str]]:
    """Settings in full, the --model, problems by split, rewards, and digests of what they were made of.

    What is wrong is found here, before any file is touched.
    """
    device, noise = choose_device(config.device), {"transformer": 0.0, "autoencoder": 0.5}[config.policy]
    config = dataclasses.replace(
        config,
        rewards=config.rewards or task.rewards,
        max_new_tokens=config.max_new_tokens or task.max_new_tokens,
        exploration_noise=noise if config.exploration_noise is None else config.exploration_noise,
    )
    if config.batch_size < ranks.WORLD:
        raise UserError(f"--batch-size is {config.batch_size}; {ranks.WORLD} processes need as many prompts at least")
    algorithm, rewards = config.resolved_algorithm, Rewards.from_settings(config)
    if algorithm.overlong_buffer:
        rewards.mix["overlong-penalty"] = (soft_overlong(config.max_new_tokens, algorithm.overlong_buffer), 1.0)
    policy = open_policy(config, task, **config.sampling)
    config = dataclasses.replace(config, learning_rate=config.learning_rate or (1e-4 if is_toy(policy) else 5e-6))
    chat, sizes = policy is not None and policy.chat, (config.limit, config.shots, config.eval_limit)
    data = load_task(task, chat, *sizes, data=config.data)
    rewards.check_columns(config.task, data["train"][0].columns)
    data = policy.fitting(data, config.max_new_tokens) if policy else data
    pins = {"data": states.digest_of(data={"train": data["train"]})}  # --eval-limit may change
    if config.scorer:
        scorer = load(config.scorer, device, config.dtype)
        pins["scorer"] = states.digest_of(scorer.model)
        rewards.take_scorer(make_scorer(config, scorer))
    base = Path(config.out) / "base"
    if policy is None and not (config.resume or config.overwrite) and base.exists():
        raise UserError(f"--out: {str(base)!r} exists; start from it with --model, or give --overwrite")
    if config.trace and policy is None and not config.resume:
        raise UserError(f"--trace needs a --model, such as the base policy of a run: --model {base}")
    return config, policy, data, rewards, pins


def make_scorer(config: GRPOConfig, policy: Policy) -> Callable[..., list[float]]:
    """What rewards know as `scorer`: mean log-probability per token of completions under a policy that does not learn.

    That is the one of --scorer, or without it a frozen copy of the policy at the start. The latter scores the sampled
    ids as they are; another model's tokenizer reads the text again, and what exceeds its context is cut off. Raises
    UserError.
    """
    if not isinstance(policy, TokenPolicy):
        raise UserError("--rewards perplexity needs a language model as its scorer; an autoencoder is none")
    learns = not config.scorer and next(policy.model.parameters()).requires_grad
    policy = frozen(policy) if learns else copy.copy(policy)
    policy.temperature, policy.exploration_noise = 1.0, 0.0

    def scorer(prompts, completions, completion_ids) -> list[float]:
        ids = completion_ids
        if config.scorer:
            texts = [text_of(completion) for completion in completions]
            ids = [row or policy.end_ids[:1] for row in policy.tokenizer(texts, add_special_tokens=False).input_ids]
        if not policy.chat:
            prompts = [text_of(prompt) for prompt in prompts]
        prompts, room, first = policy.encode(prompts), policy.model.max_length, {}
        ids = [row[: max(1, room - len(prompt))] for row, prompt in zip(ids, prompts, strict=True)]
        group = [first.setdefault(tuple(prompt), i) for i, prompt in enumerate(prompts)]  # equal prompts share a pass
        rollout = policy.pack([prompt[-(room - 1) :] for prompt in prompts], ids, [""] * len(ids), group)
        return mean_log_probs(policy, rollout, config.micro_batch_tokens).tolist()

    return scorer


def own_groups(rollout: Rollout, advantages: torch.Tensor) -> tuple[Rollout, torch.Tensor]:
    """What this rank scores and learns from: its share of the groups, all of them where it is alone."""
    groups = ranks.own(torch.arange(len(advantages), device=rollout.group.device))
    if len(groups) == len(advantages):
        return rollout, advantages
    return rollout.select(torch.isin(rollout.group, groups).nonzero()[:, 0]), ranks.own(advantages)


def rates(rollout: Rollout, metrics: dict, config: GRPOConfig, clock: list[float]) -> dict[str, float]:
    """Seconds and tokens per second of a step and its parts; `clock` is its start, then the end of each part."""
    start, sampled, scored, end = clock
    tokens, scores = int(rollout.mask.sum()), config.resolved_algorithm.beta > 0
    return {
        **{"seconds": end - start, "seconds_sample": sampled - start},
        **{"seconds_score": scored - sampled, "seconds_update": end - scored},
        "tokens_per_second": metrics["tokens"] / (end - start),
        "tokens_per_second_sample": metrics["tokens"] / (sampled - start),
        "tokens_per_second_score": tokens / (scored - sampled) if scores else 0.0,
        "tokens_per_second_update": tokens * config.num_inner_updates / (end - scored),
    }


def evaluate_run(run: GRPORun, policy: Policy, split: str, samples: int, seed: int = 0) -> dict[str, float]:
    """Evaluate a policy on a split of a run, as many rows at once as a step samples; raises UserError."""
    config, count = run.config, len(run.data[split])
    rows = config.batch_size * config.num_generations
    if not is_toy(policy) and ranks.FIRST:
        what = f"{count} {split.replace('_', '-')} problems, one greedy completion and {samples} samples of each"
        tqdm.write(f"evaluating: {what}, at most {config.max_new_tokens} tokens long (--eval-limit)", file=sys.stderr)
    commands.return_memory()
    with out_of_memory("--batch-size, --num-generations or --max-new-tokens"), ranks.whole(policy.model):
        return evaluate(policy, run.scored_task, run.data[split], config.max_new_tokens, samples, seed, rows)


def report(run: GRPORun) -> None:
    """Evaluate on the held-out problems, print before and after, draw the figures, say what to try next."""
    import plot_metrics  # here, since matplotlib is slow to import and only the end needs it

    config, position, out = run.config, run.position, run.out
    base = commands.read_json(out / "evaluation.json").get("base") if (out / "evaluation.json").exists() else None
    sound = isinstance(base, dict) and all(isinstance(value, float | int) for value in base.values())
    last = {"step": position.step, **evaluate_run(run, run.policy, "held_out", samples=4)}
    best = last
    if position.best_step != position.step:
        policy = load(out, run.policy.device, config.dtype, config.temperature, config.exploration_noise)
        best = {"step": position.best_step, **evaluate_run(run, policy, "held_out", samples=4)}
    results = ({"base": base} if sound else {}) | {"best": best, "last": last}
    if not ranks.FIRST:
        return
    commands.write_json(out / "evaluation.json", results)
    print(f"\n{len(run.data['held_out'])} held-out problems, before and after (95 % intervals):")
    print(results_table({f"{name} (step {result['step']})": result for name, result in results.items()}))
    figures = plot_metrics.plot([out], out)
    print(f"\nbest checkpoint and metrics: {out}   figures: {', '.join(map(str, figures))}")
    print(next_commands(config, run.data["held_out"][0].question, config.model or str(out / "base")))


def next_commands(config: GRPOConfig, question: str, start: str) -> str:
    """What to try after a run of grpo.py: ask its policy, ask the one it started from beside it, another algorithm."""
    task = find_task(config.task)
    asked = [commands.printable(question), *(["--task", task.name] if task.name != "arithmetic" else [])]

    def given(*names: str) -> list[str]:
        values = {name: getattr(config, name) for name in names}
        usual = (None, 0, "transformer", task.rewards, task.max_new_tokens)
        return [word for name, value in values.items() if value not in usual for word in (flag_of(name), str(value))]

    how = given("shots", "chat_template", "thinking", "max_new_tokens")  # which the start does not know by itself
    again = ["--task", task.name, "--model", start, "--out", "another_run", "--algorithm", "dr_grpo"]
    again += [*given("data", "policy", "rewards", "judge_url", "eval_limit"), *how]
    beside = [*asked, "--model", start, config.out, "--samples", "4", *how]
    return f"""Next:
  python inference.py {shlex.join(asked)} --model {shlex.quote(config.out)}
  python inference.py {shlex.join(beside)}
  python grpo.py {shlex.join(again)}"""
