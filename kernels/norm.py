"""RMSNorm, computed in at least fp32, keeping only its input and one scale per row."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.precision import wide


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        w = wide(x)
        scale = torch.linalg.vector_norm(w, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (w * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        g, normed = wide(grad), wide(x) * scale
        product = g * normed
        d_weight = product.reshape(-1, *weight.shape).sum(0)
        mean = product.mul_(weight).mean(-1, keepdim=True)
        d_x = torch.addcmul(g * weight, normed, mean, value=-1).mul_(scale)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv:1910.07467, eq. 4).

    Args:
        x: `[..., D]`, or `[..., G, W]` to norm within G groups.
        weight: `[D]` or `[G, W]`, of `x`'s dtype or wider.

    Returns:
        the shape and dtype of `x`.
    """
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], None, eps) * weight.to(x.dtype)
    return _RMSNorm.apply(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` by its formula."""
    w = wide(x)
    return (w / (w.square().mean(-1, keepdim=True) + eps).sqrt() * weight).to(x.dtype)
