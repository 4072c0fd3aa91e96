"""Halo exchange for causal convolutions: send/recv over the context group gives each segment the
last rows of the segment before it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.conv import causal_conv
from colonnade.models.blocks.base import Conv, local_conv
from colonnade.models.context import Context
from colonnade.parallel.context.layout import SequenceSharding
from colonnade.parallel.context.p2p import group_by_name, launch_send_recv, next_segment_route


# A custom operator, so that recomputation can keep its results instead of communicating again.
@torch.library.custom_op("colonnade::halo_send_recv", mutates_args=())
def halo_send_recv(rows: Tensor, group_name: str, zigzag: bool, backward: bool) -> Tensor:
    """Sends rows of every segment, `[segments_per_rank, ...]`, to the rank of the next segment, or
    under `backward` to that of the previous one, and returns the rows received in their place."""
    group = group_by_name(group_name)
    route = next_segment_route(SequenceSharding(group.size(), group.rank(), zigzag))
    return launch_send_recv(rows.contiguous(), route.reversed() if backward else route, group)()


@halo_send_recv.register_fake
def _(rows: Tensor, group_name: str, zigzag: bool, backward: bool) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


HALO_SEND_RECV = torch.ops.colonnade.halo_send_recv.default


class _HaloExchange(torch.autograd.Function):
    """Sends rows to the next segment over the context group; backward returns their gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup, zigzag: bool) -> Tensor:
        ctx.options = group.group_name, zigzag
        return halo_send_recv(rows, *ctx.options, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return halo_send_recv(grad, *ctx.options, True), None, None


def context_conv(sharding: SequenceSharding, group: dist.ProcessGroup) -> Conv:
    """The `conv` seam: convolves this rank's segments, `x` `[S/n, B, C]`, each with its halo, the
    rows before it, which come by send/recv over the context group."""

    def conv(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: bool,
        role: str,
        context: Context,
    ) -> Tensor:
        rows = weight.shape[1] - 1  # that the first output of a segment reads before it
        if context.cache is not None or not rows:
            return local_conv(x, weight, bias, activation, role, context)
        segments, documents = x.chunk(sharding.segments_per_rank), context.documents
        last_rows = torch.stack([segment[-rows:] for segment in segments])
        halo = _HaloExchange.apply(last_rows, group, sharding.zigzag)
        numbers: tuple[Tensor | None, ...] = (None,) * sharding.segments_per_rank
        if documents is not None:
            numbers = documents.chunk(sharding.segments_per_rank)
            halo = halo * _same_document(sharding, context, rows)[..., None]
        return torch.cat(
            [
                causal_conv(segment, weight, bias, activation=activation, documents=d, before=h)
                for segment, d, h in zip(segments, numbers, halo, strict=True)
            ]
        )

    return conv


def _same_document(sharding: SequenceSharding, context: Context, rows: int) -> Tensor:
    """Whether each of the `rows` before a segment is of the document that the segment starts with,
    `[segments_per_rank, rows, B]`."""
    documents = context.whole_documents
    assert documents is not None
    length, segments = len(documents) // sharding.segments, sharding.local_segments
    before = [documents[s * length - rows : s * length] for s in segments if s]
    # Nothing is before the first segment: it receives zeros, of no document.
    none = [torch.full_like(documents[:rows], -1)] * (len(segments) - len(before))
    first = torch.stack([documents[s * length] for s in segments])
    return torch.stack([*none, *before]) == first[:, None]
