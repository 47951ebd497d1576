"""Write `results/conformance.json`: the cases of `check.py` and the right answers as plain numbers, for any language.

python tests/check_conformance.py
"""

import functools
import json

import check_cases as known
import check_samples
import numpy as np
from check_cases import FUNCTIONS, ROOT, Candidate, Case, grpo

FILE = ROOT / "results" / "conformance.json"
VERSION = 1  # of the format and of the numbers: raised with any change


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


def right_answers(name: str, cases: list[Case]) -> dict[str, Candidate]:
    """What each row gives, by name; of a loss without `fitted`, which takes beta from what was seen."""
    if name != "policy_loss":
        candidates = [c for c in FUNCTIONS[name].candidates(0, cases, []) if not c.changes]
        return {c.name.partition(",")[0].replace("`", ""): c for c in candidates}
    return {
        key: Candidate(key, functools.partial(known.loss_numbers, (), row, row.beta > 0))
        for key, row in grpo.ALGORITHMS.items()
    }


def entry(name: str) -> dict:
    """One function: its parameters, its cases, and for each row what it gives in each case."""
    cases, what = known.cases_of(name), FUNCTIONS[name]
    kept = ("value",) if name == "log_probs" else ("value", "gradient")  # by the weights it would be long
    expected = {}
    for row, candidate in right_answers(name, cases).items():
        answers = [candidate.give(case) for case in cases]
        expected[row] = [{key: plain(numbers[key]) for key in kept if key in numbers} for numbers in answers]
    asked = [{"what": c.what, "needs": c.needs, "given": {k: plain(v) for k, v in c.given.items()}} for c in cases]
    return {"parameters": what.required + what.optional, "gives": what.expected, "cases": asked, "expected": expected}


def samples() -> dict:
    """Prompts, and the probabilities of all completions that are not rare."""
    what, prompts = FUNCTIONS["sample"], check_samples.PROMPTS[:2]
    tables = [check_samples.exact_probabilities(prompt, 1.0) for prompt in prompts]
    shown = [[[list(ids), float(f"{p:.6g}")] for ids, p in table.items() if p >= 1e-3] for table in tables]
    case = {"what": "at temperature 1", "needs": [], "given": {"prompts": prompts, "max_new_tokens": known.WIDTH}}
    names = what.required + what.optional
    return {"parameters": names, "gives": what.expected, "cases": [case], "expected": {"probabilities": [shown]}}


def text() -> str:
    """The whole file, a line for each function."""
    weights = {name: plain(weight.detach().numpy()) for name, weight in known.toy().named_parameters()}
    model = {
        "config": known.toy().config.to_json(),
        "end_ids": known.END_IDS,
        "pad_id": known.PAD_ID,
        "weights": weights,
    }
    functions = {name: samples() if name == "sample" else entry(name) for name in FUNCTIONS}
    lines = [f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in functions.items()]
    head = [f'  "version": {VERSION}', f'  "tolerance": {known.SAME}', f'  "model": {json.dumps(model)}']
    return "{\n" + ",\n".join([*head, '  "functions": {\n' + ",\n".join(lines) + "\n  }"]) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(f"wrote {FILE.relative_to(ROOT)}")
