"""Activations of MLPs and experts, alone or with the product that follows: only inputs are kept."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.linear import product


def gated(name: str) -> bool:
    """Whether the activation has a gate projection beside `up`."""
    return name == "swiglu"


def _value(up: Tensor, gate: Tensor | None, name: str) -> Tensor:
    if name == "swiglu":
        assert gate is not None
        return F.silu(gate).mul_(up)
    if name == "gelu":
        return F.gelu(up)
    if name == "relu2":
        return F.relu(up).square_()
    raise ValueError(f"unknown activation {name!r}")


def _derivative(
    grad: Tensor, up: Tensor, gate: Tensor | None, name: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `up` and `gate` from the activation's."""
    if name == "swiglu":
        assert gate is not None
        return F.silu(gate).mul_(grad), torch.ops.aten.silu_backward(grad * up, gate)
    if name == "gelu":
        return torch.ops.aten.gelu_backward(grad, up), None
    return F.relu(up).mul_(grad).mul_(2), None


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up: Tensor, gate: Tensor | None, name: str) -> Tensor:
        ctx.save_for_backward(up, gate)
        ctx.name = name
        return _value(up, gate, name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        up, gate = ctx.saved_tensors
        return *_derivative(grad, up, gate, ctx.name), None


class _ActivatedLinear(torch.autograd.Function):
    """Backward computes the activation again: cheap, and an inner width of memory is spared."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, gate: Tensor | None, weight: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(up, gate, weight)
        ctx.name = name
        return product(_value(up, gate, name), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        up, gate, weight = ctx.saved_tensors
        inner = _value(up, gate, ctx.name)
        rows = grad.reshape(-1, grad.shape[-1])
        d_weight = product(rows.T, inner.reshape(-1, inner.shape[-1]).T)
        del inner
        return *_derivative(product(grad, weight.T), up, gate, ctx.name), d_weight, None


def activate(up: Tensor, gate: Tensor | None, name: str) -> Tensor:
    """The inner activation of an MLP.

    Args:
        up: `[..., F]`.
        gate: `[..., F]` for `swiglu` (Shazeer 2020, arXiv:2002.05202, eq. 6), else None.
        name: `swiglu` silu(gate)·up; `gelu` x·Φ(x); `relu2` relu(x)² (Primer, arXiv:2109.08668).

    Returns:
        `[..., F]`, dtype of `up`.
    """
    return _Activate.apply(up, gate, name)


def activated_linear(up: Tensor, gate: Tensor | None, weight: Tensor, name: str) -> Tensor:
    """`linear(activate(up, gate, name), weight)`, without keeping the activation.

    Args:
        up, gate, name: as in `activate`.
        weight: `[O, F]`, dtype of `up`.

    Returns:
        `[..., O]`.
    """
    return _ActivatedLinear.apply(up, gate, weight, name)


def activate_reference(up: Tensor, gate: Tensor | None, name: str) -> Tensor:
    """`activate` by its formula."""
    if name == "swiglu":
        assert gate is not None
        return gate * torch.sigmoid(gate) * up
    if name == "gelu":
        return up * 0.5 * (1 + torch.erf(up / 2**0.5))
    return torch.where(up > 0, up, 0) ** 2
