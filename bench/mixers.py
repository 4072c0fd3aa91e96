"""`bench mixers`: chunked sequence mixers beside their token recurrences and transformers' code.

Forward and backward, all from the same tensors, in alternation. transformers' functions run in the
plain PyTorch that it has for CPUs, in the layout its own mixers hand them. Memory is PyTorch's:
what autograd keeps for backward, and the most that is allocated at a time, inputs left out.
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

from colonnade.bench import need
from colonnade.bench.timing import alternate, median_ratio
from colonnade.kernels.delta import delta_rule, delta_rule_recurrence
from colonnade.kernels.s4d import s4d, s4d_recurrence
from colonnade.kernels.selective_scan import selective_scan, selective_scan_recurrence
from colonnade.kernels.ssd import ssd, ssd_recurrence

# Heads H of width P (keys and values alike), state width N; Mamba-1: CHANNELS with STATE each.
H, P, N, CHANNELS, STATE = 8, 64, 128, 512, 16
PAIRS = 32  # S4D's complex states of a channel
CHUNK = {"ssd": 64, "s4d": 64, "selective_scan": 64, "delta_rule": 64, "delta_rule gated": 64}

Run = Callable[..., Tensor]  # of the leaves, to outputs `[S, B, ...]`


@dataclass(frozen=True)
class Case:
    """One kernel, and what computes the same from the same tensors."""

    shape: str
    leaves: list[Tensor]
    chunked: Run
    recurrence: Run
    floor: Callable[[], float]  # seconds
    theirs: Run | None = None
    their_leaves: Sequence[Tensor] = ()


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Contiguous copies that want gradients."""
    kind = torch.contiguous_format
    return [t.detach().clone(memory_format=kind).requires_grad_() for t in tensors]


def batch_first(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`[S, B, ...]` to contiguous `[B, S, ...]`; vectors as they are."""
    return leaves(*(t.transpose(0, 1) if t.dim() > 1 else t for t in tensors))


def ssd_case(S: int) -> Case:
    """Mamba-2."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    chunk = CHUNK["ssd"]
    inputs = leaves(
        torch.randn(S, 1, H, P), torch.rand(S, 1, H) * 0.1, -1 - 15 * torch.rand(H),
        torch.randn(S, 1, 1, N), torch.randn(S, 1, 1, N), torch.ones(H),
    )  # fmt: skip

    def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return mamba2_chunk_scan(x, dt, A, B, C, chunk_size=chunk, D=D).transpose(0, 1)

    return Case(
        f"S={S} B=1 H={H} P={P} G=1 N={N} chunk={chunk}",
        inputs,
        lambda *t: ssd(*t, chunk=chunk)[0],
        lambda *t: ssd_recurrence(*t)[0],
        lambda: product_seconds(S * (chunk * (N + H * P) + 2 * H * P * N)),
        theirs,
        batch_first(inputs),
    )


def selective_scan_case(S: int) -> Case:
    """Mamba-1. transformers wants `[B, C, S]`."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    C = CHANNELS
    inputs = leaves(
        torch.randn(S, 1, C), torch.rand(S, 1, C) * 0.1, -1 - 15 * torch.rand(C, STATE),
        torch.randn(S, 1, STATE), torch.randn(S, 1, STATE), torch.ones(C),
    )  # fmt: skip
    # x, dt, y and their gradients once, x and dt again backward; so B and C, which give no y
    moved = 4 * S * (8 * C + 6 * STATE)
    return Case(
        f"S={S} B=1 C={C} N={STATE} chunk={CHUNK['selective_scan']}",
        inputs,
        lambda *t: selective_scan(*t, chunk=CHUNK["selective_scan"])[0],
        lambda *t: selective_scan_recurrence(*t)[0],
        lambda: moved / bandwidth(),
        lambda *t: mamba_selective_scan(*t).movedim(2, 0),
        leaves(*(t.movedim(0, 2) if t.dim() == 3 else t for t in inputs)),
    )


def s4d_case(S: int) -> Case:
    """S4D, which transformers does not have."""
    C, chunk = CHANNELS, CHUNK["s4d"]
    inputs = leaves(
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
    """DeltaNet, and gated DeltaNet with two value heads to a key head as in Qwen3-Next."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    chunk, K = CHUNK["delta_rule"], H // 2 if gated else H
    inputs = leaves(
        torch.randn(S, 1, K, P), F.normalize(torch.randn(S, 1, K, P), dim=-1),
        torch.randn(S, 1, H, P), torch.rand(S, 1, H), -0.1 * torch.rand(S, 1, H),
    )[: 5 if gated else 4]  # fmt: skip

    def ours(q: Tensor, *rest: Tensor) -> Tensor:
        return delta_rule(q * P**-0.5, *rest, chunk=chunk)[0]

    def recurrence(q: Tensor, *rest: Tensor) -> Tensor:
        return delta_rule_recurrence(q * P**-0.5, *rest)[0]

    def theirs(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
        y, _ = torch_chunk_gated_delta_rule(q, k, v, decay, beta, chunk_size=chunk)
        return y.transpose(0, 1)

    multiply_adds = S * (2 * K * chunk * P + 3 * H * chunk * P + 3 * H * P * P)
    return Case(
        f"S={S} B=1 K={K} H={H} P=V={P} chunk={chunk}",
        inputs,
        ours,
        recurrence,
        lambda: product_seconds(multiply_adds),
        theirs if gated else None,
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
    """Forward and twice that backward, at the speed of a product of 1024 x 1024 matrices."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    (seconds,) = alternate({"product": lambda: a @ b}, rounds=9).values()
    return 3 * multiply_adds / 1024**3 * statistics.median(seconds)


def bandwidth() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(2**25)
    target = torch.empty_like(source)
    (seconds,) = alternate({"copy": lambda: target.copy_(source)}, rounds=5).values()
    return 2 * source.nbytes / statistics.median(seconds)


def both(run: Run, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """Forward and backward."""

    def action() -> object:
        y = run(*inputs)
        return torch.autograd.grad(y, inputs, torch.ones_like(y))

    return action


def kept_bytes(run: Run, inputs: Sequence[Tensor]) -> int:
    """What autograd keeps for backward beside the inputs, each storage once."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(*inputs)  # alive, so that no storage's address is used again
    given = {t.untyped_storage().data_ptr() for t in inputs}
    del y
    return sum(size for address, size in storages.items() if address not in given)


def peak_bytes(action: Callable[[], object]) -> int:
    """The most that PyTorch's allocator holds at a time, beyond what it held before."""
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
    now = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without standard error, on which the profiler announces itself."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def speed(name: str, S: int, theirs_at: int, rounds: int) -> dict[str, Any]:
    """One kernel's times and ratios, at S tokens and beside transformers at `theirs_at`."""
    case = CASES[name](S)
    contestants = {"chunked": case.chunked, "recurrence": case.recurrence}
    seconds = alternate({n: both(run, case.leaves) for n, run in contestants.items()}, rounds)
    floor = case.floor()
    report: dict[str, Any] = {
        f"{name}: shape": case.shape,
        **{f"{name}: {n} ms": 1e3 * statistics.median(s) for n, s in seconds.items()},
        f"{name}: speed, chunked / recurrence": median_ratio(
            seconds["recurrence"], seconds["chunked"]
        ),
        f"{name}: floor ms": 1e3 * floor,
        f"{name}: largest difference from recurrence": difference(
            case.chunked(*case.leaves), case.recurrence(*case.leaves)
        ),
    }
    if case.theirs is None:
        return report
    case = CASES[name](theirs_at)
    assert case.theirs is not None
    seconds = alternate(
        {
            "chunked": both(case.chunked, case.leaves),
            "transformers": both(case.theirs, case.their_leaves),
        },
        rounds,
    )
    return report | {
        f"{name}: transformers at S": theirs_at,
        f"{name}: transformers ms": 1e3 * statistics.median(seconds["transformers"]),
        f"{name}: speed, chunked / transformers": median_ratio(
            seconds["transformers"], seconds["chunked"]
        ),
        f"{name}: largest difference from transformers": difference(
            case.chunked(*case.leaves), case.theirs(*case.their_leaves)
        ),
    }


def difference(a: Tensor, b: Tensor) -> float:
    """Largest, relative to the largest element of b."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def memory(name: str, lengths: Sequence[int]) -> dict[str, Any]:
    """MiB kept and at the peak, by length, and the largest growth from one to the next."""
    report: dict[str, Any] = {}
    kept, peak = [], []
    for S in lengths:
        case = CASES[name](S)
        kept.append(kept_bytes(case.chunked, case.leaves) / 2**20)
        peak.append(peak_bytes(both(case.chunked, case.leaves)) / 2**20)
    for what, sizes in (("kept beside the inputs", kept), ("at the peak", peak)):
        report[f"{name}: MiB {what}"] = ", ".join(
            f"{size:.1f} at {S}" for S, size in zip(lengths, sizes, strict=True)
        )
        growth = [b / a for a, b in itertools.pairwise(sizes)]
        report[f"{name}: growth of MiB {what} on doubling S"] = max(growth)
    return report


def run(
    S: int = 2048,
    rounds: int = 5,
    lengths: Sequence[int] = (2048, 4096, 8192),
    slow: int = 512,
) -> dict[str, Any]:
    """Times, ratios, floors and memory of every chunked kernel.

    Args:
        S: tokens.
        rounds: of every alternation.
        lengths: tokens at which memory is measured, each twice the one before.
        slow: tokens beside transformers' selective scan, whose backward is quadratic in them.

    Raises:
        UserError: transformers is not installed.
    """
    need("mixers", "transformers")
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "measured": "fp32, forward and backward",
        "floor": "products at the speed of a 1024³ one; selective_scan: bytes moved once",
    }
    for name in CASES:
        report |= speed(name, S, min(S, slow) if name == "selective_scan" else S, rounds)
        report |= memory(name, lengths)
    return report
