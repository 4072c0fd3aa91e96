"""`bench mixers`: chunked sequence mixers beside their token recurrences and transformers' code.

Forward and backward, all on the same tensors, in alternation. transformers' functions run in plain
PyTorch, its path for CPUs, in the memory layout that its mixers pass them. Memory is PyTorch's: the
bytes that autograd saves for backward, and the peak of allocated bytes, both without the inputs.
"""

import contextlib
import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from colonnade.bench import require_packages
from colonnade.bench.timing import alternate, median_ratio
from colonnade.kernels.delta import delta_rule, delta_rule_recurrence
from colonnade.kernels.s4d import s4d, s4d_recurrence
from colonnade.kernels.selective_scan import selective_scan, selective_scan_recurrence
from colonnade.kernels.ssd import ssd, ssd_recurrence

# Heads H of width P (keys and values alike), state width N; Mamba-1: CHANNELS with STATE each.
H, P, N, CHANNELS, STATE = 8, 64, 128, 512, 16
PAIRS = 32  # complex states of an S4D channel
CHUNK = {"ssd": 64, "s4d": 64, "selective_scan": 64, "delta_rule": 64, "delta_rule gated": 64}

Kernel = Callable[..., Tensor]  # from the inputs to outputs `[S, B, ...]`


@dataclass(frozen=True)
class Case:
    """One chunked kernel, and the functions that compute the same from the same tensors.

    Attributes:
        shape: the sizes, for the report.
        inputs: of `chunked` and `recurrence`; they require gradients.
        chunked: the kernel.
        recurrence: the token recurrence.
        floor: measures a lower bound of the kernel's seconds.
        peer: transformers' function; None: it has none.
        peer_inputs: the same tensors in the layout of `peer`.
    """

    shape: str
    inputs: list[Tensor]
    chunked: Kernel
    recurrence: Kernel
    floor: Callable[[], float]
    peer: Kernel | None = None
    peer_inputs: Sequence[Tensor] = ()


def grad_copies(*tensors: Tensor) -> list[Tensor]:
    """Contiguous copies that require gradients."""
    contiguous = torch.contiguous_format
    return [t.detach().clone(memory_format=contiguous).requires_grad_() for t in tensors]


def batch_first(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies `[S, B, ...]` to contiguous `[B, S, ...]`, and vectors as they are."""
    return grad_copies(*(t.transpose(0, 1) if t.dim() > 1 else t for t in tensors))


def ssd_case(S: int) -> Case:
    """Mamba-2; transformers takes `[B, S, ...]`."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    chunk = CHUNK["ssd"]
    inputs = grad_copies(
        torch.randn(S, 1, H, P), torch.rand(S, 1, H) * 0.1, -1 - 15 * torch.rand(H),
        torch.randn(S, 1, 1, N), torch.randn(S, 1, 1, N), torch.ones(H),
    )  # fmt: skip

    def transformers_scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> Tensor:
        return mamba2_chunk_scan(x, dt, A, B, C, chunk_size=chunk, D=D).transpose(0, 1)

    return Case(
        f"S={S} B=1 H={H} P={P} G=1 N={N} chunk={chunk}",
        inputs,
        lambda *t: ssd(*t, chunk=chunk)[0],
        lambda *t: ssd_recurrence(*t)[0],
        lambda: product_seconds(S * (chunk * (N + H * P) + 2 * H * P * N)),
        transformers_scan,
        batch_first(inputs),
    )


def selective_scan_case(S: int) -> Case:
    """Mamba-1; transformers takes `[B, C, S]`."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    C = CHANNELS
    inputs = grad_copies(
        torch.randn(S, 1, C), torch.rand(S, 1, C) * 0.1, -1 - 15 * torch.rand(C, STATE),
        torch.randn(S, 1, STATE), torch.randn(S, 1, STATE), torch.ones(C),
    )  # fmt: skip
    # Forward reads x and dt and writes y; backward reads x, dt and y's gradient and writes those of
    # x and dt: 8 C numbers a token. B and C are read twice, their gradients written: 6 STATE.
    moved = 4 * S * (8 * C + 6 * STATE)
    return Case(
        f"S={S} B=1 C={C} N={STATE} chunk={CHUNK['selective_scan']}",
        inputs,
        lambda *t: selective_scan(*t, chunk=CHUNK["selective_scan"])[0],
        lambda *t: selective_scan_recurrence(*t)[0],
        lambda: moved / bandwidth(),
        lambda *t: mamba_selective_scan(*t).movedim(2, 0),
        grad_copies(*(t.movedim(0, 2) if t.dim() == 3 else t for t in inputs)),
    )


def s4d_case(S: int) -> Case:
    """S4D; transformers does not have it."""
    C, chunk = CHANNELS, CHUNK["s4d"]
    inputs = grad_copies(
        torch.randn(S, 1, C), torch.rand(C) * 0.1, torch.full((C, PAIRS), -0.5),
        math.pi * torch.arange(float(PAIRS)).expand(C, PAIRS), torch.randn(C, PAIRS),
        torch.randn(C, PAIRS), torch.ones(C),
    )  # fmt: skip
    return Case(
        f"S={S} B=1 C={C} N={PAIRS} complex chunk={chunk}",
        inputs,
        lambda *t: s4d(*t, chunk=chunk)[0],
        lambda *t: s4d_recurrence(*t)[0],
        lambda: product_seconds(S * C * (chunk + 4 * PAIRS)),
    )


def delta_case(S: int, gated: bool) -> Case:
    """DeltaNet, or gated DeltaNet with two value heads per key head as in Qwen3-Next.

    transformers takes `[B, S, ...]`, and has the gated rule only.
    """
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    chunk, K = CHUNK["delta_rule"], H // 2 if gated else H
    inputs = grad_copies(
        torch.randn(S, 1, K, P), F.normalize(torch.randn(S, 1, K, P), dim=-1),
        torch.randn(S, 1, H, P), torch.rand(S, 1, H), -0.1 * torch.rand(S, 1, H),
    )[: 5 if gated else 4]  # fmt: skip

    def chunked(q: Tensor, *rest: Tensor) -> Tensor:
        return delta_rule(q * P**-0.5, *rest, chunk=chunk)[0]

    def recurrence(q: Tensor, *rest: Tensor) -> Tensor:
        return delta_rule_recurrence(q * P**-0.5, *rest)[0]

    def transformers_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
        y, _ = torch_chunk_gated_delta_rule(q, k, v, decay, beta, chunk_size=chunk)
        return y.transpose(0, 1)

    multiply_adds = S * (2 * K * chunk * P + 3 * H * chunk * P + 3 * H * P * P)
    return Case(
        f"S={S} B=1 K={K} H={H} P=V={P} chunk={chunk}",
        inputs,
        chunked,
        recurrence,
        lambda: product_seconds(multiply_adds),
        transformers_rule if gated else None,
        batch_first(inputs),
    )


CASES: dict[str, Callable[[int], Case]] = {
    "ssd": ssd_case,
    "selective_scan": selective_scan_case,
    "s4d": s4d_case,
    "delta_rule": lambda S: delta_case(S, gated=False),
    "delta_rule gated": lambda S: delta_case(S, gated=True),
}


def product_seconds(multiply_adds: float) -> float:
    """Seconds of forward, and of backward with twice as many multiply-adds.

    They run at the measured speed of a product of 1024 x 1024 matrices.
    """
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    (seconds,) = alternate({"product": lambda: a @ b}, rounds=9).values()
    return 3 * multiply_adds / 1024**3 * statistics.median(seconds)


def bandwidth() -> float:
    """Memory bandwidth in bytes/s: what a copy reads and writes."""
    source = torch.ones(2**25)
    target = torch.empty_like(source)
    (seconds,) = alternate({"copy": lambda: target.copy_(source)}, rounds=5).values()
    return 2 * source.nbytes / statistics.median(seconds)


def forward_backward(kernel: Kernel, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """An action that runs a kernel forward and backward."""

    def action() -> object:
        y = kernel(*inputs)
        return torch.autograd.grad(y, inputs, torch.ones_like(y))

    return action


def saved_bytes(kernel: Kernel, inputs: Sequence[Tensor]) -> int:
    """Bytes that autograd saves for backward besides the inputs; each storage counts once."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = kernel(*inputs)  # kept alive, so that no storage's address is reused
    input_addresses = {t.untyped_storage().data_ptr() for t in inputs}
    del y
    return sum(size for address, size in storages.items() if address not in input_addresses)


def peak_bytes(action: Callable[[], object]) -> int:
    """The peak of the bytes that the action allocates through PyTorch, beyond those before it."""
    activities = [ProfilerActivity.CPU]
    with _stderr_discarded(), profile(activities=activities, profile_memory=True) as profiler:
        action()
    allocated = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


@contextlib.contextmanager
def _stderr_discarded() -> Iterator[None]:
    """Discards standard error, to which the profiler prints a notice."""
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def speed(name: str, S: int, peer_tokens: int, rounds: int) -> dict[str, Any]:
    """One kernel's times and ratios: beside its recurrence, and beside transformers if it has one.

    Args:
        name: of a case in `CASES`.
        S: tokens beside the recurrence.
        peer_tokens: tokens beside transformers.
        rounds: of either alternation.
    """
    case = CASES[name](S)
    kernels = {"chunked": case.chunked, "recurrence": case.recurrence}
    seconds = alternate(
        {n: forward_backward(kernel, case.inputs) for n, kernel in kernels.items()}, rounds
    )
    floor = case.floor()
    report: dict[str, Any] = {
        f"{name}: shape": case.shape,
        **{f"{name}: {n} ms": 1e3 * statistics.median(s) for n, s in seconds.items()},
        f"{name}: speed, chunked / recurrence": median_ratio(
            seconds["recurrence"], seconds["chunked"]
        ),
        f"{name}: floor ms": 1e3 * floor,
        f"{name}: largest difference from recurrence": difference(
            case.chunked(*case.inputs), case.recurrence(*case.inputs)
        ),
    }
    if case.peer is None:
        return report
    case = CASES[name](peer_tokens)
    assert case.peer is not None
    seconds = alternate(
        {
            "chunked": forward_backward(case.chunked, case.inputs),
            "transformers": forward_backward(case.peer, case.peer_inputs),
        },
        rounds,
    )
    return report | {
        f"{name}: transformers at S": peer_tokens,
        f"{name}: transformers ms": 1e3 * statistics.median(seconds["transformers"]),
        f"{name}: speed, chunked / transformers": median_ratio(
            seconds["transformers"], seconds["chunked"]
        ),
        f"{name}: largest difference from transformers": difference(
            case.chunked(*case.inputs), case.peer(*case.peer_inputs)
        ),
    }


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of an element, relative to the largest element of b."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def memory(name: str, lengths: Sequence[int]) -> dict[str, Any]:
    """MiB saved for backward and at the peak by length, and the largest growth between lengths."""
    report: dict[str, Any] = {}
    saved, peak = [], []
    for S in lengths:
        case = CASES[name](S)
        saved.append(saved_bytes(case.chunked, case.inputs) / 2**20)
        peak.append(peak_bytes(forward_backward(case.chunked, case.inputs)) / 2**20)
    for quantity, sizes in (("kept beside the inputs", saved), ("at the peak", peak)):
        report[f"{name}: MiB {quantity}"] = ", ".join(
            f"{size:.1f} at {S}" for S, size in zip(lengths, sizes, strict=True)
        )
        growth = [b / a for a, b in itertools.pairwise(sizes)]
        report[f"{name}: growth of MiB {quantity} on doubling S"] = max(growth)
    return report


def run(
    S: int = 2048,
    rounds: int = 5,
    lengths: Sequence[int] = (2048, 4096, 8192),
    selective_scan_peer_tokens: int = 512,
) -> dict[str, Any]:
    """Times, ratios, floors and memory of every chunked kernel.

    Args:
        S: tokens.
        rounds: of every alternation.
        lengths: tokens at which memory is measured, each twice the one before.
        selective_scan_peer_tokens: tokens beside transformers' selective scan, whose backward is
            quadratic in them.

    Raises:
        UserError: transformers is not installed.
    """
    require_packages("mixers", "transformers")
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "measured": "fp32, forward and backward",
        "floor": "products at the speed of a 1024³ one; selective_scan: bytes moved once",
    }
    for name in CASES:
        peer_tokens = min(S, selective_scan_peer_tokens) if name == "selective_scan" else S
        report |= speed(name, S, peer_tokens, rounds)
        report |= memory(name, lengths)
    return report
