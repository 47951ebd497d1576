"""What `check.py` asks of a function: fixed cases, the right answers, and the answers that the known faults give.

Right answers come from this project's code, those of a fault from the same code with the patch of `faults.py`. A case
holds plain numbers, so that `results/conformance.json` can hold it too.
"""

import functools
import importlib
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults import FAULTS, Fault  # noqa: E402

import grpo  # noqa: E402
from commands import UserError  # noqa: E402
from model_toy import Llama, LlamaConfig  # noqa: E402
from rollouts import Rollout  # noqa: E402
from tasks import Example  # noqa: E402

Numbers = dict[str, np.ndarray]  # "value", and "gradient" where there is one
SAME = 1e-5  # what float32 makes of these cases; the smallest difference that any fault makes is larger
MAX_NEW_TOKENS = 16  # the constant of `dr_grpo`
VOCABULARY, END_IDS, PAD_ID = 12, [2, 5], 0
WIDTH = 3  # tokens of a sampled completion at most


@dataclass(frozen=True, eq=False)
class Case:
    """What is given, by parameter name; `needs` names the parameters without which a function is not asked."""

    what: str
    given: dict
    needs: tuple[str, ...] = ()
    step_mask: np.ndarray | None = None  # of policy_loss: the mask of all rows of the optimizer step

    @property
    def is_optional(self) -> bool:
        """Whether nobody is told that it was not asked."""
        return self.needs == ("old_logp=None",)


@dataclass(frozen=True, eq=False)
class Candidate:
    """Something that a function may equal: a row with `changes` other cells, and faults."""

    name: str
    give: Callable[[Case], Numbers]
    faults: tuple[Fault, ...] = ()
    changes: int = 0
    right: bool = True
    cells: "tuple[grpo.Algorithm, float] | None" = None  # of a loss: the algorithm and its beta


@functools.cache
def patched(file: str, faults: tuple[Fault, ...] = (), swap: tuple[str, str] = ("", "")) -> types.ModuleType | None:
    """A module of this project with these faults in it and in what it imports; None where the patches do not fit."""
    source = (ROOT / file).read_text(encoding="utf-8")
    for fault in faults:
        if fault.file == file:
            if source.count(fault.old) != 1:
                return None
            source = source.replace(fault.old, fault.new)
    if swap[0]:
        source = source.replace(*swap)
    module = types.ModuleType(f"patched_{Path(file).stem}_{len(sys.modules)}")
    sys.modules[module.__name__] = module  # where dataclasses look for it
    exec(compile(source, str(ROOT / file), "exec"), vars(module))
    for other in {fault.file for fault in faults} - {file}:
        there = vars(patched(other, tuple(fault for fault in faults if fault.file == other)))
        here = vars(importlib.import_module(Path(other).stem))
        for name, value in vars(module).items():
            if not name.startswith("__") and value is here.get(name):
                vars(module)[name] = there[name]
    return module


def known(*numbers: int) -> list[Fault]:
    """Faults by their number in the table of tests/README.md, from 1."""
    return [FAULTS[number - 1] for number in numbers]


def fault_sets(level: int, faults: list[Fault]) -> list[tuple[Fault, ...]]:
    """No fault, each of them, or each two of them."""
    return list(itertools.combinations(faults, level))


# group_advantages


def advantage_cases() -> list[Case]:
    flat = [[value] * 7 for value in (0.1, 0.3, 0.7, 1.1)]
    rewards = {
        "rewards of 0 and 1, and a group of equal ones": [[1, 0, 0, 1], [0, 0, 0, 0]],
        "real rewards, some negative, with ties": [[0.5, -1.25, 2, 0.5], [3, 3, -1, 0.75], [-2, -2.5, -2, -4]],
        "equal rewards whose mean rounds to another number": [*flat, [0.2, 0.9, 0.4, 0.4, -0.6, 1.3, 0.1]],
        "rewards that hardly differ": [[0.0001, 0.0, 0.0003, 0.0002], [0.0, 0.0001, 0.0, 0.0]],
        "groups of two": [[1.0, 0.25], [0.0, 1.0], [0.5, 0.5]],
    }
    return [Case(what, {"rewards": np.array(values, dtype=float)}) for what, values in rewards.items()]


def see_advantages(advantages: np.ndarray, case: Case) -> Numbers:
    """Advantages with the rounding at flat groups taken out, and whether there was any beyond that of the rewards."""
    rewards = case.given["rewards"]
    advantages, largest = advantages.reshape(rewards.shape).copy(), np.abs(rewards).max()
    flat = (rewards.max(1) == rewards.min(1))[:, None] & np.isfinite(advantages)
    precision = np.finfo(advantages.dtype if advantages.dtype.kind == "f" else float).eps
    magnified = flat & (np.abs(advantages) > 16 * precision * largest)
    advantages[flat & (np.abs(advantages) < 1e-3 * largest)] = 0
    return {"value": advantages.astype(float), "flat groups": np.array([float(magnified.any())])}


def advantage_candidates(level: int, cases: list[Case], seen: list[Numbers]) -> Iterator[Candidate]:
    for faults in fault_sets(level, known(7, 8, 11, 48, 49)):
        for epsilon in ("1e-4", "1e-6", "1e-8", "1e-5", "1e-9"):
            module = patched("grpo.py", faults, ("+ 1e-4)", f"+ {epsilon})"))
            scales = ("group", "batch_std", "centered", "leave_one_out", "batch_mean", "max_rl", "max_at_k")
            for scale in scales if epsilon == "1e-4" else scales[:2] if module else ():
                other = "" if epsilon == "1e-4" else f" with {epsilon} added to the std, not 1e-4"
                other = {"max_rl": ", NaN below 0", "max_at_k": " with k = G"}.get(scale, other)
                give = functools.partial(advantage_numbers, module, scale)
                yield Candidate(f"`{scale}`{other}", give, faults, int(bool(other)))


def advantage_numbers(module: types.ModuleType, scale: str, case: Case) -> Numbers:
    """The advantages of a case by the (patched) module; NaN where it refuses the rewards."""
    rewards = tensor(case.given["rewards"])
    try:
        return see_advantages(module.group_advantages(rewards, scale, k=rewards.shape[1]).numpy(), case)
    except UserError:
        return see_advantages(np.full(rewards.shape, np.nan), case)


# policy_loss

LOSS_FAULTS = known(1, 2, 3, 6, 12, 13, 15, 24, 25, 26, 27, 28, 37, 42, 43, 44, 45, 46, 47, 51)
ONLY_IN = {  # rows that these faults can be seen in; in others they change nothing
    42: lambda row: row.ratio == "sequence" and row.aggregate == "constant",
    43: lambda row: row.surrogate == "sapo",
    44: lambda row: row.surrogate == "geometric",
    45: lambda row: row.surrogate == "dppo",
    46: lambda row: row.surrogate == "dppo" and row.anchor,
    47: lambda row: row.anchor,
    51: lambda row: row.cap,
}
CAP = 3.0  # verl's own
LENGTHS, ADVANTAGES = [6, 1, 3, 6, 2, 4], [1.2, -0.7, 0.4, -1.5, 0.9, -0.3]


def on_a_bound(log_ratio: np.ndarray, mask: np.ndarray) -> bool:
    """Whether a token's ratio, or a row's, is so near to a row's clip that float32 may see it on the other side."""
    ratios = np.exp(np.concatenate([log_ratio[mask], log_ratio.sum(1) / mask.sum(1)]))
    bounds = [bound for row in grpo.ALGORITHMS.values() for bound in (1 - row.epsilon, 1 + row.epsilon_high)]
    return np.abs(ratios[:, None] - bounds).min() < 1e-5


def loss_cases() -> list[Case]:
    """Cases of 6 rows of up to 6 tokens; the first tells most candidates apart, so it is asked first."""
    rng = np.random.default_rng(0)

    def case(what, log_ratio, padding=0.0, advantages=ADVANTAGES, rows=slice(None), needs=(), lengths=LENGTHS) -> Case:
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        while True:
            logp = -rng.uniform(0.05, 3, mask.shape).round(3)
            old, ref = (logp - log_ratio(mask.shape)).round(6), logp + rng.normal(0, 0.6, mask.shape).round(3)
            if not on_a_bound(np.where(mask, logp - old, 0.0), mask):
                break
        drawn = [rng.uniform(-padding, padding, mask.shape).round(1) for _ in range(3)]
        logp, old, ref = (np.where(mask, x, y)[rows] for x, y in zip((logp, old, ref), drawn, strict=True))
        given = {"logp": logp, "old_logp": old, "advantages": np.array(advantages)[rows], "mask": mask[rows]}
        given |= {"ref_logp": ref, "max_new_tokens": MAX_NEW_TOKENS}
        given |= {"step_rows": len(mask), "step_tokens": int(mask.sum())}
        return Case(what, given, needs, mask)

    def normal(spread: float) -> Callable:
        return lambda shape: rng.normal(0, spread, shape)

    first_update = case("the first inner update, without old_logp", lambda shape: 0.0, needs=("old_logp=None",))
    first_update.given["old_logp"] = None
    return [
        case("off-policy, beyond both clips, rows of 1 to 6 tokens, both signs of A", normal(0.6)),
        case("the first inner update: old_logp equals logp", lambda shape: np.zeros(shape)),
        case("off-policy, within the clips", normal(0.06)),
        case("log-ratios of a few ten-thousandths, about the clips of `gspo`", normal(8e-4)),
        case("far off-policy, up to ratios that `cispo` caps", normal(1.8)),
        case("flat groups: every advantage is 0", normal(0.5), advantages=[0.0] * 6),
        case("one row of one token", normal(0.5), advantages=[-0.8], lengths=[1]),
        case("finite garbage at padding", normal(0.4), padding=6.0),
        case("huge garbage at padding: exp of it overflows", normal(0.4), padding=3000.0),
        case("a micro-batch of 4 rows of 6", normal(0.4), rows=slice(2, 6), needs=("step_rows", "step_tokens")),
        first_update,
    ]


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


@functools.cache
def loss_numbers(faults: tuple[Fault, ...], algorithm: "grpo.Algorithm", with_kl: bool, case: Case) -> Numbers:
    """Loss and its gradient by logp as `backward` of the (patched) module makes them, with a policy that is the case's.

    Through `backward`, so that faults around the loss show too: denominators, and where old_logp comes from.
    """
    module, given = patched("grpo.py", faults), case.given
    logp, mask = tensor(given["logp"]).requires_grad_(), tensor(given["mask"])
    old, ref = (None if given[name] is None else tensor(given[name]) for name in ("old_logp", "ref_logp"))
    blank, rows = torch.zeros(mask.shape, dtype=torch.float64), torch.zeros(len(mask), dtype=torch.int64)
    prompt = torch.ones(1, 1, dtype=torch.int64)
    rollout = Rollout(prompt, prompt.bool(), rows, blank.long(), mask, blank, rows.bool(), [""] * len(mask))
    policy = types.SimpleNamespace(layout="packed", model=None, log_probs=lambda part: (logp, blank))
    denominator = module.loss_denominator(tensor(case.step_mask), algorithm.aggregate, given["max_new_tokens"])
    ref, advantages = ref if with_kl else None, tensor(given["advantages"])
    arguments = (rollout, advantages, ref, old, None, algorithm, denominator, 10**6)
    _, sums, _, _ = module.backward(policy, None, *arguments)
    gradient = torch.zeros_like(logp) if logp.grad is None else logp.grad
    return {"value": np.array(sums["loss"]), "gradient": gradient.numpy()}


@functools.cache  # here and below: the same few rows, again and again
def with_cells(row: "grpo.Algorithm", **cells) -> "grpo.Algorithm | None":
    """A row with other cells; None where it refuses them."""
    try:
        return replace(row, **cells)
    except UserError:
        return None


@functools.cache
def rows_of(module: types.ModuleType, **cells: float) -> dict:
    """The rows of the table that differ in the loss, with their names; the advantage is given, so it is no cell."""
    rows: dict = {}
    for name, row in module.ALGORITHMS.items():
        if row.combine == "each":  # `gdpo`, whose loss is that of `grpo` without KL
            continue
        plain = replace(row, advantage="group", max_resample=0, overlong_buffer=0.0, **cells)
        rows.setdefault(plain, []).append(name)
    return {row: "` or `".join(names) for row, names in rows.items()}


def shows_in(fault: Fault, row: "grpo.Algorithm") -> bool:
    return ONLY_IN.get(FAULTS.index(fault) + 1, lambda row: True)(row)


def loss_candidates(level: int, cases: list[Case], seen: list[Numbers], cells: dict[str, float]) -> Iterator[Candidate]:
    """Every row as it is, without KL, with each estimator and the beta that fits best, with each aggregate, or a cap.

    Two faults at once are looked for in the rows with their own aggregate alone, without KL and with k3.
    """
    for faults in fault_sets(level, LOSS_FAULTS):
        module = patched("grpo.py", faults)
        if module is None:
            continue
        for row, name in rows_of(module, **cells).items():
            others = [x for x in ("sequence_mean", "token_mean", "constant") if x != row.aggregate]
            others = [] if level == 2 or row.surrogate == "reinforce" else others  # `pairwise` has but one aggregate
            estimators = (None, "k3") if level == 2 else (None, "k3", "k2", "k3_unbiased", "k1")
            kinds = [(row.aggregate, 0.0), *((other, 0.0) for other in others)]
            kinds += [(row.aggregate, CAP)] if row.surrogate == "clip" else []
            for (aggregate, cap), estimator in itertools.product(kinds, estimators):
                algorithm = with_cells(row, aggregate=aggregate, beta=1.0, kl_estimator=estimator or "k3", cap=cap)
                if algorithm is not None and all(shows_in(fault, algorithm) for fault in faults):  # k1 is refused
                    found = fitted(algorithm, row, name, estimator, faults, cases[0], seen[0])
                    yield from [found] if found else []


def fitted(algorithm, row, name: str, estimator: str | None, faults, case: Case, seen: Numbers) -> Candidate | None:
    """The candidate with these cells; of the KL term's weight, which is the user's own, what fits the case best."""
    if estimator is None:
        beta = 0.0
    else:
        without = flat(loss_numbers(faults, with_cells(algorithm, beta=0.0), True, case), seen)
        term = flat(loss_numbers(faults, algorithm, True, case), seen) - without
        beta = float((flat(seen, seen) - without) @ term / (term @ term))
        if not 1e-6 < abs(beta) < 1e6:  # none, or what was seen is not finite
            return None
        beta = row.beta if abs(beta - row.beta) < 1e-6 else float(f"{beta:.4g}")

    def give(case: Case) -> Numbers:
        if estimator is None:
            return loss_numbers(faults, algorithm, False, case)
        none, one = (loss_numbers(faults, x, True, case) for x in (with_cells(algorithm, beta=0.0), algorithm))
        return {key: none[key] + beta * (one[key] - none[key]) for key in none}  # the loss is linear in beta

    changes = []
    if algorithm.aggregate != row.aggregate:
        changes.append(f"aggregate {algorithm.aggregate}")
    if algorithm.cap:
        changes.append(f"cap {algorithm.cap:g}")
    if beta != row.beta:
        changes.append(f"beta {beta:g}" if beta >= 0 else f"the KL term subtracted (beta {beta:g})")
    if estimator and estimator != row.kl_estimator:
        changes.append(f"kl_estimator {estimator}")
    shown = f"`{name}`" + (" with " if changes else "") + ", ".join(changes)
    return Candidate(shown, give, faults, len(changes), beta >= 0, (algorithm, beta))


def flat(numbers: Numbers, like: Numbers) -> np.ndarray:
    """The numbers of both kinds that `like` has, in one vector."""
    return np.concatenate([np.ravel(numbers[key]) for key in like])


# kl


def kl_cases() -> list[Case]:
    rng = np.random.default_rng(1)
    logp = -rng.uniform(0.05, 3, (3, 4)).round(3)
    cases = {"policy and reference apart, on both sides": rng.normal(0, 0.9, (3, 4)).round(3)}
    cases["policy and reference equal"] = np.zeros((3, 4))
    return [Case(what, {"logp": logp, "ref_logp": logp + d}) for what, d in cases.items()]


def kl_candidates(level: int, cases: list[Case], seen: list[Numbers]) -> Iterator[Candidate]:
    for faults in fault_sets(level, known(1)):
        module = patched("grpo.py", faults)
        for estimator in ("k3", "k1", "k2", "k3_unbiased"):

            def give(case: Case, module=module, estimator=estimator) -> Numbers:
                logp, ref = tensor(case.given["logp"]).requires_grad_(), tensor(case.given["ref_logp"])
                value = module.kl_penalty(logp, ref, estimator, (logp - logp.detach()).exp())
                (gradient,) = torch.autograd.grad(value.sum(), logp)
                return {"value": value.detach().numpy(), "gradient": gradient.numpy()}

            note = ", a metric: as a loss its gradient is 0 in expectation (fault 37)" if estimator == "k1" else ""
            yield Candidate(f"`{estimator}`{note}", give, faults)


# completion_mask


def mask_cases() -> list[Case]:
    rows = [[7, 2, 0, 0, 0, 0], [3, 9, 5, 8, 2, 1], [4, 4, 6, 7, 8, 9], [2, 2, 5, 3, 0, 0], [8, 6, 7, 9, 3, 5]]
    ids, pad_is_end = np.array(rows), np.array([[7, 4, 2, 2, 2], [2, 2, 2, 2, 2], [7, 8, 9, 7, 8]])
    return [
        Case("two end ids, text after them, truncated rows", {"ids": ids, "end_ids": END_IDS}),
        Case("the same, end ids in the other order", {"ids": ids, "end_ids": END_IDS[::-1]}),
        Case("one end id", {"ids": ids, "end_ids": [2]}),
        Case("padding is the end id", {"ids": pad_is_end, "end_ids": [2]}),
    ]


@functools.cache
def toy() -> Llama:
    """A small Llama in float64; its weights have three decimals, to be written down."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = Llama(LlamaConfig(VOCABULARY, **sizes, **heads)).double()
    rng = np.random.default_rng(56)  # so that both end ids are likely, and the last of 12 tokens are not rare
    with torch.no_grad():
        for weight in model.parameters():
            drawn = rng.normal(0, 0.25, tuple(weight.shape))
            weight.copy_(torch.from_numpy((drawn if weight.dim() > 1 else 1 + 0.3 * drawn).round(3)))
    return model


@functools.cache
def theirs():
    """The same model as `transformers` has it."""
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(Config(**toy().config.to_json(), pad_token_id=PAD_ID)).double()
    model.load_state_dict(toy().state_dict())
    model.get_input_embeddings().padding_idx = None  # where padding is seen, it has a gradient
    model.generation_config.update(eos_token_id=END_IDS, pad_token_id=PAD_ID, max_new_tokens=WIDTH, do_sample=True)
    return model.eval()


def policy_with(faults: tuple[Fault, ...], end_ids: list[int], eos: int, temperature: float = 1.0):
    """A policy of the (patched) policy.py whose prompts are lists of ids already."""
    tokenizer = types.SimpleNamespace(eos_token_id=eos, pad_token_id=PAD_ID, batch_decode=lambda ids, **_: ids)
    policy = patched("policy.py", faults).TokenPolicy(toy(), tokenizer, temperature, end_ids)
    policy.encode = lambda prompts: [list(prompt) for prompt in prompts]
    return policy


def mask_candidates(level: int, cases: list[Case], seen: list[Numbers]) -> Iterator[Candidate]:
    """By the (patched) sampler, made to draw the case's ids one after the other."""
    for faults, first in itertools.product(fault_sets(level, known(4, 29, 30, 31)), (0, -1)):
        if patched("policy.py", faults) is None:
            continue

        def give(case: Case, faults=faults, first=first) -> Numbers:
            ids, ends = tensor(case.given["ids"]), case.given["end_ids"]
            policy, steps = policy_with(faults, ends, ends[first]), iter(ids.T)
            policy.drop_below = 0.0  # rows stay, so that column t is asked for at time t
            policy.logits = lambda hidden: 1000.0 * torch.nn.functional.one_hot(next(steps), VOCABULARY).double()
            rollout = policy.sample([Example([1])] * len(ids), 1, (0, 0, 0), ids.shape[1])
            mask = np.zeros(case.given["ids"].shape)
            mask[:, : rollout.mask.shape[1]] = rollout.mask.numpy()
            return {"value": mask}

        yield Candidate("the mask up to and with the first end id", give, faults)


# log_probs

PROMPTS, COMPLETIONS = [[1, 7, 3, 9], [4, 11], [6, 8, 10]], [[8, 2], [10, 3, 7, 5], [9]]


def scorer_cases() -> list[Case]:
    plain = {"model": None, "prompts": PROMPTS, "completions": COMPLETIONS}
    equal = {"model": None, "prompts": [[3, 4], [7, 1]], "completions": [[6, 2], [9, 5]]}
    return [
        Case("prompts of 4, 2 and 3 tokens, completions of 2, 4 and 1", plain),
        Case("prompts and completions of equal length", equal),
        Case("temperature 0.7", plain | {"temperature": 0.7}, ("temperature",)),
    ]


def with_gradient(logp: list[torch.Tensor], model: torch.nn.Module) -> Numbers:
    """Log-probabilities of all tokens, and the gradient of a weighted sum of them by the parameters."""
    joined = torch.cat(logp)
    if not joined.requires_grad:
        return {"value": joined.numpy()}
    weights = torch.cos(torch.arange(len(joined), dtype=joined.dtype))
    parameters = [weight for _, weight in sorted(model.named_parameters())]
    gradients = torch.autograd.grad((joined * weights).sum(), parameters, allow_unused=True)
    parts = [torch.zeros_like(w) if g is None else g for w, g in zip(parameters, gradients, strict=True)]
    return {"value": joined.detach().numpy(), "gradient": torch.cat([part.flatten() for part in parts]).numpy()}


def picked(logits: torch.Tensor, ids: list[int], temperature: float) -> torch.Tensor:
    return torch.log_softmax(logits / temperature, -1)[range(len(ids)), ids]


def by_transformers(case: Case, late: int = 0, padded: bool = False) -> Numbers:
    """A row at a time without padding; `late`: logits that many places late; `padded`: left, with nothing masked."""
    given, model = case.given, theirs()
    rows, longest = [], max(map(len, given["prompts"]))
    for prompt, completion in zip(given["prompts"], given["completions"], strict=True):
        prompt = [PAD_ID] * (longest - len(prompt)) + prompt if padded else prompt
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 + late :]
        rows.append(picked(logits, completion[: len(logits)], given.get("temperature", 1.0)))
    return with_gradient(rows, model)


def by_policy(case: Case, faults: tuple[Fault, ...], layout: str) -> Numbers:
    policy = policy_with(faults, END_IDS, END_IDS[0], case.given.get("temperature", 1.0))
    rollout = policy.pack(case.given["prompts"], case.given["completions"], [""] * len(case.given["prompts"]))
    logp, _ = policy.log_probs(rollout, layout=layout)
    return with_gradient([row[mask] for row, mask in zip(logp, rollout.mask, strict=True)], policy.model)


def scorer_candidates(level: int, cases: list[Case], seen: list[Numbers]) -> Iterator[Candidate]:
    if level == 0:
        yield Candidate("the log-probabilities of `transformers`", by_transformers)
    if level == 1:
        yield Candidate("logits one place late", functools.partial(by_transformers, late=1), tuple(known(18)))
        yield Candidate("no attention mask", functools.partial(by_transformers, padded=True), tuple(known(21)))
    for faults, layout in itertools.product(
        fault_sets(level, known(5, 18, 19, 20, 21)), ("shared", "joined", "packed")
    ):
        if faults:
            yield Candidate("the scorer", functools.partial(by_policy, faults=faults, layout=layout), faults)


# pass_at_k


def pass_cases() -> list[Case]:
    numbers = [(4, 1, 2), (5, 2, 3), (4, 0, 2), (4, 3, 2), (1, 1, 1), (8, 3, 1), (8, 8, 8), (200, 3, 100), (64, 60, 8)]
    return [Case(f"n {n}, c {c}, k {k}", {"n": n, "c": c, "k": k}) for n, c, k in numbers]


def pass_candidates(level: int, cases: list[Case], seen: list[Numbers]) -> Iterator[Candidate]:
    for faults in fault_sets(level, known(41)):
        module = patched("inference.py", faults)
        yield Candidate(
            "1 - C(n-c, k) / C(n, k)",
            lambda case, module=module: {"value": np.array(module.pass_at_k(*case.given.values()))},
            faults,
        )


@dataclass
class Function:
    """What is known of a function that a user may hand in."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    expected: str
    cases: Callable[[], list[Case]] = field(repr=False)
    candidates: Callable | None = field(default=None, repr=False)
    differentiate: str | None = None

    @property
    def has_gradient(self) -> bool:
        return self.differentiate is not None or "model" in self.required


FUNCTIONS = {
    "group_advantages": Function(
        ("rewards",), (), "advantages of the rewards' shape (P, G)", advantage_cases, advantage_candidates
    ),
    "policy_loss": Function(
        ("logp", "old_logp", "advantages", "mask"),
        ("ref_logp", "max_new_tokens", "step_rows", "step_tokens"),
        "a scalar loss, or a tuple that begins with it",
        loss_cases,
        loss_candidates,
        "logp",
    ),
    "kl": Function(
        ("logp", "ref_logp"), (), "an estimate for each token, of logp's shape (B, T)", kl_cases, kl_candidates, "logp"
    ),
    "completion_mask": Function(("ids", "end_ids"), (), "a mask of the ids' shape (B, T)", mask_cases, mask_candidates),
    "log_probs": Function(
        ("model", "prompts", "completions"),
        ("temperature",),
        "log-probabilities of the completions' tokens: (B, T), padded on the right, or a row for each completion",
        scorer_cases,
        scorer_candidates,
    ),
    "sample": Function(
        ("model", "prompts", "group_size"),
        ("max_new_tokens", "end_ids", "temperature", "seed"),
        "a list of P * G lists of ids, row p * G + g being completion g of prompt p; or arrays (ids, mask)",
        lambda: [],
    ),
    "pass_at_k": Function(("n", "c", "k"), (), "a number", pass_cases, pass_candidates),
}


@functools.cache
def cases_of(name: str) -> list[Case]:
    return FUNCTIONS[name].cases()


def is_finite(numbers: Numbers) -> bool:
    return all(np.isfinite(array).all() for array in numbers.values())


def difference(seen: Numbers, given: Numbers) -> float:
    """The largest difference, relative to the largest number of its kind; what is not finite is equal to its like."""
    if not is_finite(seen) or not is_finite(given):
        return 0.0 if is_finite(seen) == is_finite(given) else math.inf
    worst = 0.0
    for key, array in seen.items():
        if array.shape != given[key].shape:
            return math.inf
        scale = max(1e-2 if key == "gradient" else 1.0, np.abs(given[key]).max(initial=0))
        worst = max(worst, float(np.abs(array - given[key]).max(initial=0) / scale))
    return worst
