"""Benchmarks: each beside its reference in one run, alternating, with the floor printed."""

from collections.abc import Callable
from typing import Any


def bench_step() -> dict[str, Any]:
    """A training step of a small Llama beside Hugging Face's."""
    from colonnade.launcher.benchmarks.step import run

    return run()


def bench_loader() -> dict[str, Any]:
    """Reading batches from a memory-mapped token file, beside copying as many bytes."""
    from colonnade.launcher.benchmarks.loader import run

    return run()


def bench_scan() -> dict[str, Any]:
    """Chunked Mamba-2 beside its token-by-token recurrence."""
    from colonnade.launcher.benchmarks.scan import run

    return run()


def bench_linear() -> dict[str, Any]:
    """Products of a linear layer beside PyTorch's."""
    from colonnade.launcher.benchmarks.linear import run

    return run()


def bench_norm() -> dict[str, Any]:
    """RMSNorm beside PyTorch's own and its formula."""
    from colonnade.launcher.benchmarks.norm import run

    return run()


BENCHMARKS: dict[str, Callable[[], dict[str, Any]]] = {
    "step": bench_step,
    "loader": bench_loader,
    "scan": bench_scan,
    "linear": bench_linear,
    "norm": bench_norm,
}


def bench(name: str) -> dict[str, Any]:
    """Run the benchmark `name`, one of `BENCHMARKS`, and return its figures."""
    return BENCHMARKS[name]()
