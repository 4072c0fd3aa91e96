"""Activations, with and without the next product, against PyTorch's and their formulas."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from shown import Row
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from colonnade.kernels.activation import (
    NAMES,
    activate,
    activate_reference,
    activated_linear,
    gated,
    polynomial,
)

TABLE = [
    Row("-", "; ".join(NAMES), "torch's own, or the formula"),
]

Inputs = dict[str, Tensor]
OF_TORCH: dict[str, Callable[..., Tensor]] = {
    "swiglu": lambda up, gate: F.silu(gate) * up,
    "geglu": lambda up, gate: F.gelu(gate) * up,
    "geglu_tanh": lambda up, gate: F.gelu(gate, approximate="tanh") * up,
    "swiglu_clamped": lambda up, gate: (
        (up.clamp(-7, 7) + 1) * gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7))
    ),
    "silu": lambda up: F.silu(up),
    "gelu": lambda up: F.gelu(up),
    "gelu_tanh": lambda up: F.gelu(up, approximate="tanh"),
    "relu": lambda up: F.relu(up),
    "relu2": lambda up: F.relu(up).square(),
    "polyrelu": lambda up, poly: sum(
        (poly[i] * F.relu(up).pow(i) for i in (1, 2, 3)), start=poly[0]
    ),
    "polynorm": lambda up, poly: sum(
        (poly[i] * F.rms_norm(up**i, up.shape[-1:], None, 1e-6) for i in (1, 2, 3)), start=poly[0]
    ),
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal, the same in every dtype up to rounding."""
    g = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def operands(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """The activation's operands; coefficients in at least fp32."""
    inputs = {"up": 3 * normal(*shape, dtype=dtype)}
    if gated(name):
        inputs["gate"] = 3 * normal(*shape, seed=1, dtype=dtype)
    if polynomial(name):
        inputs["poly"] = normal(4, seed=2, dtype=torch.promote_types(dtype, torch.float32))
    return inputs


def results(function: Callable[..., Tensor], inputs: Inputs) -> Inputs:
    """The output, and the gradients of all inputs for a fixed random gradient of it."""
    leaves = {k: t.detach().clone().requires_grad_() for k, t in inputs.items()}
    y = function(**leaves)
    y.backward(normal(*y.shape, seed=9).bfloat16().to(y.dtype))
    grads = {f"d{k}": t.grad for k, t in leaves.items() if t.grad is not None}
    return {"y": y.detach(), **grads}


def named(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """`function` for that activation, with None for operands that are not given."""
    return lambda up, gate=None, poly=None, **more: function(
        up=up, gate=gate, name=name, poly=poly, **more
    )


def test_names() -> None:
    assert set(NAMES) == set(OF_TORCH)
    assert [n for n in NAMES if gated(n)] == ["swiglu", "geglu", "geglu_tanh", "swiglu_clamped"]
    assert [n for n in NAMES if polynomial(n)] == ["polyrelu", "polynorm"]


@pytest.mark.parametrize("shape", [(5, 2, 7), (1, 1), (3,)])
@pytest.mark.parametrize("name", NAMES)
def test_activate(name: str, shape: tuple[int, ...]) -> None:
    inputs = operands(name, *shape)
    ours = results(named(activate, name), inputs)
    assert ours.keys() == {"y", *(f"d{k}" for k in inputs)}
    assert_equal(ours, results(named(activate_reference, name), inputs))
    assert_equal(ours, results(OF_TORCH[name], inputs))


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name: str) -> None:
    """An expert without tokens."""
    inputs = {**operands(name, 0, 7), "weight": normal(3, 7, seed=3)}
    ours = results(named(activated_linear, name), inputs)
    assert {k: t.shape for k, t in ours.items() if k != "y"} == {
        f"d{k}": t.shape for k, t in inputs.items()
    }
    assert not any(t.any() for t in ours.values())


@pytest.mark.parametrize("name", NAMES)
def test_activated_linear(name: str) -> None:
    inputs = {**operands(name, 5, 2, 7), "weight": normal(3, 7, seed=3)}
    expected = results(lambda weight, **others: OF_TORCH[name](**others) @ weight.T, inputs)
    assert_equal(results(named(activated_linear, name), inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_activate_in_narrow_dtypes(name: str, dtype: torch.dtype) -> None:
    """Each tensor takes at most two roundings: 2^-8 of a bf16 tensor's largest element."""
    inputs = operands(name, 61, 33, dtype=dtype)
    ours = results(named(activate, name), inputs)
    exact = results(named(activate_reference, name), {k: t.double() for k, t in inputs.items()})
    for k, t in ours.items():
        assert t.dtype == (torch.float32 if k == "dpoly" else dtype)
        assert_equal({k: t}, {k: exact[k]}, 2.0**-8 if t.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("polyrelu", "relu2")])
def test_activate_of_extreme_rows(name: str, dtype: torch.dtype) -> None:
    """Zeros, huge and tiny numbers, one huge number among small ones: each row is correct, also
    where x⁶ is far outside fp32. (Squares and cubes beyond the dtype's range are infinite.)"""
    inputs = operands(name, 6, 33, dtype=dtype)
    x = inputs["gate" if gated(name) else "up"]
    huge = 1e10 if "tanh" in name else 1e30  # PyTorch squares the former's
    x[0], x[1], x[2], x[3], x[4, 5] = 0, huge * x[1], 1e-15 * x[2], 1e-30 * x[3], -huge
    ours = results(named(activate, name), inputs)
    exact = results(named(activate_reference, name), {k: t.double() for k, t in inputs.items()})
    bound = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    for row in range(6):
        a, b = ({k: v for k, v in t.items() if k != "dpoly"} for t in (ours, exact))
        assert_equal({k: v[row] for k, v in a.items()}, {k: v[row] for k, v in b.items()}, bound)
    if "dpoly" in ours:
        assert_equal({"dpoly": ours["dpoly"]}, {"dpoly": exact["dpoly"]}, bound)


@pytest.mark.parametrize("name", ["swiglu", "gelu", "polyrelu", "polynorm"])
def test_activated_linear_saves_its_inputs_only(name: str) -> None:
    """And three numbers per row for PolyNorm; the same under a checkpoint."""
    inputs = {
        **operands(name, 64, 2, 32, dtype=torch.float32),
        "weight": normal(8, 32, dtype=torch.float32),
    }
    function, saved = named(activated_linear, name), {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        plain = results(function, inputs)
    input_bytes = sum(t.nbytes for t in inputs.values())
    assert sum(saved.values()) == input_bytes + (64 * 2 * 3 * 8 if name == "polynorm" else 0)

    def recomputed(**leaves: Tensor) -> Tensor:
        return checkpoint(lambda: function(**leaves), use_reentrant=False)

    assert all(torch.equal(plain[k], t) for k, t in results(recomputed, inputs).items())


def test_bad_operands_are_refused() -> None:
    x, weight, poly = normal(2, 3), normal(4, 3), normal(4)
    for call in (
        lambda name, gate, poly: activate(x, gate, name, poly),
        lambda name, gate, poly: activated_linear(x, gate, weight, name, poly),
    ):
        for arguments, message in (
            (("tanh", None, None), "unknown activation 'tanh'"),
            (("geglu", None, None), "'geglu' needs `gate`"),
            (("relu", x, None), "'relu' has no `gate`"),
            (("polynorm", None, None), "'polynorm' needs `poly`"),
            (("swiglu", x, poly), "'swiglu' has no `poly`"),
        ):
            with pytest.raises(ValueError, match=message):
                call(*arguments)
