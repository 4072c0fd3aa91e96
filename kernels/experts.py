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
from colonnade.kernels.linear import linear
from colonnade.kernels.precision import wide, wide_dtype


@dataclass(frozen=True)
class Order:
    """How assignments (token t's j-th choice is number t·k + j) became rows sorted by expert."""

    counts: Tensor  # [E] int64, rows of each expert
    assignments: Tensor  # [T·k] int64, the assignment in each row
    rows: Tensor  # [T·k] int64, the row of each assignment


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Order, k: int) -> Tensor:
        ctx.order, ctx.k = order, k
        return x.index_select(0, order.assignments // k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _sum_choices(grad, ctx.order.rows.view(-1, ctx.k)), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.order = order
        return _sum_choices(rows, order.rows.view_as(weight), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        order: Order = ctx.order
        spread = wide(grad.index_select(0, order.assignments // weight.shape[1]))
        d_weight = (spread * rows).sum(-1)[order.rows].view_as(weight)
        d_rows = spread.mul_(weight.reshape(-1)[order.assignments, None])
        return d_rows.to(rows.dtype), d_weight.to(weight.dtype), None


def _sum_choices(rows: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
    """y_t = Σ_j weight[t, j] rows[index[t, j]], j in order, summed in at least fp32."""
    T, k = index.shape
    y = torch.zeros(T, rows.shape[1], dtype=wide_dtype(rows.dtype), device=rows.device)
    for j in range(k):
        chosen = rows.index_select(0, index[:, j]).to(y.dtype)
        y = y.add_(chosen) if weight is None else y.addcmul_(chosen, weight[:, j, None].to(y.dtype))
    return y.to(rows.dtype)


def dispatch(x: Tensor, chosen: Tensor, experts: int) -> tuple[Tensor, Order]:
    """Copy each token to a row for every expert it chose, rows sorted by expert, then by token.

    Args:
        x: `[T, D]`.
        chosen: `[T, k]` int64 in `[0, experts)`.

    Returns:
        rows `[T·k, D]` and the order, which `combine` needs.
    """
    sorted_, assignments = chosen.reshape(-1).sort(stable=True)
    rows = torch.empty_like(assignments)
    rows[assignments] = torch.arange(len(assignments), device=chosen.device)
    ends = torch.searchsorted(sorted_, torch.arange(experts, device=chosen.device), right=True)
    order = Order(ends.diff(prepend=ends.new_zeros(1)), assignments, rows)
    return _Dispatch.apply(x, order, chosen.shape[1]), order


def combine(rows: Tensor, order: Order, weight: Tensor) -> Tensor:
    """Sum each token's rows, weighted.

    Args:
        rows: `[T·k, D]`, in the order of `dispatch`.
        weight: `[T, k]`, any floating dtype.

    Returns:
        `[T, D]`, dtype of `rows`.
    """
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


def expert_mlp(
    rows: Tensor, counts: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """down_e · act(gate_e · row, up_e · row) for every row, e the expert that owns it.

    Args:
        rows: `[M, D]`, the first `counts[0]` rows expert 0's, and so on.
        counts: `[E]` integers that sum to M, zeros allowed (their experts' gradients are zeros).
        gate: `[E, F, D]`, or None where the activation has no gate.
        up: `[E, F, D]`; down: `[E, D, F]`.
        activation: a name that `kernels.activation.activate` knows.

    Returns:
        `[M, D]`.
    """
    if _grouped(rows, up):
        return _grouped_mlp(rows, counts, gate, up, down, activation)
    gates = [None] * len(up) if gate is None else gate.unbind()
    parts = zip(rows.split(counts.tolist()), gates, up.unbind(), down.unbind(), strict=True)
    return torch.cat([_mlp(x, g, u, d, activation) for x, g, u, d in parts])


def _mlp(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: str) -> Tensor:
    inner = None if gate is None else linear(x, gate)
    return activated_linear(linear(x, up), inner, down, activation)


def _grouped_mlp(
    rows: Tensor, counts: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """`expert_mlp` by grouped products, without telling the host the counts."""
    ends = counts.cumsum(0, dtype=torch.int32)
    gated = None if gate is None else _GroupedProduct.apply(rows, gate, ends)
    inner = activate(_GroupedProduct.apply(rows, up, ends), gated, activation)
    return _GroupedProduct.apply(inner, down, ends)


def experts(
    x: Tensor,
    chosen: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
) -> Tensor:
    """y_t = Σ_j weight[t, j] · expert_{chosen[t, j]}(x_t): `dispatch`, `expert_mlp`, `combine`.

    Args and result as there: x `[T, D]`, chosen and weight `[T, k]`, y `[T, D]`.
    """
    rows, order = dispatch(x, chosen, len(up))
    return combine(expert_mlp(rows, order.counts, gate, up, down, activation), order, weight)


def experts_reference(
    x: Tensor,
    chosen: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
) -> Tensor:
    """`experts` by its formula: every expert on every token, masked."""
    y = torch.zeros_like(x)
    for e in range(len(up)):
        g = None if gate is None else x @ gate[e].T
        out = activate_reference(x @ up[e].T, g, activation) @ down[e].T
        y = y + torch.where(chosen == e, weight, 0).sum(1)[:, None] * out
    return y.to(x.dtype)
