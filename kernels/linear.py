"""Matrix products of linear layers, on the fastest library at hand.

On x86 CPUs PyTorch sends fp32 products to MKL, which leaves half of an AMD core idle; oneDNN, which
PyTorch ships and uses for bf16, does not. EXPERIMENTS.md has the figures.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.opaque import opaque

# The operator, or None in builds of PyTorch without oneDNN.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@torch.compiler.assume_constant_result  # Dynamo does not trace these look-ups
def _onednn_is_on() -> bool:
    mkldnn = torch.backends.mkldnn
    return bool(ONEDNN_LINEAR and mkldnn.is_available() and mkldnn.enabled)


def uses_onednn(x: Tensor) -> bool:
    """Whether oneDNN serves products of this tensor: fp32 on an x86 CPU, oneDNN switched on."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and _onednn_is_on()


@opaque("onednn_product", lambda a, b: a.new_empty(*a.shape[:-1], b.shape[0]))
def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """Opaque: Inductor has this operator for packed weights alone and refuses any other use."""
    assert ONEDNN_LINEAR is not None
    return ONEDNN_LINEAR(a, b, None, "none", [], "")


def product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ, without gradient.

    Args:
        a: `[..., K]`, any strides.
        b: `[N, K]`, any strides, dtype of `a`.

    Returns:
        `[..., N]`.
    """
    if uses_onednn(a) and a.numel() and b.numel():
        return _onednn(a, b)
    return a @ b.T


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_x = product(grad, weight.T) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return d_x, None
        rows = grad.reshape(-1, grad.shape[-1])
        return d_x, product(rows.T, x.reshape(-1, x.shape[-1]).T)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ.

    Args:
        x: `[..., I]`.
        weight: `[O, I]`, dtype of `x`.

    Returns:
        `[..., O]`.
    """
    if uses_onednn(x):
        return _Linear.apply(x, weight)
    return F.linear(x, weight)
