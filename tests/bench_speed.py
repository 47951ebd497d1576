"""Speed of a GRPO step, part by part: against the machine's limits, against TRL, and as the work grows.

    python tests/bench_speed.py                                            every setting that can run here
    python tests/bench_speed.py --peer trl --models MODELS --base BASE     ours and TRL's GRPOTrainer in turns
    python tests/bench_speed.py --to90 --base BASE                         seconds until 90 % of the samples are right
    python tests/bench_speed.py --grow                                     one axis after the other, and a figure

BASE is the base policy of the main job (`python sft.py --task arithmetic --out BASE`), MODELS what the peers'
make_models.py wrote; without it the models are random ones of the same shapes. Each measurement runs in a process of
its own, with its own peak memory. Tokens per second are real completion tokens. Useful work is counted on real tokens,
each prompt once; the peak is the fastest matrix product (squares of 1024 and more), the bandwidth the fastest sum of
256 MiB, both measured in the same process after the steps. The main job's TRL side always takes 2 threads and seed 0.
Prints Markdown tables and merges what it measured into results/bench_speed.json. Nothing else should be running on the
machine: where threads have to wait for a core, TRL's step of the main job took up to ten times as long.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from bench_main import ROOT, describe, load_before, machine, table, write
from bench_sampler import NEVER, IdsPolicy, random_prompts

import checkpoints
import commands
import runs
from grpo import GRPOConfig, group_advantages, update
from inference import measure_rollout
from linear import product
from model_toy import Llama, LlamaConfig, character_tokenizer, compile_blocks
from policy import TokenPolicy, frozen, score_rollout
from rewards import Rewards
from rollouts import Rollout
from tasks import Example, find_task, load_task, take_prompts


@dataclass(frozen=True)
class Setting:
    """The work of a step: P prompts, G completions of each, tokens of a prompt, tokens of the longest completion."""

    model: str
    prompts: int
    group: int
    prompt: int
    completion: int
    inner: int = 1
    target: float | None = None  # TRL's seconds over ours, at least
    shortest: int | None = None  # lengths are drawn from here on; None: every completion has the longest
    power: float = 1.0  # of the uniform numbers that draw them: their mean share is 1 / (power + 1)
    dtype: str = "float32"
    micro_batch: int = GRPOConfig.micro_batch_tokens


SETTINGS = {
    "toy-16-1": Setting("toy", 8, 8, 32, 16, target=2.5),
    "toy-64-1": Setting("toy", 8, 8, 32, 64, target=2.0),
    "toy-64-4": Setting("toy", 8, 8, 32, 64, inner=4, target=2.2),
    "small-64-1": Setting("small", 4, 8, 32, 64, target=2.0),
    "135M-32-1": Setting("135M", 1, 8, 32, 32, target=2.0),
    "small-mixed-1": Setting("small", 4, 16, 256, 128, shortest=4, target=5.0),
    "main": Setting("base", 32, 16, 10, 32, target=2.5),  # the task's own prompts; completions end by themselves
    "qwen-512-rows": Setting("qwen-0.5B", 64, 8, 128, 128, dtype="bfloat16", micro_batch=32768),  # these on a GPU only
    "qwen-64-rows": Setting("qwen-0.5B", 8, 8, 128, 128, dtype="bfloat16", micro_batch=32768),
}
TOY = replace(SETTINGS["toy-64-1"], target=None)
AXES = {  # what grows, as a result names it: its label, settings
    "completions": ("completions in a step", {f"rows-{8 * n}": replace(TOY, prompts=n) for n in (2, 4, 8, 16, 32, 64)}),
    "longest": ("tokens of each", {f"tokens-{n}": replace(TOY, completion=n) for n in (8, 16, 32, 64, 128, 256)}),
    "weights": ("weights", {f"model-{name}": replace(TOY, model=name) for name in ("toy", "small", "135M")}),
    "filled": (
        "mean over longest completion",
        {f"filled-{n}": replace(TOY, shortest=1, power=100 / n - 1) for n in (25, 50, 75)} | {"filled-100": TOY},
    ),
}
GROWN = {name: setting for _, settings in AXES.values() for name, setting in settings.items()}
ALL = SETTINGS | GROWN
llama = partial(LlamaConfig, max_position_embeddings=2048, rope_theta=10000.0, initializer_range=0.02)
SHAPES = {  # vocabulary, hidden size, intermediate size, layers, heads, key-value heads
    "toy": llama(64, 128, 512, 4, 4, 4),
    "small": llama(8192, 512, 1408, 8, 8, 8),
    "135M": llama(49152, 576, 1536, 30, 9, 3),
    "qwen-0.5B": llama(151936, 896, 4864, 24, 14, 2, model_type="qwen2"),
}
DIGITS = "0123456789"
PARTS = ("sample", "reward", "score", "update")
STEPS_TO_90 = 40


def drawn_lengths(setting: Setting) -> torch.Tensor:
    """Tokens (B,) of each completion, the same in every step and on both sides."""
    numbers = np.random.default_rng(0).random(setting.prompts * setting.group) ** setting.power
    spread = (setting.completion + 1 - setting.shortest) * numbers
    return torch.from_numpy(setting.shortest + spread.astype(int)).clamp(max=setting.completion)


class DrawnLengths(IdsPolicy):
    """A policy whose row r ends with token lengths[r] and never before; sampler and model work as they always do.

    A number that is no uniform (2) stands where a row has to end, so that `choose`, which knows no row, sees it.
    """

    lengths: torch.Tensor  # (B,)

    def decode(self, hidden, cache, positions, uniforms, choose, noise):
        here = torch.arange(1, uniforms.shape[1] + 1) == self.lengths[:, None]
        end = self.end_ids[0]

        def forced(log_probs, uniform):
            token = choose(log_probs, uniform)
            return torch.where(uniform > 1, end, token + (token == end))  # the id after it, where it was drawn too soon

        uniforms = uniforms.masked_fill(here.to(uniforms.device), 2.0)
        return super().decode(hidden, cache, positions, uniforms, forced, noise)


def random_model(name: str) -> TokenPolicy:
    """Random weights of a shape, with a tokenizer of single characters."""
    model = Llama(SHAPES[name])
    model.init_weights(torch.Generator().manual_seed(0))
    characters = DIGITS + "".join(chr(0x4E00 + i) for i in range(min(model.config.vocab_size, 20000)))
    return TokenPolicy(model, character_tokenizer([characters[: model.config.vocab_size - 10]]))


def make_policy(setting: Setting, args: argparse.Namespace, device: torch.device) -> TokenPolicy:
    """The policy of a setting: the base of the main job, a model of --models, or random weights of its shape."""
    dtype = args.dtype or setting.dtype
    if setting.model == "base":
        return checkpoints.load(args.base, device, dtype)
    if args.models and (args.models / setting.model).exists():
        loaded = checkpoints.load(args.models / setting.model, device, dtype)
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        loaded = random_model(setting.model)
        model, tokenizer = loaded.model.to(device), loaded.tokenizer
    policy = (DrawnLengths if setting.shortest else IdsPolicy)(model, tokenizer)
    policy.dtype = getattr(torch, dtype)
    if setting.shortest:
        policy.lengths = drawn_lengths(setting)
    else:
        policy.end_ids = [NEVER]
    return policy


def make_work(setting: Setting, policy: TokenPolicy) -> tuple[GRPOConfig, list[Example], Callable]:
    """Settings of the update, problems, and a function of examples and rollout that gives rewards (P, G)."""
    sizes = {"batch_size": setting.prompts, "num_generations": setting.group, "num_inner_updates": setting.inner}
    if setting.model == "base":
        task = find_task("arithmetic")
        config = GRPOConfig(rewards=task.rewards, max_new_tokens=task.max_new_tokens, learning_rate=1e-4, **sizes)
        rewards = Rewards.from_settings(config)

        def reward(examples, rollout):  # measured as `train_step` does
            values = rewards(examples, rollout, {})[0].total
            measure_rollout(rollout, values, examples, task)
            return values

        return config, load_task(task, policy.chat)["train"], reward

    def reward(examples, rollout):
        shares = [sum(i % 2 for i in ids) / len(ids) for ids in rollout.completion_ids]
        return torch.tensor(shares).view(len(examples), -1)

    sizes["micro_batch_tokens"] = setting.micro_batch
    config = GRPOConfig(max_new_tokens=setting.completion, learning_rate=1e-6, **sizes)
    return config, random_prompts(policy.model.config, setting.prompts, setting.prompt, ragged=False), reward


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_step(policy, reference, optimizer, examples, reward, config, step: int) -> tuple[Rollout, list[float]]:
    """Steps (2) to (6) of `train_step`; the rollout, and the seconds of each of PARTS."""
    optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, step / config.warmup_steps)
    clock = [now(policy.device)]

    def timed(value):
        clock.append(now(policy.device))
        return value

    rollout = timed(policy.sample(examples, config.num_generations, (config.seed, step, 0), config.max_new_tokens))
    rewards = timed(reward(examples, rollout))
    ref_logp = timed(score_rollout(reference, rollout, config.micro_batch_tokens))
    advantages = group_advantages(rewards.to(policy.device))
    timed(update(policy, reference, optimizer, rollout, advantages, ref_logp, config))
    return rollout, [end - start for start, end in pairwise(clock)]


def useful(policy: TokenPolicy, rollout: Rollout) -> tuple[float, float]:
    """Operations of a forward pass over real tokens, each prompt once, and bytes that decoding has to read.

    A completion's last token is no input, and only its tokens need the output layer. Decoding reads all weights for
    each token of the longest row, and for each row that goes on the keys and values of all that it sees.
    """
    model, c = policy.model, policy.model.config
    prompts, lengths = rollout.prompt_mask.sum(1).double(), rollout.mask.sum(1).double()
    inputs = (prompts.sum() + (lengths - 1).sum()).item()
    seen = ((lengths - 1) * (prompts[rollout.group] + lengths / 2)).sum().item()  # by inputs of completions
    seen_all = seen + (prompts * (prompts + 1) / 2).sum().item()
    keys = 2 * c.num_key_value_heads * c.head_dim  # and values
    body = c.num_hidden_layers * c.hidden_size * (2 * c.hidden_size + keys + 3 * c.intermediate_size)
    attention = 4 * c.num_hidden_layers * c.hidden_size * seen_all
    operations = 2 * body * inputs + attention + 2 * c.hidden_size * c.vocab_size * lengths.sum().item()
    weights = sum(weight.numel() for weight in model.parameters())
    weights -= 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    read = weights * lengths.max().item() + c.num_hidden_layers * keys * seen
    return operations, read * policy.dtype.itemsize


def best_rate(amount: float, call: Callable, device: torch.device, seconds: float = 0.5) -> float:
    """The most of an amount per second that a call gets done, of its calls in a short while."""
    times, end = [], now(device) + seconds
    while not times or time.perf_counter() < end:
        start = now(device)
        call()
        times.append(now(device) - start)
    return amount / min(times)


def limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations per second of matrix products, bytes per second of reading."""
    products = []
    for n in (1024, 2048, *[8192] * (device.type == "cuda")):
        x, out = torch.randn(n, n, device=device).to(dtype), torch.empty(n, n, device=device, dtype=dtype)
        products.append(best_rate(2 * n**3, partial(torch.mm, x, x.t(), out=out), device))
        if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            products.append(best_rate(2 * n**3, partial(product, x, x), device))
    return {"peak": max(products), "bandwidth": best_rate(2**28, torch.ones(2**26, device=device).sum, device)}


def measure(name: str, args: argparse.Namespace) -> dict:
    """Steps of a setting in this process: medians and ranges of seconds, work, limits, peak memory."""
    commands.keep_memory()
    torch.set_num_threads(args.threads)
    setting = ALL[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.compile:
        compile_blocks()
    policy = make_policy(setting, args, device)
    reference, optimizer = frozen(policy), runs.adamw(policy.model, weight_decay=0.0)
    config, data, reward = make_work(setting, policy)
    rows = []
    for step in range(1, args.warmup + args.steps + 1):
        examples = take_prompts(data, step, setting.prompts, config.seed)
        rollout, seconds = take_step(policy, reference, optimizer, examples, reward, config, step)
        lengths = rollout.mask.sum(1).double()
        sizes = [lengths.sum().item(), lengths.max().item(), lengths.mean().item() / lengths.max().item()]
        rows.append([sum(seconds), *seconds, *sizes, *useful(policy, rollout)])
    # Before the limits are measured, which takes memory as well.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident
    columns = list(zip(*rows[args.warmup :], strict=True))
    tokens, longest, filled, operations, read = map(statistics.median, columns[5:])
    limit, parts = limits(device, policy.dtype), {}
    passes = {"sample": 1, "reward": 0, "score": 1, "update": 3 * setting.inner}  # backward is twice forward
    passes["step"] = sum(passes.values())
    for part, seconds in zip(("step", *PARTS), columns, strict=False):
        median, work = statistics.median(seconds), passes[part] * operations
        parts[part] = {
            **{"seconds": median, "min": min(seconds), "max": max(seconds)},
            "tokens_per_second": tokens * (setting.inner if part == "update" else 1) / median,
            **{"operations": work, "of_peak": work / median / limit["peak"]},
        }
    parts["sample"] |= {"read": read, "of_bandwidth": read / parts["sample"]["seconds"] / limit["bandwidth"]}
    return {
        "setting": asdict(setting), "steps": args.steps, "parts": parts, "limits": limit, "memory": memory,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "threads": args.threads,
        "dtype": args.dtype or setting.dtype, "weights": sum(x.numel() for x in policy.model.parameters()),
        "completions": setting.prompts * setting.group, "tokens": tokens, "longest": longest, "filled": filled,
    }  # fmt: skip


def child(*command, cpu: bool = False, folder: Path = ROOT) -> dict:
    """What a Python command prints after RESULT, {} if nothing; raises SystemExit if it fails."""
    command = [sys.executable, *map(str, command)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench_speed.py: {' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1]) if lines else {}


def flags(values: dict) -> list:
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", value)]


def fits(name: str, args: argparse.Namespace) -> bool:
    """Whether a setting has the GPU or the base policy that it needs."""
    return {"base": bool(args.base), "qwen-0.5B": torch.cuda.is_available()}.get(ALL[name].model, True)


def measure_apart(name: str, args: argparse.Namespace, cpu: bool = False) -> dict | None:
    """`measure` in a process of its own; None if the setting does not fit here."""
    if not fits(name, args):
        return None
    given = {key: getattr(args, key) for key in ("steps", "warmup", "threads", "models", "base", "dtype")}
    return child(__file__, "--one", name, *flags(given), *["--compile"] * args.compile, cpu=cpu)


def trl_seconds(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step of TRL's and of its parts, and peak memory, as far as its driver tells them."""
    setting = ALL[name]
    if setting.model == "base":
        driver = [args.peers / "trl_main.py", args.base, "--steps", args.warmup + args.steps]
        return {"step": statistics.median(child(*driver, cpu=True)["times"][args.warmup :])}
    sizes = {"prompts": setting.prompts, "group": setting.group, "prompt-len": setting.prompt}
    sizes |= {"completion-len": setting.completion, "inner": setting.inner, "beta": 0.04, "steps": args.steps}
    sizes |= {"model": args.models / setting.model, "warmup": args.warmup, "threads": args.threads}
    if not sizes["model"].exists():
        checkpoints.save(random_model(setting.model), sizes["model"])
    changed = setting.shortest or torch.cuda.is_available()
    command = [*(["-O", __file__, "--trl", name, args.peers] if changed else [args.peers / "bench_trl.py"])]
    half = (args.dtype or setting.dtype) == "bfloat16"
    result = child(*command, *flags(sizes), *["--bf16"] * half)
    names = {"step": "step_s", "sample": "gen_s", "reward and score": "score_s", "update": "update_s"}
    memory = result.get("gpu_memory", result["peak_rss_mb"] * 2**20)
    return {part: result[key] for part, key in names.items()} | {"memory": memory}


def trl_changed(name: str, peers: str, rest: list[str]) -> None:
    """The peers' bench_trl.py with completions of drawn lengths, or on a GPU, after prompts of random digits.

    It asserts that no completion ends before the longest, so it runs under `python -O`, and lengths are checked here.
    """
    sys.path.insert(0, peers)
    import bench_trl
    import trl
    from transformers import LogitsProcessorList

    setting, on_gpu, say = ALL[name], torch.cuda.is_available(), bench_trl.report
    lengths = torch.full((setting.prompts * setting.group,), setting.completion)
    lengths = drawn_lengths(setting) if setting.shortest else lengths

    class Drawn(trl.GRPOTrainer):
        def __init__(self, **settings):
            super().__init__(**settings)
            end = self.processing_class.eos_token_id

            def force(ids, scores):
                last = lengths == ids.shape[1] - setting.prompt + 1
                scores[:, end] = -torch.inf
                scores[last] = -torch.inf
                scores[last, end] = 0.0
                return scores

            if setting.shortest:
                self.model.generate = partial(self.model.generate, logits_processor=LogitsProcessorList([force]))

        def _generate_and_score_completions(self, inputs):
            out = super()._generate_and_score_completions(inputs)
            sizes = out["completion_mask"].sum(1).cpu()
            if not torch.equal(sizes, lengths) or out["prompt_ids"].shape[1] != setting.prompt:
                sys.exit("bench_speed.py: TRL's prompts or completions have not the lengths that they should have")
            return out

    def digits(tokenizer, count, length, seed):
        drawn = np.random.default_rng(seed).integers(10, size=(count, length)).tolist()
        return [("".join(map(str, row)), "0") for row in drawn]

    def report(*values, **named):
        say(*values, **named | ({"gpu_memory": torch.cuda.max_memory_allocated()} if on_gpu else {}))

    settings = trl.GRPOConfig
    trl.GRPOConfig = lambda **given: settings(**given | {"use_cpu": not on_gpu})
    trl.GRPOTrainer, bench_trl.problems, bench_trl.report = Drawn, digits, report
    sys.argv = ["bench_trl.py", *rest]
    bench_trl.main()


def in_turns(number: int, ours: Callable, theirs: Callable) -> dict[str, dict]:
    """Both sides once; every other time TRL goes first."""
    sides = {"ours": ours, "trl": theirs}
    return {side: sides[side]() for side in (list(sides)[::-1] if number % 2 else sides)}


def race(name: str, args: argparse.Namespace) -> dict | None:
    """Rounds of ours and TRL's: median seconds of the step and of its parts in each, and peak memory."""

    def ours() -> dict[str, float]:
        result = measure_apart(name, args, cpu=ALL[name].model == "base")
        seconds = {part: values["seconds"] for part, values in result["parts"].items()}
        return seconds | {"reward and score": seconds["reward"] + seconds["score"], "memory": result["memory"]}

    if not fits(name, args):
        return None
    rounds = [in_turns(number, ours, partial(trl_seconds, name, args)) for number in range(args.rounds)]
    return {"setting": asdict(ALL[name]), "steps": args.steps, "rounds": rounds}


def to_90(seed: int, args: argparse.Namespace) -> dict[str, dict]:
    """Seconds of training from one base policy until 90 % of a step's samples are right, on both sides."""

    def reached(seconds: list[float], accuracy: list[float]) -> dict:
        step = next((i for i, share in enumerate(accuracy, 1) if share >= 0.9), None)
        return {"step": step, "seconds": step and sum(seconds[:step])}

    def ours() -> dict:
        job = {"task": "arithmetic", "model": args.base, "steps": STEPS_TO_90, "seed": seed, "out": "run"}
        with tempfile.TemporaryDirectory() as folder:
            child(ROOT / "grpo.py", *flags(job), cpu=True, folder=folder)
            lines = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
            steps = [line for line in lines if line["step"]]
        return reached([line["seconds"] for line in steps], [line["accuracy"] for line in steps])

    def theirs() -> dict:
        result = child(args.peers / "trl_main.py", args.base, "--steps", STEPS_TO_90, cpu=True)
        return reached(result["times"], result["accuracy"])

    return in_turns(seed, ours, theirs)


def spread(values: list[float], unit: str) -> str:
    return f"{statistics.median(values):.3g} {unit} [{min(values):.3g}, {max(values):.3g}]"


def padded(rows: list[list[str]]) -> str:
    """A table whose rows may end early."""
    return table([row + [""] * (len(rows[0]) - len(row)) for row in rows])


def report_settings(results: dict[str, dict | None]) -> str:
    parts = [["setting", "part", "seconds", "tokens/s", "useful GFLOP", "of the peak", "GB read", "of the bandwidth"]]
    about = [["setting", "weights", "rows", "longest", "filled", "peak, GFLOP/s", "read, GB/s", "memory", "on"]]
    for name, result in results.items():
        if not result:
            parts.append([name, "step", "not measured"])
            about.append([name, "not measured"])
            continue
        for part, x in result["parts"].items():
            cells = [f"{x['seconds']:.3g} [{x['min']:.3g}, {x['max']:.3g}]", f"{x['tokens_per_second']:,.0f}"]
            cells += [f"{x['operations'] / 1e9:,.3g}", f"{x['of_peak']:.0%}"] if x["operations"] else []
            cells += [f"{x['read'] / 1e9:.3g}", f"{x['of_bandwidth']:.0%}"] if part == "sample" else []
            parts.append([name, part, *cells])
        cells = [f"{result[key]:,.0f}" for key in ("weights", "completions", "longest")] + [f"{result['filled']:.0%}"]
        cells += [f"{result['limits'][key] / 1e9:,.4g}" for key in ("peak", "bandwidth")]
        about.append([name, *cells, f"{result['memory'] / 1e9:.2f} GB", f"{result['device']}, {result['dtype']}"])
    return f"{padded(parts)}\n\n{padded(about)}"


def report_race(results: dict[str, dict | None]) -> str:
    rows = [["setting", "part", "ours", "TRL", "TRL over ours", "target", "met"]]
    for name, result in results.items():
        if not result:
            rows.append([name, "step", "not measured", "not measured"])
            continue
        for part in result["rounds"][0]["trl"]:
            ours, theirs = ([both[side][part] for both in result["rounds"]] for side in ("ours", "trl"))
            ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
            scale, unit = (1e9, "GB") if part == "memory" else (1, "s")
            cells = [f"{statistics.median(side) / scale:.3g} {unit}" for side in (ours, theirs)]
            target = result["setting"]["target"] if part == "step" else None
            met = [f">= {target:g} x", "yes" if statistics.median(ratios) >= target else "NO"] if target else []
            rows.append([name, part, *cells, spread(ratios, "x"), *met])
    return padded(rows)


def report_to_90(results: dict[str, dict]) -> str:
    rows, pairs = [["our seed", "ours", "TRL (always seed 0)", "TRL over ours"]], []
    for seed, result in results.items():
        sides = [result["ours"], result["trl"]]
        cells = [f"{side['seconds']:.2f} s, step {side['step']}" if side["step"] else "not reached" for side in sides]
        if all(side["step"] for side in sides):
            pairs.append([side["seconds"] for side in sides])
            cells.append(f"{pairs[-1][1] / pairs[-1][0]:.2f} x")
        rows.append([seed, *cells])
    if pairs:
        medians = [spread(list(side), "s") for side in zip(*pairs, strict=True)]
        rows.append(["median", *medians, spread([theirs / ours for ours, theirs in pairs], "x")])
    return padded(rows)


def draw(results: dict[str, dict], out: Path) -> list[Path]:
    """Seconds of a step along each axis that was measured, over the least that its work would take."""
    import matplotlib
    from matplotlib.figure import Figure

    from plot_metrics import STYLE, save_figures

    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(9, 6.5), layout="constrained")
        for ax, (axis, (label, settings)) in zip(figure.subplots(2, 2, sharey=True).flat, AXES.items(), strict=True):
            found = sorted((results[name] for name in settings if name in results), key=lambda result: result[axis])
            x = [result[axis] for result in found]
            ax.loglog(x, [result["parts"]["step"]["seconds"] for result in found], "o-", label="a step")
            least = [result["parts"]["step"]["operations"] / result["limits"]["peak"] for result in found]
            ax.loglog(x, least, "o--", label="its useful work at the speed of matrix products")
            ax.set(xlabel=label, ylabel="seconds")
            scale, form = {"weights": (1e-6, "{:.0f} M"), "filled": (1, "{:.0%}")}.get(axis, (1, "{:.0f}"))
            ax.set_xticks(x, [form.format(scale * value) for value in x])
            ax.set_xticks([], minor=True)
            ax.yaxis.set_major_formatter("{x:g}")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        return save_figures({out.stem: figure}, out.parent)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--settings", nargs="+", choices=ALL, metavar="NAME", help="which (default: all of what is asked)")
    add("--models", type=Path, help="folder of make_models.py (default: random weights of the same shapes)")
    add("--base", type=Path, help="base policy of the main job, made by sft.py")
    add("--peer", choices=["trl"], help="take turns with it")
    add("--peers", type=Path, default=ROOT.parent / "shared" / "peers", help="its drivers (default: %(default)s)")
    add("--to90", action="store_true", help="time to 90 %% of samples right, a seed in each round")
    add("--grow", action="store_true", help="how the cost of a step grows")
    add("--rounds", type=int, default=5, help="rounds against the peer (default: %(default)s)")
    add("--steps", type=int, default=5, help="timed steps (default: %(default)s)")
    add("--warmup", type=int, default=2, help="steps before them (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch (default: its own choice)")
    add("--dtype", choices=["float32", "bfloat16"], help="of ours (default: the setting's, mostly float32)")
    add("--compile", action="store_true", help="compile our blocks; on a GPU")
    add("--results", type=Path, default=ROOT / "results" / "bench_speed.json", help="file to add to")
    add("--one", choices=ALL, metavar="NAME", help="measure one in this process and print it as JSON")
    args = parser.parse_args()
    for name in ("models", "base", "peers", "results"):
        if getattr(args, name):
            setattr(args, name, getattr(args, name).resolve())
    if args.to90 and not args.base:
        parser.error("--to90 needs a --base")
    if args.peer and not args.models:
        parser.error("--peer needs --models, the folder that make_models.py wrote")
    return args


def main() -> None:
    if sys.argv[1:2] == ["--trl"]:  # its other arguments are those of bench_trl.py
        return trl_changed(sys.argv[2], sys.argv[3], sys.argv[4:])
    args = parse()
    if args.one:
        return print("RESULT " + json.dumps(measure(args.one, args)))
    here = machine(args.threads, load_before())
    mode = "to90" if args.to90 else "trl" if args.peer else "grow" if args.grow else "settings"
    take = {"to90": to_90, "trl": race}.get(mode, measure_apart)
    results = {}
    for name in range(args.rounds) if args.to90 else args.settings or (GROWN if args.grow else SETTINGS):
        results[str(name)] = result = take(name, args)
        print(f"{mode}, {name}: {'done' if result else 'not measured'}", file=sys.stderr)
        if result:  # kept at once, lest a long run is lost
            kept = json.loads(args.results.read_text()) if args.results.exists() else {}
            group = mode if args.dtype in (None, "float32") else f"{mode} in {args.dtype}"
            group += ", compiled" * args.compile
            kept.setdefault(group, {})[str(name)] = result | {"machine": here}
            write(args.results, kept)
    report = {"to90": report_to_90, "trl": report_race}.get(mode, report_settings)
    print(f"\n{report(results)}\n\n{describe(here)}\nwritten: {args.results}")
    if args.grow:
        print(*draw(json.loads(args.results.read_text())["grow"], args.results), sep="\n")


if __name__ == "__main__":
    main()
