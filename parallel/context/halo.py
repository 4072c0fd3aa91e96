"""Convolutions over a sequence of which each rank holds a part: the rows before each segment."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.conv import causal_conv
from colonnade.models.blocks.base import Conv, local_conv
from colonnade.models.context import Context
from colonnade.parallel.context.hops import along, group_of, send
from colonnade.parallel.context.layout import SequenceSharding


# An operator, so that recomputation can keep its results instead of sending everything again.
@torch.library.custom_op("colonnade::handed_on", mutates_args=())
def handed_on(rows: Tensor, group_name: str, zigzag: bool, back: bool) -> Tensor:
    """`[parts, ...]` of every segment to the one after it, or the one before it."""
    group = group_of(group_name)
    hop = along(SequenceSharding(group.size(), group.rank(), zigzag))
    return send(rows.contiguous(), hop.back() if back else hop, group)()


@handed_on.register_fake
def _(rows: Tensor, group_name: str, zigzag: bool, back: bool) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


HANDED_ON = torch.ops.colonnade.handed_on.default


class _HandedOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup, zigzag: bool) -> Tensor:
        ctx.options = group.group_name, zigzag
        return handed_on(rows, *ctx.options, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return handed_on(grad, *ctx.options, True), None, None


def context_conv(cut: SequenceSharding, group: dist.ProcessGroup) -> Conv:
    """The `conv` seam: `x` `[S/n, B, C]` are this rank's segments."""

    def conv(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: bool,
        role: str,
        context: Context,
    ) -> Tensor:
        reach = weight.shape[1] - 1
        if context.cache is not None or not reach:
            return local_conv(x, weight, bias, activation, role, context)
        parts, documents = x.chunk(cut.parts), context.documents
        before = _HandedOn.apply(torch.stack([part[-reach:] for part in parts]), group, cut.zigzag)
        numbers: tuple[Tensor | None, ...] = (None,) * cut.parts
        if documents is not None:
            numbers = documents.chunk(cut.parts)
            before = before * _visible(cut, context, reach)[..., None]
        return torch.cat(
            [
                causal_conv(part, weight, bias, activation=activation, documents=d, before=rows)
                for part, d, rows in zip(parts, numbers, before, strict=True)
            ]
        )

    return conv


def _visible(cut: SequenceSharding, context: Context, reach: int) -> Tensor:
    """Which of the rows before a segment are of its first document, `[parts, reach, B]`."""
    whole = context.whole_documents
    assert whole is not None
    length = len(whole) // cut.segments
    before = [whole[i * length - reach : i * length] for i in cut.own if i]
    nothing = [torch.full_like(whole[:reach], -1)] * (cut.parts - len(before))  # zeros arrive
    firsts = torch.stack([whole[i * length] for i in cut.own])
    return torch.stack([*nothing, *before]) == firsts[:, None]
