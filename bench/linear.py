"""`bench linear`: products of a linear layer on oneDNN and on MKL, forward and both gradients."""

import statistics
from typing import Any

import torch

from colonnade.bench.timing import alternate, median_ratio
from colonnade.kernels.linear import class_of, has_onednn, onednn_product
from colonnade.launcher.cluster.environment import cores
from colonnade.launcher.cluster.products import cached_choice, measure_choice
from colonnade.launcher.errors import UserError

SHAPES = ((2048, 512, 512), (2048, 1408, 512), (2048, 512, 1408), (512, 8192, 512))


def run(rounds: int = 9) -> dict[str, Any]:
    """GFLOP/s of either library for several `M x N x K` in fp32, the ratio, and a run's choice.

    Raises:
        UserError: this build of PyTorch has no oneDNN.
    """
    if not has_onednn(torch.empty(0)):
        raise UserError(
            "bench linear compares oneDNN with MKL: this build of PyTorch has no oneDNN"
        )
    torch.set_num_threads(cores())
    choice = cached_choice() or measure_choice()
    report: dict[str, Any] = {
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    speedups = []  # of the chosen library over MKL
    for m, n, k in SHAPES:
        x, weight, grad = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
        pairs = {"forward": (x, weight), "input": (grad, weight.T), "weight": (grad.T, x.T)}
        for name, (a, b) in pairs.items():
            seconds = alternate(
                {
                    "oneDNN": lambda a=a, b=b: onednn_product(a, b),  # type: ignore[misc]
                    "MKL": lambda a=a, b=b: a @ b.T,  # type: ignore[misc]
                },
                rounds,
            )
            rates = [2e-9 * m * n * k / statistics.median(s) for s in seconds.values()]
            ratio = median_ratio(seconds["MKL"], seconds["oneDNN"])
            chosen = "oneDNN" if choice[class_of(a, b)] else "MKL"
            speedups.append(ratio if chosen == "oneDNN" else 1.0)
            report[f"{m}x{n}x{k} {name}"] = (
                f"oneDNN {rates[0]:.0f}, MKL {rates[1]:.0f} GFLOP/s, ratio {ratio:.2f}: {chosen}"
            )
    return report | {"chosen / MKL, median": statistics.median(speedups), "least": min(speedups)}
