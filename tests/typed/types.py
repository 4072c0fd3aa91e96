"""The type of a tensor over the ranks of the axis that is checked: the only one of the mesh set."""

from typing import Any

import spmd_types as spmd
import torch.distributed as dist
from spmd_types import R, S, SpmdTypeError, V
from torch import Tensor

Type = Any  # R, I, P, V or S(i)


def axis() -> spmd.MeshAxis:
    """The axis that is checked."""
    mesh = spmd.current_mesh()
    assert mesh is not None
    (checked,) = mesh
    return checked


def along(group: dist.ProcessGroup) -> bool:
    """Whether the ranks of the axis are among those of a group, which exchange something."""
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
    """Raises SpmdTypeError where a tensor has another type. A tuple: any of them."""
    found, right = type_of(t), wanted if isinstance(wanted, tuple) else (wanted,)
    if found not in right:
        raise SpmdTypeError(f"{name} is {found!r}, not {' or '.join(map(repr, right))}")


def stamp(t: Tensor, wanted: Type) -> Tensor:
    """Give a tensor that varies over the ranks the type that it is known to have."""
    spmd.assert_type(t, {axis(): wanted})
    return t


def as_shard(t: Tensor, dim: int) -> Tensor:
    """What differs between ranks, though the checker takes it to be the same; its gradient too."""
    return stamp(spmd.reinterpret(t, axis(), src=R, dst=V, expert_mode=True), S(dim % t.dim()))
