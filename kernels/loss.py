"""Vocabulary projection fused with the losses of its logits, a chunk of tokens at a time."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.labels import IGNORED
from colonnade.kernels.linear import add_product, product
from colonnade.kernels.precision import wide, wide_dtype
from colonnade.kernels.sharding import UNSHARDED, Sharding


class _Gradients:
    """Gradients of inputs and weight, accumulated chunk by chunk in forward, while logits exist."""

    def __init__(self, inputs: tuple[Tensor, ...], weight: Tensor, with_gradients: bool) -> None:
        self.inputs, self.weight = inputs, weight
        self.d_inputs = [
            torch.empty_like(x) if with_gradients and x.requires_grad else None for x in inputs
        ]
        dtype = wide_dtype(weight.dtype)
        needed = with_gradients and weight.requires_grad
        self.d_weight = torch.zeros_like(weight, dtype=dtype) if needed else None

    def needed(self) -> bool:
        return self.d_weight is not None or any(d is not None for d in self.d_inputs)

    def add(self, i: int, tokens: slice, d_logits: Tensor) -> None:
        """Adds the gradients through `logits = inputs[i][tokens] @ weight.T`."""
        d_logits, d_x = d_logits.to(self.weight.dtype), self.d_inputs[i]
        if d_x is not None:
            d_x[tokens] = product(d_logits, self.weight.T)
        if self.d_weight is not None:
            add_product(self.d_weight, d_logits.T, self.inputs[i][tokens].T)

    def save(self, ctx: Any) -> None:
        ctx.gradients, ctx.weight_dtype = (self.d_inputs, self.d_weight), self.weight.dtype


def _scaled(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The saved gradients of inputs and weight times `grad`, in place: they can be used once."""
    if ctx.gradients is None:
        raise RuntimeError("the graph of a chunked loss can be walked backward once")
    d_inputs, d_weight = ctx.gradients
    ctx.gradients = None
    d_inputs = [None if d is None else d.mul_(grad) for d in d_inputs]
    return *d_inputs, None if d_weight is None else d_weight.mul_(grad).to(ctx.weight_dtype)


def _logits(
    x: Tensor, weight: Tensor, cap: float | None, with_gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits in at least fp32, and with gradients the derivative of capping them."""
    logits = wide(product(x, weight))
    if not cap:
        return logits, None
    logits = logits.div_(cap).tanh_()
    slope = logits.square().neg_().add_(1) if with_gradients else None
    return logits.mul_(cap), slope


@dataclass(frozen=True)
class _Targets:
    """The labels of a chunk of tokens, as columns of the local shard of the vocabulary."""

    valid: Tensor  # [T, 1] bool, the tokens that have a loss
    is_local: Tensor  # [T, 1] bool, those of them whose label is a local column
    column: Tensor  # [T, 1], the local column of the label, 0 where it is not local

    @staticmethod
    def of(labels: Tensor, columns: int, sharding: Sharding) -> "_Targets":
        labels = labels.long()[:, None]
        valid = is_local = labels != IGNORED
        if sharding.size > 1:
            labels = labels - sharding.rank * columns
            is_local = valid & (labels >= 0) & (labels < columns)
        return _Targets(valid, is_local, labels.where(is_local, 0))

    def values(self, t: Tensor) -> Tensor:
        """`t[column]`, 0 where the label is not local: `[T, 1]`."""
        return t.gather(1, self.column).masked_fill_(~self.is_local, 0)

    def sum(self, t: Tensor) -> Tensor:
        """The sum of `t`, `[..., T, 1]`, over tokens that have a loss."""
        return t.masked_fill(~self.valid, 0).sum()

    def finish(self, d_logits: Tensor, slope: Tensor | None) -> Tensor:
        """In place: subtracts 1 at the label, multiplies by the cap's derivative, and zeros tokens
        that have no loss."""
        d_logits.scatter_add_(1, self.column, self.is_local.to(d_logits.dtype).neg_())
        if slope is not None:
            d_logits.mul_(slope)
        return d_logits.mul_(self.valid)


def _shift(logits: list[Tensor], sharding: Sharding) -> Tensor:
    """Subtracts, in place, each row's maximum over the vocabulary, which it all-reduces; returns
    the maxima, `[passes, T, 1]`."""
    local_maxima = torch.stack([t.amax(-1, keepdim=True) for t in logits])
    maxima = sharding.all_reduce_max(local_maxima)
    for t, shift in zip(logits, maxima, strict=True):
        t.sub_(shift)
    return maxima


# A chunk's row statistics take one all-reduce of sums over the ranks that share the vocabulary; the
# consistency takes a second one. (Computed from the sums of the first, its divergence would be a
# small difference of large numbers where the passes nearly agree.)


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
        with_gradients: bool,
        sharding: Sharding,
    ) -> tuple[Tensor, Tensor]:
        gradients = _Gradients((x,), weight, with_gradients)
        nlls = x.new_zeros((), dtype=wide_dtype(x.dtype))
        zs = torch.zeros_like(nlls)
        for start in range(0, x.shape[0], chunk):
            tokens = slice(start, start + chunk)
            targets = _Targets.of(labels[tokens], len(weight), sharding)
            logits, slope = _logits(x[tokens], weight, cap, gradients.needed())
            maxima = _shift([logits], sharding)[0]
            target = targets.values(logits)
            powers = logits.exp_()
            sums = torch.stack([powers.sum(-1, keepdim=True), target])
            total, target = sharding.all_reduce(sums)
            lse = total.log()
            nlls += targets.sum(lse - target)
            lse += maxima
            if z:
                zs += z * targets.sum(lse.square())
            if gradients.needed():
                d_logits = powers.mul_((1 + 2 * z * lse) / total)
                gradients.add(0, tokens, targets.finish(d_logits, slope))
        gradients.save(ctx)
        ctx.mark_non_differentiable(zs)
        return nlls + zs, zs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx, grad), None, None, None, None, None, None


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
        with_gradients: bool,
        sharding: Sharding,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = _Gradients((x1, x2), weight, with_gradients)
        nlls = x1.new_zeros((), dtype=wide_dtype(x1.dtype))
        zs, divergences = torch.zeros_like(nlls), torch.zeros_like(nlls)
        for start in range(0, x1.shape[0], chunk):
            tokens = slice(start, start + chunk)
            targets = _Targets.of(labels[tokens], len(weight), sharding)
            logits, slopes = [], []
            for x in (x1, x2):
                pass_logits, slope = _logits(x[tokens], weight, cap, gradients.needed())
                logits.append(pass_logits)
                slopes.append(slope)
            del pass_logits  # `pop` below must drop the last reference to the second pass's logits
            maxima = _shift(logits, sharding)
            powers = [t.exp() for t in logits]
            sums = [t.sum(-1, keepdim=True) for t in powers]
            sums += [targets.values(t) for t in logits]
            totals, target = sharding.all_reduce(torch.stack(sums)).chunk(2)
            lses = totals.log()
            nlls += targets.sum(lses - target)
            # `pop` frees the second pass's logits before the divergence allocates as much again.
            delta = logits[0].sub_(logits.pop()).sub_(lses[0] - lses[1])
            p, q = (t.div_(total) for t, total in zip(powers, totals, strict=True))
            lses += maxima
            if z:
                zs += z * targets.sum(lses.square())
            factors = 1 + 2 * z * lses
            divergence, d_logits = _divergence(
                delta, p, q, alpha / 2, factors, gradients.needed(), sharding
            )
            divergences += targets.sum(divergence)
            for i, d in enumerate(d_logits):
                gradients.add(i, tokens, targets.finish(d, slopes[i]))
        gradients.save(ctx)
        mean = nlls / 2
        ctx.mark_non_differentiable(mean, divergences)
        return nlls + zs + divergences, mean, divergences

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx, grad), None, None, None, None, None, None, None


def _divergence(
    delta: Tensor,
    p: Tensor,
    q: Tensor,
    weight: float,
    factors: Tensor,
    with_gradients: bool,
    sharding: Sharding,
) -> tuple[Tensor, list[Tensor]]:
    """weight · Σ_v (p − q) δ, `[T, 1]`, of two softmaxes and δ = log p − log q, `[T, V]`.

    With gradients it also returns those in the logits of p and of q, plus `factors[0]` p and
    `factors[1]` q (from terms in logsumexp; `[T, 1]` each). The gradient in the logits of p is
    weight · (p (δ − Σ p δ) + p − q), that in the logits of q the same with p and q exchanged. The
    memory of `delta` is overwritten.
    """
    sums = [(p - q).mul_(delta).sum(-1, keepdim=True)]
    if with_gradients:  # KL(p‖q); KL(q‖p) is the total minus it
        sums.append((p * delta).sum(-1, keepdim=True))
    total, *p_to_q = sharding.all_reduce(torch.stack(sums))
    if not with_gradients:
        return weight * total, []
    in_p = weight * (1 - p_to_q[0]) + factors[0]
    in_q = weight * (1 - (total - p_to_q[0])) + factors[1]
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
    sharding: Sharding = UNSHARDED,
) -> tuple[Tensor, Tensor]:
    """Sum over valid tokens of −log softmax(l)[label] + z · logsumexp(l)², with l = x Wᵀ.

    The term in z keeps logsumexp near 0 (PaLM, arXiv:2204.02311, section 5). With a cap,
    l = cap · tanh(x Wᵀ / cap) (Gemma 2, arXiv:2408.00118). At most `chunk` rows of logits exist at
    one time, forward and backward. Backward can run once only.

    Args:
        x: `[T, D]`.
        weight: `[V, D]`, dtype of `x`.
        labels: `[T]` integers; `IGNORED` (−100) marks tokens without loss.
        chunk: tokens per chunk.
        sharding: of the vocabulary, where V is one rank's shard of it: `weight` is the rank-th
            block of V·size rows, and labels count over all of these.

    Returns:
        two scalars in at least fp32: the objective, and, without gradient, its term in z. Where the
        vocabulary is sharded both are all-reduced, equal on all ranks; the gradient of `x` is a
        partial sum, which the caller all-reduces.
    """
    with_gradients = torch.is_grad_enabled()  # inside `forward` it never is
    return _Objective.apply(x, weight, labels, chunk, cap, z, with_gradients, sharding)


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
    sharding: Sharding = UNSHARDED,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of two passes with a penalty on their difference (THOR, arXiv:2110.04260).

    It is the sum of both passes' `linear_objective` and, over valid tokens, of
    alpha · ½ Σ_v (p − q)(log p − log q), where p and q are the passes' distributions: alpha times
    the mean of both KL divergences. At most `chunk` tokens' logits of each pass exist at one time.
    Backward can run once only.

    Args:
        x1, x2: `[T, D]`.
        weight, labels, chunk, cap, z, sharding: as in `linear_objective`.

    Returns:
        three scalars in at least fp32: the objective, and, without gradient, the mean of the two
        cross entropies and the term in alpha, all summed over tokens; where the vocabulary is
        sharded as in `linear_objective`.
    """
    with_gradients = torch.is_grad_enabled()
    return _Consistency.apply(
        x1, x2, weight, labels, chunk, alpha, cap, z, with_gradients, sharding
    )


def _logits_reference(x: Tensor, weight: Tensor, cap: float | None) -> Tensor:
    logits = wide(x @ weight.T)
    return cap * torch.tanh(logits / cap) if cap else logits


def linear_objective_reference(
    x: Tensor, weight: Tensor, labels: Tensor, *, cap: float | None = None, z: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`linear_objective` with all logits at once."""
    logits, labels = _logits_reference(x, weight, cap), labels.long()
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    z_term = z * (logits.logsumexp(-1).square() * (labels != IGNORED)).sum()
    return nll + z_term, z_term.detach()


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
    divergences = [
        F.kl_div(b, a, log_target=True, reduction="sum")
        for a, b in ((log_p, log_q), (log_q, log_p))
    ]
    divergence = alpha / 2 * (divergences[0] + divergences[1])
    mean = (one + two - z1 - z2).detach() / 2
    return one + two + divergence, mean, divergence.detach()
