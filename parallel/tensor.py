"""Tensor and sequence parallelism: parameters cut over ranks, and the seams that join their work.

What a rank computes alone is described by `spmd_types`: the stream is invariant (I) over the ranks,
or under sequence parallelism sharded (S) along the sequence; within a sub-block the input is
replicated (R), weights vary (V), and the output is a partial sum (P).
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import spmd_types as spmd
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from spmd_types import I, P, R, S
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from colonnade.kernels.sharding import Sharding, outside_graphs
from colonnade.models.context import attach
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.parameters import ParameterSpec, Split
from colonnade.parallel.gradients import local_gradients
from colonnade.parallel.seams import RefusedError, fill_seams, sub_blocks

# spmd_types calls functional collectives by names that PyTorch 2.13 has given others beside.
warnings.filterwarnings("ignore", message=".*torch.distributed._functional_collectives.*deprecated")

FIRST = 2**62  # above every number that autograd gives a node


def later(x: Tensor) -> dict[str, Any]:
    """Options of a collective that is launched and not waited for, in the dtype of `x`."""
    return {"async_op": True, "op_dtype": x.dtype}


def both(x: Tensor) -> dict[str, Any]:
    """The same for a collective and for that of its gradient."""
    return {**later(x), "backward_options": later(x)}


class Seams:
    """`enter` and `leave` between the stream and sub-blocks, launched and not waited for.

    Sequences are sharded in training alone: in evaluation the stream is whole, so that text of any
    length can be generated.

    Backward runs by sequence numbers. A node that launches a collective goes first. Where `enter`
    gathers nothing, what waits for its reduced gradient goes after the whole sub-block in front of
    which it entered, so that the reduction may take as long (architecture, "ladder overlap").
    """

    def __init__(self, model: Decoder, group: dist.ProcessGroup, sequence: bool) -> None:
        self.model, self.group, self.sequence = model, group, sequence
        self.entered = 0  # number of the last node that entered

    def enter(self, x: Tensor) -> Tensor:
        """`[S or S/n, B, D]` of the stream to `[S, B, D]`, replicated."""
        if self.sequence and self.model.training:
            return launched(spmd.all_gather(x, self.group, src=S(0), dst=R, **both(x)))
        ordered(x, self.entered)
        x = spmd.convert(x, self.group, src=I, dst=R, backward_options=later(x))
        if x.grad_fn is not None:
            self.entered = x.grad_fn._sequence_nr()
        return launched(x)

    def leave(self, h: Tensor) -> Tensor:
        """`[S, B, D]`, a partial sum, to `[S or S/n, B, D]` of the stream."""
        if self.sequence and self.model.training:
            return launched(spmd.reduce_scatter(h, self.group, src=P, dst=S(0), **both(h)))
        return launched(spmd.all_reduce(h, self.group, src=P, dst=I, **later(h)))


def ordered(x: Tensor, number: int) -> Tensor:
    """`x`, whose backward node has this number: of those that are ready the highest runs first."""
    if x.grad_fn is not None:
        x.grad_fn._set_sequence_nr(number)  # type: ignore[attr-defined]  # not in PyTorch's stubs
    return x


def launched(x: Tensor) -> Tensor:
    """`x`, whose gradient launches a collective as soon as it is there."""
    return ordered(x, FIRST)


def sharding_over(group: dist.ProcessGroup) -> Sharding:
    """This rank's part of all widths that the group shares."""

    def total(t: Tensor) -> Tensor:
        back = {"op_dtype": t.dtype}
        return spmd.all_reduce(t.contiguous(), group, src=P, dst=R, backward_options=back)

    def largest(t: Tensor) -> Tensor:
        return funcol.wait_tensor(funcol.all_reduce(t, "max", group))

    def once(t: Tensor) -> Tensor:
        t = t.clone()  # in place: no operator whose results are kept for recomputation
        dist.all_reduce(t, group=group)
        return t

    combine = (outside_graphs(f) for f in (total, largest, once))
    return Sharding(group.size(), group.rank(), *combine)


def on_stream(model: Decoder) -> Iterator[ParameterModule]:
    """The parts that work on the stream: norms, and what joins two streams into one."""
    inside = {id(part) for part in in_blocks(model)}
    return (m for m in model.modules() if isinstance(m, ParameterModule) and id(m) not in inside)


def in_blocks(model: Decoder) -> Iterator[ParameterModule]:
    """The parts that work on replicated inputs: of sub-blocks, embedding and head."""
    blocks = (block for wiring in model.wirings() for block in wiring.blocks.values())
    for root in [*model.ends(), *blocks]:
        yield from (m for m in root.modules() if isinstance(m, ParameterModule))


def tensor_parallel(model: Decoder, mesh: DeviceMesh, sequence: bool) -> None:
    """Cut a model, built on meta, over the ranks of a one-dimensional mesh.

    Parameters become DTensors. Those that ranks use whole have gradients that are partial sums:
    `complete_gradients` adds them up at the end of the step.

    Raises:
        RefusedError: a sub-block that would compute another function.
        ValueError: pieces that do not divide over the ranks.
    """
    check_writers(model)
    group = mesh.get_group()
    cut, seams = sharding_over(group), Seams(model, group, sequence)
    for part in in_blocks(model):
        part.sharding = cut
        for name, _ in list(part.named_parameters(recurse=False)):
            place(part, name, mesh, placement(part, name, cut))
            spec = part.specs[name]
            if spec.split is None:
                spec.partial = True
            elif spec.split.units % cut.size:
                share(part, spec, spec.split)
    for part in on_stream(model):
        for name, _ in list(part.named_parameters(recurse=False)):
            place(part, name, mesh, Replicate())
            part.specs[name].partial = sequence
    for wiring in model.wirings():
        wiring.enter, wiring.leave, wiring.gathers = seams.enter, seams.leave, sequence
    fill_seams(model, "tp", {"attach": lambda seam: attach_once(group)})
    if model.is_first:
        model.embedding.leave = seams.leave
    if model.is_last:
        model.head.enter = seams.enter
        model.head.gather = lambda logits: spmd.all_gather(logits, group, src=S(2), dst=R)


def check_writers(model: Decoder) -> None:
    """Refuse weights that write onto the stream and that every rank would hold whole.

    What sub-blocks write is summed over the ranks: a whole weight's output would count on each.

    Raises:
        RefusedError: such a weight, by name.
    """
    for path, block in sub_blocks(model):
        for name, half in block.named_modules(prefix=path):
            for weight, spec in half.specs.items() if isinstance(half, ParameterModule) else ():
                if spec.role == "writes" and (spec.split is None or spec.split.replicable):
                    raise RefusedError(
                        f"{name}.{weight}: writes onto the stream and is not split over "
                        "tensor-parallel ranks, so its output would count on several of them; "
                        "declare it with a split of its inputs that is not shared"
                    )


def placement(part: ParameterModule, name: str, cut: Sharding) -> Placement:
    """How a parameter of a sub-block lies at rest.

    Raises:
        ValueError: its pieces can be neither divided among the ranks nor shared by several.
    """
    split = part.specs[name].split
    if split is None:
        return Replicate()
    if not split.suits(cut.size):
        raise ValueError(f"{split.field}: {split.units} do not divide over {cut.size} ranks")
    return Replicate() if split.units % cut.size else Shard(split.dim)


def place(part: ParameterModule, name: str, mesh: DeviceMesh, where: Placement) -> None:
    """Make a parameter a DTensor, of which a part sees its shard."""
    whole = getattr(part, name).data
    cut = distribute_tensor(whole, mesh, [where], src_data_rank=None)
    setattr(part, name, nn.Parameter(cut))
    part.local = shard_of


def shard_of(p: Tensor) -> Tensor:
    """The rank's shard of a DTensor; its gradient stays what this rank finds."""
    return p.to_local() if isinstance(p, DTensor) else p


def share(part: ParameterModule, spec: ParameterSpec, split: Split) -> None:
    """Use of a whole parameter the piece that this rank needs, among others that need it too."""
    cut = part.sharding
    spec.transforms.append(lambda whole: cut.local(whole, split.dim, split.units))
    spec.partial = True


def attach_once(group: dist.ProcessGroup) -> Callable[[Tensor, Tensor], Tensor]:
    """`attach` of a term that every rank computes alike: its gradient flows on one of them."""
    return lambda x, term: attach(x, spmd.convert(term, group, src=R, dst=P))


def complete_gradients(model: Decoder, mesh: DeviceMesh) -> None:
    """Sum gradients that are partial over tensor-parallel ranks: one reduction for all of them.

    To be called once, after a step's last backward pass; the sums commute with those of FSDP.
    """
    if mesh["tp"].size() == 1:
        return
    parts = (m for m in model.modules() if isinstance(m, ParameterModule))
    partial = (
        getattr(part, name)
        for part in parts
        for name in sorted(part.specs)
        if part.specs[name].partial
    )
    shards = local_gradients(partial)
    if shards:
        flat = torch.cat([shard.flatten() for shard in shards])
        dist.all_reduce(flat, group=mesh.get_group("tp"))
        pieces = flat.split([shard.numel() for shard in shards])
        for shard, piece in zip(shards, pieces, strict=True):
            shard.copy_(piece.view_as(shard))
