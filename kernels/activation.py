"""Activations of MLPs and experts, with or without the next product; only inputs are saved."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.activation_names import Activation, gated, polynomial
from colonnade.kernels.deferred import PutOff, put_off
from colonnade.kernels.linear import product, weight_gradient
from colonnade.kernels.precision import wide
from colonnade.kernels.sharding import UNSHARDED, Sharding, outside_graphs

aten = torch.ops.aten

# Activations of one input: the function, and its backward from the output's gradient and the input.
_UNGATED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, aten.silu_backward),
    "gelu": (F.gelu, aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "relu": (F.relu, lambda grad, x: aten.threshold_backward(grad, x, 0)),
    "relu2": (lambda x: F.relu(x).square_(), lambda grad, x: F.relu(x).mul_(grad).mul_(2)),
}
# The activation of the gate.
_GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
# The backward of the gate's activation, which can write over the output's gradient.
_GATE_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "swiglu": aten.silu_backward.grad_input,
    "geglu": aten.gelu_backward.grad_input,
    "geglu_tanh": partial(aten.gelu_backward.grad_input, approximate="tanh"),
}
# The clamped SwiGLU of gpt-oss: the factor inside the sigmoid, and the largest gate and |up|.
ALPHA, LIMIT = 1.702, 7.0
POLYNORM_EPS = 1e-6

NAMES = get_args(Activation)


def _communicates(name: str, sharding: Sharding) -> bool:
    """Whether the activation all-reduces sums over its width."""
    return name == "polynorm" and sharding.size > 1


def _check(name: str, gate: Tensor | None, poly: Tensor | None) -> None:
    if name not in NAMES:
        raise ValueError(f"unknown activation {name!r}")
    for operand, given, wanted in (
        ("gate", gate is not None, gated(name)),
        ("poly", poly is not None, polynomial(name)),
    ):
        if given != wanted:
            raise ValueError(f"activation {name!r} {'needs' if wanted else 'has no'} `{operand}`")


# PolyCom is a polynomial in u: Σ_i a_i ρ_i u^i. PolyReLU: u = relu(x), ρ_i = 1. PolyNorm: u = s_1 x
# and ρ_i = s_i / s_1^i with s_i = 1/rms(x^i), so that powers are taken of numbers near 1 only.


def _row_scales(x: Tensor, name: str, sharding: Sharding) -> Tensor | None:
    """For PolyNorm, s_i = 1/sqrt(mean(x^(2i)) + eps), `[..., 3]`, means over the full width.

    All-reduces the sums of powers over the ranks that share the width; in fp64, which holds the
    sixth power of any fp32.
    """
    if name != "polynorm":
        return None
    x = wide(x)
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)
    unit = x / largest.clamp_(min=torch.finfo(x.dtype).tiny)
    powers = (unit, unit.square(), unit * unit.square())
    norms = torch.stack([torch.linalg.vector_norm(p, dim=-1) for p in powers], -1).double()
    orders = torch.arange(1, 4, device=x.device)
    squares = sharding.all_reduce((norms * largest.double() ** orders).square_())
    return (squares / (x.shape[-1] * sharding.size)).add_(POLYNORM_EPS).rsqrt_()


def _base(x: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """u `[..., F]` and ρ (1 for the constant), `[4]` or `[..., 4]`, both in at least fp32."""
    x = wide(x)
    if scales is None:
        return F.relu(x), x.new_ones(4)
    first = scales[..., :1]
    ratios = scales / first ** torch.arange(1, 4, device=x.device)
    return x * first.to(x.dtype), torch.cat([torch.ones_like(first), ratios], -1).to(x.dtype)


def _horner(u: Tensor, *coefficients: Tensor) -> Tensor:
    """Σ_i coefficients[i] u^i; each `[1]` or `[..., 1]`."""
    *lower, before, last = coefficients
    y = torch.addcmul(before, u, last)
    for c in reversed(lower):
        torch.addcmul(c, y, u, out=y)
    return y


def _polynomial(x: Tensor, poly: Tensor, scales: Tensor | None) -> Tensor:
    u, rho = _base(x, scales)
    return _horner(u, *(poly.to(u.dtype) * rho).split(1, -1)).to(x.dtype)


def _moments(grad: Tensor, u: Tensor) -> Tensor:
    """Σ grad u^i over the width, i = 0..3: `[..., 4]`."""
    product, sums = grad * u, [grad.sum(-1)]
    for _ in range(2):
        sums.append(product.sum(-1))
        product.mul_(u)
    return torch.stack([*sums, product.sum(-1)], -1)


def _polynomial_backward(
    grad: Tensor, x: Tensor, poly: Tensor, scales: Tensor | None, sharding: Sharding
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the coefficients; the latter is a partial sum over local columns."""
    g, (u, rho) = wide(grad), _base(x, scales)
    moments = _moments(g, u) * rho
    d_poly = moments.reshape(-1, 4).sum(0).to(poly.dtype)
    i = torch.arange(1, 4, device=x.device)
    slopes = (poly.to(u.dtype) * rho)[..., 1:] * i
    d_x = _horner(u, *slopes.split(1, -1)).mul_(g)
    if scales is None:
        d_x.mul_(u > 0)
    else:  # through the scales: s_i changes with every x of the row
        d_scales = sharding.all_reduce(slopes * rho[..., 1:] * moments[..., 1:])
        d_scales = d_scales.div_(x.shape[-1] * sharding.size)
        d_x.addcmul_(u, _horner(u.square(), *d_scales.split(1, -1)), value=-1)
        d_x.mul_(scales[..., :1].to(u.dtype))
    return d_x.to(x.dtype), d_poly


def _clamped(up: Tensor, gate: Tensor) -> Tensor:
    u, g = wide(up).clamp(-LIMIT, LIMIT), wide(gate).clamp(max=LIMIT)
    return ((u + 1) * g * torch.sigmoid(ALPHA * g)).to(up.dtype)


def _clamped_backward(grad: Tensor, up: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `up` and `gate` from that of the output."""
    d, u, g = wide(grad), wide(up), wide(gate).clamp(max=LIMIT)
    s = torch.sigmoid(ALPHA * g)
    d_up = d * g * s * (u.abs() <= LIMIT)
    slope = s * (1 + ALPHA * g * (1 - s)) * (wide(gate) <= LIMIT)
    d_gate = d * (u.clamp(-LIMIT, LIMIT) + 1) * slope
    return d_up.to(up.dtype), d_gate.to(gate.dtype)


def _value(
    up: Tensor, gate: Tensor | None, name: str, poly: Tensor | None, scales: Tensor | None
) -> Tensor:
    if gate is not None:
        if name == "swiglu_clamped":
            return _clamped(up, gate)
        return _UNGATED[_GATES[name]][0](gate).mul_(up)
    if poly is not None:
        return _polynomial(up, poly, scales)
    return _UNGATED[name][0](up)


def _ungated_backward(
    grad: Tensor,
    up: Tensor,
    name: str,
    poly: Tensor | None,
    scales: Tensor | None,
    sharding: Sharding,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `up` and `poly` from that of the output, for an activation without a gate."""
    if poly is not None:
        return _polynomial_backward(grad, up, poly, scales, sharding)
    return _UNGATED[name][1](grad, up), None


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        up: Tensor,
        gate: Tensor | None,
        name: str,
        poly: Tensor | None,
        sharding: Sharding,
    ) -> Tensor:
        scales = _row_scales(up, name, sharding)
        ctx.save_for_backward(up, gate, poly, scales)
        ctx.name, ctx.sharding = name, sharding
        return _value(up, gate, name, poly, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        up, gate, poly, scales = ctx.saved_tensors
        if gate is None:
            d_up, d_poly = _ungated_backward(grad, up, ctx.name, poly, scales, ctx.sharding)
            return d_up, None, None, d_poly, None
        if ctx.name == "swiglu_clamped":
            return *_clamped_backward(grad, up, gate), None, None, None
        function, backward = _UNGATED[_GATES[ctx.name]]
        return function(gate).mul_(grad), backward(grad * up, gate), None, None, None


class _ActivatedLinear(torch.autograd.Function):
    """Backward computes the activation again: that is cheap and saves memory of the inner width."""

    @staticmethod
    def forward(
        ctx: Any,
        up: Tensor,
        gate: Tensor | None,
        weight: Tensor,
        name: str,
        poly: Tensor | None,
        sharding: Sharding,
        defer: PutOff | None,
    ) -> Tensor:
        scales = _row_scales(up, name, sharding)
        ctx.save_for_backward(up, gate, weight, poly, scales)
        ctx.name, ctx.sharding, ctx.defer = name, sharding, defer
        return product(_value(up, gate, name, poly, scales), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        up, gate, weight, poly, scales = ctx.saved_tensors
        activated_gate = _UNGATED[_GATES[ctx.name]][0](gate) if ctx.name in _GATES else None
        if activated_gate is None:
            inner = _value(up, gate, ctx.name, poly, scales)
        else:
            inner = activated_gate * up
        d_weight = None
        if ctx.defer is not None:
            name = ctx.name
            ctx.defer(lambda: weight_gradient(grad, _value(up, gate, name, poly, scales)))
        elif ctx.needs_input_grad[2]:
            d_weight = weight_gradient(grad, inner)
        del inner  # frees its memory for `d_inner`
        d_inner = product(grad, weight.T)
        if ctx.name == "swiglu_clamped":
            return *_clamped_backward(d_inner, up, gate), d_weight, None, None, None, None
        if activated_gate is None:
            d_up, d_poly = _ungated_backward(d_inner, up, ctx.name, poly, scales, ctx.sharding)
            return d_up, None, d_weight, None, d_poly, None, None
        d_up = activated_gate.mul_(d_inner)
        d_activated_gate = d_inner.mul_(up)
        d_gate = _GATE_BACKWARD[ctx.name](d_activated_gate, gate, grad_input=d_activated_gate)
        return d_up, d_gate, d_weight, None, None, None, None


def activate(
    up: Tensor,
    gate: Tensor | None,
    name: str,
    poly: Tensor | None = None,
    sharding: Sharding = UNSHARDED,
) -> Tensor:
    """The inner activation of an MLP.

    | name | value |
    |---|---|
    | `swiglu`, `geglu` | silu(gate)·up, gelu(gate)·up (Shazeer 2020, arXiv:2002.05202, eq. 6) |
    | `geglu_tanh` | gelu_tanh(gate)·up |
    | `swiglu_clamped` | (u + 1)·g·sigmoid(1.702 g), u = up in ±7, g = gate up to 7 (gpt-oss) |
    | `silu`, `gelu`, `relu` | x·sigmoid(x), x·Φ(x), max(x, 0) |
    | `gelu_tanh` | gelu with tanh in place of Φ |
    | `relu2` | relu(x)² (Primer, arXiv:2109.08668) |
    | `polyrelu` | a_0 + Σ_i a_i relu(x)^i, i = 1..3 (PolyCom, arXiv:2411.03884) |
    | `polynorm` | a_0 + Σ_i a_i x^i / rms(x^i), rms over F with eps 1e-6 (the same) |

    Args:
        up: `[..., F]`.
        gate: `[..., F]` where `gated(name)`, else None.
        name: one of `NAMES`.
        poly: `[4]`, a_0 to a_3, any floating dtype, where `polynomial(name)`, else None.
        sharding: of the width, where F is one rank's shard of it (the gradient of `poly` is then a
            partial sum over these columns, which the caller all-reduces).

    Returns:
        `[..., F]`, dtype of `up`.

    Raises:
        ValueError: an unknown name, a missing operand, or one that the activation does not use.
    """
    _check(name, gate, poly)
    communicates = _communicates(name, sharding)
    apply = outside_graphs(_Activate.apply) if communicates else _Activate.apply
    return apply(up, gate, name, poly, sharding)


def activated_linear(
    up: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    name: str,
    poly: Tensor | None = None,
    sharding: Sharding = UNSHARDED,
) -> Tensor:
    """`linear(activate(up, gate, name, poly, sharding), weight)`, without saving the activation.

    Args:
        up, gate, name, poly, sharding: as in `activate`.
        weight: `[O, F]`, dtype of `up`.

    Returns:
        `[..., O]`; where the width is sharded, a partial sum, which the caller all-reduces.
    """
    _check(name, gate, poly)
    communicates = _communicates(name, sharding)
    apply = outside_graphs(_ActivatedLinear.apply) if communicates else _ActivatedLinear.apply
    weight, defer = put_off(weight, up, gate)
    return apply(up, gate, weight, name, poly, sharding, defer)


def activate_reference(
    up: Tensor, gate: Tensor | None, name: str, poly: Tensor | None = None
) -> Tensor:
    """`activate` by its formula."""
    if gate is not None and name == "swiglu_clamped":
        u, g = up.clamp(-LIMIT, LIMIT), gate.clamp(max=LIMIT)
        return (u + 1) * g * torch.sigmoid(ALPHA * g)
    if gate is not None:
        return activate_reference(gate, None, _GATES[name]) * up
    if poly is not None:
        x, a = wide(up), wide(poly)
        if name == "polyrelu":
            terms = [a[i] * torch.where(x > 0, x, 0) ** i for i in (1, 2, 3)]
        else:
            mean = [x.pow(2 * i).mean(-1, keepdim=True) for i in (1, 2, 3)]
            terms = [a[i] * x**i / (mean[i - 1] + POLYNORM_EPS).sqrt() for i in (1, 2, 3)]
        return (sum(terms) + a[0]).to(up.dtype)
    if name == "silu":
        return up * torch.sigmoid(up)
    if name == "gelu":
        return up * 0.5 * (1 + torch.erf(up / 2**0.5))
    if name == "gelu_tanh":
        return up * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3)))
    return torch.where(up > 0, up, 0) ** (2 if name == "relu2" else 1)
