"""Check yours: are the functions of a file right, and if not, which known fault do they have?

    python tests/check.py FILE.py

FILE.py defines any of the functions of `check_cases.FUNCTIONS`; it is imported, never read. Each is called with fixed
cases, and what it gives, values and gradients, is compared with what this project's code gives, as it is and with the
faults of `faults.py`. Exit status 0: all is right; 1: something differs; 2: something could not be checked.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import inspect
import json
import math
import sys
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import check_cases as known
import check_samples as samples
import numpy as np
import torch
from check_cases import FUNCTIONS, SAME, Candidate, Case, Numbers, difference, grpo
from check_explain import work_out


class Unusable(Exception):
    """A function that could not be checked, and why, in one line."""


@dataclass
class Verdict:
    """What is said of one function."""

    function: str
    status: str  # "right", "differs" or "unusable"
    text: str
    difference: float | None = None
    equals: list[str] = field(default_factory=list)
    faults: list[list[int]] = field(default_factory=list)  # by their number in tests/README.md, for each of `equals`


# The border: what is handed over, and what comes back


def parameters_of(name: str, function) -> set[str]:
    """The known parameters that a function takes; raises Unusable where others are needed or some are missing."""
    known_ones, required = FUNCTIONS[name].required + FUNCTIONS[name].optional, FUNCTIONS[name].required
    parameters = inspect.signature(function).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        names |= set(required)
    if needed - set(known_ones) or set(required) - names:
        may = f", and may take {', '.join(FUNCTIONS[name].optional)}" if FUNCTIONS[name].optional else ""
        has = ", ".join(p.name for p in parameters) or "none"
        raise Unusable(f"it has the parameters {has}; expected {', '.join(required)}{may}, by these names")
    if name == "policy_loss" and inspect.signature(function).parameters.get("old_logp", known).default is None:
        names.add("old_logp=None")
    return names


def kinds_for(function, asked: str | None) -> list[str]:
    """The kinds of arrays to try: those that the function's own module has imported, or all."""
    if asked:
        return [asked]
    there = getattr(inspect.unwrap(function), "__globals__", {}).values()
    imported = {value.__name__.partition(".")[0] for value in there if isinstance(value, types.ModuleType)}
    kinds = ["torch", "numpy"] + ["jax"] * bool(importlib.util.find_spec("jax"))
    return [kind for kind in kinds if kind in imported] or kinds


def hand_over(value, kind: str, dtype: type):
    """A copy of an array as the user's kind; all else as it is."""
    if not isinstance(value, np.ndarray):
        return copy.deepcopy(value)
    value = value.astype(dtype if value.dtype.kind == "f" else value.dtype, copy=True)
    if kind == "jax":
        import jax

        return jax.numpy.asarray(value)
    return torch.from_numpy(value) if kind == "torch" else value


def take_back(value) -> np.ndarray:
    """NumPy's array of whatever converts to one: torch, NumPy, JAX, numbers."""
    if torch.is_tensor(value):
        value = value.detach().cpu()
        value = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise Unusable(f"it gave {type(value).__name__}; expected numbers")
    return array


def differentiated(function, given: dict, kind: str, by: str | None):
    """What a function gives, and the gradient of its sum by one argument; None where there is none to be had."""
    first = lambda result: result[0] if isinstance(result, tuple) else result  # noqa: E731
    if "group_size" in given:  # a sampler, whose tuple is ids and mask
        return function(**given), None
    if by is None or kind == "numpy":
        return first(function(**given)), None
    if kind == "jax":
        import jax

        result, pull = jax.vjp(lambda x: first(function(**{**given, by: x})), given[by])
        return result, take_back(pull(jax.numpy.ones_like(result))[0])
    given[by].requires_grad_()
    result = first(function(**given))
    if not torch.is_tensor(result) or not result.requires_grad:
        raise Unusable(f"it gave no gradient: expected a torch tensor that {by} can be trained by")
    (gradient,) = torch.autograd.grad(result.sum(), given[by], allow_unused=True)
    if gradient is None:
        raise Unusable(f"no gradient reaches {by}: expected a result that depends on it")
    return result, take_back(gradient)


def called_with(name: str, given: dict) -> str:
    """A call in one line, with the types and shapes of arrays."""

    def show(value) -> str:
        if isinstance(value, np.ndarray):
            return f"{value.dtype}{list(value.shape)}"
        return repr(value) if len(repr(value)) < 60 else type(value).__name__

    return f"{name}({', '.join(f'{key}={show(value)}' for key, value in given.items())})"


def call(name: str, function, given: dict, look: Callable, kind: str = "torch", dtype: type = np.float64):
    """What `look` makes of a function's result and gradient; raises Unusable, with what it was called with."""
    before = f"called as {called_with(name, given)}:"
    handed = {key: known.theirs() if key == "model" else hand_over(x, kind, dtype) for key, x in given.items()}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            seen = look(*differentiated(function, handed, kind, FUNCTIONS[name].differentiate))
    except Unusable as error:
        raise Unusable(f"{before} {error}") from None
    except (Exception, SystemExit) as error:
        raise Unusable(f"{before} {in_a_line(error)}; expected {FUNCTIONS[name].expected}") from None
    for key, value in given.items():
        if isinstance(value, (np.ndarray, list)) and changed(handed[key], hand_over(value, kind, dtype)):
            raise Unusable(f"{before} it changed {key} in place; expected its arguments as they were")
    return seen


def ask(name: str, function, case: Case, names: set[str], kind: str, options) -> Numbers:
    """What a function of the user's gives in a case; raises Unusable."""
    given = {key: value for key, value in case.given.items() if key in names}
    if options.padding == "zeros" and "mask" in given:
        padded = [key for key in ("logp", "old_logp", "ref_logp") if isinstance(given.get(key), np.ndarray)]
        given |= {key: np.where(given["mask"], given[key], 0.0) for key in padded}
    look = SEE.get(name, see)
    dtype = np.float32 if options.float32 else np.float64
    return call(name, function, given, lambda *results: look(*results, case), kind, dtype)


def changed(now, before) -> bool:
    return now != before if isinstance(before, list) else not np.array_equal(take_back(now), take_back(before))


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def see(result, gradient, case: Case) -> Numbers:
    """A result of the shape of the case's first argument, with its gradient."""
    like, array = np.shape(next(iter(case.given.values()))), take_back(result)
    if array.shape != like:
        raise Unusable(f"it gave the shape {list(array.shape)}; expected {list(like)}")
    return {"value": array.astype(float)} | ({} if gradient is None else {"gradient": gradient})


def see_scalar(result, gradient, case: Case) -> Numbers:
    array = take_back(result)
    if array.size != 1:
        raise Unusable(f"it gave the shape {list(array.shape)}; expected a single number")
    return {"value": array.astype(float).reshape(())} | ({} if gradient is None else {"gradient": gradient})


def see_advantages(result, gradient, case: Case) -> Numbers:
    array, shape = take_back(result), case.given["rewards"].shape
    if array.shape not in (shape, (math.prod(shape),)):
        raise Unusable(f"it gave the shape {list(array.shape)}; expected {list(shape)}, or the same in one row")
    return known.see_advantages(array, case)


def see_scores(result, gradient, case: Case) -> Numbers:
    """The rows of log-probabilities, without what stands after a completion, and their gradient by the weights."""
    rows, lengths = list(result), [len(ids) for ids in case.given["completions"]]
    rows = [row if torch.is_tensor(row) else torch.from_numpy(take_back(row)) for row in rows]
    shapes = [list(row.shape) for row in rows]
    if len(rows) != len(lengths) or any(len(s) != 1 or s[0] < n for s, n in zip(shapes, lengths, strict=True)):
        raise Unusable(f"it gave rows of the shapes {shapes}; expected rows of {lengths} log-probabilities")
    return known.with_gradient([row[:length] for row, length in zip(rows, lengths, strict=True)], known.theirs())


SEE = {
    "policy_loss": see_scalar,
    "pass_at_k": see_scalar,
    "group_advantages": see_advantages,
    "log_probs": see_scores,
}


# The verdict


def distance(seen: list[Numbers], cases: list[Case], candidate: Candidate, limit: float = math.inf) -> float:
    """The largest difference over the cases; infinity from the first case on where it exceeds the limit."""
    worst = 0.0
    for numbers, case in zip(seen, cases, strict=True):
        worst = max(worst, difference(numbers, candidate.give(case)))
        if worst > limit:
            return math.inf
    return worst


def number_of(fault) -> int:
    return known.FAULTS.index(fault) + 1


def with_faults(candidate: Candidate) -> str:
    """A candidate in words."""
    told = [f"fault {number_of(f)} ({f.what}; {f.source})" for f in candidate.faults]
    return candidate.name + (f" with {' and '.join(told)}" if told else "")


def matches(candidates, cases: list[Case], seen: list[Numbers], only: str | None) -> list[tuple[float, Candidate]]:
    """What equals the numbers seen, with as few faults as possible, and under each fault as few other cells."""
    for level in (0, 1, 2):
        found = []
        for candidate in candidates(level, cases, seen):
            if only is None or f"`{only}`" in candidate.name:
                gap = distance(seen, cases, candidate, SAME)
                found += [(gap, candidate)] if gap <= SAME else []
        found.sort(key=lambda pair: (not pair[1].right, pair[1].changes))
        fewest = {candidate.faults: candidate.changes for _, candidate in reversed(found)}
        if found:
            return [(gap, candidate) for gap, candidate in found if candidate.changes == fewest[candidate.faults]]
    return []


def judge(name: str, function, options) -> Verdict:
    """The verdict on one function of the user's."""
    try:
        names = parameters_of(name, function)
        if name == "sample":
            return judge_samples(name, function, names)
        cases = [case for case in known.cases_of(name) if names.issuperset(case.needs)]
        failed = None
        for kind in kinds_for(function, options.arrays):
            try:
                seen = [ask(name, function, case, names, kind, options) for case in cases]
                return compare(name, cases, seen, options)
            except Unusable as error:
                failed = failed or error
        raise failed
    except Unusable as error:
        return Verdict(name, "unusable", f"not checked: {error}")


def compare(name: str, cases: list[Case], seen: list[Numbers], options) -> Verdict:
    """What the numbers seen are equal to, or how far from all that is known."""
    candidates, only = FUNCTIONS[name].candidates, options.row
    if name == "policy_loss":
        candidates = functools.partial(candidates, cells=options.cells)
    else:
        only = grpo.ALGORITHMS[only].advantage if only and name == "group_advantages" else None
    found = matches(candidates, cases, seen, only)
    if not found:
        return unknown(name, cases, seen, [c for c in candidates(0, cases, seen) if not only or f"`{only}`" in c.name])
    gap, best = found[0]
    right = best.right and not best.faults and not (name == "policy_loss" and only and best.changes)
    remarks = [f"not asked: {case.what}" for case in known.cases_of(name) if case not in cases and not case.is_optional]
    if FUNCTIONS[name].has_gradient and "gradient" not in seen[0]:
        remarks.append("values only, no gradients")
    if gap > 1e-9 and not options.float32 and name != "log_probs":  # whose rotations are float32 in any case
        remarks.append("something is computed in float32")
    equals = list(dict.fromkeys(with_faults(candidate) for _, candidate in found))
    faults = list(dict.fromkeys(tuple(map(number_of, candidate.faults)) for _, candidate in found))
    told = f"{'right' if right else 'differs'}: equals {', or '.join(equals)}" + (f" to {gap:.0e}" if gap else "")
    told += f" ({'; '.join(remarks)})" if remarks else ""
    return Verdict(name, "right" if right else "differs", told, gap, equals, list(map(list, faults)))


def unknown(name: str, cases: list[Case], seen: list[Numbers], near: list[Candidate]) -> Verdict:
    """How far the numbers are from the nearest row; raises Unusable if they are not finite."""
    for numbers, case in zip(seen, cases, strict=True):
        if not known.is_finite(numbers):
            raise Unusable(f"called with {case.what}: it gave NaN or infinity; expected finite numbers")
    gap, nearest = min(((distance(seen, cases, c), c) for c in near), key=lambda pair: (pair[0], pair[1].changes))
    for candidate in sorted(near, key=lambda c: c.changes):
        factor = multiple(seen, [candidate.give(case) for case in cases])
        if factor is not None:
            told = f"differs: {factor:.6g} times {candidate.name} in every case; is it a sum, or is a constant another?"
            return Verdict(name, "differs", told, gap)
    first = next(i for i, case in enumerate(cases) if difference(seen[i], nearest.give(case)) > SAME)
    told = f"differs from every row by at least {gap:.1g} (nearest: {nearest.name}), first at case {first + 1}"
    lines = [f"{told}, {cases[first].what}:", *work_out(name, cases[first], nearest, seen[first])]
    return Verdict(name, "differs", "\n    ".join(lines), gap)


def multiple(seen: list[Numbers], given: list[Numbers]) -> float | None:
    """The one number that all of the given ones have to be multiplied by, if there is one."""
    theirs, ours = (np.concatenate([known.flat(x, seen[0]) for x in numbers]) for numbers in (seen, given))
    factor = float(theirs @ ours / max(ours @ ours, 1e-30))
    fits = np.abs(theirs - factor * ours).max() <= SAME * np.abs(theirs).max()
    return factor if fits and factor else None


def judge_samples(name: str, function, names: set[str]) -> Verdict:
    """The verdict on a sampler."""
    worst, count = 1.0, len(samples.PROMPTS) * samples.GROUP
    given = {"model": None, "prompts": [list(prompt) for prompt in samples.PROMPTS], "group_size": samples.GROUP}
    given |= {"max_new_tokens": known.WIDTH, "end_ids": list(known.END_IDS), "seed": 0}
    for temperature in (1.0, 0.7) if "temperature" in names else (1.0,):
        handed = {key: value for key, value in {**given, "temperature": temperature}.items() if key in names}
        samples.seed_all()
        rows = call(name, function, handed, lambda result, _: samples.rows_of(result, take_back))
        if len(rows) != count:
            raise Unusable(f"called as {called_with(name, handed)}: it gave {len(rows)} rows; expected {count}")
        p, what = samples.against_exact(rows, temperature)
        worst = min(worst, p)
        if p >= samples.LEAST_P:
            continue
        if temperature != 1 and samples.against_exact(rows, 1.0)[0] >= samples.LEAST_P:
            return Verdict(name, "differs", f"differs: at temperature {temperature} it samples as at 1", p)
        faults = samples.faults_like(rows, temperature)
        equals = [with_faults(Candidate("the sampler", None, (fault,))) for fault in faults]
        told = f"differs: samples as {', or '.join(equals)}" if faults else "differs from every sampler known here"
        return Verdict(name, "differs", f"{told}; {what}", p, equals, [[number_of(fault)] for fault in faults])
    told = f"right: {samples.GROUP} samples of each prompt come in the model's proportions, chi-square p = {worst:.2g}"
    return Verdict(
        "sample", "right", told + (" (not asked: a temperature)" if "temperature" not in names else ""), worst
    )


# The command line


def load_file(path: Path) -> dict:
    """The functions of a user's file, by name; raises Unusable."""
    spec = importlib.util.spec_from_file_location("checked", path)
    if not path.is_file() or spec is None:
        raise Unusable(f"{path}: no such Python file")
    sys.path.insert(0, str(path.resolve().parent))
    module = importlib.util.module_from_spec(spec)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise Unusable(f"{path} does not import: {in_a_line(error)}") from None
    functions = {name: getattr(module, name) for name in FUNCTIONS if callable(getattr(module, name, None))}
    if not functions:
        raise Unusable(f"{path} defines none of {', '.join(FUNCTIONS)}")
    return functions


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("file", type=Path, help="The Python file with your functions.")
    made.add_argument("--json", action="store_true", help="Print the verdicts as JSON.")
    made.add_argument("--row", choices=grpo.ALGORITHMS, help="The algorithm that it is meant to be; else any may be.")
    made.add_argument(
        "--arrays", choices=("torch", "numpy", "jax"), help="What to hand over; else what your file uses."
    )
    made.add_argument("--float32", action="store_true", help="Hand over float32, not float64.")
    made.add_argument("--padding", choices=("garbage", "zeros"), default="garbage", help="What stands at padding.")
    made.add_argument("--epsilon", type=float, help="Your lower clip, where it is not the row's.")
    made.add_argument("--epsilon-high", type=float, help="Your upper clip, where it is not the row's.")
    return made


def check(arguments: list[str]) -> tuple[list[Verdict], argparse.Namespace]:
    options = parser().parse_args(arguments)
    cells = {"epsilon": options.epsilon, "epsilon_high": options.epsilon_high}
    options.cells = {name: value for name, value in cells.items() if value is not None}
    return [judge(name, function, options) for name, function in load_file(options.file).items()], options


def main() -> int:
    try:
        verdicts, options = check(sys.argv[1:])
    except Unusable as error:
        print(f"check.py: error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=2))
    for verdict in verdicts if not options.json else []:
        print(f"{verdict.function}: {verdict.text}")
    return max({"right": 0, "differs": 1, "unusable": 2}[verdict.status] for verdict in verdicts)


if __name__ == "__main__":
    sys.exit(main())
