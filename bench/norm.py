"""`bench norm`: RMSNorm beside PyTorch's own and its formula, forward and backward."""

import statistics
from typing import Any

import torch
import torch.nn.functional as F

from colonnade.bench.timing import alternate, median_ratio
from colonnade.kernels.norm import rms_norm, rms_norm_reference

S, B, D, EPS = 512, 4, 512, 1e-5


def run(rounds: int = 31) -> dict[str, Any]:
    """Milliseconds of each for `[S, B, D]` in fp32, and ours as a speedup over the others."""
    x, weight = torch.randn(S, B, D, requires_grad=True), torch.ones(D, requires_grad=True)
    grad = torch.randn(S, B, D)
    seconds = alternate(
        {
            "ours": lambda: rms_norm(x, weight, EPS).backward(grad),
            "torch": lambda: F.rms_norm(x, (D,), weight, EPS).backward(grad),
            "formula": lambda: rms_norm_reference(x, weight, EPS).backward(grad),
        },
        rounds,
        warmup=3,
    )
    return {
        "shape": f"S={S} B={B} D={D}, fp32",
        "threads": torch.get_num_threads(),
        **{f"{name} ms": 1e3 * statistics.median(times) for name, times in seconds.items()},
        "speed, ours / torch": median_ratio(seconds["torch"], seconds["ours"]),
        "speed, ours / formula": median_ratio(seconds["formula"], seconds["ours"]),
    }
