"""Chooses the library for fp32 matrix products: measured once per machine, equal on all ranks."""

import hashlib
import json
import os
import platform
import statistics
import time
import uuid
from contextlib import suppress
from pathlib import Path

import torch

from colonnade.kernels.linear import (
    CLASSES,
    LAYOUTS,
    SIZES,
    class_of,
    has_onednn,
    onednn_product,
    prefer,
)
from colonnade.launcher.cluster.collective import on_rank_zero
from colonnade.launcher.cluster.environment import cache_folder, instruction_limits

# M, N, K of a product of each size.
SHAPES = dict(zip(SIZES, ((256, 128, 128), (1024, 256, 256), (2048, 1408, 512)), strict=True))
ROUNDS = 7
RATIO = "time of MKL / oneDNN"
GAIN = 1.1  # oneDNN replaces MKL, PyTorch's choice, where it is faster by this factor: beyond noise


def settle_products(device: torch.device) -> None:
    """Makes every rank use the libraries that are faster on rank 0, which broadcasts its choice.

    Ranks must agree: a router that every rank of a group computes has to choose the same experts.
    """
    if device.type == "cpu" and has_onednn(torch.empty(0)):
        prefer(on_rank_zero(lambda: cached_choice() or measure_choice()))


def cached_choice() -> dict[str, bool] | None:
    """The choice of an earlier measurement on the same processor with as many threads, or None.

    By class of product: whether oneDNN serves it.
    """
    try:
        cached = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ratios = {name: cached.get(name, {}).get(RATIO) for name in CLASSES}
    if not all(isinstance(ratio, int | float) for ratio in ratios.values()):
        return None
    return {name: ratio > GAIN for name, ratio in ratios.items()}


def measure_choice() -> dict[str, bool]:
    """Times both libraries on a product of every class, in turn, and caches the choice.

    Where the cache folder cannot be written, the next run measures again.
    """
    figures: dict[str, dict[str, float]] = {}
    for size, (m, n, k) in SHAPES.items():
        x, weight, grad = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
        pairs = ((x, weight), (grad, weight.T), (grad.T, x.T))
        for (a, b), layout in zip(pairs, LAYOUTS, strict=True):
            name = class_of(a, b)
            assert name == f"{layout}, {size}"
            figures[name] = {RATIO: round(_mkl_over_onednn(a, b), 3)}
    choice = {name: figure[RATIO] > GAIN for name, figure in figures.items()}
    path = _path()
    # written under another name first: other processes may read or write the file meanwhile
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(
            json.dumps({"machine": _machine(), **figures}, indent=1), encoding="utf-8"
        )
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
    return choice


def _mkl_over_onednn(a: torch.Tensor, b: torch.Tensor) -> float:
    """The median over rounds of MKL's time for a·bᵀ divided by oneDNN's; the first is a warm-up."""
    ratios = []
    for number in range(ROUNDS + 1):
        seconds = []
        for multiply in (lambda: a @ b.T, lambda: onednn_product(a, b)):
            start = time.perf_counter()
            multiply()
            seconds.append(time.perf_counter() - start)
        if number:
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def _machine() -> dict[str, str | int]:
    """The facts about this machine and process on which the measurement depends."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    wanted = ("vendor_id", "cpu family", "model", "model name", "flags")
    facts = {line.split(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    return {
        "processor": " ".join(facts.get(name, "") for name in wanted) or platform.processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "limits": instruction_limits(),
    }


def _path() -> Path:
    """The file of the cached measurement, named by a hash of the machine's facts."""
    key = json.dumps(_machine()).encode()
    return cache_folder() / f"products-{hashlib.blake2b(key, digest_size=8).hexdigest()}.json"
