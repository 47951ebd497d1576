"""A sampler of the user's: whether its completions come in the model's own proportions, in order, with their end token.

Against exact probabilities of every completion, and where they differ, against the samples of this project's sampler
with each of the faults that a sampler can have.
"""

import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable

import check_cases as known
import numpy as np
import torch
from check_cases import END_IDS, WIDTH, Fault, theirs

from tasks import Example

PROMPTS = [[1, 7, 3], [4], [1, 7, 3]]  # twice the same, whose rows must still differ
GROUP = 1000  # samples of each
LEAST_P = 1e-4  # of each of the ten chi-square tests
FAULTS = known.known(4, 9, 17, 22, 23, 29, 30, 31, 34)
ENOUGH_EXPECTED, ENOUGH_SEEN = 5, 10  # what is rarer is pooled

Rows = list[tuple[int, ...]]


def exact_probabilities(prompt: list[int], temperature: float) -> dict[tuple[int, ...], float]:
    """The probability of every completion of at most WIDTH tokens, by `transformers`."""
    done, going = {}, {(): 1.0}
    for step in range(WIDTH):
        with torch.no_grad():
            logits = theirs()(torch.tensor([[*prompt, *start] for start in going])).logits[:, -1]
        shares = torch.softmax(logits / temperature, -1).tolist()
        items, going = list(going.items()), {}
        for (start, before), line in zip(items, shares, strict=True):
            for token, share in enumerate(line):
                ended = token in END_IDS or step + 1 == WIDTH
                (done if ended else going)[(*start, token)] = before * share
    return done


@functools.cache
def sampled_with(fault: Fault, temperature: float) -> Rows:
    """What this project's sampler gives with the fault."""
    policy = known.policy_with((fault,), END_IDS, END_IDS[0], temperature)
    rollout = policy.sample([Example(prompt) for prompt in PROMPTS], GROUP, (1, 0, 0), WIDTH)
    return [tuple(ids) for ids in rollout.completion_ids]


def seed_all() -> None:
    """Whichever generator a sampler uses, it starts from the same state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def rows_of(result, take_back: Callable) -> Rows:
    """Completions as tuples of ids, of a list of lists or of arrays (ids, mask)."""
    if isinstance(result, tuple):
        ids, mask = (take_back(part) for part in result)
        result = [row[keep.astype(bool)] for row, keep in zip(ids, mask, strict=True)]
    return [tuple(int(token) for token in row) for row in result]


def counted(rows: Rows) -> list[Counter]:
    """How often each beginning of 1, 2 and 3 tokens came for each prompt, and equal rows of the two equal prompts."""
    parts = [rows[start : start + GROUP] for start in range(0, len(rows), GROUP)]
    counts = [Counter(row[:length] for row in part) for part in parts for length in range(1, WIDTH + 1)]
    return [*counts, Counter(a == b for a, b in zip(parts[0], parts[-1], strict=True))]


def expected_of(exact: list[dict]) -> list[Counter]:
    """The probabilities of what `counted` counts."""
    shares = [Counter() for _ in range(len(exact) * WIDTH)]
    for place, table in enumerate(exact):
        for (row, p), length in itertools.product(table.items(), range(WIDTH)):
            shares[place * WIDTH + length][row[: length + 1]] += p
    same = sum(p * p for p in exact[0].values())
    return [*shares, Counter({True: same, False: 1 - same})]


def survival(statistic: float, freedom: int) -> float:
    """The probability that a chi-square variable of this many degrees of freedom is larger."""
    if freedom == 0:
        return 1.0
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))


def against_exact(rows: Rows, temperature: float) -> tuple[float, str]:
    """The smallest p of chi-square tests against exact probabilities, and what differs most there."""
    exact, worst, what = [exact_probabilities(prompt, temperature) for prompt in PROMPTS], 1.0, ""
    strange = [row for row in rows if row not in exact[0]]  # the same completions are possible after every prompt
    if strange:
        return 0.0, f"{list(strange[0])} came, which is no completion (end ids {END_IDS}, at most {WIDTH} tokens)"
    for counts, shares in zip(counted(rows), expected_of(exact), strict=True):
        cells = {key: GROUP * p for key, p in shares.items() if GROUP * p >= ENOUGH_EXPECTED}
        pairs = [(counts[key], expected) for key, expected in cells.items()]
        rest = GROUP - sum(cells.values())
        if rest > 1e-6:
            pairs.append((GROUP - sum(counts[key] for key in cells), rest))
        p = survival(sum((n - e) ** 2 / e for n, e in pairs), len(pairs) - 1)
        if p <= worst:
            key = max(cells, key=lambda key: abs(counts[key] - cells[key]) / math.sqrt(cells[key]))
            shown = f"{list(key)} at the start" if isinstance(key, tuple) else "equal rows of the two equal prompts"
            worst, what = p, f"{shown}: {counts[key]} in {GROUP}, expected {cells[key]:.1f} (chi-square p = {p:.2g})"
    return worst, what


def alike(rows: Rows, others: Rows) -> float:
    """The smallest p of chi-square tests of two lists of samples against each other."""
    worst = 1.0
    for a, b in zip(counted(rows), counted(others), strict=True):
        cells = [(a[key], b[key]) for key in a.keys() | b.keys() if a[key] + b[key] >= ENOUGH_SEEN]
        cells.append(tuple(GROUP - sum(column) for column in zip(*cells, strict=True)) if cells else (0, 0))
        statistic = sum((n - m) ** 2 / (n + m) for n, m in cells if n + m)
        worst = min(worst, survival(statistic, sum(n + m > 0 for n, m in cells) - 1))
    return worst


def faults_like(rows: Rows, temperature: float) -> list[Fault]:
    """The faults with which this project's sampler samples like that."""
    return [fault for fault in FAULTS if alike(rows, sampled_with(fault, temperature)) >= LEAST_P]
