"""Dropless mixture of experts: tokens sorted by expert, each expert on its rows, a sum per token.

Shape letters: T tokens, k experts per token, E experts, D hidden, F inner width of an expert.
Rows are moved by gathers only, forward and backward, so results do not depend on thread timing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.activation import activate, activate_reference, activated_linear
from colonnade.kernels.deferred import PutOff, put_off
from colonnade.kernels.linear import linear
from colonnade.kernels.precision import wide, wide_dtype
from colonnade.kernels.sharding import UNSHARDED, Sharding


@dataclass(frozen=True)
class DispatchOrder:
    """The order of rows sorted by expert; an assignment is number t·k + j, token t's j-th choice.

    Rows of dropped assignments come last, after the `counts.sum()` rows that have an expert: so the
    host knows all shapes, and the contents of dropped rows are never read.
    """

    counts: Tensor  # [E] int64, rows of each expert
    assignments: Tensor  # [T·k] int64, the assignment in each row
    rows: Tensor  # [T, k] int64, the row of each assignment
    keep_mask: Tensor | None  # [T, k] bool, False for dropped assignments; None: all are kept


def counts_on_host(counts: Tensor, rows: int) -> list:
    """The numbers of rows `[..., n]` as lists, for which the host waits.

    Fake tensors hold no numbers: each `[n]` of them is then an even division of `rows`.
    """
    if not isinstance(counts, FakeTensor):
        return counts.tolist()
    if counts.dim() > 1:
        return [counts_on_host(part, rows) for part in counts.unbind()]
    each, rest = divmod(rows, len(counts))
    return [each + 1] * rest + [each] * (len(counts) - rest)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: DispatchOrder) -> Tensor:
        ctx.order = order
        return x.index_select(0, order.assignments // order.rows.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_choices(grad, ctx.order), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, order: DispatchOrder) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.order = order
        return _sum_choices(rows, order, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        order: DispatchOrder = ctx.order
        dispatched = wide(grad.index_select(0, order.assignments // weight.shape[1]))
        d_weight = (dispatched * rows).sum(-1)[order.rows]
        d_rows = dispatched.mul_(weight.reshape(-1)[order.assignments, None])
        return d_rows.to(rows.dtype), d_weight.to(weight.dtype), None


def _sum_choices(rows: Tensor, order: DispatchOrder, weight: Tensor | None = None) -> Tensor:
    """y_t = Σ_j weight[t, j] rows[order.rows[t, j]], j in order, summed in at least fp32."""
    T, k = order.rows.shape
    y = torch.zeros(T, rows.shape[1], dtype=wide_dtype(rows.dtype), device=rows.device)
    for j in range(k):
        chosen = rows.index_select(0, order.rows[:, j]).to(y.dtype)
        if order.keep_mask is not None:  # not a weight of 0: dropped rows may hold NaN
            chosen = chosen.masked_fill_(~order.keep_mask[:, j, None], 0)
        y = y.add_(chosen) if weight is None else y.addcmul_(chosen, weight[:, j, None].to(y.dtype))
    return y.to(rows.dtype)


# Compiled graphs break at `dispatch`, `expert_mlp` and `combine`: how many rows an expert has
# is not known when they are compiled, and between gathers and products there is nothing to fuse.
@torch.compiler.disable
def dispatch(
    x: Tensor, chosen: Tensor, experts: int, keep_mask: Tensor | None = None
) -> tuple[Tensor, DispatchOrder]:
    """Copies each token to a row for every expert it chose, rows sorted by expert, then by token.

    Args:
        x: `[T, D]`.
        chosen: `[T, k]` int64 in `[0, experts)`.
        keep_mask: `[T, k]` bool, False for choices to drop; None keeps all.

    Returns:
        rows `[T·k, D]`, of which those of dropped choices come last and have no expert, and the
        order, which `combine` needs.
    """
    expert = chosen if keep_mask is None else torch.where(keep_mask, chosen, experts)
    sorted_, assignments = expert.reshape(-1).sort(stable=True)
    rows = torch.empty_like(assignments)
    rows[assignments] = torch.arange(len(assignments), device=chosen.device)
    ends = torch.searchsorted(sorted_, torch.arange(experts, device=chosen.device), right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    order = DispatchOrder(counts, assignments, rows.view(chosen.shape), keep_mask)
    return _Dispatch.apply(x, order), order


@torch.compiler.disable
def combine(rows: Tensor, order: DispatchOrder, weight: Tensor) -> Tensor:
    """Sums each token's rows, weighted; dropped choices add nothing.

    Args:
        rows: `[T·k, D]`, in the order of `dispatch`.
        weight: `[T, k]`, any floating dtype.

    Returns:
        `[T, D]`, dtype of `rows`.
    """
    if order.keep_mask is not None:  # dropped choices give no gradient to rows or weight
        weight = torch.where(order.keep_mask, weight, 0)
    return _Combine.apply(rows, weight, order)


class _GroupedProduct(torch.autograd.Function):
    """rows[e's range] @ weight[e]ᵀ for every expert e.

    torch's own backward refuses gradients that are not contiguous, and on some GPUs leaves
    arbitrary values for experts without rows (pytorch issue 172439).
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor, defer: PutOff | None
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        ctx.defer = defer
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        rows, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()

        def d_weight() -> Tensor:
            gradient = F.grouped_mm(grad.t(), rows, offs=ends)
            empty = ends.diff(prepend=ends.new_zeros(1)) == 0
            return gradient.masked_fill_(empty[:, None, None], 0)

        if ctx.defer is not None:
            ctx.defer(d_weight)
        d_rows = F.grouped_mm(grad, weight, offs=ends)
        return d_rows, d_weight() if ctx.needs_input_grad[1] else None, None, None


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows[e's range] @ weight[e]ᵀ for every expert e; rows from `ends[-1]` on are undefined."""
    weight, defer = put_off(weight, rows)
    return _GroupedProduct.apply(rows, weight, ends, defer)


def _grouped(rows: Tensor, up: Tensor) -> bool:
    """Whether to use the grouped product for these operands.

    On CPU one product per expert is as fast. It requires bf16 and rows of a multiple of 16 bytes.
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
    sharding: Sharding = UNSHARDED,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """down_e · act(gate_e · row, up_e · row) for every row, e being its expert; each product plus
    its bias.

    Args:
        rows: `[M, D]`, the first `counts[0]` rows are expert 0's, and so on; the remaining rows
            have no expert.
        counts: `[E]` integers that sum to M or less, zeros allowed (their experts' gradients are
            zeros).
        gate: `[E, F, D]`, or None where the activation has no gate.
        up: `[E, F, D]`; down: `[E, D, F]`.
        activation: a name of `kernels.activation.NAMES`.
        poly: `[4]`, the coefficients of a polynomial activation, shared by the experts.
        sharding: of the inner width, where F is one rank's shard of it.
        gate_bias, up_bias: `[E, F]`; None: none.
        down_bias: `[E, D]`, zeros on all but one of the ranks that share the width; None: none.

    Returns:
        `[M, D]`, undefined in rows without an expert. Where the inner width is sharded it is this
        rank's partial sum, which the caller all-reduces.
    """
    biases = gate_bias, up_bias, down_bias
    if _grouped(rows, up):
        return _grouped_mlp(rows, counts, gate, up, down, activation, poly, sharding, biases)
    sizes = counts_on_host(counts, len(rows))
    *by_expert, remaining = rows.split([*sizes, len(rows) - sum(sizes)])
    of_experts = ([None] * len(up) if t is None else t.unbind() for t in (gate, up, down, *biases))
    operands = zip(by_expert, *of_experts, strict=True)
    y = [_mlp(x, g, u, d, activation, poly, sharding, b) for x, g, u, d, *b in operands]
    return torch.cat([*y, torch.zeros_like(remaining)])


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def _mlp(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    poly: Tensor | None,
    sharding: Sharding,
    biases: Sequence[Tensor | None],
) -> Tensor:
    gate_bias, up_bias, down_bias = biases
    gated = None if gate is None else _plus(linear(x, gate), gate_bias)
    inner = _plus(linear(x, up), up_bias)
    return _plus(activated_linear(inner, gated, down, activation, poly, sharding), down_bias)


def _grouped_mlp(
    rows: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    poly: Tensor | None = None,
    sharding: Sharding = UNSHARDED,
    biases: Sequence[Tensor | None] = (None, None, None),
) -> Tensor:
    """`expert_mlp` by grouped products, without copying the counts to the host."""
    ends = counts.cumsum(0, dtype=torch.int32)
    gate_bias, up_bias, down_bias = biases
    if poly is not None or up_bias is not None:
        # Gradients of biases and of `poly` sum over rows, and rows without an expert hold
        # arbitrary values.
        index = torch.arange(len(rows), device=rows.device)[:, None]
        has_expert = index < ends[-1]
    if up_bias is not None:  # all have one, or none
        # A product with ones and zeros, whose backward sums rows in an order of its own.
        of_expert = ((index < ends) & (index >= ends - counts)).to(rows.dtype)

    def plus(y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else torch.where(has_expert, y + of_expert @ bias, 0)

    gated = None if gate is None else plus(grouped_product(rows, gate, ends), gate_bias)
    inner = plus(grouped_product(rows, up, ends), up_bias)
    if poly is None:
        inner = activate(inner, gated, activation)
    else:
        inner = activate(torch.where(has_expert, inner, 0), gated, activation, poly, sharding)
        inner = torch.where(has_expert, inner, 0)
    return plus(grouped_product(inner, down, ends), down_bias)


def experts(
    x: Tensor,
    chosen: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    poly: Tensor | None = None,
    keep_mask: Tensor | None = None,
    sharding: Sharding = UNSHARDED,
    **biases: Tensor | None,
) -> Tensor:
    """y_t = Σ_j weight[t, j] · expert_{chosen[t, j]}(x_t): `dispatch`, `expert_mlp`, `combine`.

    Args and result as for these: x `[T, D]`, chosen, weight and keep_mask `[T, k]`, y `[T, D]`.
    """
    rows, order = dispatch(x, chosen, len(up), keep_mask)
    out = expert_mlp(rows, order.counts, gate, up, down, activation, poly, sharding, **biases)
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
    keep_mask: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """`experts` by its formula: every expert on every token, masked."""
    y = torch.zeros_like(x)
    zero = x.new_zeros(len(up), 1)
    b_gate, b_up, b_down = (zero if b is None else b for b in (gate_bias, up_bias, down_bias))
    for e in range(len(up)):
        g = None if gate is None else x @ gate[e].T + b_gate[e]
        inner = activate_reference(x @ up[e].T + b_up[e], g, activation, poly)
        out = inner @ down[e].T + b_down[e]
        used = chosen == e if keep_mask is None else (chosen == e) & keep_mask
        y = y + torch.where(used, weight, 0).sum(1)[:, None] * out
    return y.to(x.dtype)
