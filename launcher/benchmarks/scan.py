"""`bench scan`: chunked Mamba-2 beside the step-by-step recurrence, forward and backward."""

import statistics
from typing import Any

import torch
from torch import Tensor

from colonnade.kernels.ssd import ssd, ssd_recurrence
from colonnade.launcher.benchmarks.timing import alternate, median_ratio

B, H, P, G, N, CHUNK = 1, 8, 64, 1, 128, 64


def run(S: int = 2048, rounds: int = 5) -> dict[str, Any]:
    """Seconds of each at S tokens, their ratio, and the floor of the chunked one's products."""
    torch.manual_seed(0)
    shapes = {"x": (S, B, H, P), "B": (S, B, G, N), "C": (S, B, G, N)}
    inputs = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    dt = torch.rand(S, B, H).mul_(0.1).requires_grad_()
    A = (-torch.rand(H) * 15 - 1).requires_grad_()
    D = torch.ones(H, requires_grad=True)
    x, Bs, C = inputs.values()
    leaves = [x, dt, A, Bs, C, D]

    def both(y: Tensor) -> None:
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    seconds = alternate(
        {
            "chunked": lambda: both(ssd(x, dt, A, Bs, C, D, chunk=CHUNK)[0]),
            "recurrence": lambda: both(ssd_recurrence(x, dt, A, Bs, C, D)[0]),
        },
        rounds=rounds,
    )
    per_token = 2 * (CHUNK * (G * N + H * P) + 2 * H * P * N)
    flops = 3 * S * B * per_token
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    product = statistics.median(alternate({"mm": lambda: a @ b}, rounds=9)["mm"])
    return {
        "shape": f"S={S} B={B} H={H} P={P} G={G} N={N} chunk={CHUNK}, fp32",
        "threads": torch.get_num_threads(),
        "chunked ms": 1e3 * statistics.median(seconds["chunked"]),
        "recurrence ms": 1e3 * statistics.median(seconds["recurrence"]),
        "speed, chunked / recurrence": median_ratio(seconds["recurrence"], seconds["chunked"]),
        "floor ms (its products at the speed of a 1024³ one)": 1e3
        * flops
        / (2 * 1024**3 / product),
    }
