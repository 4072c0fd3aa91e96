"""Attention over a sequence that the context group shards, by ring send/recv or by all-gather."""

from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.blockwise import AttendTiles, AttendTilesBackward, attend, attend_backward
from colonnade.kernels.precision import wide_dtype
from colonnade.kernels.tiles import DocumentStarts, ScoreOptions
from colonnade.parallel.context.allgather import AllGather
from colonnade.parallel.context.layout import SequenceSharding
from colonnade.parallel.context.p2p import group_by_name
from colonnade.parallel.context.ring import Ring

Variant = Literal["ring", "allgather"]


class KeyExchange(Protocol):
    """A way to bring all ranks' keys and values to every rank of the context group."""

    def visit_keys(self, k: Tensor, v: Tensor, attend_tiles: AttendTiles) -> None:
        """Calls `attend_tiles` until this rank's queries have attended to all keys and values,
        those of its shard, `k` and `v`, among them."""

    def visit_keys_backward(
        self, k: Tensor, v: Tensor, attend_tiles: AttendTilesBackward
    ) -> tuple[Tensor, Tensor]:
        """Does the same for backward, and returns the gradients of `k` and `v`, summed over all
        ranks' queries, in at least fp32."""


def _key_exchange(
    variant: str,
    rows: int,
    score_options: ScoreOptions,
    packed: bool,
    group: dist.ProcessGroup,
    zigzag: bool,
) -> KeyExchange:
    """The exchange of a variant over the context group; `rows` are a rank's tokens, S/n."""
    sharding = SequenceSharding(group.size(), group.rank(), zigzag)
    length = rows // sharding.segments_per_rank
    if variant == "ring":
        return Ring(sharding, length, score_options, packed, group)
    return AllGather(sharding, length, group)


# A custom operator, so that recomputation can keep its results instead of communicating again.
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
    """Attends to all keys by ring send/recv or all-gather over the context group.

    Returns:
        output; LSE; and under `clip` what backward takes in place of the output, else an empty
        tensor.
    """
    score_options = ScoreOptions(scale, window, cap, (clip[0], clip[1]) if clip else None)
    starts = None if documents is None else DocumentStarts(documents)
    group = group_by_name(group_name)
    exchange = _key_exchange(variant, len(q), score_options, starts is not None, group, zigzag)
    out, lse, for_backward = attend(q, k, v, sinks, score_options, starts, exchange.visit_keys)
    # Without `clip` it would be `out` again, and the results of an operator may not alias.
    return out, lse, q.new_empty(0) if clip is None else for_backward


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, clip = q.new_empty(*q.shape[:3], v.shape[3]), options[5]
    lse = torch.empty(q.shape[:3], dtype=wide_dtype(q.dtype), device=q.device)
    return out, lse, q.new_empty(0) if clip is None else torch.empty_like(out, dtype=lse.dtype)


CONTEXT_ATTENTION = torch.ops.colonnade.context_attention.default


class _ContextAttention(torch.autograd.Function):
    """Saves the rank's inputs, output and LSE; backward communicates all keys and values again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        documents: Tensor | None,
        score_options: ScoreOptions,
        variant: Variant,
        group: dist.ProcessGroup,
        zigzag: bool,
    ) -> Tensor:
        o = score_options
        clip = None if o.clip is None else [*o.clip]
        options = o.scale, o.window, o.cap, clip, variant, group.group_name, zigzag
        out, lse, for_backward = attention_forward(q, k, v, sinks, documents, *options)
        for_backward = out if clip is None else for_backward
        ctx.save_for_backward(q, k, v, sinks, documents, for_backward, lse)
        ctx.score_options = score_options
        ctx.exchange = variant, len(q), score_options, documents is not None, group, zigzag
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, documents, out, lse = ctx.saved_tensors
        starts = None if documents is None else DocumentStarts(documents)
        visit_keys = _key_exchange(*ctx.exchange).visit_keys_backward
        grads = attend_backward(
            grad, q, k, v, sinks, out, lse, ctx.score_options, starts, visit_keys
        )
        return *grads, *(None,) * 5


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup,
    *,
    score_options: ScoreOptions,
    variant: Variant = "ring",
    documents: Tensor | None = None,
    sinks: Tensor | None = None,
    zigzag: bool = True,
) -> Tensor:
    """`kernels.attention.attention` over a sequence that the n ranks of a context group shard.

    `ring` moves keys and values by send/recv over the group, `allgather` by an all-gather whose
    gradients are reduce-scattered. With m the bytes of a rank's keys and values and w those of as
    many numbers in fp32, a rank sends (n − 1) m forward, and backward `ring` (n − 1) m + n w,
    `allgather` (n − 1) (m + w). With a window that reaches r < n segments back, a ring's rank sends
    at most r m forward and r (m + w) backward.

    Args:
        q: `[S/n, B, H, P]`, this rank's segments, as `SequenceSharding` orders them.
        k: `[S/n, B, K, P]`.
        v: `[S/n, B, K, V]`.
        group: the context-parallel group.
        documents: `[S, B]`, of the full sequence, or None.
        sinks: `[H]` or None; its gradient is this rank's partial sum.

    Returns:
        `[S/n, B, H, V]`, dtype of `q`.
    """
    return _ContextAttention.apply(q, k, v, sinks, documents, score_options, variant, group, zigzag)
