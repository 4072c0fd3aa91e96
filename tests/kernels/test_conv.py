"""The causal depthwise convolution against its formula and PyTorch's."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from torch import Tensor

from colonnade.kernels import conv
from colonnade.kernels.conv import causal_conv, causal_conv_reference


def inputs(S: int, B: int = 2, C: int = 5, K: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Random fp64 arguments of causal_conv."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (S, B, C), "weight": (C, K), "bias": (C,), "before": (K - 1, B, C)}
    return {k: torch.randn(v, generator=g, dtype=torch.float64) for k, v in shapes.items()}


def packed(S: int, B: int, documents: int, seed: int = 0) -> Tensor:
    """Rows of documents with random bounds."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, documents, (S, B), generator=g, dtype=torch.int32).sort(0).values


def results(
    function: Callable[..., Tensor], t: dict[str, Tensor], **options: object
) -> dict[str, Tensor]:
    """The output, and gradients of a random function of it."""
    t = {name: v.detach().requires_grad_() for name, v in t.items()}
    y = function(**{"bias": None, **t}, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(y, list(t.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{k}": v for k, v in zip(t, gradients, strict=True)}}


@pytest.fixture(params=[2**17, 30])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows in one block, and three rows a block."""
    monkeypatch.setattr(conv, "BLOCK", request.param)


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("documents", [0, 5])
@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize(("S", "K"), [(17, 4), (2, 4), (1, 3), (9, 1)])
def test_equals_reference(S: int, K: int, activation: bool, documents: int) -> None:
    t, ids = inputs(S, K=K), packed(S, 2, documents) if documents else None
    if K == 1:
        del t["before"]  # no rows
    expected = results(causal_conv_reference, t, activation=activation, documents=ids)
    assert_equal(results(causal_conv, t, activation=activation, documents=ids), expected, of_all=0)


def test_optional_arguments() -> None:
    t = inputs(11)
    del t["bias"], t["before"]
    for ids in (None, packed(11, 2, 4)):
        expected = results(causal_conv_reference, t, activation=True, documents=ids)
        assert_equal(results(causal_conv, t, activation=True, documents=ids), expected, of_all=0)


def test_documents_equal_separate_conv1d() -> None:
    t, bounds = inputs(30, B=1), [0, 1, 3, 14, 30]
    ids = torch.zeros(30, 1, dtype=torch.int32)
    for start in bounds[1:-1]:
        ids[start:] += 1
    y = causal_conv(**t, activation=True, documents=ids)
    for start, stop in pairwise(bounds):
        head = torch.zeros_like(t["before"]) if start else t["before"]
        rows = torch.cat([head, t["x"][start:stop]]).permute(1, 2, 0)
        separate = F.silu(F.conv1d(rows, t["weight"][:, None], t["bias"], groups=5)).permute(
            2, 0, 1
        )
        assert_equal({"y": y[start:stop]}, {"y": separate}, of_all=0)


def test_chained_halves_equal_one_call() -> None:
    t = inputs(20)

    def halves(x: Tensor, before: Tensor, **others: Tensor) -> Tensor:
        first = causal_conv(x[:8], before=before, **others)
        return torch.cat([first, causal_conv(x[8:], before=x[5:8], **others)])

    expected = results(causal_conv, t, activation=True)
    assert_equal(results(halves, t, activation=True), expected, of_all=0)


def test_gradcheck() -> None:
    t = {k: v.requires_grad_() for k, v in inputs(5, C=2, K=3).items()}
    ids = packed(5, 2, 2)

    def function(*values: Tensor) -> Tensor:
        return causal_conv(**dict(zip(t, values, strict=True)), activation=True, documents=ids)

    assert torch.autograd.gradcheck(function, tuple(t.values()))


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_narrow_dtypes(dtype: torch.dtype, bound: float) -> None:
    """Against fp64 of the same rounded inputs: the errors are those of the kernel only."""
    ids = packed(40, 2, 3)
    t = {k: v.to(dtype) for k, v in inputs(40).items()}
    got = results(causal_conv, t, activation=True, documents=ids)
    assert all(v.dtype == dtype for v in got.values())
    exact = {k: v.double() for k, v in t.items()}
    expected = results(causal_conv_reference, exact, activation=True, documents=ids)
    assert_equal(got, expected, relative=bound, of_all=0)


def test_extreme_values_are_finite() -> None:
    for value in (0.0, 1e30, -1e30):
        t = inputs(6)
        t["x"][3, 0, 1] = value
        if not value:
            t = {k: torch.zeros_like(v) for k, v in t.items()}
        expected = results(causal_conv_reference, t, activation=True)
        assert_equal(results(causal_conv, t, activation=True), expected, of_all=0)
