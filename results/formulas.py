"""Draw the clip objective and the KL estimators by calling the functions of `grpo.py`: `python results/formulas.py`."""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from grpo import ALGORITHMS, kl_penalty, policy_loss  # noqa: E402

COLOURS = {"grpo": "#0072B2", "dapo": "#E69F00", "cispo": "#009E73"}
STYLES = {
    "k1": ("#999999", "-"),
    "k2": ("#0072B2", "-"),
    "k3": ("#D55E00", "-"),
    "k3_unbiased": ("#E69F00", (0, (4, 3))),
}


def objective(name: str, ratio: torch.Tensor, advantage: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Minus the loss of a single token at each ratio, and its derivative by the token's log-probability."""
    logp = ratio.log().requires_grad_()
    values = []
    for x in logp:
        row = x.view(1, 1)
        mask = torch.ones(1, 1, dtype=torch.bool)
        loss, _ = policy_loss(row, torch.zeros(1, 1).double(), torch.tensor([advantage]), mask, ALGORITHMS[name])
        values.append(-loss)
    return torch.stack(values).detach(), torch.autograd.grad(torch.stack(values).sum(), logp)[0]


def estimates(name: str, log_ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A KL estimate at each log pi - log ref, on-policy, and its derivative by log pi."""
    logp = log_ratio.clone().requires_grad_()
    value = kl_penalty(logp, torch.zeros_like(logp), name, (logp - logp.detach()).exp())
    return value.detach(), torch.autograd.grad(value.sum(), logp)[0]


def draw(out: Path) -> list[Path]:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "grpo"})
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.8), constrained_layout=True)
    ratio = torch.linspace(0.02, 1.98, 393, dtype=torch.float64)
    for column, advantage in enumerate((1.0, -1.0)):
        top = axes[0][column]
        for name in ("grpo", "dapo"):
            value, slope = objective(name, ratio, advantage)
            line = "-" if name == "grpo" else (0, (4, 3))
            cells = ALGORITHMS[name]
            label = f"{name}: clip {1 - cells.epsilon:.2f} to {1 + cells.epsilon_high:.2f}"
            top.plot(ratio, value, color=COLOURS[name], linestyle=line, label=label)
            if name == "grpo":
                dead = slope.abs() < 1e-12
                top.plot(ratio[dead], value[dead], color=COLOURS[name], linewidth=6, alpha=0.25, label="no gradient")
        _, slope = objective("cispo", ratio, advantage)
        top.plot(
            ratio, slope, color=COLOURS["cispo"], linewidth=1, linestyle=":", label="cispo: gradient by log π, never 0"
        )
        top.set_title(f"Objective of a token, A {'>' if advantage > 0 else '<'} 0 (A = {advantage:+.0f})", loc="left")
        top.set_xlabel("ratio r = π / π_old")
        top.axvline(1, color="#cccccc", linewidth=0.8, zorder=0)
        top.legend(frameon=False, fontsize=8)
    log_ratio = torch.linspace(-2, 2, 401, dtype=torch.float64)
    for name, (colour, line) in STYLES.items():
        value, slope = estimates(name, log_ratio)
        axes[1][0].plot(log_ratio, value, color=colour, linestyle=line, label=name)
        axes[1][1].plot(log_ratio, slope, color=colour, linestyle=line, label=name)
    axes[1][0].set_title("KL estimate of a sampled token", loc="left")
    axes[1][1].set_title("Its gradient by log π, on-policy", loc="left")
    for bottom in axes[1]:
        bottom.set_xlabel("log π − log π_ref")
        bottom.set_ylim(-2.2, 4.6)
        bottom.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
        bottom.legend(frameon=False, fontsize=8, loc="upper center")
    paths = [out / f"formulas.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="Folder of the figure. Default: results.")
    print(*draw(parser.parse_args().out))
