"""Functions to try `check.py` on: right ones in many forms, and one for each known fault, written from its description.

None of it is this project's code or a patch of it. A variant is a text with some of its words replaced.
"""
# ruff: noqa: E501 (texts of functions)

LOSS = """
import torch

LOW, HIGH, BETA, LEVEL, KIND, MEAN = CELLS

def policy_loss(logp, old_logp=None, advantages=None, mask=None, ref_logp=None, max_new_tokens=16, step_rows=0, step_tokens=0):
    raw, raw_old = logp, old_logp
    logp = logp.masked_fill(~mask, 0.0)
    old = logp.detach() if old_logp is None else old_logp.masked_fill(~mask, 0.0)
    ref = ref_logp.masked_fill(~mask, 0.0)
    count = mask.sum(-1)
    x = logp - old
    if LEVEL == "sequence":
        x = (x.sum(-1) / count).unsqueeze(-1).repeat(1, logp.shape[1])
    w = torch.exp(x)
    a = advantages.reshape(-1, 1)
    bounded = torch.clip(w, 1 - LOW, 1 + HIGH)
    if KIND == "clip":
        gain = torch.min(w * a, bounded * a)
    elif KIND == "cispo":
        gain = bounded.detach() * a * logp
    elif KIND == "sapo":
        sharp = (a > 0) * 1.0 + (a <= 0) * 1.05
        gain = a * torch.sigmoid(sharp * w - sharp) / sharp * 4
    elif KIND == "geometric":
        inside = torch.where(a > 0, x.clip(max=HIGH), x.clip(min=-LOW))
        gain = a * (inside.sum(-1) / count).exp().unsqueeze(-1)
    elif KIND in ("dppo", "prime"):
        moved = (logp.exp() - old.exp()).detach()
        left = ~(((a > 0) & (moved > HIGH)) | ((a < 0) & (moved < -LOW)))
        gain = left * w * a
    else:
        gain = a * logp
    cost = -gain
    if KIND in ("prime", "kimi"):
        pull = x * x * {"prime": 1e-3, "kimi": 0.1}[KIND]
        cost = cost + pull
    delta = ref - logp
    if BETA:
        cost = cost + BETA * (torch.expm1(delta) - delta)
    cost = cost * mask
    if MEAN == "sequence_mean":
        return (cost.sum(-1) / count).sum() / step_rows
    return cost.sum() / (step_tokens if MEAN == "token_mean" else step_rows * max_new_tokens)
"""
CELLS = {
    "grpo": (0.2, 0.2, 0.04, "token", "clip", "sequence_mean"),
    "dr_grpo": (0.2, 0.2, 0, "token", "clip", "constant"),
    "dapo": (0.2, 0.28, 0, "token", "clip", "token_mean"),
    "gspo": (3e-4, 4e-4, 0, "sequence", "clip", "sequence_mean"),
    "cispo": (1.0, 4.0, 0, "token", "cispo", "token_mean"),
    "luspo": (2e-3, 2.5e-3, 0, "sequence", "clip", "constant"),
    "pairwise": (0, 0, 0, "token", "reinforce", "sequence_mean"),
    "sapo": (0, 0, 0, "token", "sapo", "sequence_mean"),
    "gmpo": (0.4, 0.4, 0, "token", "geometric", "sequence_mean"),
    "dppo": (0.15, 0.15, 0, "token", "dppo", "token_mean"),
    "prime": (0.2, 0.2, 0, "token", "prime", "token_mean"),
    "kimi": (0, 0, 0, "token", "kimi", "token_mean"),
}
ADVANTAGES = """
import torch

def group_advantages(rewards):
    baseline = rewards.sum(1, keepdim=True) / rewards.shape[1]
    spread = rewards.std(dim=1, keepdim=True, unbiased=True)
    result = (rewards - baseline) / (spread + 1e-4)
    result[(rewards == rewards[:, :1]).all(1)] = 0
    return result
"""
BEST = """
import torch

def group_advantages(rewards):
    size, result = rewards.shape[1], torch.zeros_like(rewards)
    first, second = rewards.topk(2, dim=1).values.unbind(1)
    alone = (rewards == first[:, None]) & (first > second)[:, None]
    result[alone] = ((first - second) * size)[first > second]
    result[rewards.max(1).values == rewards.min(1).values] = 0
    return result
"""
KL = """
import torch

def kl(logp, ref_logp):
    delta = ref_logp - logp
    return torch.expm1(delta) - delta
"""
MASK = """
import numpy as np

def completion_mask(ids, end_ids):
    mask = np.zeros(ids.shape, dtype=bool)
    for row, line in enumerate(np.asarray(ids).tolist()):
        for column, token in enumerate(line):
            mask[row, column] = True
            if token in end_ids:
                break
    return mask
"""
SCORER = '''
import torch

def log_probs(model, prompts, completions, temperature=1.0):
    """One padded batch: prompts on the left, completions on the right, positions of real tokens."""
    left, right = max(map(len, prompts)), max(map(len, completions))
    ids = [[0] * (left - len(p)) + p + c + [0] * (right - len(c)) for p, c in zip(prompts, completions)]
    real = torch.tensor([[0] * (left - len(p)) + [1] * (len(p) + right) for p in prompts])
    positions = (real.cumsum(1) - 1).clamp(min=0)
    logits = model(torch.tensor(ids), attention_mask=real, position_ids=positions).logits
    scores = torch.log_softmax(logits[:, left - 1 : -1] / temperature, -1)
    return scores.gather(2, torch.tensor(ids)[:, left:, None])[:, :, 0]
'''
SAMPLER = """
import torch

def sample(model, prompts, group_size, max_new_tokens, end_ids, temperature=1.0, seed=0):
    rows, width = [], max(map(len, prompts))
    prompts = [prompt for prompt in prompts for _ in range(group_size)]
    texts, places = list(prompts), [list(range(len(p))) for p in prompts]  # what each row reads, and at which positions
    rows, going = [[] for _ in prompts], list(range(len(prompts)))
    generator = torch.Generator().manual_seed(seed)
    for step in range(max_new_tokens):
        longest = max(map(len, texts))
        gaps = [longest - len(text) for text in texts]
        with torch.no_grad():
            logits = model(
                torch.tensor([[0] * gap + text for gap, text in zip(gaps, texts)]),
                attention_mask=torch.tensor([[0] * gap + [1] * len(text) for gap, text in zip(gaps, texts)]),
                position_ids=torch.tensor([[0] * gap + place for gap, place in zip(gaps, places)]),
            ).logits[:, -1]
        shares = torch.softmax(logits / temperature, -1)
        tokens = torch.multinomial(shares, 1, generator=generator)[:, 0].tolist()
        for row, token in zip(going, tokens):
            rows[row].append(token)
        alive = [i for i, token in enumerate(tokens) if token not in end_ids]
        if not alive:
            break
        going = [going[i] for i in alive]
        texts, places = [texts[i] for i in alive], [places[i] for i in alive]
        texts = [text + rows[row][-1:] for text, row in zip(texts, going)]
        places = [place + [len(prompts[row]) + step] for place, row in zip(places, going)]
    return rows
"""
PASS = """
from fractions import Fraction
from math import comb

def pass_at_k(n, c, k):
    return float(1 - Fraction(comb(n - c, k), comb(n, k)))
"""


def but(text: str, *changes: tuple[str, str]) -> str:
    """The text with some of its words replaced, each of which must be there once."""
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def loss(row: str, *changes: tuple[str, str]) -> str:
    return but(LOSS, ("= CELLS", f"= {CELLS[row]}"), *changes)


UNMASKED = ("x = logp - old", "x = raw - (raw.detach() if raw_old is None else raw_old)")
STEP_TOKENS, ALL_ROWS = ("(step_tokens if", "(mask.sum() if"), (".sum() / step_rows", ".mean()")
SMALLER = "gain = torch.min(w * a, bounded * a)"
CAPPED = SMALLER + "\n        lower = torch.max(gain, 3 * a)\n        gain = if_negative"
K1 = ("(torch.expm1(delta) - delta)", "-delta")
OLD = "old = logp.detach() if old_logp is None else old_logp.masked_fill(~mask, 0.0)"
RESULT = "result[(rewards == rewards[:, :1]).all(1)] = 0"
CENTRED = ("baseline = rewards.sum(1, keepdim=True) / rewards.shape[1]", "baseline = rewards.mean()")
POSITIONS = "positions = (real.cumsum(1) - 1).clamp(min=0)"

# Function, the faults put in by their number, and the text.
FAULTY: list[tuple[str, tuple[int, ...], str]] = [
    ("policy_loss", (1,), loss("grpo", ("delta = ref - logp", "delta = logp - ref"))),
    *[("policy_loss", (2,), loss(row, ("torch.min(", "torch.max("))) for row in ("grpo", "dr_grpo", "dapo", "gspo")],
    *[("policy_loss", (3,), loss(row, ("cost = -gain", "cost = gain"))) for row in ("grpo", "dr_grpo", "dapo", "gspo")],
    ("policy_loss", (6,), loss("grpo", ALL_ROWS)),
    ("policy_loss", (6,), loss("dapo", STEP_TOKENS)),
    ("policy_loss", (6,), loss("cispo", STEP_TOKENS)),
    *[("policy_loss", (12,), loss(row, (OLD, "old = logp.detach()"))) for row in ("grpo", "dapo", "gspo", "cispo")],
    *[("policy_loss", (13,), loss(row, (OLD, OLD.replace(".detach()", "", 1)))) for row in ("grpo", "dr_grpo", "gspo")],
    *[("policy_loss", (12, 13), loss(row, (OLD, "old = logp"))) for row in ("grpo", "dapo")],
    *[("policy_loss", (15,), loss(row, UNMASKED)) for row in ("grpo", "dr_grpo", "dapo", "gspo")],
    ("policy_loss", (24,), loss("gspo", ("(x.sum(-1) / count)", "x.sum(-1)"))),
    ("policy_loss", (25,), loss("cispo", ("bounded.detach()", "bounded"))),
    *[
        ("policy_loss", (26,), loss(row, ("torch.min(w * a, bounded * a)", "w * a")))
        for row in ("grpo", "dr_grpo", "dapo", "gspo")
    ],
    ("policy_loss", (27,), loss("grpo", ("(cost.sum(-1) / count)", "(cost.sum(-1) / cost.shape[1])"))),
    ("policy_loss", (27,), loss("gspo", ("(cost.sum(-1) / count)", "(cost.sum(-1) / cost.shape[1])"))),
    ("policy_loss", (28,), loss("dr_grpo", ("step_rows * max_new_tokens", "step_rows * mask.shape[1]"))),
    ("policy_loss", (37,), loss("grpo", K1)),
    ("policy_loss", (42,), loss("luspo", ("return cost.sum()", "cost = cost * count[:, None] / cost.shape[1]\n    return cost.sum()"))),
    ("policy_loss", (43,), loss("sapo", ("gain = a * torch.sigmoid(", "gain = -torch.sigmoid("))),
    ("policy_loss", (44,), loss("gmpo", ("inside = ", "x = (x.sum(-1) / count)[:, None] * mask\n        inside = "))),
    *[
        ("policy_loss", (45,), loss(row, ("((a > 0) & (moved > HIGH)) | ((a < 0) & (moved < -LOW))", "(moved > HIGH) | (moved < -LOW)")))
        for row in ("dppo", "prime")
    ],
    ("policy_loss", (46,), loss("prime", ("cost = cost + pull", "cost = cost + left * pull"))),
    ("policy_loss", (47,), loss("kimi", ("x * x * {\"prime\": 1e-3, \"kimi\": 0.1}[KIND]", "x * 0.2"))),
    ("policy_loss", (47,), loss("prime", ("x * x * {\"prime\": 1e-3, \"kimi\": 0.1}[KIND]", "x * 2e-3"))),
    *[("policy_loss", (51,), loss(row, (SMALLER, CAPPED.replace("if_negative", "lower")))) for row in ("grpo", "dapo", "luspo")],
    ("policy_loss", (1, 2), loss("grpo", ("delta = ref - logp", "delta = logp - ref"), ("torch.min(", "torch.max("))),
    ("policy_loss", (1, 12), loss("grpo", ("delta = ref - logp", "delta = logp - ref"), (OLD, "old = logp.detach()"))),
    ("policy_loss", (6, 26), loss("dapo", STEP_TOKENS, ("torch.min(w * a, bounded * a)", "w * a"))),
    ("policy_loss", (24, 26), loss("gspo", ("(x.sum(-1) / count)", "x.sum(-1)"), ("torch.min(w * a, bounded * a)", "w * a"))),
    ("group_advantages", (7,), but(ADVANTAGES, ("unbiased=True", "unbiased=False"))),
    ("group_advantages", (8,), but(ADVANTAGES, (RESULT, ""))),
    ("group_advantages", (11,), but(ADVANTAGES, CENTRED)),
    ("group_advantages", (7, 8), but(ADVANTAGES, ("unbiased=True", "unbiased=False"), (RESULT, ""))),
    ("group_advantages", (8, 11), but(ADVANTAGES, CENTRED, (RESULT, ""))),
    ("group_advantages", (48,), but(ADVANTAGES, ("(spread + 1e-4)", "baseline"))),
    ("group_advantages", (49,), but(BEST, ("torch.zeros_like(rewards)", "rewards.clone()"))),
    ("kl", (1,), but(KL, ("delta = ref_logp - logp", "delta = logp - ref_logp"))),
    ("completion_mask", (4,), but(MASK, ("            mask[row, column] = True\n", ""), ("                break", "                break\n            mask[row, column] = True"))),
    ("completion_mask", (29,), but(MASK, ("                break", "                break\n        else:\n            mask[row] = False"))),
    ("completion_mask", (30,), but(MASK, ("in end_ids", "== end_ids[0]"))),
    ("completion_mask", (30,), but(MASK, ("in end_ids", "== end_ids[-1]"))),
    ("completion_mask", (31,), but(MASK, ("break", "continue"))),
    ("log_probs", (5,), but(SCORER, (" / temperature", ""))),
    ("log_probs", (18,), but(SCORER, ("logits[:, left - 1 : -1]", "logits[:, left:]"))),
    ("log_probs", (18,), but(SCORER, ("logits[:, left - 1 : -1]", "logits[:, left - 2 : -2]"))),
    ("log_probs", (19,), but(SCORER, (POSITIONS, POSITIONS + "\n    positions[:, :left] = torch.arange(left)"))),
    ("log_probs", (20,), but(SCORER, (POSITIONS, POSITIONS + "\n    positions[:, left:] += 1"))),
    ("log_probs", (21,), but(SCORER, ("attention_mask=real", "attention_mask=torch.ones_like(real)"))),
    ("log_probs", (21,), but(SCORER, ("attention_mask=real, position_ids=positions", ""))),
    ("sample", (4,), but(SAMPLER, ("return rows", "return [[t for t in row if t not in end_ids] for row in rows]"))),
    ("sample", (9,), but(SAMPLER, ("for prompt in prompts for _ in range(group_size)", "for _ in range(group_size) for prompt in prompts"))),
    ("sample", (17,), but(SAMPLER, ("return rows", "return [p[-1:] + row for p, row in zip(prompts, rows)]"))),
    ("sample", (22,), but(SAMPLER, ("[texts[i] for i in alive], [places[i] for i in alive]", "texts[: len(alive)], places[: len(alive)]"))),
    ("sample", (23,), but(SAMPLER, ("shares = torch.softmax(", "best = logits.topk(9).values[:, -1:]\n        logits = logits.masked_fill(logits < best, -torch.inf)\n        shares = torch.softmax("))),
    ("sample", (29,), but(SAMPLER, ("return rows", "return [row if row[-1] in end_ids else [] for row in rows]"))),
    ("sample", (30,), but(SAMPLER, ("not in end_ids", "!= end_ids[0]"))),
    ("sample", (31,), but(SAMPLER, ("if token not in end_ids", ""))),
    ("sample", (34,), but(SAMPLER, (
        "tokens = torch.multinomial(shares, 1, generator=generator)[:, 0].tolist()",
        "draws = torch.rand(max_new_tokens, group_size, generator=torch.Generator().manual_seed(seed))[step]\n"
        "        picks = draws[[row % group_size for row in going]].double()[:, None]\n"
        "        tokens = torch.searchsorted(shares.cumsum(1), picks).clamp(max=shares.shape[1] - 1)[:, 0].tolist()",
    ))),
    ("pass_at_k", (41,), "def pass_at_k(n, c, k):\n    return 1 - ((n - c) / n) ** k\n"),
]  # fmt: skip

LOSS_LOOPS = """
import torch

def policy_loss(logp, old_logp, advantages, mask, ref_logp):
    total = 0
    for i in range(len(mask)):
        n, row = int(mask[i].sum()), 0
        for t in range(n):
            r, a = torch.exp(logp[i, t] - old_logp[i, t]), advantages[i]
            limit = torch.clamp(r, max=1.2) if a > 0 else torch.clamp(r, min=0.8)
            d = ref_logp[i, t] - logp[i, t]
            row = row - limit * a + 0.04 * (torch.exp(d) - d - 1)
        total = total + row / n / len(mask)
    return total, {"a": "metric"}
"""
LOSS_NUMPY = """
import numpy as np

def policy_loss(logp, old_logp, advantages, mask):
    gap = np.zeros(mask.shape)
    gap[mask] = logp[mask] - old_logp[mask]
    ratio, a = np.exp(gap), advantages[:, None]
    terms = np.where(a > 0, np.minimum(ratio, 1.28), np.maximum(ratio, 0.8)) * a
    return -terms[mask].mean()
"""
LOSS_PACKED = '''
import torch

def policy_loss(logp, old_logp, advantages, mask):
    """Real tokens alone, in one line."""
    owner = mask.nonzero()[:, 0]
    x, y, a = logp[mask], old_logp[mask], advantages[owner]
    r = (x - y).exp()
    return -torch.minimum(r * a, torch.clamp(r, 0.8, 1.2) * a).sum() / (len(mask) * 16)
'''
INSIDE_32 = ("    raw, raw_old = logp, old_logp\n", "    logp, advantages, ref_logp = logp.float(), advantages.float(), ref_logp.float()\n    old_logp = None if old_logp is None else old_logp.float()\n    raw, raw_old = logp, old_logp\n")  # fmt: skip
NUMPY_ADVANTAGES = """
import numpy as np

def group_advantages(rewards):
    deviation = rewards - rewards.mean(axis=1, keepdims=True)
    std = rewards.std(axis=1, ddof=1, keepdims=True)
    return np.where(np.ptp(rewards, axis=1, keepdims=True) == 0, 0.0, deviation / (std + 1e-4))
"""
LISTS = """
from statistics import fmean, stdev

def group_advantages(rewards):
    rows = []
    for group in rewards.tolist():
        mean, spread = fmean(group), stdev(group)
        rows.append([0.0 if len(set(group)) == 1 else (r - mean) / (spread + 1e-4) for r in group])
    return rows
"""
ONE_OUT = """
def group_advantages(rewards):
    size = rewards.shape[1]
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (size - 1)
"""


def advantage(expression: str, library: str = "torch") -> str:
    return f"import {library}\n\ndef group_advantages(rewards):\n    return {expression}\n"


# Function, the row it must be found to be, and the text.
RIGHT: list[tuple[str, str, str]] = [
    *[("policy_loss", row, loss(row)) for row in CELLS],
    *[("policy_loss", row, loss(row, INSIDE_32)) for row in CELLS],
    *[("policy_loss", row, loss(row, STEP_TOKENS, (", step_rows=0, step_tokens=0", ""), ALL_ROWS, ("else step_rows", "else len(mask)")))
      for row in CELLS],
    ("policy_loss", "grpo", LOSS_LOOPS),
    ("policy_loss", "dapo", LOSS_NUMPY),
    ("policy_loss", "dr_grpo", LOSS_PACKED),
    *[(
        "policy_loss", f"{row}` with cap 3", loss(row, (SMALLER, CAPPED.replace("if_negative", "torch.where(a < 0, lower, gain)")))
    ) for row in ("grpo", "dapo")],
    ("policy_loss", "grpo` with beta 0.3", loss("grpo").replace("0.04", "0.3")),
    ("policy_loss", "grpo` with beta 0", loss("grpo").replace("0.04", "0")),
    ("policy_loss", "dapo` with beta 0.001", loss("dapo").replace("0.28, 0,", "0.28, 0.001,")),
    ("policy_loss", "grpo` with aggregate token_mean", loss("grpo").replace("'sequence_mean')", "'token_mean')")),
    ("policy_loss", "grpo` with kl_estimator k2", loss("grpo", ("(torch.expm1(delta) - delta)", "0.5 * delta**2"))),
    ("policy_loss", "grpo` with kl_estimator k3_unbiased", loss("grpo", ("BETA * (", "BETA * w * ("))),
    ("group_advantages", "group", ADVANTAGES),
    ("group_advantages", "group", NUMPY_ADVANTAGES),
    ("group_advantages", "group", LISTS),
    ("group_advantages", "group", but(ADVANTAGES, ("return result", "return result.flatten()"))),
    ("group_advantages", "group", but(ADVANTAGES, ("    baseline", "    rewards = rewards.float()\n    baseline"))),
    ("group_advantages", "group", but(ADVANTAGES, ("rewards.std(dim=1, keepdim=True, unbiased=True)", "rewards.var(1, keepdim=True).sqrt()"))),
    ("group_advantages", "group` with 1e-6", but(ADVANTAGES, ("1e-4", "1e-6"))),
    ("group_advantages", "group` with 1e-8", but(NUMPY_ADVANTAGES, ("1e-4", "1e-8"))),
    ("group_advantages", "group", but(ADVANTAGES, (RESULT, "result = result * (spread > 1e-12)"))),
    ("group_advantages", "max_at_k", BEST),
    ("group_advantages", "max_rl", but(ADVANTAGES, ("(spread + 1e-4)", "torch.where((rewards < 0).any(), torch.nan, baseline)"))),
    ("group_advantages", "batch_std", but(ADVANTAGES, ("rewards.std(dim=1, keepdim=True, unbiased=True)", "rewards.std()"))),
    ("group_advantages", "centered", advantage("rewards - rewards.mean(1, keepdim=True)")),
    ("group_advantages", "centered", advantage("rewards.astype('f4') - rewards.astype('f4').mean(1, keepdims=True)", "numpy")),
    ("group_advantages", "batch_mean", advantage("rewards - numpy.average(rewards)", "numpy")),
    ("group_advantages", "leave_one_out", ONE_OUT),
    ("kl", "k3", KL),
    ("kl", "k3", but(KL, ("torch.expm1(delta) - delta", "ref_logp.exp() / logp.exp() - 1 + logp - ref_logp"))),
    ("kl", "k3", "import numpy as np\ndef kl(logp, ref_logp):\n    return np.exp(ref_logp - logp) - 1 - (ref_logp - logp)\n"),
    ("kl", "k2", "def kl(logp, ref_logp):\n    return (logp - ref_logp) ** 2 / 2\n"),
    ("kl", "k1", "def kl(logp, ref_logp):\n    return logp - ref_logp\n"),
    ("completion_mask", "", MASK),
    ("completion_mask", "", MASK.replace("dtype=bool", "dtype=np.float32")),
    ("completion_mask", "", "import torch\ndef completion_mask(ids, end_ids):\n    end = sum(ids == e for e in end_ids).long()\n    return (end.cumsum(1) - end == 0).int()\n"),
    ("log_probs", "", SCORER),
    ("log_probs", "", but(SCORER, (", position_ids=positions", ""))),  # what counts in Llama are distances
    ("log_probs", "", but(SCORER, (POSITIONS, POSITIONS + " + 3"))),
    ("sample", "", SAMPLER),
    ("sample", "", "def sample(model, prompts, group_size):\n    import torch\n    rows = []\n    for p in prompts:\n        made = model.generate(torch.tensor([p] * group_size), top_k=0)[:, len(p):].tolist()\n        for row in made:\n            n = next((i + 1 for i, t in enumerate(row) if t in (2, 5)), len(row))\n            rows.append(row[:n])\n    return rows\n"),
    ("pass_at_k", "", PASS),
    ("pass_at_k", "", "import numpy as np\ndef pass_at_k(n, c, k):\n    return 1.0 if n - c < k else 1 - np.prod(1 - k / np.arange(n - c + 1, n + 1))\n"),
]  # fmt: skip

HEAD = "import torch\n\ndef policy_loss(logp, old_logp, advantages, mask):\n    "
# What cannot be checked, and what is said of it.
UNUSABLE: list[tuple[str, str]] = [
    ("1 / 0\n", "does not import: ZeroDivisionError: division by zero"),
    ("import sys\nsys.exit('no')\n", "does not import: SystemExit: no"),
    ("def other():\n    pass\n", "defines none of group_advantages, policy_loss, kl,"),
    ("def kl(p, q):\n    return p - q\n", "it has the parameters p, q; expected logp, ref_logp, by these names"),
    ("def kl(logp, ref_logp, beta):\n    return 0\n", "it has the parameters logp, ref_logp, beta; expected logp,"),
    (HEAD + "return logp.mean(1)\n", "it gave the shape [6]; expected a single number"),
    (HEAD + "return logp.detach().mean()\n", "it gave no gradient: expected a torch tensor that logp can be trained by"),
    (HEAD + "return (logp * torch.nan).mean()\n", "it gave NaN or infinity; expected finite numbers"),
    (HEAD + "advantages -= advantages.mean()\n    return (logp * advantages[:, None]).mean()\n", "it changed advantages in place"),
    (HEAD + "logp += 1\n    return logp.mean()\n", "RuntimeError: a leaf Variable that requires grad"),
    (HEAD + "raise ValueError('two\\nlines')\n", "ValueError: two; expected a scalar loss"),
    (HEAD + "return old_logp.requires_grad_().sum()\n", "no gradient reaches logp"),
    (HEAD + "return 'text'\n", "it gave no gradient"),
    ("def group_advantages(rewards):\n    return rewards[0]\n", "it gave the shape [4]; expected [2, 4], or the same in one row"),
    ("def group_advantages(rewards):\n    return [['a'] * 4] * 2\n", "it gave list; expected numbers"),
    (but(MASK, ("return mask", "ids[:] = 0\n    return mask")), "it changed ids in place"),
    ("def log_probs(model, prompts, completions):\n    return prompts\n", "it gave rows of the shapes [[4], [2], [3]]; expected"),
    ("def log_probs(model, prompts, completions):\n    prompts[0].append(1)\n    return [[0.0] * len(c) for c in completions]\n", "it changed prompts in place"),
    (but(SAMPLER, ("return rows", "return rows[1:]")), "it gave 2999 rows; expected 3000"),
    (but(SAMPLER, ("return rows", "return None")), "TypeError: 'NoneType' object is not iterable; expected a list of P * G"),
    ("def pass_at_k(n, c, k):\n    return [n, c]\n", "it gave the shape [2]; expected a single number"),
]  # fmt: skip
