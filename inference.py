"""Ask a policy a question, or evaluate one on held-out problems.

python inference.py "What is (4 - 9) * 6?"
python inference.py --eval --model saved_model/base saved_model
"""

import functools
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import commands
import ranks
from checkpoints import choose_device, find_checkpoint, load
from commands import UserError, check_settings, option, out_of_memory, parser_for, printable, run_main
from policy import Policy
from rewards import answer_format, apply_reward, extract_answer
from rollouts import Rollout
from tasks import TASKS, Example, Task, find_task, load_task, pose, worked_examples


def wilson(right: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a proportion (Wilson 1927)."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share = right / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low, high = (centre - spread) / (1 + z * z / total), (centre + spread) / (1 + z * z / total)
    return max(low, 0.0), min(high, 1.0)  # rounding may step over an end


def pass_at_k(total: int, right: int, k: int) -> float:
    """Probability that k of `total` samples, `right` of them correct, hold a correct one (Codex, arXiv 2107.03374)."""
    return 1 - math.comb(total - right, k) / math.comb(total, k)


def bootstrap(values: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """95 % percentile interval of the mean over problems, resampled with a fixed seed."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def known_means(table: dict[str, list[float | None]]) -> dict[str, float]:
    """The mean of what is not None under each name, without the names under which nothing is known."""
    known = {name: [value for value in values if value is not None] for name, values in table.items()}
    return {name: statistics.fmean(values) for name, values in known.items() if values}


def sampled_results(task: Task, means: dict[str, float], scores: np.ndarray) -> dict[str, float]:
    """The means of several samples a problem, and of their scores (problems, samples) the interval and pass@k."""
    result, samples = {f"sampled_{name}": value for name, value in means.items()}, scores.shape[1]
    if len(scores):
        name = f"sampled_{task.score}"
        result[f"{name}_low"], result[f"{name}_high"] = bootstrap(scores.mean(1))
    for k in [2**i for i in range(1, samples.bit_length())] if task.score == "accuracy" else []:
        passed = np.array([pass_at_k(samples, int(right), k) for right in scores.sum(1)])
        result[f"pass@{k}"] = float(passed.mean())
        result[f"pass@{k}_low"], result[f"pass@{k}_high"] = bootstrap(passed)
    return result


def measure_rollout(rollout: Rollout, rewards: torch.Tensor, examples: list[Example], task: Task) -> dict[str, float]:
    """What is measured on the sampled completions and their rewards (P, G), before any update."""
    rows = [example for example in examples for _ in range(rewards.shape[1])]
    lengths = rollout.mask.sum(1).float()
    measured = {name: apply_reward(name, function, rows, rollout) for name, function in task.metrics.items()}
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        **known_means(measured),
        "truncated": rollout.truncated.float().mean().item(),
        **{"length": lengths.mean().item(), "length_min": lengths.min().item(), "length_max": lengths.max().item()},
        **{"samples": rewards.numel(), "tokens": int(rollout.mask.sum())},
    }


def measure_completions(
    policy: Policy, task: Task, examples: list[Example], max_new_tokens: int, seed: int, batch_rows: int,
    group_size: int, greedy: bool,
) -> dict[str, list]:  # fmt: skip
    """Sample each problem without exploration: texts (under "completion") and every measure, a value a completion.

    The problems are shared out among the ranks, of which each gets all that was measured.
    """
    size = max(1, batch_rows // group_size)
    how = "greedy" if greedy else f"{group_size} samples"
    begin, end = ranks.share(len(examples))
    bar = {"leave": False, "delay": 5, "unit": "batch", "disable": not ranks.FIRST}

    def measure() -> dict[str, list]:
        table: dict[str, list] = {name: [] for name in ("completion", *task.metrics, "length", "truncated")}
        for start in tqdm(range(begin, end, size), f"{len(examples)} problems, {how}", **bar):
            part = examples[start : min(end, start + size)]
            rollout = policy.sample(part, group_size, (seed, 0, 0), max_new_tokens, greedy, start, explore=False)
            rows = [example for example in part for _ in range(group_size)]
            table["completion"] += rollout.texts
            for name, function in task.metrics.items():
                table[name] += apply_reward(name, function, rows, rollout)
            table["length"] += rollout.mask.sum(1).tolist()
            table["truncated"] += rollout.truncated.tolist()
        return table

    tables = ranks.every(measure)
    return {name: [value for part in tables for value in part[name]] for name in tables[0]}


def summarize(task: Task, table: dict[str, list], group_size: int) -> tuple[dict[str, float], np.ndarray]:
    """The mean of every measure, and the scores (problems, group_size), a missing one filled by the mean."""
    means = known_means({name: values for name, values in table.items() if name != "completion"})
    scores = table[task.score] if task.score in means else []
    filled = [means[task.score] if score is None else score for score in scores]
    return means, np.array(filled).reshape(-1, group_size)


def evaluate(
    policy: Policy, task: Task, examples: list[Example], max_new_tokens: int, samples: int = 0, seed: int = 0,
    batch_rows: int = 512, outputs: list[dict] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Greedy accuracy with its interval, and with `samples` > 0 accuracy and pass@k at the policy's temperature.

    A task whose score is no accuracy has the mean of that instead, and no pass@k. A record of each completion is
    appended to `outputs`, where that is given.
    """
    draw = functools.partial(measure_completions, policy, task, examples, max_new_tokens, seed, batch_rows)
    likeliest = draw(group_size=1, greedy=True)
    means, scores = summarize(task, likeliest, 1)
    result = {"problems": len(examples), **means}
    for name in [name for name in means if name in (task.score, "lenient")]:
        shares = name in ("accuracy", "lenient")  # of problems, each right or wrong
        interval = wilson(means[name] * len(examples), len(examples)) if shares else bootstrap(scores.mean(1))
        result[f"{name}_low"], result[f"{name}_high"] = interval
    if outputs is not None:
        outputs += records(examples, likeliest, greedy=True)
    if samples:
        drawn = draw(group_size=samples, greedy=False)
        result |= sampled_results(task, *summarize(task, drawn, samples))
        if outputs is not None:
            outputs += records(examples, drawn, greedy=False)
    return result


def records(examples: list[Example], table: dict[str, list], greedy: bool) -> list[dict]:
    """A record for each completion of a table, with its question and all measures."""
    rows = [example for example in examples for _ in range(len(table["completion"]) // len(examples))]
    measured = (dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True))
    asked = ({"question": row.question, **row.columns, "greedy": greedy} for row in rows)
    return [question | measures for question, measures in zip(asked, measured, strict=True)]


@dataclass(frozen=True)
class InferenceConfig:
    """Settings of inference.py."""

    model: list[str] = option(["saved_model"], "Checkpoint folders; several are shown side by side.", "model and data")
    task: Literal[*TASKS] = option("arithmetic", "Task whose form of question and problems are used.", "model and data")
    data: str | None = option(None, "File or folder with the task's records. Default: the hub's.", "model and data")
    limit: int | None = option(None, "At most so many held-out problems.", "model and data", above_zero=True)
    shots: int | None = option(None, "Worked examples before each question. Default: the run's.", "model and data")
    chat_template: str | None = option(
        None, "File with another chat template, or none. Default: the model's.", "model and data"
    )
    thinking: Literal["on", "off"] | None = option(
        None, "Whether the chat template asks for thinking, if it can. Default: the run's.", "model and data"
    )
    samples: int = option(1, "Completions of each question; with --eval at least 4.", "sampling", above_zero=True)
    temperature: float | None = option(None, "0 is greedy. Default: 0 for one completion, else 1.", "sampling")
    max_new_tokens: int | None = option(
        None, "Longest completion, in tokens. Default: the task's.", "sampling", above_zero=True
    )
    seed: int = option(0, "Seed of the sampler.", "sampling")
    eval: bool = option(False, "Evaluate on the held-out problems of --task instead of answering.", "evaluation")
    report: str | None = option(None, "Write the results to this file, as JSON.", "evaluation")
    outputs: str | None = option(None, "Write all completions and scores to this file, as JSON Lines.", "evaluation")
    batch_size: int = option(512, "Completions that are sampled at once.", "evaluation", above_zero=True)
    device: str = option("auto", "Device: auto, cuda, mps or cpu.", "memory and device")
    dtype: Literal["float32", "bfloat16"] | None = option(
        None, "Of matrix products. Default: float32; on a GPU bfloat16 if the model is no toy.", "memory and device"
    )

    def __post_init__(self):
        check_settings(self)
        if self.temperature is not None and 0 < self.temperature < 1e-3:
            raise UserError(f"--temperature is {self.temperature}; it must be 0 (greedy) or from 0.001 up")


def show_answer(text: str, tagged: bool = True) -> str:
    """A completion for the terminal: the working, an arrow, the answer, where the task asks for one in tags."""
    answer = extract_answer(text) if tagged else None
    if answer is None:
        return printable(text) + "  (no <answer>...</answer> at the end)" * tagged
    working = text.partition("<answer>")[0].strip()
    return printable(f"{working}  →  {answer}" if working else f"→  {answer}")


def as_trained(config: InferenceConfig, name: str) -> InferenceConfig:
    """The settings with what is not given taken from the run that made a model, where that is known."""
    file = Path(name) / "run.json"
    stored = commands.read_json(file).get("settings") if file.is_file() else None
    stored = stored if isinstance(stored, dict) and stored.get("task") == config.task else {}
    found = {key: stored.get(key) for key in ("shots", "data", "thinking") if getattr(config, key) is None}
    if type(found.get("shots") or 0) is not int or not isinstance(found.get("data") or "", str):
        mend = "restore the file, or give --shots and --data"
        raise UserError(f"{file}: shots or data are not what a run writes; {mend}")
    return replace(config, **found)


def answer_question(config: InferenceConfig, question: str, policies: dict[str, Policy]) -> None:
    task = find_task(config.task)
    greedy = config.temperature == 0 or (config.temperature is None and config.samples == 1)
    for name, policy in policies.items():
        asked = as_trained(config, name)
        given = {} if asked.data is None else {"data": asked.data}
        example = pose(task, Example(question), policy.chat, worked_examples(task, asked.shots or 0, **given))
        width = config.max_new_tokens or task.max_new_tokens
        rollout = policy.sample([example], config.samples, (config.seed, 0, 0), width, greedy=greedy)
        if len(policies) > 1:
            print(f"{name}:")
        for text in rollout.texts:
            print(show_answer(text, tagged=task.metrics.get("format") is answer_format))


def compare(config: InferenceConfig, load_one: Callable[[str], Policy]) -> None:
    """Evaluate the policies on the held-out problems, one in memory at a time, and print a table."""
    task, results = find_task(config.task), {}
    width, samples = config.max_new_tokens or task.max_new_tokens, max(config.samples, 4)
    samples = 0 if config.temperature == 0 else samples
    for name in config.model:
        policy, outputs, asked = load_one(name), [], as_trained(config, name)
        examples = load_task(task, policy.chat, config.limit, asked.shots or 0, data=asked.data)["held_out"]
        examples = policy.fitting({"held_out": examples}, width)["held_out"]
        print(f"{name}: {len(examples)} problems, one greedy completion and {samples} samples of each", file=sys.stderr)
        results[name] = evaluate(policy, task, examples, width, samples, config.seed, config.batch_size, outputs)
        if config.outputs:
            commands.append_json(Path(config.outputs), *({"model": name, **output} for output in outputs))
    print(results_table(results))
    if config.report:
        settings = {"task": task.name, "samples": samples, "seed": config.seed}
        settings["temperature"] = 1.0 if config.temperature is None else config.temperature
        commands.write_json(Path(config.report), {"settings": settings, "results": results})


def show_number(name: str, value: float) -> str:
    """A measure as text: a share as per cent, anything else with four digits."""
    return f"{value:.4g}" if name == "problems" or name.endswith(("length", "error", "reward")) else f"{value:.1%}"


def results_table(results: dict[str, dict[str, float]]) -> str:
    """Evaluation results as text, a line per measure and a column per policy, with the 95 % intervals."""

    def cell(result: dict[str, float], key: str) -> str:
        if key not in result:
            return "–"
        low, high = (show_number(key, result.get(f"{key}_{end}", math.nan)) for end in ("low", "high"))
        return show_number(key, result[key]) + (f" [{low}, {high}]" if f"{key}_low" in result else "")

    measured = dict.fromkeys(key for result in results.values() for key in result)
    keys = [key for key in measured if key != "step" and not key.endswith(("_low", "_high"))]
    greedy = [key if key.startswith(("problems", "sampled", "pass")) else f"greedy {key}" for key in keys]
    names = [key.replace("_", " ") for key in greedy]
    columns = [["", *names]] + [[name, *(cell(result, key) for key in keys)] for name, result in results.items()]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


EXAMPLES = """the commonest:
  python inference.py "What is (4 - 9) * 6?"
  python inference.py "What is (4 - 9) * 6?" --model saved_model/base saved_model --samples 4
  python inference.py --eval --task arithmetic --model saved_model/base saved_model"""


def main() -> int:
    parser = parser_for(InferenceConfig, "Ask a trained policy a question, or evaluate it.", EXAMPLES)
    parser.add_argument("question", nargs="?", help="Without it, one question a line from standard input.")
    arguments = vars(parser.parse_args())
    question = arguments.pop("question")
    config = InferenceConfig(**arguments)
    if config.eval and question is not None:
        raise UserError(f"--eval takes no question, but there is {question!r}; leave out the one or the other")
    device = choose_device(config.device)
    for path in filter(None, (config.report, config.outputs)):
        if not config.eval:
            raise UserError(f"--report and --outputs go with --eval; leave {path!r} out, or add --eval")
        if Path(path).exists() or not Path(path).parent.is_dir():
            what = "exists" if Path(path).exists() else "is in a folder that is not there"
            raise UserError(f"{path} {what}; name another file")
    temperature = config.temperature or 1.0

    def load_one(name: str) -> Policy:
        chat = {"chat_template": config.chat_template, "thinking": as_trained(config, name).thinking}
        return load(name, device, config.dtype, temperature, **chat)

    for name in config.model:
        find_checkpoint(name)  # before any is loaded
    policies = {} if config.eval else {name: load_one(name) for name in config.model}
    with out_of_memory("--batch-size with --eval, --samples without, or --max-new-tokens"):
        if config.eval:
            compare(config, load_one)
        elif question is not None:
            answer_question(config, question, policies)
        else:
            return answer_lines(config, policies)
    return 0


def answer_lines(config: InferenceConfig, policies: dict[str, Policy]) -> int:
    """Answer one question a line from standard input; a bad one is named and skipped. Returns the exit status."""
    status = 0
    if sys.stdin.isatty():
        print("Type a question, such as: What is (4 - 9) * 6?  (end with Ctrl-D)", file=sys.stderr)
    for line in filter(None, map(str.strip, sys.stdin)):
        try:
            answer_question(config, line, policies)
        except UserError as error:
            print(f"inference.py: error: {printable(str(error))}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    run_main(main)
