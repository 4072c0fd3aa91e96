"""Benchmarks: each beside its reference in one run, alternating, with the floor printed."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

from colonnade.launcher.errors import UserError

# Where these are installed transformers takes them, and they need a GPU.
GPU_ONLY = ("mamba_ssm", "causal_conv1d", "fla")


def need(name: str, *modules: str) -> None:
    """Import what `bench name` compares with, or draws with; transformers in plain PyTorch.

    Raises:
        UserError: one is not installed.
    """
    for module in GPU_ONLY:
        sys.modules.setdefault(module, None)  # type: ignore[arg-type]  # None: not importable
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as missing:
            package = module.partition(".")[0]
            extra = "plot" if package == "matplotlib" else "bench"
            raise UserError(
                f"bench {name} needs {package}: pip install 'colonnade[{extra}]'"
            ) from missing


def bench_step() -> dict[str, Any]:
    """A training step of a small Llama beside Hugging Face's."""
    from colonnade.bench.step import run

    return run()


def bench_loader() -> dict[str, Any]:
    """Reading batches from a memory-mapped token file, beside copying as many bytes."""
    from colonnade.bench.loader import run

    return run()


def bench_linear() -> dict[str, Any]:
    """Products of a linear layer beside PyTorch's."""
    from colonnade.bench.linear import run

    return run()


def bench_norm() -> dict[str, Any]:
    """RMSNorm beside PyTorch's own and its formula."""
    from colonnade.bench.norm import run

    return run()


def bench_mixers() -> dict[str, Any]:
    """Chunked sequence mixers beside their token recurrences and transformers' code."""
    from colonnade.bench.mixers import run

    return run()


def bench_moe() -> dict[str, Any]:
    """A mixture of experts beside Mixtral's loop over experts."""
    from colonnade.bench.moe import run

    return run()


def bench_mup() -> dict[str, Any]:
    """A coordinate check of muP beside the standard parametrisation; draws `mup.png`."""
    from colonnade.bench.mup import run

    return run()


def bench_ladder() -> dict[str, Any]:
    """Communication hidden by ladder residual between two hosts; 25 minutes, as root."""
    from colonnade.bench.ladder import run

    return run()


def bench_overlap() -> dict[str, Any]:
    """Ladder residual beside collectives that are mere delays; one process, two minutes."""
    from colonnade.bench.overlap import run

    return run()


def bench_context() -> dict[str, Any]:
    """A sequence over several ranks: work, time, memory and bytes sent; a few minutes."""
    from colonnade.bench.context import run

    return run()


BENCHMARKS: dict[str, Callable[[], dict[str, Any]]] = {
    "step": bench_step,
    "loader": bench_loader,
    "linear": bench_linear,
    "norm": bench_norm,
    "mixers": bench_mixers,
    "moe": bench_moe,
    "mup": bench_mup,
    "ladder": bench_ladder,
    "overlap": bench_overlap,
    "context": bench_context,
}


def bench(name: str) -> dict[str, Any]:
    """Run the benchmark `name`, one of `BENCHMARKS`, and return its figures."""
    return BENCHMARKS[name]()
