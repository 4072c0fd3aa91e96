"""The chunked Mamba-1 scan against the token-by-token recurrence."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from scans import call, packed, results
from shown import Row
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from colonnade.kernels import selective_scan as module
from colonnade.kernels.selective_scan import selective_scan, selective_scan_recurrence

TABLE = [Row("m", "chunks; packed documents; states in and out", "token recurrence")]

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")
SEQUENCES = ("x", "dt", "B", "C")


def inputs(S: int, B: int = 2, C: int = 6, N: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Random fp64 arguments of selective_scan."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return {
        "x": normal(S, B, C),
        "dt": F.softplus(normal(S, B, C) - 2),
        "A": -normal(C, N).exp(),
        "B": normal(S, B, N),
        "C": normal(S, B, N),
        "D": normal(C),
        "initial_state": normal(B, C, N),
    }


@pytest.mark.parametrize("documents", [0, 4])
@pytest.mark.parametrize(("S", "chunk"), [(64, 16), (37, 8), (5, 64), (1, 4), (23, 1)])
def test_equals_recurrence(S: int, chunk: int, documents: int) -> None:
    t, ids = inputs(S), packed(S, 2, documents) if documents else None
    expected = results(selective_scan_recurrence, t, documents=ids)
    assert_equal(results(selective_scan, t, chunk=chunk, documents=ids), expected, of_all=0)


@pytest.mark.parametrize("width", [1, 4])
def test_blocks_of_channels(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six channels in blocks of one, and in blocks of four and two."""
    t, ids = inputs(21), packed(21, 2, 3)
    expected = results(selective_scan_recurrence, t, documents=ids)
    monkeypatch.setattr(module, "STEP", width * 2 * 5)
    assert_equal(results(selective_scan, t, chunk=8, documents=ids), expected, of_all=0)


def test_optional_arguments() -> None:
    t = inputs(21)
    del t["D"], t["initial_state"]
    assert_equal(
        results(selective_scan, t, chunk=8), results(selective_scan_recurrence, t), of_all=0
    )


def test_packed_documents_equal_separate_ones() -> None:
    """Outputs are those of each document by itself, the first with the initial state."""
    t, bounds = inputs(40, B=1), [0, 3, 16, 17, 40]
    ids = torch.zeros(40, 1, dtype=torch.int32)
    for start in bounds[1:-1]:
        ids[start:] += 2
    y, state = call(selective_scan, t, chunk=8, documents=ids)
    for start, stop in pairwise(bounds):
        separate = {k: v[start:stop] if k in SEQUENCES else v for k, v in t.items()}
        if start:
            del separate["initial_state"]
        expected_y, expected_state = call(selective_scan_recurrence, separate)
        assert_equal({"y": y[start:stop]}, {"y": expected_y}, of_all=0)
    assert_equal({"state": state}, {"state": expected_state}, of_all=0)


def test_chained_halves_equal_one_call() -> None:
    t, ids = inputs(33), packed(33, 2, 3)

    def halves(initial_state: Tensor, **others: Tensor) -> tuple[Tensor, Tensor]:
        middle, outputs, state = 18, [], initial_state
        for tokens in (slice(None, middle), slice(middle, None)):
            # The second half's initial state belongs to its first token's document: pass it only
            # where the first half's last token is of that document.
            if tokens.start:
                state = state * (ids[middle] == ids[middle - 1])[:, None, None]
            half = {k: v[tokens] if k in SEQUENCES else v for k, v in others.items()}
            half["initial_state"] = state
            y, state = call(selective_scan, half, chunk=8, documents=ids[tokens])
            outputs.append(y)
        return torch.cat(outputs), state

    expected = results(selective_scan, t, chunk=8, documents=ids)
    assert_equal(results(halves, t), expected, of_all=0)


def test_gradcheck() -> None:
    t = {k: v.requires_grad_() for k, v in inputs(5, B=1, C=2, N=2).items()}
    ids = torch.tensor([0, 0, 0, 7, 7], dtype=torch.int32)[:, None]

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(NAMES, values, strict=True))
        return call(selective_scan, named, chunk=2, documents=ids)

    assert torch.autograd.gradcheck(function, tuple(t[name] for name in NAMES))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_dtypes(dtype: torch.dtype, bound: float) -> None:
    """Against fp64 of the same rounded inputs: the errors are those of the kernel only."""
    t, ids = inputs(100, C=16, N=16), packed(100, 2, 3)
    narrow = {k: v.to(dtype if k in SEQUENCES else torch.float32) for k, v in t.items()}
    got = results(selective_scan, narrow, chunk=16, documents=ids)
    assert got["y"].dtype == dtype
    assert got["state"].dtype == torch.float32
    assert all(got[f"d{k}"].dtype == v.dtype for k, v in narrow.items())
    exact = {k: v.double() for k, v in narrow.items()}
    expected = results(selective_scan_recurrence, exact, documents=ids)
    assert_equal(got, expected, relative=bound, of_all=0)


def test_ten_thousand_bf16_tokens() -> None:
    """Errors against the recurrence in fp64 on the same bf16 inputs are within rounding bounds.

    A term of y is a product that takes at most 6 fp32 roundings per token it is carried over (the
    log-decay's three, its exponential's, the product's and the sum's), each at most 2^-24, so its
    error is at most 6 S 2^-24 of its magnitude. Rounding the result to bf16 adds 2^-8 of it. For a
    gradient the same bound is relative to its largest element.
    """
    S = 10_000
    t = {k: v.to(torch.bfloat16) for k, v in inputs(S, B=1, C=4, N=4).items()}
    t["x"][3000:3100], t["dt"][5000:5100], t["dt"][7000] = 0, 0, 1e4
    exact = {k: v.double() for k, v in t.items()}
    got, expected = results(selective_scan, t, chunk=32), results(selective_scan_recurrence, exact)

    magnitudes = {k: v if k == "A" else v.abs() for k, v in exact.items()}
    terms, _ = call(selective_scan, magnitudes, chunk=32)
    bound = 6 * S * 2**-24
    y_bound = 2**-8 * expected["y"].abs() + bound * terms
    assert ((got["y"] - expected["y"]).abs() <= y_bound).all()
    assert_equal(got, expected, relative=2**-8 + bound, of_all=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dt", [0.0, 1e-44, 1e-30, 100.0, 1e4, 1e10])
def test_extreme_steps_are_finite_and_right(dt: float, dtype: torch.dtype) -> None:
    """1e-44 and 100 are about softplus(-100) and softplus(100)."""
    t = inputs(20)
    t["dt"][::3] = dt
    t = {k: v.to(dtype) for k, v in t.items()}
    got, expected = results(selective_scan, t, chunk=8), results(selective_scan_recurrence, t)
    relative = 1e-9 if dtype == torch.float64 else 1e-4
    assert_equal(got, expected, relative=relative, of_all=0)


def test_decays_vanish_within_a_chunk() -> None:
    """Tokens after decays whose cumulative products are 0 in fp32 are exact."""
    t = {k: v.float() for k, v in inputs(64).items()}
    t["dt"] = torch.full_like(t["dt"], 0.3)
    t["dt"][5] = 1e6  # decays the state to zero
    t["A"] = torch.full_like(t["A"], -16.0)
    expected = call(selective_scan_recurrence, {k: v.double() for k, v in t.items()})[0][6:]
    y = call(selective_scan, t, chunk=64)[0][6:]
    assert_equal({"y": y}, {"y": expected}, relative=1e-6, of_all=0)


def test_extreme_values_are_finite() -> None:
    zeros = {k: torch.zeros_like(v) for k, v in inputs(9).items()}
    expected = results(selective_scan_recurrence, zeros)
    assert_equal(results(selective_scan, zeros, chunk=4), expected, of_all=0)
    t = inputs(9)
    t["x"][4, 0, 1] = 1e30
    expected = results(selective_scan_recurrence, t)
    assert_equal(results(selective_scan, t, chunk=4), expected, of_all=0)


def test_any_strides() -> None:
    """Batch-first memory, as a transposed view."""
    t = inputs(19)
    views = {
        k: v.transpose(0, 1).contiguous().transpose(0, 1) if v.dim() > 2 else v
        for k, v in t.items()
    }
    expected = results(selective_scan, t, chunk=8)
    assert_equal(results(selective_scan, views, chunk=8), expected, relative=1e-13, of_all=0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_memory() -> None:
    """Backward saves the inputs and one state per chunk; no tensor is larger than x."""
    chunk, B, C, N = 16, 2, 32, 8
    for S in (256, 512):
        t = inputs(S, B=B, C=C, N=N)
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with Largest() as largest, saved_tensors_hooks(pack, lambda tensor: tensor):
            results(selective_scan, t, chunk=chunk)
        sequences = sum(t[k].numel() for k in SEQUENCES) + S * B  # and where documents end
        states = (S // chunk) * B * C * N
        assert sum(saved.values()) <= sequences + states + t["A"].numel() + t["D"].numel()
        assert largest.elements == S * B * C


def test_no_grad_and_recomputation() -> None:
    t, ids = inputs(21), packed(21, 2, 3)
    expected = results(selective_scan, t, chunk=8, documents=ids)
    with torch.no_grad():
        y, state = call(selective_scan, t, chunk=8, documents=ids)
    assert torch.equal(y, expected["y"])
    assert torch.equal(state, expected["state"])

    def recomputed(**args: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(
            lambda **a: selective_scan(**a, chunk=8, documents=ids), use_reentrant=False, **args
        )

    assert_equal(results(recomputed, t), expected, relative=0, of_all=0)


def test_bad_chunk() -> None:
    with pytest.raises(ValueError, match="chunks of 0 tokens"):
        call(selective_scan, inputs(4), chunk=0)
