"""Norms over the last dimension, in at least fp32, that save only inputs and row statistics."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.precision import wide, wide_dtype
from colonnade.kernels.sharding import Reduction, outside_graphs


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(Σ x² / width + eps) · (weight + offset) + bias.

    `lacks_channel` says that rows lack the channel that would make their sum zero; Σ includes its
    square. `mean` turns means over local columns into means over the row where rows are sharded
    over ranks; None where they are not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        offset: float,
        width: int,
        lacks_channel: bool,
        mean: Reduction | None,
    ) -> Tensor:
        w = wide(x)
        scale = torch.linalg.vector_norm(w, dim=-1, keepdim=True).square_()
        total = w.sum(-1, keepdim=True) if lacks_channel else None  # minus the missing channel
        if total is not None:
            scale.addcmul_(total, total)
        scale = scale.div_(width)
        if mean is not None:
            scale = mean(scale)
        scale = scale.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale, total)
        ctx.offset, ctx.width, ctx.bias_dtype = offset, width, None if bias is None else bias.dtype
        ctx.mean = mean
        y = w * scale
        if weight is not None:
            y.mul_(_factor(weight, offset))
        if bias is not None:
            y.add_(bias)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, total = ctx.saved_tensors
        g, w = wide(grad), wide(x)
        product = g * w
        d_weight = d_bias = None
        if weight is None:
            row_sum = product.sum(-1, keepdim=True)
        else:
            if ctx.bias_dtype is not None:
                d_bias = g.reshape(-1, *weight.shape).sum(0).to(ctx.bias_dtype)
            factor = _factor(weight, ctx.offset)
            d_weight, row_sum = _weighted_sums(product, scale, factor.to(product.dtype))
            d_weight = d_weight.to(weight.dtype)
        mean = row_sum.mul_(scale).div_(ctx.width)  # of the gradient times the normed row
        if ctx.mean is not None:
            mean = ctx.mean(mean)
        slope = mean.mul(scale).mul_(scale).neg_()  # one by one: a third power could underflow
        d_x = (g * scale if weight is None else (g * factor).mul_(scale)).addcmul_(w, slope)
        if total is not None:  # the sum is an input of the scale too
            d_x.addcmul_(total, slope)
        return d_x.to(x.dtype), d_weight, d_bias, None, None, None, None, None


def _weighted_sums(product: Tensor, scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over rows, each times its scale, and sums over each row's channels times the factor.

    Args:
        product: `[..., *weight]`.
        scale: `[..., 1]`.
        factor: `[D]` or `[G, W]`, the weight's shape.

    Returns:
        the shape of `factor`, and `[..., 1]`.
    """
    if factor.dim() == 1:  # matrix times vector: one pass each
        over_rows = product.reshape(-1, len(factor)).T @ scale.flatten()
        return over_rows, (product @ factor)[..., None]
    over_rows = (product * scale).reshape(-1, *factor.shape).sum(0)
    return over_rows, (product * factor).sum(-1, keepdim=True)


def _factor(weight: Tensor, offset: float) -> Tensor:
    """weight + offset, added in at least fp32: near 1, bf16 would lose most of a small weight."""
    return wide(weight) + offset if offset else weight


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    bias: Tensor | None = None,
    offset: float = 0.0,
    mean: Reduction | None = None,
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (weight + offset) + bias (arXiv:1910.07467, eq. 4).

    Args:
        x: `[..., D]`, or `[..., G, W]` to norm within G groups.
        weight: `[D]` or `[G, W]`, of `x`'s dtype or wider; None: none is learned, nor a bias.
        bias: as `weight`, or None.
        offset: 1 for models that store the weight minus 1 (Gemma, Qwen3-Next).
        mean: where the rows of `x` (with weight and bias) are sharded over ranks, the all-reduce
            that turns a mean over local columns, `[..., 1]`, into that over the whole row, forward
            and backward (`kernels.sharding.Sharding.mean_over_ranks`).

    Returns:
        the shape and dtype of `x`.
    """
    if x.is_cuda and mean is None:
        normed = F.rms_norm(x, x.shape[-1:], None, eps)
        if weight is not None:
            normed = normed * _factor(weight, offset).to(x.dtype)
        return normed if bias is None else normed + bias.to(x.dtype)
    apply = _RMSNorm.apply if mean is None else outside_graphs(_RMSNorm.apply)
    return apply(x, weight, bias, eps, offset, x.shape[-1], False, mean)


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None, offset: float = 0.0
) -> Tensor:
    """`rms_norm` by its formula."""
    w = wide(x)
    y = w / (w.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + offset)
    return (y if bias is None else y + bias).to(x.dtype)


class _LayerNorm(torch.autograd.Function):
    """PyTorch's operators; backward in fp32, as it would sum bf16 rows' weight gradient in bf16."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        # With bf16 rows and no weight PyTorch would return statistics in bf16.
        factor = weight
        if weight is None:
            factor = x.new_ones(x.shape[-1:], dtype=wide_dtype(x.dtype))
        y, mean, scale = torch.native_layer_norm(x, x.shape[-1:], factor, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            wide(grad),
            wide(x),
            x.shape[-1:],
            mean,
            scale,
            weight,
            bias,
            (True, weight is not None, bias is not None),
        )
        return d_x.to(x.dtype), d_weight, d_bias, None


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x − mean(x)) / sqrt(var(x) + eps) · weight + bias (arXiv:1607.06450).

    Args:
        x: `[..., D]`.
        weight: `[D]`, of `x`'s dtype or wider; None: none is learned.
        bias: as `weight`, or None.

    Returns:
        the shape and dtype of `x`.
    """
    # PyTorch computes in fp32 inside; with bf16 rows it takes fp32 parameters on CPU only.
    dtype = x.dtype if x.is_cuda else wide_dtype(x.dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    if dtype == x.dtype:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`layer_norm` by its formula."""
    w = wide(x) - wide(x).mean(-1, keepdim=True)
    y = w / (w.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return (y if bias is None else y + bias).to(x.dtype)


def crms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of zero-mean vectors of D channels from their first D − 1 (arXiv:2305.14858).

    The last channel is minus the sum of the others: x / sqrt((Σ x² + (Σ x)²) / D + eps) · weight.

    Args:
        x: `[..., D - 1]`.
        weight: `[D - 1]`, of `x`'s dtype or wider; None: none is learned.

    Returns:
        the shape and dtype of `x`.
    """
    return _RMSNorm.apply(x, weight, None, eps, 0.0, x.shape[-1] + 1, True, None)


def crms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`crms_norm` by its formula."""
    w = wide(x)
    squares = w.square().sum(-1, keepdim=True) + w.sum(-1, keepdim=True).square()
    return (w / (squares / (x.shape[-1] + 1) + eps).sqrt() * weight).to(x.dtype)


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(Σ x² + eps) over the last dimension.

    Args:
        x: `[..., D]`.

    Returns:
        the shape and dtype of `x`.
    """
    if x.is_cuda:  # one kernel, and a factor for which backward saves nothing
        D = x.shape[-1]
        return F.rms_norm(x, (D,), None, eps / D) * D**-0.5
    return _RMSNorm.apply(x, None, None, eps, 0.0, 1, False, None)


def l2_norm_reference(x: Tensor, eps: float) -> Tensor:
    """`l2_norm` by its formula."""
    w = wide(x)
    return (w / (w.square().sum(-1, keepdim=True) + eps).sqrt()).to(x.dtype)
