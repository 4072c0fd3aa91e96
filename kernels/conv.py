"""Causal depthwise convolution over packed documents, as shifted multiply-adds.

Shape letters: S sequence, B batch, C channels, K taps.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.opaque import opaque
from colonnade.kernels.precision import wide

# Elements processed at a time on CPU, so that they stay in cache over several passes.
BLOCK = 2**17


def _fake_convolved(rows: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(rows.shape[0] - weight.shape[0] + 1, *rows.shape[1:])


@opaque("causal_conv", _fake_convolved)
def _convolved(
    rows: Tensor, weight: Tensor, bias: Tensor | None, masks: Tensor | None, activation: bool
) -> Tensor:
    """Forward. Opaque: fused by Inductor it takes longer than by blocks, and seconds to compile."""
    y = rows.new_empty(len(rows) - len(weight) + 1, *rows.shape[1:])
    for start, stop in _blocks(y):
        out = _weighted_taps(rows, weight, bias, masks, start, stop)
        y[start:stop] = F.silu(out, inplace=True) if activation else out
    return y


def _fake_gradients(
    dy: Tensor, rows: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weight), torch.empty_like(weight[0])


@opaque("causal_conv_backward", _fake_gradients)
def _gradients(
    dy: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    masks: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, weight and bias; that of the bias is zeros where there is none."""
    drows, dweight = torch.zeros_like(rows, dtype=weight.dtype), torch.zeros_like(weight)
    dbias = torch.zeros_like(weight[0])
    for start, stop in _blocks(dy):
        grad = wide(dy[start:stop])
        if activation:
            out = _weighted_taps(rows, weight, bias, masks, start, stop)
            grad = torch.ops.aten.silu_backward(grad, out)
        if bias is not None:
            dbias += grad.sum((0, 1))
        for j, w in enumerate(weight):
            masked = grad if masks is None else grad * masks[j, start:stop]
            drows[start + j : stop + j].addcmul_(masked, w)
            dweight[j] += (masked * rows[start + j : stop + j]).sum((0, 1))
    return drows.to(rows.dtype), dweight, dbias


class _CausalConv(torch.autograd.Function):
    """The convolution of `rows` `[K - 1 + S, B, C]`; `masks` `[K, S, B, 1]` of the taps, or None.

    Autograd would save every tap's product; this saves the inputs and computes the sum again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,  # [K, C], at least fp32
        bias: Tensor | None,  # [C], at least fp32
        masks: Tensor | None,
        activation: bool,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, masks)
        ctx.activation = activation
        return _convolved(rows, weight, bias, masks, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, masks = ctx.saved_tensors
        drows, dweight, dbias = _gradients(dy, rows, weight, bias, masks, ctx.activation)
        return drows, dweight, None if bias is None else dbias, None, None


def _blocks(y: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows of `y` `[S, B, C]` to process one after the other."""
    S, row = len(y), y[:1].numel()
    step = max(1, BLOCK // max(1, row)) if y.device.type == "cpu" else S
    return ((start, min(start + step, S)) for start in range(0, S, step))


def _weighted_taps(
    rows: Tensor, weight: Tensor, bias: Tensor | None, masks: Tensor | None, start: int, stop: int
) -> Tensor:
    """The convolution without its activation, tokens `start` to `stop`, in the weight's dtype."""
    last = len(weight) - 1
    out = wide(rows[start + last : stop + last]) * weight[last]
    if bias is not None:
        out += bias
    for j in range(last):
        tap = wide(rows[start + j : stop + j])
        out.addcmul_(tap if masks is None else tap * masks[j, start:stop], weight[j])
    return out


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: bool,
    documents: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """y_t = act(Σ_j weight[:, j] x_{t-K+1+j} + bias), per channel, summed in at least fp32.

    Args:
        x: `[S, B, C]`, fp64, fp32 or bf16.
        weight: `[C, K]`, the current token's tap last.
        bias: `[C]` or None.
        activation: whether act is SiLU; else the identity.
        documents: `[S, B]` integers, constant within a document; taps read their own document only.
        before: `[K - 1, B, C]`, the rows before the first token, of its document; None: zeros.

    Returns:
        `[S, B, C]`, dtype of `x`.
    """
    rows, masks = _rows_and_masks(x, weight.shape[1], documents, before)
    if len(x) == 1 and not torch.is_grad_enabled():  # as in generation: no blocks to go through
        y = torch.einsum("kbc,ck->bc", wide(rows), wide(weight))[None]
        y = y if bias is None else y + wide(bias)
        return (F.silu(y, inplace=True) if activation else y).to(x.dtype)
    taps = wide(weight).t().contiguous()
    return _CausalConv.apply(rows, taps, None if bias is None else wide(bias), masks, activation)


def _rows_and_masks(
    x: Tensor, K: int, documents: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The rows before `x` and `x`, `[K - 1 + S, B, C]`, and the taps' masks, `[K, S, B, 1]`, which
    are False where a tap reads another document; None: all True."""
    if before is None:
        before = x.new_zeros(K - 1, *x.shape[1:])
    rows = torch.cat([before.to(x.dtype), x])
    if documents is None:
        return rows, None
    document_of = torch.cat([documents[:1].expand(K - 1, -1), documents])
    masks = torch.stack([document_of[j : j + len(x)] == documents for j in range(K)])
    return rows, masks[..., None]


def causal_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: bool,
    documents: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """`causal_conv` by its formula, token by token and tap by tap."""
    S, K = len(x), weight.shape[1]
    if documents is None:
        documents = torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
    outputs = []
    for t in range(S):
        total = torch.zeros_like(wide(x[t])) if bias is None else wide(bias).expand(x.shape[1:])
        for j in range(K):
            source = t - K + 1 + j
            if source >= 0:
                row, document = x[source], documents[source]
            elif before is not None:
                row, document = before[source], documents[0]  # `source` counts from the end
            else:
                continue
            masked = torch.where((document == documents[t])[:, None], wide(row), 0)
            total = total + wide(weight[:, j]) * masked
        outputs.append(F.silu(total) if activation else total)
    return torch.stack(outputs).to(x.dtype)
