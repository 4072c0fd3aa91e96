"""Benchmarks: each alternates with its reference in one run, and reports the floor of its time."""

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from colonnade.launcher.errors import UserError
from colonnade.launcher.weights.peer import GPU_ONLY


def require_packages(name: str, *modules: str) -> None:
    """Imports the packages with which `bench name` compares or plots.

    From then on transformers runs in plain PyTorch: the packages of `GPU_ONLY` cannot be imported.

    Raises:
        UserError: a package is not installed.
    """
    for module in GPU_ONLY:
        sys.modules.setdefault(module, None)  # type: ignore[arg-type]  # None makes imports fail
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
    """Reading batches from a memory-mapped token file, beside a copy of as many bytes."""
    from colonnade.bench.loader import run

    return run()


def bench_linear() -> dict[str, Any]:
    """Matrix products of a linear layer beside PyTorch's."""
    from colonnade.bench.linear import run

    return run()


def bench_norm() -> dict[str, Any]:
    """RMSNorm beside PyTorch's own and its formula."""
    from colonnade.bench.norm import run

    return run()


def bench_mixers() -> dict[str, Any]:
    """Chunked sequence mixers beside their token recurrences and transformers' functions."""
    from colonnade.bench.mixers import run

    return run()


def bench_moe(nproc: int = 1) -> dict[str, Any]:
    """A mixture of experts beside Mixtral's loop over experts; with --nproc, its parts on ranks."""
    if nproc > 1:
        from colonnade.bench.moe_ranks import run as run_on_ranks

        return run_on_ranks(nproc)
    from colonnade.bench.moe import run

    return run()


def bench_mup() -> dict[str, Any]:
    """A coordinate check of muP beside the standard parametrisation; plots `mup.png`."""
    from colonnade.bench.mup import run

    return run()


def bench_ladder() -> dict[str, Any]:
    """Communication that ladder hides between two simulated hosts; takes 25 minutes, as root."""
    from colonnade.bench.ladder import run

    return run()


def bench_overlap() -> dict[str, Any]:
    """Communication that ladder hides where collectives are delays; one process, two minutes."""
    from colonnade.bench.overlap import run

    return run()


def bench_experts() -> dict[str, Any]:
    """All-to-alls of experts that ladder hides, as delays and between two hosts; as root."""
    from colonnade.bench.experts import run

    return run()


def bench_context() -> dict[str, Any]:
    """A sequence over several ranks: work, time, memory and bytes sent; takes a few minutes."""
    from colonnade.bench.context import run

    return run()


def bench_pipeline() -> dict[str, Any]:
    """Idle time of schedules with sleeping stages, FLOPs of their passes, two ranks in training."""
    from colonnade.bench.pipeline import run

    return run()


def bench_checkpoint() -> dict[str, Any]:
    """A checkpoint saved while a step runs beside torch.save; its check; writes of the disk."""
    from colonnade.bench.checkpoint import run

    return run()


def bench_generate() -> dict[str, Any]:
    """Tokens per second of attention, hybrid and Mamba-2 by context; ladder on hosts, as root."""
    from colonnade.bench.generate import run

    return run()


def bench_convert() -> dict[str, Any]:
    """Weights of 16 GB to our format and back, beside plain reads and writes; needs 50 GB."""
    from colonnade.bench.convert import run

    return run()


def bench_init() -> dict[str, Any]:
    """Memory of two ranks that read their shards of an 8B Llama's tensors; needs half of memory."""
    from colonnade.bench.init import run

    return run()


def bench_offload() -> dict[str, Any]:
    """AdamW over host memory beside three passes, DeepSpeedCPUAdam and the memory's bandwidth."""
    from colonnade.bench.offload import run

    return run()


def bench_start() -> dict[str, Any]:
    """From `train` to its first step, and from a killed rank to the next, beside torchrun."""
    from colonnade.bench.start import run

    return run()


BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "step": bench_step,
    "loader": bench_loader,
    "linear": bench_linear,
    "norm": bench_norm,
    "mixers": bench_mixers,
    "moe": bench_moe,
    "mup": bench_mup,
    "ladder": bench_ladder,
    "overlap": bench_overlap,
    "experts": bench_experts,
    "context": bench_context,
    "pipeline": bench_pipeline,
    "checkpoint": bench_checkpoint,
    "generate": bench_generate,
    "convert": bench_convert,
    "init": bench_init,
    "offload": bench_offload,
    "start": bench_start,
}


def bench(name: str, nproc: int | None = None) -> dict[str, Any]:
    """Runs the benchmark `name`, one of `BENCHMARKS`; returns its figures.

    Args:
        nproc: ranks on this host, for a benchmark that takes them.

    Raises:
        UserError: `nproc` is given to another one.
    """
    run = BENCHMARKS[name]
    if nproc is None:
        return run()
    if "nproc" not in inspect.signature(run).parameters:
        raise UserError(f"bench {name} sets its number of ranks itself: leave out --nproc")
    return run(nproc)
