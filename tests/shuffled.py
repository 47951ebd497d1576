"""A negative control for the command line: the arithmetic task's reward, shuffled among all rows of a step.

python grpo.py --task arithmetic --rewards tests/shuffled.py:shuffled=1

The rewards have the right distribution but say nothing about the completion that gets them, so nothing may be learned.
"""

import zlib

import numpy as np

from rewards import answer_exact, answer_format, answer_near


def shuffled(prompts, completions, answer, **_) -> list[float]:
    """0.2 format + 0.2 near + 0.6 exact, permuted over the batch by a generator that the completions seed."""
    parts = (function(prompts, completions, answer=answer) for function in (answer_format, answer_near, answer_exact))
    total = [0.2 * well_formed + 0.2 * near + 0.6 * exact for well_formed, near, exact in zip(*parts, strict=True)]
    seed = zlib.crc32("\n".join(map(str, completions)).encode())
    return np.random.default_rng(seed).permutation(total).tolist()
