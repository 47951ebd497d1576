"""The linear layer's product by oneDNN, forward and backward, against PyTorch's own choice: GFLOP/s and their ratio.

    python tests/bench_product.py
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python tests/bench_product.py      as if there were no AVX-512

Rows, inputs and outputs of the layers of the toy, of a model of 30 million weights and of one of 135 million. Medians
of 20 calls in turns, float32. Prints a table.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from bench_main import describe, load_before, machine, table

import commands
from linear import Product

SHAPES = {
    "toy, up": (4288, 128, 512),
    "toy, down": (4288, 512, 128),
    "toy, query": (4288, 128, 128),
    "small, up": (2176, 512, 1408),
    "small, query": (2176, 512, 512),
    "small, output": (2048, 512, 8192),
    "135M, up": (280, 576, 1536),
    "135M, key": (280, 576, 192),
    "135M, output": (256, 576, 49152),
}


def seconds(compute, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> float:
    x.grad = weight.grad = None
    start = time.perf_counter()
    compute(x, weight, None).backward(grad)
    return time.perf_counter() - start


def main() -> None:
    load = load_before()
    commands.keep_memory()
    rows = [["layer", "rows", "inputs", "outputs", "F.linear", "oneDNN", "oneDNN's time over F.linear's"]]
    for name, (count, inputs, outputs) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(n, inputs, generator=generator, requires_grad=True) for n in (count, outputs))
        grad, times = torch.randn(count, outputs, generator=generator), {F.linear: [], Product.apply: []}
        for _ in range(22):
            for compute, taken in times.items():
                taken.append(seconds(compute, x, weight, grad))
        plain, ours = (statistics.median(taken[2:]) for taken in times.values())
        rates = [f"{6e-9 * count * inputs * outputs / taken:.0f}" for taken in (plain, ours)]
        rows.append([name, count, inputs, outputs, *rates, f"{ours / plain:.2f}"])
    print(f"GFLOP/s, forward and backward:\n\n{table([[str(cell) for cell in row] for row in rows])}\n")
    print(describe(machine(torch.get_num_threads(), load)))


if __name__ == "__main__":
    main()
