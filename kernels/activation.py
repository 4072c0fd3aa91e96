"""Activations of MLPs and experts: SwiGLU, GELU, squared ReLU, saving only their inputs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Autograd would keep silu(gate) too; here it is computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(grad)
        d_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return d_gate, d_up


class _SquaredReLU(torch.autograd.Function):
    """relu(x)², keeping x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(grad).mul_(2)


def activate(up: Tensor, gate: Tensor | None, name: str) -> Tensor:
    """The inner activation of an MLP.

    Args:
        up: `[..., F]`.
        gate: `[..., F]` for `swiglu` (Shazeer 2020, arXiv:2002.05202, eq. 6), else None.
        name: `swiglu` silu(gate)·up; `gelu` x·Φ(x); `relu2` relu(x)² (Primer, arXiv:2109.08668).

    Returns:
        `[..., F]`, dtype of `up`.
    """
    if name == "swiglu":
        assert gate is not None
        return _SwiGLU.apply(gate, up)
    if name == "gelu":
        return F.gelu(up)
    if name == "relu2":
        return _SquaredReLU.apply(up)
    raise ValueError(f"unknown activation {name!r}")


def activate_reference(up: Tensor, gate: Tensor | None, name: str) -> Tensor:
    """`activate` by its formula."""
    if name == "swiglu":
        assert gate is not None
        return gate * torch.sigmoid(gate) * up
    if name == "gelu":
        return up * 0.5 * (1 + torch.erf(up / 2**0.5))
    return torch.where(up > 0, up, 0) ** 2


def gated(name: str) -> bool:
    """Whether the activation has a gate projection beside `up`."""
    return name == "swiglu"
