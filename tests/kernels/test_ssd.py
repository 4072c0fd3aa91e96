"""The chunked Mamba-2 scan against the token-by-token recurrence."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from scans import call, packed, results
from shown import Row
from torch import Tensor

from colonnade.kernels.ssd import ssd, ssd_recurrence

TABLE = [Row("M", "chunks; packed documents; states in and out", "token recurrence")]

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def inputs(
    S: int, B: int = 2, H: int = 4, P: int = 3, G: int = 2, N: int = 5, seed: int = 0
) -> dict[str, Tensor]:
    """Random fp64 arguments of ssd."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return {
        "x": normal(S, B, H, P),
        "dt": F.softplus(normal(S, B, H) - 2),
        "A": -normal(H).exp(),
        "B": normal(S, B, G, N),
        "C": normal(S, B, G, N),
        "D": normal(H),
        "initial_state": normal(B, H, P, N),
    }


@pytest.mark.parametrize("documents", [0, 4])
@pytest.mark.parametrize(("S", "chunk"), [(64, 16), (37, 8), (5, 64), (1, 4), (23, 1)])
def test_equals_recurrence(S: int, chunk: int, documents: int) -> None:
    t, ids = inputs(S), packed(S, 2, documents) if documents else None
    expected = results(ssd_recurrence, t, documents=ids)
    assert_equal(results(ssd, t, chunk=chunk, documents=ids), expected, of_all=0)


@pytest.mark.parametrize("G", [1, 4])
def test_groups_and_optional_arguments(G: int) -> None:
    t = inputs(21, G=G)
    del t["D"], t["initial_state"]
    assert_equal(results(ssd, t, chunk=8), results(ssd_recurrence, t), of_all=0)


def test_packed_documents_equal_separate_ones() -> None:
    """Outputs are those of each document by itself, the first with the initial state."""
    t, bounds = inputs(40, B=1), [0, 3, 16, 17, 40]
    ids = torch.zeros(40, 1, dtype=torch.int32)
    for start in bounds[1:-1]:
        ids[start:] += 2
    y, state = call(ssd, t, chunk=8, documents=ids)
    for start, stop in pairwise(bounds):
        separate = {k: v[start:stop] if k in ("x", "dt", "B", "C") else v for k, v in t.items()}
        if start:
            del separate["initial_state"]
        expected_y, expected_state = call(ssd_recurrence, separate)
        assert_equal({"y": y[start:stop]}, {"y": expected_y}, of_all=0)
    assert_equal({"state": state}, {"state": expected_state}, of_all=0)


def test_chained_halves_equal_one_call() -> None:
    t, ids = inputs(33), packed(33, 2, 3)

    def halves(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        middle, outputs, state = 18, [], initial_state
        for tokens in (slice(None, middle), slice(middle, None)):
            # The second half's initial state belongs to its first token's document: pass it only
            # where the first half's last token is of that document.
            if tokens.start:
                state = state * (ids[middle] == ids[middle - 1])[:, None, None, None]
            y, state = ssd(
                x[tokens],
                dt[tokens],
                A,
                B[tokens],
                C[tokens],
                D,
                chunk=8,
                documents=ids[tokens],
                initial_state=state,
            )
            outputs.append(y)
        return torch.cat(outputs), state

    assert_equal(results(halves, t), results(ssd, t, chunk=8, documents=ids), of_all=0)


def test_gradcheck() -> None:
    t = {k: v.requires_grad_() for k, v in inputs(5, B=1, H=2, P=2, G=1, N=2).items()}
    ids = torch.tensor([0, 0, 0, 7, 7], dtype=torch.int32)[:, None]

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return call(ssd, dict(zip(NAMES, values, strict=True)), chunk=2, documents=ids)

    assert torch.autograd.gradcheck(function, tuple(t[name] for name in NAMES))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_dtypes(dtype: torch.dtype, bound: float) -> None:
    """Against fp64 of the same rounded inputs: the errors are those of the kernel only."""
    t, ids = inputs(100, P=16, N=16), packed(100, 2, 3)
    narrow = {k: v.to(dtype if k in ("x", "B", "C") else torch.float32) for k, v in t.items()}
    got = results(ssd, narrow, chunk=16, documents=ids)
    assert got["y"].dtype == dtype
    assert got["state"].dtype == torch.float32
    assert all(got[f"d{k}"].dtype == v.dtype for k, v in narrow.items())
    exact = {k: v.double() for k, v in narrow.items()}
    expected = results(ssd_recurrence, exact, documents=ids)
    assert_equal(got, expected, relative=bound, of_all=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_over_10000_tokens(dtype: torch.dtype) -> None:
    """Against fp64 of the same rounded inputs: the errors are those of the kernel only.

    No step expands the state, so that S tokens' roundings in fp32 lose at most S · 2⁻²⁴ of the
    largest value; gradients go through two such chains. Every result is rounded to its dtype once.
    """
    S = 10_000
    t, ids = inputs(S, B=1, H=2, G=1, P=3, N=4), packed(S, 1, 2)
    narrow = {k: v.to(dtype if k in "xBC" else torch.float32) for k, v in t.items()}
    got = results(ssd, narrow, chunk=64, documents=ids)
    assert got["y"].dtype == dtype
    exact = {k: v.double() for k, v in narrow.items()}
    expected = results(ssd, exact, chunk=16, documents=ids)
    with torch.no_grad():
        y, state = call(ssd_recurrence, exact, documents=ids)
    for name, truth in {**expected, "y": y, "state": state}.items():
        unit = torch.finfo(got[name].dtype).eps / 2
        chains = 2 if name.startswith("d") else 1
        bound = unit * truth.abs() + chains * S * 2**-24 * truth.abs().max()
        assert got[name].isfinite().all()
        assert ((got[name] - truth).abs() <= bound).all(), name


def test_fp32_decays_late_in_a_chunk() -> None:
    """Between adjacent tokens late in a chunk, decays are small differences of large sums."""
    t = {k: v.float() for k, v in inputs(256, H=2, G=1).items()}
    t["dt"] = torch.full_like(t["dt"], 0.3)
    t["dt"][5] = 1e6  # and one that decays the state to zero
    t["A"] = torch.tensor([-2.0, -16.0])
    expected = call(ssd_recurrence, {k: v.double() for k, v in t.items()})[0][6:]
    y = call(ssd, t, chunk=256)[0][6:]
    assert_equal({"y": y}, {"y": expected}, relative=1e-6, of_all=0)


def test_fp64_decays_behind_a_strong_one() -> None:
    """They are not differences of sums that include the strong one: as precise as the recurrence.

    It compares the gradients that no strong step multiplies.
    """
    t = inputs(64)
    t["dt"] = t["dt"] * 0.1
    t["dt"][::7] = 500 / t["A"].abs().max()
    del t["initial_state"]
    got, expected = results(ssd, t, chunk=64), results(ssd_recurrence, t)
    for name in ("y", "dx", "dB", "dC"):
        assert_equal({name: got[name]}, {name: expected[name]}, relative=2e-14, of_all=0)


def test_fp32_gradient_of_strong_decays() -> None:
    """It is tiny against the terms of a token with itself, which cancel, so must not be summed."""
    t = {k: v.float() for k, v in inputs(32).items()}
    t["dt"], t["A"] = torch.ones_like(t["dt"]), torch.full_like(t["A"], -20.0)
    expected = results(ssd_recurrence, {k: v.double() for k, v in t.items()})
    got = results(ssd, t, chunk=8)
    assert_equal({"dA": got["dA"]}, {"dA": expected["dA"]}, relative=1e-5, of_all=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dt", [0.0, 1e-30, 1e4, 1e10])
def test_extreme_steps_are_finite_and_right(dt: float, dtype: torch.dtype) -> None:
    t = inputs(20)
    t["dt"][::3] = dt
    t = {k: v.to(dtype) for k, v in t.items()}
    got, expected = results(ssd, t, chunk=8), results(ssd_recurrence, t)
    relative = 1e-9 if dtype == torch.float64 else 1e-4
    assert_equal(got, expected, relative=relative, of_all=0)


def test_extreme_values_are_finite() -> None:
    zeros = {k: torch.zeros_like(v) for k, v in inputs(9).items()}
    assert_equal(results(ssd, zeros, chunk=4), results(ssd_recurrence, zeros), of_all=0)
    t = inputs(9)
    t["x"][4, 0, 1, 2] = 1e30
    assert_equal(results(ssd, t, chunk=4), results(ssd_recurrence, t), of_all=0)


def test_any_strides() -> None:
    """Batch-first memory, as a transposed view."""
    t = inputs(19)
    views = {
        k: v.transpose(0, 1).contiguous().transpose(0, 1) if v.dim() > 2 else v
        for k, v in t.items()
    }
    assert_equal(results(ssd, views, chunk=8), results(ssd, t, chunk=8), relative=1e-13, of_all=0)


def test_bad_shapes() -> None:
    t = inputs(4, H=4, G=3)
    with pytest.raises(ValueError, match="4 heads in 3 groups"):
        call(ssd, t, chunk=2)
