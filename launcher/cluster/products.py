"""Which library serves fp32 products: measured once on a machine, the same on all ranks."""

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
GAIN = 1.1  # PyTorch's own library is left for one that is so much faster, beyond noise


def settle_products(device: torch.device) -> None:
    """Have every rank use the libraries that rank 0 finds the faster ones. Collective.

    Ranks must agree: a router that every rank of a group computes has to choose alike.
    """
    if device.type == "cpu" and has_onednn(torch.empty(0)):
        prefer(on_rank_zero(lambda: known_choice() or measured_choice()))


def known_choice() -> dict[str, bool] | None:
    """What was measured on a processor like this with as many threads, and kept."""
    try:
        kept = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ratios = {name: kept.get(name, {}).get(RATIO) for name in CLASSES}
    if not all(isinstance(ratio, int | float) for ratio in ratios.values()):
        return None
    return {name: ratio > GAIN for name, ratio in ratios.items()}


def measured_choice() -> dict[str, bool]:
    """Time both libraries on a product of every class, in turn, and keep the outcome.

    A folder that cannot be written keeps nothing: the next run measures again.
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
    coming = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        coming.write_text(
            json.dumps({"machine": _machine(), **figures}, indent=1), encoding="utf-8"
        )
        os.replace(coming, path)
    except OSError:
        with suppress(OSError):
            coming.unlink()
    return choice


def _mkl_over_onednn(a: torch.Tensor, b: torch.Tensor) -> float:
    """Ratio of times, the median of rounds in turn; one of each first."""
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
    """What the outcome depends on."""
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
    key = json.dumps(_machine()).encode()
    return cache_folder() / f"products-{hashlib.blake2b(key, digest_size=8).hexdigest()}.json"
