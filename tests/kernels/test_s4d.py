"""The chunked S4D scan against the token recurrence, and against a convolution by FFT."""

from itertools import pairwise

import pytest
import torch
from equal import assert_equal
from scans import packed, results
from shown import Row
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from colonnade.kernels import s4d as module
from colonnade.kernels.s4d import s4d, s4d_recurrence

TABLE = [
    Row("S", "chunks; packed documents; states in and out", "token recurrence"),
    Row("S", "whole rows", "torch.fft with the paper's kernel"),
]

NAMES = ("x", "dt", "A_real", "A_imag", "C_real", "C_imag", "D", "initial_state")


def inputs(S: int, B: int = 2, C: int = 6, N: int = 5) -> dict[str, Tensor]:
    """Random fp64 arguments of s4d."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return {
        "x": normal(S, B, C),
        "dt": (normal(C) - 2).exp(),
        "A_real": -normal(C, N).exp(),
        "A_imag": 3 * normal(C, N),
        "C_real": normal(C, N),
        "C_imag": normal(C, N),
        "D": normal(C),
        "initial_state": normal(B, C, N, 2),
    }


@pytest.mark.parametrize("documents", [0, 4])
@pytest.mark.parametrize(("S", "chunk"), [(64, 16), (37, 8), (5, 64), (1, 4), (23, 1)])
def test_equals_recurrence(S: int, chunk: int, documents: int) -> None:
    t, ids = inputs(S), packed(S, 2, documents) if documents else None
    expected = results(s4d_recurrence, t, documents=ids)
    assert_equal(results(s4d, t, chunk=chunk, documents=ids), expected, of_all=0)


@pytest.mark.parametrize("width", [1, 4])
def test_blocks_of_channels(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six channels in blocks of one, and in blocks of four and two."""
    t = inputs(21)
    expected = results(s4d_recurrence, t)
    monkeypatch.setattr(module, "BLOCK", width * 8 * 2 * 5)
    assert_equal(results(s4d, t, chunk=8), expected, of_all=0)


def test_every_token_a_document() -> None:
    """Every chunk has as many spans as tokens; where every document is a chunk, one span."""
    t = inputs(16)
    for length in (1, 4):
        ids = (torch.arange(16) // length)[:, None].expand(16, 2)
        expected = results(s4d_recurrence, t, documents=ids)
        assert_equal(results(s4d, t, chunk=4, documents=ids), expected, of_all=0)


def test_packed_documents_equal_separate_ones() -> None:
    """A packed row equals its documents one by one, of which the first has the initial state."""
    t, bounds = inputs(40, B=1), [0, 3, 16, 17, 40]
    ids = torch.zeros(40, 1, dtype=torch.int32)
    for start in bounds[1:-1]:
        ids[start:] += 2
    y, state = s4d(**t, chunk=8, documents=ids)
    for start, stop in pairwise(bounds):
        document = t | {"x": t["x"][start:stop]}
        if start:
            del document["initial_state"]
        expected, last_state = s4d_recurrence(**document)
        assert_equal({"y": y[start:stop]}, {"y": expected}, of_all=0)
    assert_equal({"state": state}, {"state": last_state}, of_all=0)


def test_chained_halves_equal_one_call() -> None:
    t, ids = inputs(33), packed(33, 2, 3)

    def halves(x: Tensor, initial_state: Tensor, **system: Tensor) -> tuple[Tensor, Tensor]:
        first, state = s4d(
            x[:18], **system, chunk=8, documents=ids[:18], initial_state=initial_state
        )
        state = state * (ids[18] == ids[17])[:, None, None, None]
        second, state = s4d(x[18:], **system, chunk=8, documents=ids[18:], initial_state=state)
        return torch.cat([first, second]), state

    assert_equal(results(halves, t), results(s4d, t, chunk=8, documents=ids), of_all=0)


def test_equals_convolution() -> None:
    """The kernel of the paper, 2 Re(Σ_n C_n B̄_n Ā_n^l), over full rows by PyTorch's FFT."""
    S = 50
    t = inputs(S)
    del t["initial_state"]

    def convolution(
        x: Tensor, dt: Tensor, A_real: Tensor, A_imag: Tensor, C_real: Tensor, C_imag: Tensor,
        D: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        A, C = torch.complex(A_real, A_imag), torch.complex(C_real, C_imag)
        decay = (dt[:, None] * A).exp()
        powers = decay[..., None] ** torch.arange(S)
        kernel = 2 * torch.einsum("cn,cn,cnl->lc", C, (decay - 1) / A, powers).real
        spectrum = torch.fft.rfft(x, 2 * S, dim=0) * torch.fft.rfft(kernel, 2 * S, dim=0)[:, None]
        return torch.fft.irfft(spectrum, 2 * S, dim=0)[:S] + D * x, x.sum()

    def chunked(**named: Tensor) -> tuple[Tensor, Tensor]:
        return s4d(**named, chunk=8)[0], named["x"].sum()

    assert_equal(results(chunked, t), results(convolution, t), of_all=0)


def test_gradcheck() -> None:
    t = {k: v.requires_grad_() for k, v in inputs(5, B=1, C=2, N=2).items()}
    ids = torch.tensor([0, 0, 0, 7, 7], dtype=torch.int32)[:, None]

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return s4d(**dict(zip(NAMES, values, strict=True)), chunk=2, documents=ids)

    assert torch.autograd.gradcheck(function, tuple(t[name] for name in NAMES))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_dtypes(dtype: torch.dtype, bound: float) -> None:
    """The fp64 reference gets the rounded inputs, so the bound is that of the kernel's rounding."""
    t, ids = inputs(100, C=16, N=16), packed(100, 2, 3)
    narrow = {k: v.to(dtype if k == "x" else torch.float32) for k, v in t.items()}
    actual = results(s4d, narrow, chunk=16, documents=ids)
    assert actual["y"].dtype == dtype
    assert actual["state"].dtype == torch.float32
    assert all(actual[f"d{k}"].dtype == v.dtype for k, v in narrow.items())
    exact = {k: v.double() for k, v in narrow.items()}
    expected = results(s4d_recurrence, exact, documents=ids)
    assert_equal(actual, expected, relative=bound, of_all=0)


@pytest.mark.parametrize("dt", [0.0, 1e-30, 100.0, 1e10])
def test_extreme_steps_are_finite_and_right(dt: float) -> None:
    t = inputs(20)
    t["dt"][::3] = dt
    assert_equal(results(s4d, t, chunk=8), results(s4d_recurrence, t), of_all=0)


def test_small_steps_keep_precision() -> None:
    """B̄ = (exp(dt A) − 1) / A avoids the difference of numbers near 1, inexact in fp32."""
    t = inputs(20)
    t["dt"] *= 1e-5
    actual = results(s4d, {k: v.float() for k, v in t.items()}, chunk=8)
    assert_equal(actual, results(s4d, t, chunk=8), relative=1e-5, of_all=0)


def test_memory() -> None:
    """The inputs and one state per chunk are saved for backward."""
    chunk, B, C, N = 16, 2, 32, 8
    for S in (256, 512):
        t = {k: v.requires_grad_() for k, v in inputs(S, B=B, C=C, N=N).items()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            s4d(**t, chunk=chunk)
        system = sum(v.numel() for k, v in t.items() if k not in ("x", "initial_state"))
        assert sum(saved.values()) <= t["x"].numel() + (S // chunk) * B * C * N * 2 + system


def test_bad_chunk() -> None:
    with pytest.raises(ValueError, match="chunks of 0 tokens"):
        s4d(**inputs(4), chunk=0)
