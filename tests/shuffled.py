"""A negative control for the command line: the arithmetic task's reward, shuffled among all rows of a step.

python grpo.py --task arithmetic --rewards tests/shuffled.py:shuffled=1

The rewards have the right distribution but say nothing about the completion that gets them, so nothing may be learned.
"""

import zlib

import numpy as np

from rewards import answer_exact, answer_format, answer_near


def permuted(rewards: list[float], completions) -> list[float]:
    """The rewards in an order that the completions seed and that has nothing to do with which is better."""
    seed = zlib.crc32("\n".join(map(str, completions)).encode())
    return np.random.default_rng(seed).permutation(rewards).tolist()


def shuffled(prompts, completions, answer, **_) -> list[float]:
    """0.2 format + 0.2 near + 0.6 exact, permuted over the batch."""
    parts = (function(prompts, completions, answer=answer) for function in (answer_format, answer_near, answer_exact))
    total = [0.2 * well_formed + 0.2 * near + 0.6 * exact for well_formed, near, exact in zip(*parts, strict=True)]
    return permuted(total, completions)


def shuffled_exact(prompts, completions, answer, **_) -> list[float]:
    """1 for a right answer and 0 for another, permuted over the batch."""
    return permuted(answer_exact(prompts, completions, answer=answer), completions)
