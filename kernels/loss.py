"""Vocabulary projection and losses of its logits in one, a chunk of logits at a time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.linear import product
from colonnade.kernels.precision import wide, wide_dtype

IGNORED = -100  # label of a token without loss, as in torch.nn.functional.cross_entropy


class _Gradients:
    """Gradients of inputs and weight, collected chunk by chunk while the logits exist anyway."""

    def __init__(self, inputs: tuple[Tensor, ...], weight: Tensor, training: bool) -> None:
        self.inputs, self.weight = inputs, weight
        self.d_inputs = [
            torch.empty_like(x) if training and x.requires_grad else None for x in inputs
        ]
        dtype = wide_dtype(weight.dtype)
        wanted = training and weight.requires_grad
        self.d_weight = torch.zeros_like(weight, dtype=dtype) if wanted else None

    def wanted(self) -> bool:
        return self.d_weight is not None or any(d is not None for d in self.d_inputs)

    def add(self, i: int, part: slice, d_logits: Tensor) -> None:
        """Those of `logits = inputs[i][part] @ weight.T`."""
        d_logits, d_x = d_logits.to(self.weight.dtype), self.d_inputs[i]
        if d_x is not None:
            d_x[part] = product(d_logits, self.weight.T)
        if self.d_weight is not None:
            self.d_weight += product(d_logits.T, self.inputs[i][part].T)

    def keep(self, ctx: Any) -> None:
        ctx.gradients, ctx.weight_dtype = (self.d_inputs, self.d_weight), self.weight.dtype


def _scaled(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The kept gradients of inputs and weight, times `grad`: in place, so they serve once."""
    if ctx.gradients is None:
        raise RuntimeError("the graph of a chunked loss can be walked backward once")
    d_inputs, d_weight = ctx.gradients
    ctx.gradients = None
    d_inputs = [None if d is None else d.mul_(grad) for d in d_inputs]
    return *d_inputs, None if d_weight is None else d_weight.mul_(grad).to(ctx.weight_dtype)


def _logits(
    x: Tensor, weight: Tensor, cap: float | None, training: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits in at least fp32, and the derivative of capping them."""
    logits = wide(product(x, weight))
    if not cap:
        return logits, None
    logits = logits.div_(cap).tanh_()
    slope = logits.square().neg_().add_(1) if training else None
    return logits.mul_(cap), slope


def _targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Column numbers, and which tokens have a loss: `[T, 1]` each."""
    labels = labels.long()[:, None]
    valid = labels != IGNORED
    return labels.where(valid, 0), valid


def _finish(d_logits: Tensor, label: Tensor, valid: Tensor, slope: Tensor | None) -> Tensor:
    """In place: minus 1 at the label, through the cap, zero without a loss."""
    d_logits.scatter_add_(1, label, d_logits.new_full((1, 1), -1).expand_as(label))
    if slope is not None:
        d_logits.mul_(slope)
    return d_logits.mul_(valid)


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        cap: float | None,
        z: float,
        training: bool,
    ) -> tuple[Tensor, Tensor]:
        gradients = _Gradients((x,), weight, training)
        nlls = x.new_zeros((), dtype=wide_dtype(x.dtype))
        zs = torch.zeros_like(nlls)
        for start in range(0, x.shape[0], chunk):
            part = slice(start, start + chunk)
            label, valid = _targets(labels[part])
            logits, slope = _logits(x[part], weight, cap, gradients.wanted())
            norm = torch.logsumexp(logits, dim=-1, keepdim=True)
            nlls += (norm - logits.gather(1, label)).masked_fill_(~valid, 0).sum()
            if z:
                zs += z * norm.square().masked_fill_(~valid, 0).sum()
            if gradients.wanted():
                d_logits = logits.sub_(norm).exp_()
                if z:
                    d_logits.mul_(1 + 2 * z * norm)
                gradients.add(0, part, _finish(d_logits, label, valid, slope))
        gradients.keep(ctx)
        ctx.mark_non_differentiable(zs)
        return nlls + zs, zs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx, grad), None, None, None, None, None


class _Consistency(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        x2: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        alpha: float,
        cap: float | None,
        z: float,
        training: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = _Gradients((x1, x2), weight, training)
        nlls = x1.new_zeros((), dtype=wide_dtype(x1.dtype))
        zs, divergences = torch.zeros_like(nlls), torch.zeros_like(nlls)
        for start in range(0, x1.shape[0], chunk):
            part = slice(start, start + chunk)
            label, valid = _targets(labels[part])
            logits, slopes, factors = [], [], []
            for x in (x1, x2):
                own, slope = _logits(x[part], weight, cap, gradients.wanted())
                norm = torch.logsumexp(own, dim=-1, keepdim=True)
                logits.append(own.sub_(norm))
                slopes.append(slope)
                factors.append(1 + 2 * z * norm)
                nlls -= own.gather(1, label).masked_fill_(~valid, 0).sum()
                if z:
                    zs += z * norm.square().masked_fill_(~valid, 0).sum()
            divergence, d_logits = _divergence(logits, alpha / 2, factors, gradients.wanted())
            divergences += divergence.masked_fill_(~valid, 0).sum()
            for i, d in enumerate(d_logits):
                gradients.add(i, part, _finish(d, label, valid, slopes[i]))
        gradients.keep(ctx)
        mean = nlls / 2
        ctx.mark_non_differentiable(mean, divergences)
        return nlls + zs + divergences, mean, divergences

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx, grad), None, None, None, None, None, None


def _divergence(
    logs: list[Tensor], weight: float, factors: list[Tensor], training: bool
) -> tuple[Tensor, list[Tensor]]:
    """weight · Σ_v (p − q)(log p − log q), `[T, 1]`, of two log-softmaxes `[T, V]`: consumed.

    In training also its gradients in the logits of p and of q, plus `factors[0]` p and `factors[1]`
    q (of terms in logsumexp; `[T, 1]` each). With δ = log p − log q, that in the logits of p is
    weight · (p (δ − Σ p δ) + p − q), and that in q's the same with p and q exchanged.
    """
    log_p, log_q = logs
    p = log_p.exp()
    delta, q = log_p.sub_(log_q), log_q.exp_()
    total = (p - q).mul_(delta).sum(-1, keepdim=True)
    if not training:
        return weight * total, []
    p_to_q = (p * delta).sum(-1, keepdim=True)  # KL(p‖q); KL(q‖p) is the rest of the total
    in_p = weight * (1 - p_to_q) + factors[0]
    in_q = weight * (1 - (total - p_to_q)) + factors[1]
    d_p = (delta * weight).add_(in_p).mul_(p).sub_(q, alpha=weight)
    d_q = delta.mul_(-weight).add_(in_q).mul_(q).sub_(p, alpha=weight)
    return weight * total, [d_p, d_q]


def linear_objective(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    *,
    cap: float | None = None,
    z: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sum over valid tokens of −log softmax(l)[label] + z · logsumexp(l)², with l = x Wᵀ.

    The term in z keeps logsumexp near 0 (PaLM, arXiv:2204.02311, section 5). With a cap,
    l = cap · tanh(x Wᵀ / cap) (Gemma 2, arXiv:2408.00118). At most `chunk` rows of logits exist at
    one time, forward and backward. The graph can be walked backward once.

    Args:
        x: `[T, D]`.
        weight: `[V, D]`, dtype of `x`.
        labels: `[T]` integers; `IGNORED` (−100) marks tokens without loss.
        chunk: tokens per chunk.

    Returns:
        two scalars in at least fp32: the objective, and without gradient the part of it due to z.
    """
    training = torch.is_grad_enabled()  # inside `forward` it never is
    return _Objective.apply(x, weight, labels, chunk, cap, z, training)


def linear_consistency(
    x1: Tensor,
    x2: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    alpha: float,
    *,
    cap: float | None = None,
    z: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of two passes that are to agree (THOR, arXiv:2110.04260).

    Both passes' `linear_objective`, and of valid tokens alpha · ½ Σ_v (p − q)(log p − log q), where
    p and q are their distributions: alpha times the mean of both KL divergences. At most `chunk`
    tokens' logits of each pass exist at one time. The graph can be walked backward once.

    Args:
        x1, x2: `[T, D]`.
        weight, labels, chunk, cap, z: as in `linear_objective`.

    Returns:
        three scalars in at least fp32: the objective, and without gradient the mean of the two
        cross entropies and the term in alpha, all summed over tokens.
    """
    training = torch.is_grad_enabled()
    return _Consistency.apply(x1, x2, weight, labels, chunk, alpha, cap, z, training)


def _logits_reference(x: Tensor, weight: Tensor, cap: float | None) -> Tensor:
    logits = wide(x @ weight.T)
    return cap * torch.tanh(logits / cap) if cap else logits


def linear_objective_reference(
    x: Tensor, weight: Tensor, labels: Tensor, *, cap: float | None = None, z: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`linear_objective` with all logits at once."""
    logits, labels = _logits_reference(x, weight, cap), labels.long()
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    z_part = z * (logits.logsumexp(-1).square() * (labels != IGNORED)).sum()
    return nll + z_part, z_part.detach()


def linear_consistency_reference(
    x1: Tensor,
    x2: Tensor,
    weight: Tensor,
    labels: Tensor,
    alpha: float,
    *,
    cap: float | None = None,
    z: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_consistency` with all logits at once."""
    (one, z1), (two, z2) = (
        linear_objective_reference(x, weight, labels, cap=cap, z=z) for x in (x1, x2)
    )
    log_p, log_q = (
        _logits_reference(x, weight, cap)[labels != IGNORED].log_softmax(-1) for x in (x1, x2)
    )
    both = [
        F.kl_div(b, a, log_target=True, reduction="sum")
        for a, b in ((log_p, log_q), (log_q, log_p))
    ]
    divergence = alpha / 2 * (both[0] + both[1])
    mean = (one + two - z1 - z2).detach() / 2
    return one + two + divergence, mean, divergence.detach()
