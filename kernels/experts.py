"""Dropless mixture of experts: sort tokens by expert, run each expert on its rows, sum per token.

Shape letters: T tokens, k experts per token, E experts, D hidden, F inner width of an expert.
Every move of rows is a gather, forward and backward, so results do not depend on thread timing.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.activation import activate, activate_reference, activated_linear
from colonnade.kernels.cut import WHOLE, Cut
from colonnade.kernels.linear import linear
from colonnade.kernels.precision import wide, wide_dtype


@dataclass(frozen=True)
class Order:
    """How assignments (token t's j-th choice is number t·k + j) became rows sorted by expert.

    Rows of dropped assignments come last, after the `counts.sum()` rows that experts own: shapes
    stay known to the host, and what the dropped rows hold is never read.
    """

    counts: Tensor  # [E] int64, rows of each expert
    assignments: Tensor  # [T·k] int64, the assignment in each row
    rows: Tensor  # [T, k] int64, the row of each assignment
    kept: Tensor | None  # [T, k] bool, the assignments that an expert serves; None for all


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return x.index_select(0, order.assignments // order.rows.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_choices(grad, ctx.order), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.order = order
        return _sum_choices(rows, order, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        order: Order = ctx.order
        spread = wide(grad.index_select(0, order.assignments // weight.shape[1]))
        d_weight = (spread * rows).sum(-1)[order.rows]
        d_rows = spread.mul_(weight.reshape(-1)[order.assignments, None])
        return d_rows.to(rows.dtype), d_weight.to(weight.dtype), None


def _sum_choices(rows: Tensor, order: Order, weight: Tensor | None = None) -> Tensor:
    """y_t = Σ_j weight[t, j] rows[order.rows[t, j]], j in order, summed in at least fp32."""
    T, k = order.rows.shape
    y = torch.zeros(T, rows.shape[1], dtype=wide_dtype(rows.dtype), device=rows.device)
    for j in range(k):
        chosen = rows.index_select(0, order.rows[:, j]).to(y.dtype)
        if order.kept is not None:  # not a weight of 0: dropped rows may hold NaN
            chosen = chosen.masked_fill_(~order.kept[:, j, None], 0)
        y = y.add_(chosen) if weight is None else y.addcmul_(chosen, weight[:, j, None].to(y.dtype))
    return y.to(rows.dtype)


# Compiled graphs break at `dispatch`, `expert_mlp` and `combine`: how many rows an expert owns is
# known when it is too late for them, and between gathers and products there is nothing to fuse.
@torch.compiler.disable
def dispatch(
    x: Tensor, chosen: Tensor, experts: int, kept: Tensor | None = None
) -> tuple[Tensor, Order]:
    """Copy each token to a row for every expert it chose, rows sorted by expert, then by token.

    Args:
        x: `[T, D]`.
        chosen: `[T, k]` int64 in `[0, experts)`.
        kept: `[T, k]` bool, the choices that find a place; the others are dropped. None keeps all.

    Returns:
        rows `[T·k, D]`, those of dropped choices last and no expert's, and the order, which
        `combine` needs.
    """
    expert = chosen if kept is None else torch.where(kept, chosen, experts)
    sorted_, assignments = expert.reshape(-1).sort(stable=True)
    rows = torch.empty_like(assignments)
    rows[assignments] = torch.arange(len(assignments), device=chosen.device)
    ends = torch.searchsorted(sorted_, torch.arange(experts, device=chosen.device), right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    order = Order(counts, assignments, rows.view(chosen.shape), kept)
    return _Dispatch.apply(x, order), order


@torch.compiler.disable
def combine(rows: Tensor, order: Order, weight: Tensor) -> Tensor:
    """Sum each token's rows, weighted; dropped choices add nothing.

    Args:
        rows: `[T·k, D]`, in the order of `dispatch`.
        weight: `[T, k]`, any floating dtype.

    Returns:
        `[T, D]`, dtype of `rows`.
    """
    if order.kept is not None:  # so dropped choices pass no gradient, neither to rows nor to weight
        weight = torch.where(order.kept, weight, 0)
    return _Combine.apply(rows, weight, order)


class _GroupedProduct(torch.autograd.Function):
    """rows[e's range] @ weight[e]ᵀ for every expert e.

    torch's own derivative refuses gradients that are not contiguous, and on some GPUs leaves
    rubbish for experts without rows (pytorch issue 172439).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        d_weight = F.grouped_mm(grad.t(), rows, offs=ends)
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        d_weight.masked_fill_(empty[:, None, None], 0)
        return F.grouped_mm(grad, weight, offs=ends), d_weight, None


def _grouped(rows: Tensor, up: Tensor) -> bool:
    """Whether the grouped product serves these operands, and is worth it.

    On CPU a product per expert is as fast. It wants bf16 and rows of a multiple of 16 bytes.
    """
    aligned = all(width * rows.element_size() % 16 == 0 for width in up.shape[1:])
    return rows.is_cuda and rows.dtype == torch.bfloat16 and aligned and len(rows) > 0


@torch.compiler.disable
def expert_mlp(
    rows: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    poly: Tensor | None = None,
    cut: Cut = WHOLE,
) -> Tensor:
    """down_e · act(gate_e · row, up_e · row) for every row, e the expert that owns it.

    Args:
        rows: `[M, D]`, the first `counts[0]` rows expert 0's, and so on; the rest are no one's.
        counts: `[E]` integers that sum to M or less, zeros allowed (their experts' gradients are
            zeros).
        gate: `[E, F, D]`, or None where the activation has no gate.
        up: `[E, F, D]`; down: `[E, D, F]`.
        activation: a name that `kernels.activation.activate` knows.
        poly: `[4]`, the coefficients of a polynomial activation, shared by the experts.
        cut: of the whole inner width, where the F columns here are one rank's.

    Returns:
        `[M, D]`, with a cut the part of it that these columns make; what it holds for the rest is
        undefined.
    """
    if _grouped(rows, up):
        return _grouped_mlp(rows, counts, gate, up, down, activation, poly, cut)
    sizes = counts.tolist()
    *owned, rest = rows.split([*sizes, len(rows) - sum(sizes)])
    gates = [None] * len(up) if gate is None else gate.unbind()
    parts = zip(owned, gates, up.unbind(), down.unbind(), strict=True)
    y = [_mlp(x, g, u, d, activation, poly, cut) for x, g, u, d in parts]
    return torch.cat([*y, torch.zeros_like(rest)])


def _mlp(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    poly: Tensor | None,
    cut: Cut,
) -> Tensor:
    inner = None if gate is None else linear(x, gate)
    return activated_linear(linear(x, up), inner, down, activation, poly, cut)


def _grouped_mlp(
    rows: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    poly: Tensor | None = None,
    cut: Cut = WHOLE,
) -> Tensor:
    """`expert_mlp` by grouped products, without telling the host the counts."""
    ends = counts.cumsum(0, dtype=torch.int32)
    gated = None if gate is None else _GroupedProduct.apply(rows, gate, ends)
    inner = _GroupedProduct.apply(rows, up, ends)
    if poly is None:
        inner = activate(inner, gated, activation)
    else:  # its gradient sums over rows, and products leave rubbish in those no expert owns
        owned = torch.arange(len(rows), device=rows.device)[:, None] < ends[-1]
        inner = activate(torch.where(owned, inner, 0), gated, activation, poly, cut)
        inner = torch.where(owned, inner, 0)
    return _GroupedProduct.apply(inner, down, ends)


def experts(
    x: Tensor,
    chosen: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    poly: Tensor | None = None,
    kept: Tensor | None = None,
    cut: Cut = WHOLE,
) -> Tensor:
    """y_t = Σ_j weight[t, j] · expert_{chosen[t, j]}(x_t): `dispatch`, `expert_mlp`, `combine`.

    Args and result as there: x `[T, D]`, chosen, weight and kept `[T, k]`, y `[T, D]`.
    """
    rows, order = dispatch(x, chosen, len(up), kept)
    out = expert_mlp(rows, order.counts, gate, up, down, activation, poly, cut)
    return combine(out, order, weight)


def experts_reference(
    x: Tensor,
    chosen: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    poly: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """`experts` by its formula: every expert on every token, masked."""
    y = torch.zeros_like(x)
    for e in range(len(up)):
        g = None if gate is None else x @ gate[e].T
        out = activate_reference(x @ up[e].T, g, activation, poly) @ down[e].T
        used = chosen == e if kept is None else (chosen == e) & kept
        y = y + torch.where(used, weight, 0).sum(1)[:, None] * out
    return y.to(x.dtype)
