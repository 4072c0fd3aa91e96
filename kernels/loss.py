"""Vocabulary projection and cross entropy in one, a chunk of logits at a time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.linear import product
from colonnade.kernels.precision import wide, wide_dtype

IGNORED = -100  # label of a token without loss, as in torch.nn.functional.cross_entropy


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, while a chunk's logits exist anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, chunk: int, training: bool
    ) -> Tensor:
        need_x, need_w = training and x.requires_grad, training and weight.requires_grad
        total = x.new_zeros((), dtype=wide_dtype(x.dtype))
        d_x = torch.empty_like(x) if need_x else None
        d_w = torch.zeros_like(weight, dtype=total.dtype) if need_w else None
        for start in range(0, x.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = wide(product(x[part], weight))
            label = labels[part].long()
            valid = label != IGNORED
            label = label.where(valid, 0)[:, None]
            norm = torch.logsumexp(logits, dim=-1, keepdim=True)
            nll = norm - logits.gather(1, label)
            total += nll.squeeze(1).masked_fill_(~valid, 0).sum()
            if not (need_x or need_w):
                continue
            d_logits = logits.sub_(norm).exp_()
            d_logits.scatter_add_(1, label, torch.full_like(norm, -1))
            d_logits = d_logits.mul_(valid[:, None]).to(x.dtype)
            if d_x is not None:
                d_x[part] = product(d_logits, weight.T)
            if d_w is not None:
                d_w += product(d_logits.T, x[part].T)
        ctx.gradients = d_x, d_w
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_x, d_w = ctx.gradients
        ctx.gradients = None  # scaled in place: they serve one backward pass
        if d_x is not None:
            d_x = d_x.mul_(grad)
        if d_w is not None:
            d_w = d_w.mul_(grad).to(ctx.weight_dtype)
        return d_x, d_w, None, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Sum over valid tokens of −log softmax(x Wᵀ)[label].

    At most `chunk` rows of logits exist at one time, forward and backward. The graph can be
    walked backward once.

    Args:
        x: `[T, D]`.
        weight: `[V, D]`, dtype of `x`.
        labels: `[T]` integers; `IGNORED` (−100) marks tokens without loss.
        chunk: tokens per chunk.

    Returns:
        scalar in at least fp32.
    """
    training = torch.is_grad_enabled()  # inside `forward` it never is
    return _LinearCrossEntropy.apply(x, weight, labels, chunk, training)


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`linear_cross_entropy` with all logits at once."""
    return F.cross_entropy(wide(x @ weight.T), labels.long(), ignore_index=IGNORED, reduction="sum")
