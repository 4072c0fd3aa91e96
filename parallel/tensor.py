"""Tensor and sequence parallelism: shards parameters over the `tp` axis, and puts the collectives
between the residual stream and the sub-blocks.

`spmd_types` types what a rank computes. The stream is invariant (I) over the ranks of the axis, or
under sequence parallelism sharded (S) along the sequence. Within a sub-block the input is
replicated (R), weights vary (V), and the output is a partial sum (P).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import spmd_types as spmd
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from spmd_types import I, P, R, S
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from colonnade.kernels.sharding import Sharding, outside_graphs
from colonnade.models.context import attach
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import ParameterModule, declared
from colonnade.models.parameters import ParameterSpec, Split
from colonnade.parallel.seams import (
    RefusedError,
    expert_blocks,
    fill_seams,
    ignore_collective_names,
    sub_blocks,
)

HIGHEST = 2**62  # above every sequence number that autograd gives a node


def async_options(x: Tensor) -> dict[str, Any]:
    """Options of a collective that is launched and not waited for, in the dtype of `x`."""
    return {"async_op": True, "op_dtype": x.dtype}


def async_both_ways(x: Tensor) -> dict[str, Any]:
    """The same options for a collective and for the collective of its gradient."""
    return {**async_options(x), "backward_options": async_options(x)}


class StreamCollectives:
    """The seams `enter` and `leave` between the stream and sub-blocks, over the tensor-parallel
    group: their collectives are launched and not waited for.

    Sequences are sharded in training only: in evaluation every rank has the full stream, so that
    text of any length can be generated.

    Autograd runs the ready node with the highest sequence number first. A node that launches a
    collective gets the highest. Where `enter` communicates nothing forward, its gradient's
    all-reduce is hidden behind backward of the whole sub-block before it: the node that waits for
    it gets the number of the previous `enter`, and so runs after that sub-block (architecture,
    "ladder overlap").
    """

    def __init__(self, model: Decoder, group: dist.ProcessGroup, sequence: bool) -> None:
        self.model, self.group, self.sequence = model, group, sequence
        self.previous_enter = 0  # sequence number of the last `enter`'s backward node

    def enter(self, x: Tensor) -> Tensor:
        """Gives a sub-block the stream, `[S or S/n, B, D]`, as `[S, B, D]`, replicated.

        Under sequence parallelism it all-gathers, and backward reduce-scatters; else only backward
        communicates, by an all-reduce.
        """
        if self.sequence and self.model.training:
            return run_backward_first(
                spmd.all_gather(x, self.group, src=S(0), dst=R, **async_both_ways(x))
            )
        if self.sequence and x.requires_grad:
            x.register_hook(refuse_gradients)
        # The backward node of x waits for the reduced gradient: it runs after the sub-block before.
        set_backward_order(x, self.previous_enter)
        x = spmd.convert(x, self.group, src=I, dst=R, backward_options=async_options(x))
        if x.grad_fn is not None:
            # The number of the node that launches the all-reduce, before it becomes the highest.
            self.previous_enter = x.grad_fn._sequence_nr()
        return run_backward_first(x)

    def leave(self, h: Tensor) -> Tensor:
        """Returns a sub-block's output, `[S, B, D]`, a partial sum, to the stream,
        `[S or S/n, B, D]`.

        Under sequence parallelism it reduce-scatters, and backward all-gathers; else it
        all-reduces, and backward communicates nothing.
        """
        if self.sequence and self.model.training:
            return run_backward_first(
                spmd.reduce_scatter(h, self.group, src=P, dst=S(0), **async_both_ways(h))
            )
        return run_backward_first(spmd.all_reduce(h, self.group, src=P, dst=I, **async_options(h)))


def refuse_gradients(grad: Tensor) -> Tensor:
    """Raises RuntimeError: `complete_gradients` would sum those of norms, which are whole here."""
    raise RuntimeError(
        "under sequence parallelism a pass in evaluation mode has no gradients: call model.train()"
    )


def set_backward_order(x: Tensor, number: int) -> Tensor:
    """Sets the sequence number of the backward node of `x`, and returns `x`; of the nodes that are
    ready, autograd runs the one with the highest number first."""
    if x.grad_fn is not None:
        x.grad_fn._set_sequence_nr(number)  # type: ignore[attr-defined]  # not in PyTorch's stubs
    return x


def run_backward_first(x: Tensor) -> Tensor:
    """Makes the backward node of `x`, which launches a collective, run as soon as it is ready."""
    return set_backward_order(x, HIGHEST)


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.wait() if isinstance(x, AsyncCollectiveTensor) else x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.wait() if isinstance(grad, AsyncCollectiveTensor) else grad


def wait(x: Tensor) -> Tensor:
    """Waits for an asynchronous collective, in forward for its result `x` and in backward for that
    of its gradient."""
    return _Wait.apply(x)


def sharding_over(group: dist.ProcessGroup) -> Sharding:
    """The `Sharding` of widths over the group of an axis, with the all-reduces over it."""

    def all_reduce(t: Tensor) -> Tensor:
        options = {"op_dtype": t.dtype}
        return spmd.all_reduce(t.contiguous(), group, src=P, dst=R, backward_options=options)

    def all_reduce_max(t: Tensor) -> Tensor:
        return funcol.wait_tensor(funcol.all_reduce(t, "max", group))

    def all_reduce_no_grad(t: Tensor) -> Tensor:
        t = t.clone()  # in place: not an operator whose results recomputation keeps
        dist.all_reduce(t, group=group)
        return t

    def once(t: Tensor) -> Tensor:
        return spmd.convert(t, group, src=R, dst=P)

    functions = all_reduce, all_reduce_max, all_reduce_no_grad, once
    reductions = (outside_graphs(f) for f in functions)
    return Sharding(group.size(), group.rank(), *reductions)


def stream_modules(model: Decoder) -> Iterator[ParameterModule]:
    """The modules that work on the stream: norms, and projections that join two streams."""
    sharded = {id(module) for module in sharded_modules(model)}
    return (m for m in model.modules() if isinstance(m, ParameterModule) and id(m) not in sharded)


def sharded_modules(model: Decoder) -> Iterator[ParameterModule]:
    """The modules whose widths may be sharded, and whose inputs are replicated: those of
    sub-blocks, embedding and head."""
    blocks = (block for wiring in model.wirings() for block in wiring.blocks.values())
    for root in [*model.ends(), *blocks]:
        yield from (m for m in root.modules() if isinstance(m, ParameterModule))


def tensor_parallel(
    model: Decoder, mesh: DeviceMesh, sequence: bool, with_experts: bool = True
) -> None:
    """Shards a model, built on meta, over the ranks of a one-dimensional mesh, the `tp` axis.

    Without `with_experts` it leaves the weights of experts to `expert_parallel`.

    Parameters become DTensors. Those that are replicated within sub-blocks, and under `sequence`
    those on the stream, have gradients that are partial sums: `complete_gradients` all-reduces them
    at the end of the step.

    Raises:
        RefusedError: a sub-block that would compute another function.
        ValueError: pieces that do not divide over the ranks.
    """
    ignore_collective_names()
    check_writers(model)
    group = mesh.get_group()
    sharding, stream = sharding_over(group), StreamCollectives(model, group, sequence)
    experts = set() if with_experts else {block.experts for block in expert_blocks(model)}
    for module in sharded_modules(model):
        if module in experts:
            continue
        module.sharding = sharding
        for name, _ in list(module.named_parameters(recurse=False)):
            distribute_parameter(module, name, mesh, placement_of(module, name, sharding))
            spec = module.specs[name]
            if spec.split is None:
                spec.partial = "tp"
            elif spec.split.units % sharding.size:
                slice_at_use(module, spec, spec.split)
    for module in stream_modules(model):
        for name, _ in list(module.named_parameters(recurse=False)):
            distribute_parameter(module, name, mesh, Replicate())
            module.specs[name].partial = "tp" if sequence else None
    for wiring in model.wirings():
        wiring.enter, wiring.leave, wiring.gathers = stream.enter, stream.leave, sequence
    fill_seams(model, "tp", {"attach": lambda seam: attach_once(group)})
    if model.has_embedding:
        model.embedding.leave = stream.leave
    if model.has_head:
        model.head.enter = stream.enter
        model.head.gather = lambda logits: spmd.all_gather(logits, group, src=S(2), dst=R)


def check_writers(model: Decoder) -> None:
    """Refuses weights that write onto the stream and that several ranks would hold.

    `leave` sums what sub-blocks write over the ranks of the `tp` axis, so the output of such a
    weight would count several times.

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
                        "declare it with a split of its inputs that is not replicable"
                    )


def placement_of(module: ParameterModule, name: str, sharding: Sharding) -> Placement:
    """The placement at rest of a parameter of a sub-block over the `tp` axis.

    Raises:
        ValueError: its pieces can be neither divided among the ranks nor shared by several.
    """
    split = module.specs[name].split
    if split is None:
        return Replicate()
    if not split.suits(sharding.size):
        raise ValueError(f"{split.field}: {split.units} do not divide over {sharding.size} ranks")
    return Replicate() if split.units % sharding.size else Shard(split.dim)


def distribute_parameter(
    module: ParameterModule, name: str, mesh: DeviceMesh, placement: Placement
) -> None:
    """Makes a parameter a DTensor over the `tp` axis; the module computes with its local shard."""
    full = getattr(module, name).data
    # No rank broadcasts: the model is on meta, and `materialise` fills every shard.
    sharded = distribute_tensor(full, mesh, [placement], src_data_rank=None)
    setattr(module, name, nn.Parameter(sharded))
    module.local = local_shard


def local_shard(p: Tensor) -> Tensor:
    """The rank's shard of a DTensor; its gradient is this rank's, without communication."""
    return p.to_local() if isinstance(p, DTensor) else p


def slice_at_use(module: ParameterModule, spec: ParameterSpec, split: Split) -> None:
    """Makes a module slice its shard of a replicated parameter at use, where pieces are fewer than
    ranks and several ranks use the same one; so its gradient is a partial sum."""
    sharding = module.sharding
    spec.transforms.append(lambda full: sharding.local(full, split.dim, split.units))
    spec.partial = "tp"


def attach_once(group: dist.ProcessGroup) -> Callable[[Tensor, Tensor], Tensor]:
    """The seam `attach` for a term that is the same on every rank of the tensor-parallel group: its
    gradient flows on one of them, or it would count on each."""
    return lambda x, term: attach(x, spmd.convert(term, group, src=R, dst=P))


def complete_gradients(model: Decoder) -> None:
    """All-reduces the gradients that are partial sums over the `tp` axis, or over the `etp` axis,
    all of an axis in one collective.

    Call it once, after a step's last backward pass; the sums commute with FSDP's reduce-scatters.
    """
    partial: dict[dist.ProcessGroup, list[Tensor]] = defaultdict(list)
    for _, p, spec in declared(model):  # in the same order on every rank
        if spec.partial is not None and isinstance(p.grad, DTensor):
            partial[p.grad.device_mesh.get_group(spec.partial)].append(p.grad.to_local())
    for group, shards in partial.items():
        flat = torch.cat([shard.flatten() for shard in shards])
        dist.all_reduce(flat, group=group)
        sums = flat.split([shard.numel() for shard in shards])
        for shard, total in zip(shards, sums, strict=True):
            shard.copy_(total.view_as(shard))
