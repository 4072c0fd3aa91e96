"""Counts what a rank sends: calls and bytes of every collective, by the axes of its group.

A rank is taken to send what the ring algorithms send: of an all-reduce over n ranks its tensor
2 (n − 1) / n times, of a reduce-scatter (n − 1) / n times, of an all-gather its shard n − 1 times.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from colonnade.parallel.context.attention import CONTEXT_ATTENTION
from colonnade.parallel.context.halo import HALO_SEND_RECV
from colonnade.parallel.context.p2p import group_by_name

# What a rank that passes n elements to a collective of n ranks sends, in elements; and the index
# among the arguments of what it passes: PyTorch's functional operators, and those that write into
# an output.
SENT_OF_N = {
    "all_gather": lambda n: n * (n - 1),
    "reduce_scatter": lambda n: n - 1,
    "all_reduce": lambda n: 2 * (n - 1),
}
FUNCTIONAL = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
}
IN_PLACE = {
    "_allgather_base_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "send": ("send", 0),
}
SENDS_NOTHING = {"wait_tensor", "_wrap_tensor_autograd", "recv_", "barrier"}
BOOKKEEPING = {"prim", "profiler"}  # namespaces of operators that only ask for or record something
# Operators that communicate inside, where dispatch does not see it.
OPAQUE = {CONTEXT_ATTENTION, HALO_SEND_RECV}
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Sent(NamedTuple):
    """What one call of a collective sends from this rank."""

    collective: str
    group: dist.ProcessGroup
    dtype: torch.dtype
    bytes: int


def sent_by(operator: Any, args: Sequence[Any]) -> Sent | None:
    """What a call of this operator sends from this rank; None where it does not communicate.

    Raises:
        NotImplementedError: a communicating operator that is not known here.
    """
    name = operator.overloadpacket.__name__
    if operator.namespace not in ("c10d", "_c10d_functional") or name in SENDS_NOTHING:
        return None
    if operator.namespace == "_c10d_functional" and name in FUNCTIONAL:
        collective, tensors, group = FUNCTIONAL[name], [args[0]], group_by_name(args[-1])
        if collective == "all_to_all":
            sent = sent_to_others(args[0], args[2], group.rank())
            return Sent(collective, group, args[0].dtype, sent)
    elif operator.namespace == "c10d" and name in IN_PLACE:
        collective, index = IN_PLACE[name]
        tensors = args[index] if isinstance(args[index], list) else [args[index]]
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
    else:
        raise NotImplementedError(f"{operator}: how many bytes it sends is not known")
    passed, n = sum(t.nbytes for t in tensors), group.size()
    sent = passed if collective == "send" else passed * SENT_OF_N[collective](n) // n
    return Sent(collective, group, tensors[0].dtype, sent)


def sent_to_others(rows: Tensor, sizes: list[int], rank: int) -> int:
    """The bytes of an all-to-all that leave this rank: all rows but those that it sends itself."""
    return rows.nbytes * (sum(sizes) - sizes[rank]) // max(1, len(rows))


def inside_opaque(mode: TorchDispatchMode, operator: Any, args: Any, kwargs: Any) -> Any:
    """Runs the body of one of our operators in this mode, which then sees what it sends."""
    with mode:
        return operator.redispatch(CPU, *args, **kwargs)


def has(types: Sequence[type], *wrappers: type) -> bool:
    """Whether an operator has arguments that wrap local tensors, with which dispatch comes again
    where a mode returns NotImplemented."""
    return any(issubclass(t, wrappers) for t in types)


class AxisNames:
    """Names of process groups: the axis of the meshes along which their ranks lie.

    A group that is two axes at once has both names, `dp_shard/ep`. One over several axes has theirs
    (`dp_shard+cp`), one over all ranks is `world`, and a part of an axis has the axis's name.
    """

    def __init__(self, meshes: Sequence[DeviceMesh]) -> None:
        self.meshes = meshes
        self.names: dict[str, str] = {}

    def __call__(self, group: dist.ProcessGroup) -> str:
        name = group.group_name
        if name not in self.names:
            self.names[name] = self.name_of(group)
        return self.names[name]

    def name_of(self, group: dist.ProcessGroup) -> str:
        """The name of a group of several ranks."""
        axes = {
            axis: None
            for mesh in self.meshes
            for axis in mesh.mesh_dim_names or ()
            if mesh.get_group(axis).group_name == group.group_name
        }
        if axes:
            return "/".join(axes)
        if group.size() == dist.get_world_size():
            return "world"
        spans = [spanned_axes(mesh, group) for mesh in self.meshes]
        # A group over several axes is of the view in which it is just these.
        exact = [axes for axes in spans if math.prod(axes.values()) == group.size()]
        fewest = min(exact or spans, key=len)
        return "+".join(fewest)


def spanned_axes(mesh: DeviceMesh, group: dist.ProcessGroup) -> dict[str, int]:
    """The axes of a mesh over all ranks along which the ranks of a group differ, with sizes."""
    ranks, spanned, stride = dist.get_process_group_ranks(group), {}, mesh.size()
    for axis, size in zip(mesh.mesh_dim_names or (), mesh.shape, strict=True):
        stride //= size
        if len({rank // stride % size for rank in ranks}) > 1:
            spanned[axis] = size
    return spanned


class CollectiveCounter(TorchDispatchMode):
    """Counts calls and bytes of collectives by (axis, collective); those of groups of a single rank
    are left out."""

    def __init__(self, axis_of: AxisNames) -> None:
        super().__init__()
        self.axis_of = axis_of
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in BOOKKEEPING:
            return func(*args, **kwargs)
        if has(types, DTensor, AsyncCollectiveTensor):
            return NotImplemented
        if func in OPAQUE:
            return inside_opaque(self, func, args, kwargs)
        self.operators += 1
        sent = sent_by(func, args)
        if sent is not None and sent.group.size() > 1:
            key = self.axis_of(sent.group), sent.collective
            self.calls[key] += 1
            self.bytes[key] += sent.bytes
        return func(*args, **kwargs)
