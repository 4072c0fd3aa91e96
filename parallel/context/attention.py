"""Attention over a sequence of which each rank holds a part, whichever way keys and values come."""

from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.blockwise import AttendTiles, AttendTilesBackward, attend, attend_backward
from colonnade.kernels.precision import wide_dtype
from colonnade.kernels.tiles import DocumentStarts, ScoreOptions
from colonnade.parallel.context.gathered import Gathered
from colonnade.parallel.context.hops import group_of
from colonnade.parallel.context.layout import SequenceSharding
from colonnade.parallel.context.ring import Ring

Variant = Literal["ring", "allgather"]


class Exchange(Protocol):
    """How a rank comes to see other ranks' keys and values."""

    def see(self, k: Tensor, v: Tensor, look: AttendTiles) -> None:
        """Have all keys and values looked at, this rank's `k` and `v` among them."""

    def back(self, k: Tensor, v: Tensor, look: AttendTilesBackward) -> tuple[Tensor, Tensor]:
        """The gradients of `k` and `v`, in at least fp32, that all ranks find."""


def _exchange(
    variant: str,
    rows: int,
    rule: ScoreOptions,
    packed: bool,
    group: dist.ProcessGroup,
    zigzag: bool,
) -> Exchange:
    """`rows` are a rank's."""
    cut = SequenceSharding(group.size(), group.rank(), zigzag)
    if variant == "ring":
        return Ring(cut, rows // cut.parts, rule, packed, group)
    return Gathered(cut, rows // cut.parts, group)


# An operator, so that recomputation can keep its results instead of sending everything again.
@torch.library.custom_op("colonnade::context_attention", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    documents: Tensor | None,
    scale: float,
    window: int | None,
    cap: float | None,
    clip: list[float] | None,
    variant: str,
    group_name: str,
    zigzag: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE, and under `clip` what backward takes for the output, else nothing."""
    rule = ScoreOptions(scale, window, cap, (clip[0], clip[1]) if clip else None)
    packing = None if documents is None else DocumentStarts(documents)
    group = group_of(group_name)
    exchange = _exchange(variant, len(q), rule, packing is not None, group, zigzag)
    out, lse, through = attend(q, k, v, sinks, rule, packing, exchange.see)
    return out, lse, q.new_empty(0) if clip is None else through  # an operator's results are apart


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, clip = q.new_empty(*q.shape[:3], v.shape[3]), options[5]
    lse = torch.empty(q.shape[:3], dtype=wide_dtype(q.dtype), device=q.device)
    return out, lse, q.new_empty(0) if clip is None else torch.empty_like(out, dtype=lse.dtype)


ATTENTION = torch.ops.colonnade.context_attention.default


class _ContextAttention(torch.autograd.Function):
    """Keeps the rank's inputs, output and LSE; backward has all keys and values come again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        documents: Tensor | None,
        rule: ScoreOptions,
        variant: Variant,
        group: dist.ProcessGroup,
        zigzag: bool,
    ) -> Tensor:
        clip = None if rule.clip is None else [*rule.clip]
        options = rule.scale, rule.window, rule.cap, clip, variant, group.group_name, zigzag
        out, lse, through = attention_forward(q, k, v, sinks, documents, *options)
        through = out if clip is None else through
        ctx.save_for_backward(q, k, v, sinks, documents, through, lse)
        ctx.rule, ctx.exchange = rule, (variant, len(q), rule, documents is not None, group, zigzag)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, documents, through, lse = ctx.saved_tensors
        packing = None if documents is None else DocumentStarts(documents)
        back = _exchange(*ctx.exchange).back
        found = attend_backward(grad, q, k, v, sinks, through, lse, ctx.rule, packing, back)
        return *found, *(None,) * 5


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup,
    *,
    rule: ScoreOptions,
    variant: Variant = "ring",
    documents: Tensor | None = None,
    sinks: Tensor | None = None,
    zigzag: bool = True,
) -> Tensor:
    """`kernels.attention.attention` over the sequence of which each of n ranks holds a part.

    With m the bytes of a rank's keys and values and w those of as many numbers in fp32, a rank
    sends (n − 1) m forward, and backward `ring` (n − 1) m + n w, `allgather` (n − 1) (m + w). With
    a window that reaches r < n segments back, a ring's rank sends at most r m and r (m + w).

    Args:
        q: `[S/n, B, H, P]`, this rank's segments, as `SequenceSharding` has them.
        k: `[S/n, B, K, P]`.
        v: `[S/n, B, K, V]`.
        documents: `[S, B]`, of the whole sequence, or None.
        sinks: `[H]` or None; its gradient is this rank's part.

    Returns:
        `[S/n, B, H, V]`, dtype of `q`.
    """
    return _ContextAttention.apply(q, k, v, sinks, documents, rule, variant, group, zigzag)
