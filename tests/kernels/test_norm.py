"""Norms against PyTorch's, their formulas, and each other."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from shown import Row
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from colonnade.kernels.norm import (
    crms_norm,
    crms_norm_reference,
    l2_norm,
    l2_norm_reference,
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
)

TABLE = [
    Row("any row", "RMSNorm; LayerNorm; CRMSNorm", "torch's own"),
]

BF16 = 2.0**-8  # twice the rounding error of a bf16 number: one rounding, and room for the input's
EPS = 0.03
SHAPES = [(7,), (1, 2), (5, 3, 13), (4, 2, 3, 5)]

# name: our operator, its reference; both take x, weight and bias, and ignore those they do not use.
NORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "rms": (
        lambda x, weight, **_: rms_norm(x, weight, EPS),
        lambda x, weight, **_: rms_norm_reference(x, weight, EPS),
    ),
    "rms, bias": (
        lambda x, weight, bias: rms_norm(x, weight, EPS, bias),
        lambda x, weight, bias: rms_norm_reference(x, weight, EPS, bias),
    ),
    "rms, offset": (
        lambda x, weight, bias: rms_norm(x, weight, EPS, bias, offset=1),
        lambda x, weight, bias: rms_norm_reference(x, weight, EPS, bias, offset=1),
    ),
    "layer": (
        lambda x, weight, bias: layer_norm(x, weight, bias, EPS),
        lambda x, weight, bias: layer_norm_reference(x, weight, bias, EPS),
    ),
    "layer, no bias": (
        lambda x, weight, **_: layer_norm(x, weight, None, EPS),
        lambda x, weight, **_: layer_norm_reference(x, weight, None, EPS),
    ),
    "layer, plain": (
        lambda x, **_: layer_norm(x, None, None, EPS),
        lambda x, **_: layer_norm_reference(x, x.new_ones(x.shape[-1]), None, EPS),
    ),
    "rms, plain": (
        lambda x, **_: rms_norm(x, None, EPS),
        lambda x, **_: rms_norm_reference(x, x.new_ones(x.shape[-1]), EPS),
    ),
    "crms": (
        lambda x, weight, **_: crms_norm(x, weight, EPS),
        lambda x, weight, **_: crms_norm_reference(x, weight, EPS),
    ),
    "l2": (lambda x, **_: l2_norm(x, EPS), lambda x, **_: l2_norm_reference(x, EPS)),
}


def last_channel(x: Tensor) -> Tensor:
    """`x` with the last channel that makes its mean zero, which `crms_norm` leaves out."""
    return torch.cat([x, -x.sum(-1, keepdim=True)], -1)


OF_TORCH: dict[str, Callable[..., Tensor]] = {
    "rms": lambda x, weight, **_: F.rms_norm(x, x.shape[-1:], weight, EPS),
    "rms, bias": lambda x, weight, bias: F.rms_norm(x, x.shape[-1:], weight, EPS) + bias,
    "rms, offset": lambda x, weight, bias: F.rms_norm(x, x.shape[-1:], 1 + weight, EPS) + bias,
    "layer": lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, EPS),
    "layer, no bias": lambda x, weight, **_: F.layer_norm(x, x.shape[-1:], weight, None, EPS),
    "layer, plain": lambda x, **_: F.layer_norm(x, x.shape[-1:], None, None, EPS),
    "rms, plain": lambda x, **_: F.rms_norm(x, x.shape[-1:], None, EPS),
    "crms": lambda x, weight, **_: (
        F.rms_norm(last_channel(x), (x.shape[-1] + 1,), None, EPS)[..., :-1] * weight
    ),
    "l2": lambda x, **_: F.normalize(F.pad(x, (0, 1), value=EPS**0.5), dim=-1)[..., :-1],
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal, the same in every dtype up to rounding."""
    g = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """x in `dtype`, weight and bias in at least fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = (normal(*shape[-1:], seed=i, dtype=wide) for i in (1, 2))
    return {"x": normal(*shape, dtype=dtype), "weight": weight, "bias": bias}


def results(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of all inputs for a fixed random gradient of it."""
    leaves = {k: t.detach().clone().requires_grad_() for k, t in inputs.items()}
    y = function(**leaves)
    y.backward(normal(*y.shape, seed=9).bfloat16().to(y.dtype))
    grads = {f"d{k}": t.grad for k, t in leaves.items() if t.grad is not None}
    return {"y": y.detach(), **grads}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NORMS)
def test_norm(name: str, shape: tuple[int, ...]) -> None:
    ours, reference = (results(f, operands(shape)) for f in NORMS[name])
    assert_equal(ours, reference)
    assert_equal(ours, results(OF_TORCH[name], operands(shape)))


def test_rms_norm_in_groups() -> None:
    """A weight `[G, W]` norms each group of W by itself."""
    inputs = {"x": normal(5, 2, 3, 7), "weight": normal(3, 7, seed=1), "bias": normal(3, 7, seed=2)}
    ours = results(NORMS["rms, bias"][0], inputs)
    assert_equal(ours, results(NORMS["rms, bias"][1], inputs))
    for g in range(3):
        one_group = {k: t[..., g, :] for k, t in inputs.items()}
        assert_equal({"y": ours["y"][:, :, g]}, {"y": OF_TORCH["rms, bias"](**one_group)})


def test_crms_norm_is_layer_norm() -> None:
    """Of any vector: LayerNorm(x) is CRMSNorm of x − mean(x) without its last channel."""
    x, weight = normal(5, 3, 13), normal(12, seed=1)
    y = F.layer_norm(x, (13,), None, None, EPS)[..., :-1] * weight
    centred = x - x.mean(-1, keepdim=True)
    assert_equal({"y": crms_norm(centred[..., :-1], weight, EPS)}, {"y": y})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NORMS)
def test_norm_in_narrow_dtypes(name: str, dtype: torch.dtype) -> None:
    """Computed in at least fp32 and rounded once: 2^-8 of a bf16 tensor's largest element;
    parameters are in fp32, as are their gradients."""
    inputs = operands((37, 129), dtype)
    ours = results(NORMS[name][0], inputs)
    exact = results(NORMS[name][1], {k: t.double() for k, t in inputs.items()})
    rounded = {k: t for k, t in ours.items() if t.dtype == torch.bfloat16}
    assert rounded.keys() == ({"y", "dx"} if dtype == torch.bfloat16 else set())
    for k, t in ours.items():
        assert_equal({k: t}, {k: exact[k]}, BF16 if k in rounded else 1e-5)
    if name in ("rms", "l2", "crms") and rounded:
        assert bool(((ours["y"] - exact["y"]).abs() <= BF16 * exact["y"].abs()).all())


def test_offset_is_added_before_rounding() -> None:
    """A weight that 1 + weight in bf16 would lose has its effect."""
    x, weight = torch.ones(4, 1024), torch.full((1024,), 2.0**-10, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, 0.0, offset=1), torch.full_like(x, 1 + 2.0**-10))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NORMS)
def test_norm_of_extreme_rows(name: str, dtype: torch.dtype) -> None:
    """Zeros, huge and tiny numbers, one huge number among small ones."""
    inputs = operands((6, 129), dtype)
    x = inputs["x"]
    x[0], x[1], x[2], x[3], x[4, 5] = 0, 1e15 * x[1], 1e-15 * x[2], 1e-30 * x[3], 1e15
    ours = results(NORMS[name][0], inputs)
    exact = results(NORMS[name][1], {k: t.double() for k, t in inputs.items()})
    bound = BF16 if dtype == torch.bfloat16 else 1e-5
    for row in range(6):
        a, b = ({k: t[k][row] for k in ("y", "dx")} for t in (ours, exact))
        assert_equal(a, b, bound, of_all=1e-20)


@pytest.mark.parametrize("name", NORMS)
def test_norm_saves_inputs_and_statistics(name: str) -> None:
    """Saved are x, the parameters and at most two numbers per row; the same under a checkpoint."""
    inputs = operands((64, 2, 32), torch.bfloat16)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        plain = results(NORMS[name][0], inputs)
    rows = 64 * 2
    assert sum(saved.values()) <= rows * (32 * 2 + 2 * 4) + 2 * 32 * 4

    def recomputed(**leaves: Tensor) -> Tensor:
        return checkpoint(lambda: NORMS[name][0](**leaves), use_reentrant=False)

    assert all(torch.equal(plain[k], t) for k, t in results(recomputed, inputs).items())
