"""Speed of the hand-written sampler against `model.generate` of transformers, and of the scorer that shares prompts.

    python tests/bench_sampler.py

Both samplers read the same checkpoint and draw G completions of each of P prompts of random ids, at temperature 1 from
the whole vocabulary. Counted are sampled tokens up to and including the end token. Lengths are
"fixed" (no id ends a completion) or "variable" (in both, one id in 16 does, so that lengths are about geometric).
`TokenPolicy.sample` also keeps log-probabilities and decodes the text; `generate` is not asked to. The two take turns
in one process after a warm-up. Prints tables and writes results/bench_sampler.json.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_main import ROOT, describe, load_before, machine, table, write
from transformers import AutoModelForCausalLM, GenerationConfig

import checkpoints
from checkpoints import new_policy
from model_toy import Llama, LlamaConfig, character_tokenizer
from policy import TokenPolicy
from rollouts import Rollout, micro_batches
from tasks import Example

NEVER = -1  # an id that no model draws
MOST_DIFFERENCE = 1e-5


class IdsPolicy(TokenPolicy):
    """A policy whose prompts are token ids already."""

    def encode(self, prompts: list[list[int]]) -> list[list[int]]:
        return prompts


def toy() -> LlamaConfig:
    """The sizes of the toy that sft.py makes for arithmetic."""
    return new_policy(["(0 + 1) - 2 * 3 = 4; 5 / 6 7 8 9?"], 0, torch.device("cpu")).model.config


def small() -> LlamaConfig:
    """About 30 million weights, with grouped-query attention."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
    )


MODELS = {"toy": toy, "small": small}


def random_policy(config: LlamaConfig) -> IdsPolicy:
    """Random weights, small enough that every id is about equally likely, and a tokenizer of that many ids."""
    texts = [chr(0x4E00 + i) for i in range(config.vocab_size)]  # characters enough that are no white space
    tokenizer = character_tokenizer([text for text in texts if text.isprintable()])
    config = replace(config, vocab_size=min(len(tokenizer), config.vocab_size), initializer_range=0.005)
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return IdsPolicy(model, tokenizer)


def random_prompts(config: LlamaConfig, count: int, length: int, ragged: bool) -> list[Example]:
    """Prompts of `length` random ids; ragged ones run down to three quarters of that, so that masks are needed."""
    generator = torch.Generator().manual_seed(length)
    lengths = [length - ragged * i * (length // 4) // max(1, count - 1) for i in range(count)]
    return [Example(torch.randint(7, config.vocab_size, (n,), generator=generator).tolist()) for n in lengths]


def ours(policy: IdsPolicy, examples: list[Example], ends: list[int], settings) -> Callable[[int], torch.Tensor]:
    """A function of the round that samples with TokenPolicy.sample and returns the lengths."""

    def draw(number: int) -> torch.Tensor:
        policy.end_ids = ends or [NEVER]
        rollout = policy.sample(examples, settings.group, (0, number, 0), settings.max_new_tokens)
        return rollout.mask.sum(1)

    return draw


def theirs(model, policy: IdsPolicy, examples: list[Example], ends: list[int], settings):
    """A function of the round that samples with model.generate and returns the lengths."""
    generation = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=settings.group,
        max_new_tokens=settings.max_new_tokens, eos_token_id=ends or None, pad_token_id=policy.pad_id,
    )  # fmt: skip
    model.generation_config = generation  # nothing is left to be filled in from the checkpoint's own

    def draw(number: int) -> torch.Tensor:
        torch.manual_seed(number)
        prompts = [example.prompt for example in examples]
        width = max(map(len, prompts))
        ids = torch.tensor([[policy.pad_id] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        drawn = model.generate(input_ids=ids, attention_mask=mask, generation_config=generation)[:, width:]
        ended = torch.isin(drawn, torch.tensor(ends or [NEVER])).int()
        return drawn.shape[1] - (ended.cumsum(1) - ended).sign().sum(1)

    return draw


def race(runners: dict[str, Callable[[int], torch.Tensor]], rounds: int) -> dict[str, float]:
    """Medians over rounds, in which the runners take turns: tokens per second of each, and the ratio of the first."""
    speeds: dict[str, list[float]] = {name: [] for name in runners}
    lengths: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds + 1):
        order = list(runners) if number % 2 else list(runners)[::-1]
        for name in order:
            start = time.perf_counter()
            drawn = runners[name](number)
            if number:  # round 0 is the warm-up
                speeds[name].append(drawn.sum().item() / (time.perf_counter() - start))
                lengths[name].append(drawn.float().mean().item())
    first, second = speeds.values()
    return {
        **{f"{name}_tokens_per_second": statistics.median(values) for name, values in speeds.items()},
        **{f"{name}_length": statistics.fmean(values) for name, values in lengths.items()},
        "ratio": statistics.median(a / b for a, b in zip(first, second, strict=True)),
        "ratios": [a / b for a, b in zip(first, second, strict=True)],
    }


def bench_sampler(name: str, policy: IdsPolicy, model, settings) -> list[dict]:
    """All cases of one model."""
    vocabulary, cases = policy.model.config.vocab_size, []
    ends = list(range(7, 7 + max(1, round(vocabulary / 16))))
    for length in settings.prompt_lengths:
        examples = random_prompts(policy.model.config, settings.prompts, length, settings.ragged)
        for kind, end_ids in (("fixed", []), ("variable", ends)):
            runners = {
                "ours": ours(policy, examples, end_ids, settings),
                "generate": theirs(model, policy, examples, end_ids, settings),
            }
            target = 1.5 if (length, kind) == (32, "fixed") else 3.0 if (length, kind) == (200, "variable") else None
            case = {"model": name, "prompt": length, "lengths": kind, "target": target}
            cases.append(case | race(runners, settings.rounds))
            print(f"{name}, prompts of {length}, {kind}: {cases[-1]['ratio']:.2f}x", file=sys.stderr)
    return cases


def score(policy: IdsPolicy, rollout: Rollout, weights: torch.Tensor, budget: int, shared: bool):
    """Forward and backward over a rollout: seconds, log-probabilities (B, T), gradients by parameter."""
    policy.model.zero_grad()
    logp = torch.zeros_like(rollout.sampler_logp)
    start = time.perf_counter()
    layout = policy.layout if shared else "joined"
    for rows in micro_batches(rollout, budget, layout):
        part = rollout.select(rows)
        values, _ = policy.log_probs(part, layout=layout)
        (-(weights[rows, None] * values).sum() / rollout.mask.sum()).backward()
        logp[rows, : values.shape[1]] = values.detach()
    seconds = time.perf_counter() - start
    return seconds, logp, {name: weight.grad.clone() for name, weight in policy.model.named_parameters()}


def bench_scorer(name: str, policy: IdsPolicy, settings) -> dict:
    """Time of one pass over each prompt against one over each row, and how far the two are from each other."""
    length = max(settings.prompt_lengths)
    examples = random_prompts(policy.model.config, settings.prompts, length, settings.ragged)
    policy.end_ids = [NEVER]
    rollout = policy.sample(examples, settings.group, (0, 0, 0), settings.max_new_tokens)
    weights = torch.randn(len(rollout.group), generator=torch.Generator().manual_seed(0))  # as advantages are
    pairs = [
        [score(policy, rollout, weights, settings.micro_batch_tokens, shared) for shared in (True, False)]
        for _ in range(settings.scorer_rounds + 1)
    ]
    (_, logp, grads), (_, plain_logp, plain_grads) = pairs[-1]
    square = sum((grads[k] - plain_grads[k]).double().square().sum() for k in grads)
    size = sum(plain_grads[k].double().square().sum() for k in grads)
    return {
        "model": name,
        "prompt": length,
        "shared_seconds": statistics.median(pair[0][0] for pair in pairs[1:]),
        "plain_seconds": statistics.median(pair[1][0] for pair in pairs[1:]),
        "ratio": statistics.median(plain[0] / shared[0] for shared, plain in pairs[1:]),
        "logp_difference": (logp - plain_logp).abs().max().item(),
        "gradient_difference": (square / size).sqrt().item(),
    }


def report(sampler: list[dict], scorer: list[dict]) -> str:
    rows = [["model", "prompt", "lengths", "mean", "ours, tok/s", "generate, tok/s", "ratio", "target", "met"]]
    for case in sampler:
        target = case["target"]
        numbers = [f"{case[f'{name}_tokens_per_second']:,.0f}" for name in ("ours", "generate")]
        met = "" if target is None else "yes" if case["ratio"] >= target else "NO"
        cells = [case["model"], str(case["prompt"]), case["lengths"], f"{case['ours_length']:.1f}", *numbers]
        rows.append([*cells, f"{case['ratio']:.2f}x", "" if target is None else f">= {target}x", met])
    lines = [table(rows), ""]
    rows = [["model", "prompt", "prompts shared", "not shared", "speed-up", "logp apart", "gradient apart", "met"]]
    for case in scorer:
        seconds = [f"{case[f'{name}_seconds']:.3f} s" for name in ("shared", "plain")]
        apart = [case["logp_difference"], case["gradient_difference"]]
        cells = [case["model"], str(case["prompt"]), *seconds, f"{case['ratio']:.2f}x", *(f"{x:.1e}" for x in apart)]
        rows.append([*cells, "yes" if max(apart) <= MOST_DIFFERENCE else "NO"])
    return "\n".join([*lines, table(rows)])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which models (default: all)")
    add("--prompts", type=int, default=8, help="prompts in a batch (default: %(default)s)")
    add("--group", type=int, default=8, help="completions of each (default: %(default)s)")
    add("--prompt-lengths", type=int, nargs="+", default=[32, 200], help="prompt lengths (default: 32 200)")
    add("--ragged", action="store_true", help="prompts down to three quarters of that length, padded on the left")
    add("--max-new-tokens", type=int, default=64, help="longest completion (default: %(default)s)")
    add("--micro-batch-tokens", type=int, default=8192, help="budget of the scorer's passes (default: %(default)s)")
    add("--rounds", type=int, default=5, help="timed rounds of the samplers (default: %(default)s)")
    add("--scorer-rounds", type=int, default=3, help="timed rounds of the scorer (default: %(default)s)")
    add("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    add("--results", type=Path, default=ROOT / "results" / "bench_sampler.json", help="file to write")
    return parser.parse_args()


def main() -> None:
    settings = parse()
    load = load_before()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    sampler, scorer, sizes = [], [], {}
    for name in settings.models:
        policy = random_policy(MODELS[name]())
        sizes[name] = sum(weight.numel() for weight in policy.model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.save(policy, Path(folder))
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        sampler += bench_sampler(name, policy, model, settings)
        scorer.append(bench_scorer(name, policy, settings))
    here = machine(torch.get_num_threads(), load)
    chosen = {key: value for key, value in vars(settings).items() if key not in ("results", "threads")}
    write(
        settings.results, {"machine": here, "settings": chosen, "weights": sizes, "sampler": sampler, "scorer": scorer}
    )
    print(f"\n{report(sampler, scorer)}\n")
    print(
        f"{settings.prompts} prompts x {settings.group} completions of at most {settings.max_new_tokens} tokens; ",
        end="",
    )
    print("weights: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    print(f"{describe(here)}\nwritten: {settings.results}")


if __name__ == "__main__":
    main()
