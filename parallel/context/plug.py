"""Applies context parallelism to a model: shards its sequences, and fills the seams that
communicate over the `cp` axis.

Parameters stay as they are. Their gradients are partial sums over the `cp` axis, which FSDP's
reduce-scatter over `dp_shard` and `cp` completes.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colonnade.kernels.tiles import ScoreOptions
from colonnade.models.blocks.attention import Attend, Softmax, local_attend
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.seams import Seam
from colonnade.parallel import mesh as meshes
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.context.attention import Variant, context_attention
from colonnade.parallel.context.halo import context_conv
from colonnade.parallel.context.heads import HeadExchange
from colonnade.parallel.context.layout import SequenceSharding
from colonnade.parallel.context.states import RankStatePassing, document_continues
from colonnade.parallel.seams import (
    Fill,
    check_sequence_mixers,
    fill_seams,
    ignore_collective_names,
    sub_blocks,
)


def context_parallel(model: Decoder, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Shards the model's sequences over the ranks of a one-dimensional mesh, the `cp` axis.

    Call it after `tensor_parallel`, which decides how many heads each rank has.

    Raises:
        RefusedError: a sub-block that would compute another function.
    """
    ignore_collective_names()
    group = mesh.get_group()
    sharding = SequenceSharding(group.size(), group.rank(), config.zigzag)
    model.local_segments = sharding.shard
    _, block = next(sub_blocks(model))
    heads = model.config.heads // block.first.sharding.size
    conv, attend = context_conv(sharding, group), context_attend(mesh, config, heads)
    scans = ScanSeams(sharding, group, config.recurrence)
    all_gather = partial(all_gather_sequence, sharding, group)
    fills: dict[str, Fill] = {
        "conv": lambda seam: conv,
        "attend": lambda seam: attend,
        "scan": scans.fill,
        "local_segments": lambda seam: sharding.shard,
        "full_sequence": lambda seam: all_gather,
    }
    fill_seams(model, "cp", fills)
    check_sequence_mixers(model)
    for _, block in sub_blocks(model):
        block.sequence_share = 1 / sharding.size


def all_gather_sequence(sharding: SequenceSharding, group: dist.ProcessGroup, t: Tensor) -> Tensor:
    """All-gathers the shards of a sequence over the context group, in sequence order, without
    gradient."""
    shards = funcol.wait_tensor(funcol.all_gather_tensor(t.contiguous(), 0, group))
    return sharding.in_sequence_order(shards)


class ScanSeams:
    """Fills `scan` seams by `recurrence`: `states` passes states by an all-gather over the context
    group, `heads` exchanges sequence shards for heads by an all-to-all."""

    def __init__(
        self, sharding: SequenceSharding, group: dist.ProcessGroup, recurrence: str
    ) -> None:
        self.sharding, self.group, self.recurrence = sharding, group, recurrence
        self.heads = HeadExchange(sharding, group)

    def fill(self, seam: Seam) -> Callable[..., Tensor]:
        """A sub-block's scan over the context group; with a cache, in generation, the local one."""
        local = seam.local
        by_heads = self.recurrence == "heads"
        distributed = self.heads.wrap(seam) if by_heads else self.with_state_passing(local)
        return lambda *args: (local if args[-1].cache is not None else distributed)(*args)

    def with_state_passing(self, scan: Any) -> Any:
        """Gives a scan its last argument, after the context: the `StatePassing` of the group."""

        def distributed(*args: Any) -> Any:
            same_document = document_continues(self.sharding, args[-1])
            return scan(*args, RankStatePassing(self.sharding, self.group, same_document))

        return distributed


def context_attend(mesh: DeviceMesh, config: ParallelConfig, heads: int) -> Attend:
    """The `attend` seam over the `cp` axis; `heads` are this rank's query heads.

    Under ulysses and ring+ulysses the axis is split: neighbours exchange heads by an all-to-all
    over the inner group, and keys go around a ring over the outer group, where that has several
    ranks.
    """
    exchange, outer, degree = None, mesh.get_group(), config.ulysses_degree(heads)
    if degree > 1:
        inner, outer = meshes.split_group(mesh, degree)
        exchange = HeadExchange(SequenceSharding(inner.size(), inner.rank(), config.zigzag), inner)
    variant: Variant = "allgather" if config.context == "allgather" else "ring"
    attend_over_outer = partial(
        attend_over_group, group=outer, variant=variant, zigzag=config.zigzag
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, context: Context) -> Tensor:
        if context.cache is not None:
            return local_attend(q, k, v, softmax, context)
        if exchange is not None:
            q, k, v = exchange.sequence_to_heads(q, k, v)
            if softmax.sinks is not None:
                softmax = dataclasses.replace(softmax, sinks=exchange.local_heads(softmax.sinks))
        if outer.size() == 1:
            y = local_attend(q, k, v, softmax, context.for_full_sequence())
        else:
            y = attend_over_outer(q, k, v, softmax, context)
        return y if exchange is None else exchange.heads_to_sequence(y)

    return attend


def attend_over_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax: Softmax,
    context: Context,
    *,
    group: dist.ProcessGroup,
    variant: Variant,
    zigzag: bool,
) -> Tensor:
    """Attends to the keys of all ranks of `group`, by ring send/recv or all-gather; the arguments
    are this rank's shard of the sequence."""
    sees_all = softmax.window is None or softmax.window >= len(q) * group.size()
    window = None if sees_all else softmax.window
    score_options = ScoreOptions(softmax.scale, window, softmax.cap, softmax.clip)
    return context_attention(
        q, k, v, group, score_options=score_options, variant=variant,
        documents=context.whole_documents, sinks=softmax.sinks, zigzag=zigzag,
    )  # fmt: skip
