"""Context parallelism put into a model: a sequence is cut at its door, and sub-blocks look across.

Parameters stay as they are; their gradients are partial sums over the ranks that share a sequence,
which FSDP adds up together with those over the batch.
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
from colonnade.parallel.seams import Fill, check_sequence_mixers, fill_seams, sub_blocks


def context_parallel(model: Decoder, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Share sequences over the ranks of a one-dimensional mesh.

    After `tensor_parallel`, which says how many heads there are here.

    Raises:
        RefusedError: a sub-block that would compute another function.
    """
    group = mesh.get_group()
    cut = SequenceSharding(group.size(), group.rank(), config.zigzag)
    model.local_segments = cut.mine
    _, block = next(sub_blocks(model))
    heads = model.config.heads // block.first.sharding.size
    conv, attend = context_conv(cut, group), context_attend(mesh, config, heads)
    scans, whole = Scans(cut, group, config.recurrence), partial(gathered, cut, group)
    fills: dict[str, Fill] = {
        "conv": lambda seam: conv,
        "attend": lambda seam: attend,
        "scan": scans.filled,
        "local_segments": lambda seam: cut.mine,
        "full_sequence": lambda seam: whole,
    }
    fill_seams(model, "cp", fills)
    check_sequence_mixers(model)
    for _, block in sub_blocks(model):
        block.sequence_share = 1 / cut.ranks


def gathered(cut: SequenceSharding, group: dist.ProcessGroup, t: Tensor) -> Tensor:
    """All ranks' parts in the order of the sequence, without gradient."""
    return cut.natural(funcol.wait_tensor(funcol.all_gather_tensor(t.contiguous(), 0, group)))


class Scans:
    """The `scan` seams: states handed on, or heads exchanged."""

    def __init__(self, cut: SequenceSharding, group: dist.ProcessGroup, recurrence: str) -> None:
        self.cut, self.group, self.recurrence = cut, group, recurrence
        self.heads = HeadExchange(cut, group)

    def filled(self, seam: Seam) -> Callable[..., Tensor]:
        """A sub-block's scan between ranks; with a cache, as in generation, the local one."""
        scan = seam.local
        across = self.heads.around(seam) if self.recurrence == "heads" else self.handed(scan)
        return lambda *args: (scan if args[-1].cache is not None else across)(*args)

    def handed(self, scan: Any) -> Any:
        """Around a scan that takes `StatePassing` behind the context."""

        def across(*args: Any) -> Any:
            continues = document_continues(self.cut, args[-1])
            return scan(*args, RankStatePassing(self.cut, self.group, continues))

        return across


def context_attend(mesh: DeviceMesh, config: ParallelConfig, heads: int) -> Attend:
    """The `attend` seam; `heads` are the query heads that are here."""
    inner, outer, exchanging = None, mesh.get_group(), config.ulysses_degree(heads)
    if exchanging > 1:
        group, outer = meshes.fold(mesh, exchanging)
        inner = HeadExchange(SequenceSharding(group.size(), group.rank(), config.zigzag), group)
    variant: Variant = "allgather" if config.context == "allgather" else "ring"
    across = partial(attend_across, group=outer, variant=variant, zigzag=config.zigzag)

    def attend(q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, context: Context) -> Tensor:
        if context.cache is not None:
            return local_attend(q, k, v, softmax, context)
        if inner is not None:
            q, k, v = inner.take(q, k, v)
            if softmax.sinks is not None:
                softmax = dataclasses.replace(softmax, sinks=inner.mine(softmax.sinks))
        if outer.size() == 1:
            y = local_attend(q, k, v, softmax, context.for_full_sequence())
        else:
            y = across(q, k, v, softmax, context)
        return y if inner is None else inner.give(y)

    return attend


def attend_across(
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
    """Attention over all ranks' keys; the arguments are this rank's part of the sequence."""
    all_of_it = softmax.window is None or softmax.window >= len(q) * group.size()
    window = None if all_of_it else softmax.window
    rule = ScoreOptions(softmax.scale, window, softmax.cap, softmax.clip)
    return context_attention(
        q, k, v, group, rule=rule, variant=variant, documents=context.whole_documents,
        sinks=softmax.sinks, zigzag=zigzag,
    )  # fmt: skip
