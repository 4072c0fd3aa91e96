"""`bench linear`: products of a linear layer, ours beside PyTorch's, forward and both gradients."""

import statistics
from typing import Any

import torch

from colonnade.kernels.linear import product, uses_onednn
from colonnade.launcher.benchmarks.timing import alternate, median_ratio

SHAPES = ((2048, 512, 512), (2048, 1408, 512), (2048, 512, 1408), (512, 8192, 512))


def run(rounds: int = 9) -> dict[str, Any]:
    """GFLOP/s of each for several `M x N x K` in fp32, and the ratios."""
    report: dict[str, Any] = {
        "ours": "oneDNN" if uses_onednn(torch.empty(0)) else "PyTorch's choice",
        "threads": torch.get_num_threads(),
    }
    for m, n, k in SHAPES:
        x, weight, grad = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
        pairs = {"forward": (x, weight), "input": (grad, weight.T), "weight": (grad.T, x.T)}
        for name, (a, b) in pairs.items():
            seconds = alternate(
                {
                    "ours": lambda a=a, b=b: product(a, b),  # type: ignore[misc]
                    "torch": lambda a=a, b=b: a @ b.T,  # type: ignore[misc]
                },
                rounds,
            )
            rates = [2e-9 * m * n * k / statistics.median(s) for s in seconds.values()]
            ratio = median_ratio(seconds["torch"], seconds["ours"])
            report[f"{m}x{n}x{k} {name}"] = (
                f"{rates[0]:.0f} and {rates[1]:.0f} GFLOP/s, ratio {ratio:.2f}"
            )
    return report
