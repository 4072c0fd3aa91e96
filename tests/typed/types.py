"""The type of a tensor over the axis that is checked: the only axis of the current mesh."""

from typing import Any

import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types import P, R, S, SpmdTypeError, V
from torch import Tensor

Type = Any  # R, I, P, V or S(i)


def axis() -> spmd.MeshAxis:
    """The axis that is checked."""
    mesh = spmd.current_mesh()
    assert mesh is not None
    (checked,) = mesh
    return checked


def includes_axis(group: dist.ProcessGroup) -> bool:
    """Whether a collective over this group runs along the axis that is checked."""
    return axis() <= spmd.MeshAxis.of(group)


def type_of(t: Tensor) -> Type:
    """A tensor's type over the ranks, with the dimension along which it is a shard."""
    spec = spmd.get_partition_spec(t)
    if spec is not None:
        for dim, axes in enumerate(spec):
            if axes is not None:
                return S(dim)
    return spmd.get_axis_local_type(t, axis())


def expect(t: Tensor, wanted: Type, name: str) -> None:
    """Raises SpmdTypeError unless the tensor has the wanted type, or one of a tuple of types."""
    actual, allowed = type_of(t), wanted if isinstance(wanted, tuple) else (wanted,)
    if actual not in allowed:
        raise SpmdTypeError(f"{name} is {actual!r}, not {' or '.join(map(repr, allowed))}")


def stamp(t: Tensor, wanted: Type) -> Tensor:
    """Gives a tensor the type that it is known to have, and returns it."""
    spmd.assert_type(t, {axis(): wanted})
    return t


def as_shard(t: Tensor, dim: int) -> Tensor:
    """Turns a tensor that the checker takes to be replicated, R, into a shard along `dim`; its
    gradient too."""
    return stamp(spmd.reinterpret(t, axis(), src=R, dst=V, expert_mode=True), S(dim % t.dim()))


def shard_of(t: Any, wanted: Any, rank: int) -> Any:
    """An argument as one of two ranks has it, by its type."""
    if not isinstance(t, Tensor) or wanted in (R, None):
        return t
    if wanted is P:
        return t * (0.25, 0.75)[rank]
    return t.chunk(2, wanted.dim)[rank].contiguous()


def joined(results: tuple[Tensor, Tensor], wanted: Any) -> Tensor:
    """The result on one device, from those of two ranks, by its type."""
    if wanted is P:
        return results[0] + results[1]
    return torch.cat(results, wanted.dim) if isinstance(wanted, S) else results[0]
