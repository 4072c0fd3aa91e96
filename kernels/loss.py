"""Vocabulary projection and losses of its logits in one, a chunk of logits at a time."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.cut import WHOLE, Cut
from colonnade.kernels.linear import add_product, product
from colonnade.kernels.precision import wide, wide_dtype

IGNORED = -100  # label of a token without loss, as in torch.nn.functional.cross_entropy


class _Gradients:
    """Gradients of inputs and weight, collected chunk by chunk while the logits exist anyway."""

    def __init__(self, inputs: tuple[Tensor, ...], weight: Tensor, with_gradients: bool) -> None:
        self.inputs, self.weight = inputs, weight
        self.d_inputs = [
            torch.empty_like(x) if with_gradients and x.requires_grad else None for x in inputs
        ]
        dtype = wide_dtype(weight.dtype)
        wanted = with_gradients and weight.requires_grad
        self.d_weight = torch.zeros_like(weight, dtype=dtype) if wanted else None

    def wanted(self) -> bool:
        return self.d_weight is not None or any(d is not None for d in self.d_inputs)

    def add(self, i: int, part: slice, d_logits: Tensor) -> None:
        """Those of `logits = inputs[i][part] @ weight.T`."""
        d_logits, d_x = d_logits.to(self.weight.dtype), self.d_inputs[i]
        if d_x is not None:
            d_x[part] = product(d_logits, self.weight.T)
        if self.d_weight is not None:
            add_product(self.d_weight, d_logits.T, self.inputs[i][part].T)

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
    x: Tensor, weight: Tensor, cap: float | None, with_gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits in at least fp32, and the derivative of capping them."""
    logits = wide(product(x, weight))
    if not cap:
        return logits, None
    logits = logits.div_(cap).tanh_()
    slope = logits.square().neg_().add_(1) if with_gradients else None
    return logits.mul_(cap), slope


@dataclass(frozen=True)
class _Targets:
    """The labels of a chunk of tokens, in the columns of the vocabulary that are here."""

    valid: Tensor  # [T, 1] bool, the tokens that have a loss
    here: Tensor  # [T, 1] bool, those of them whose label is one of these columns
    column: Tensor  # [T, 1], its number, 0 where it is not here

    @staticmethod
    def of(labels: Tensor, columns: int, cut: Cut) -> "_Targets":
        labels = labels.long()[:, None]
        valid = here = labels != IGNORED
        if cut.count > 1:
            labels = labels - cut.index * columns
            here = valid & (labels >= 0) & (labels < columns)
        return _Targets(valid, here, labels.where(here, 0))

    def values(self, t: Tensor) -> Tensor:
        """`t[column]`, 0 where the label is not here: `[T, 1]`."""
        return t.gather(1, self.column).masked_fill_(~self.here, 0)

    def sum(self, t: Tensor) -> Tensor:
        """The sum over tokens with a loss of `t`, `[..., T, 1]`."""
        return t.masked_fill(~self.valid, 0).sum()

    def finish(self, d_logits: Tensor, slope: Tensor | None) -> Tensor:
        """In place: minus 1 at the label, through the cap, zero without a loss."""
        d_logits.scatter_add_(1, self.column, self.here.to(d_logits.dtype).neg_())
        if slope is not None:
            d_logits.mul_(slope)
        return d_logits.mul_(self.valid)


def _shift(logits: list[Tensor], cut: Cut) -> Tensor:
    """In place: minus each row's largest over the vocabulary; returns these, `[passes, T, 1]`."""
    largest = cut.largest(torch.stack([own.amax(-1, keepdim=True) for own in logits]))
    for own, shift in zip(logits, largest, strict=True):
        own.sub_(shift)
    return largest


# Statistics of rows are completed over the ranks of a cut by as few sums as can be: one, and for
# the consistency one more. (Its divergence from the first would be a small difference of large
# numbers where the passes nearly agree.)


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
        cut: Cut,
    ) -> tuple[Tensor, Tensor]:
        gradients = _Gradients((x,), weight, with_gradients)
        nlls = x.new_zeros((), dtype=wide_dtype(x.dtype))
        zs = torch.zeros_like(nlls)
        for start in range(0, x.shape[0], chunk):
            part = slice(start, start + chunk)
            targets = _Targets.of(labels[part], len(weight), cut)
            logits, slope = _logits(x[part], weight, cap, gradients.wanted())
            largest = _shift([logits], cut)[0]
            target = targets.values(logits)
            powers = logits.exp_()
            total, target = cut.total(torch.stack([powers.sum(-1, keepdim=True), target]))
            norm = total.log()
            nlls += targets.sum(norm - target)
            norm += largest
            if z:
                zs += z * targets.sum(norm.square())
            if gradients.wanted():
                d_logits = powers.mul_((1 + 2 * z * norm) / total)
                gradients.add(0, part, targets.finish(d_logits, slope))
        gradients.keep(ctx)
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
        cut: Cut,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = _Gradients((x1, x2), weight, with_gradients)
        nlls = x1.new_zeros((), dtype=wide_dtype(x1.dtype))
        zs, divergences = torch.zeros_like(nlls), torch.zeros_like(nlls)
        for start in range(0, x1.shape[0], chunk):
            part = slice(start, start + chunk)
            targets = _Targets.of(labels[part], len(weight), cut)
            logits, slopes = [], []
            for x in (x1, x2):
                own, slope = _logits(x[part], weight, cap, gradients.wanted())
                logits.append(own)
                slopes.append(slope)
            largest = _shift(logits, cut)
            powers = [own.exp() for own in logits]
            sums = [own.sum(-1, keepdim=True) for own in powers]
            sums += [targets.values(own) for own in logits]
            totals, target = cut.total(torch.stack(sums)).chunk(2)
            norms = totals.log()
            nlls += targets.sum(norms - target)
            # popped: its memory is free for what follows
            delta = logits[0].sub_(logits.pop()).sub_(norms[0] - norms[1])
            p, q = (own.div_(total) for own, total in zip(powers, totals, strict=True))
            norms += largest
            if z:
                zs += z * targets.sum(norms.square())
            factors = 1 + 2 * z * norms
            divergence, d_logits = _divergence(
                delta, p, q, alpha / 2, factors, gradients.wanted(), cut
            )
            divergences += targets.sum(divergence)
            for i, d in enumerate(d_logits):
                gradients.add(i, part, targets.finish(d, slopes[i]))
        gradients.keep(ctx)
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
    cut: Cut,
) -> tuple[Tensor, list[Tensor]]:
    """weight · Σ_v (p − q) δ, `[T, 1]`, of two softmaxes and δ = log p − log q, `[T, V]`: consumed.

    With gradients also those in the logits of p and of q, plus `factors[0]` p and `factors[1]`
    q (of terms in logsumexp; `[T, 1]` each). That in the logits of p is
    weight · (p (δ − Σ p δ) + p − q), and that in q's the same with p and q exchanged.
    """
    sums = [(p - q).mul_(delta).sum(-1, keepdim=True)]
    if with_gradients:  # KL(p‖q); KL(q‖p) is the rest of the total
        sums.append((p * delta).sum(-1, keepdim=True))
    total, *p_to_q = cut.total(torch.stack(sums))
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
    cut: Cut = WHOLE,
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
        cut: of the vocabulary, V here being one rank's share of it: of V·count rows, `weight` is
            the index-th block, and labels number them all.

    Returns:
        two scalars in at least fp32: the objective, and without gradient the part of it due to z.
        With a cut both are of the whole vocabulary, equal on all ranks; the gradient of `x` is what
        this block gives, and the ranks' sum is the whole one.
    """
    with_gradients = torch.is_grad_enabled()  # inside `forward` it never is
    return _Objective.apply(x, weight, labels, chunk, cap, z, with_gradients, cut)


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
    cut: Cut = WHOLE,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of two passes that are to agree (THOR, arXiv:2110.04260).

    Both passes' `linear_objective`, and of valid tokens alpha · ½ Σ_v (p − q)(log p − log q), where
    p and q are their distributions: alpha times the mean of both KL divergences. At most `chunk`
    tokens' logits of each pass exist at one time. The graph can be walked backward once.

    Args:
        x1, x2: `[T, D]`.
        weight, labels, chunk, cap, z, cut: as in `linear_objective`.

    Returns:
        three scalars in at least fp32: the objective, and without gradient the mean of the two
        cross entropies and the term in alpha, all summed over tokens; with a cut as in
        `linear_objective`.
    """
    with_gradients = torch.is_grad_enabled()
    return _Consistency.apply(x1, x2, weight, labels, chunk, alpha, cap, z, with_gradients, cut)


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
