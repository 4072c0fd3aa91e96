"""Master weights and moments in the host's memory, in a few slabs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from colonnade.parallel.optimizer.offload.groups import Group, Member

SLAB = 1 << 32  # bytes: few calls to pin memory, each of which is slow


@dataclass(eq=False)
class Views:
    """Master weights and moments of a group in one buffer of bytes: on the host, or in a slot of
    the device. Each is `[length]`; a group without moments has empty ones."""

    buffer: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(eq=False)
class HostGroup:
    """What the host holds of a group.

    Attributes:
        group: its parameters.
        state: master weights and moments.
        gradient: `[length]`, where gradients arrive.
        weights: `[length]`, the rounded weights on their way to the device; those are the master
            weights themselves where the device has the same dtype.
    """

    group: Group
    state: Views
    gradient: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of a group: of its master weights, its moments, its gradients on the host, and
    its weights on the device."""

    master: torch.dtype
    moments: torch.dtype
    gradient: torch.dtype
    weights: torch.dtype


def state_bytes(group: Group, dtypes: Dtypes) -> int:
    """Returns the bytes of the master weights and moments of a group."""
    moments = 2 * dtypes.moments.itemsize if group.trained else 0
    return group.length * (dtypes.master.itemsize + moments)


def host_bytes(group: Group, dtypes: Dtypes) -> int:
    """Returns all bytes that the host holds of a group."""
    size = state_bytes(group, dtypes)
    if group.trained:
        size += group.length * dtypes.gradient.itemsize
    if dtypes.weights != dtypes.master:
        size += group.length * dtypes.weights.itemsize
    return size


def views(buffer: Tensor, group: Group, dtypes: Dtypes) -> Views:
    """Returns the master weights and moments of a group in a buffer of at least that many bytes."""
    buffer = buffer[: state_bytes(group, dtypes)]
    count = group.length if group.trained else 0
    ends = [group.length * dtypes.master.itemsize]
    ends += [ends[0] + count * dtypes.moments.itemsize]
    first, second, third = buffer.tensor_split(ends)
    moments = second.view(dtypes.moments), third.view(dtypes.moments)
    return Views(buffer, first.view(dtypes.master), *moments)


def allocate(
    groups: Sequence[Group],
    dtypes: Sequence[Dtypes],
    new_slab: Callable[[int], Tensor],
) -> list[HostGroup]:
    """Allocates what the host holds of all groups, moments being zero.

    Args:
        groups: of the model.
        dtypes: of each.
        new_slab: allocates bytes.
    """
    sizes = [host_bytes(group, of_group) for group, of_group in zip(groups, dtypes, strict=True)]
    buffers = divide(sizes, new_slab)
    return [
        host_group(group, of_group, buffer)
        for group, of_group, buffer in zip(groups, dtypes, buffers, strict=True)
    ]


def divide(sizes: Sequence[int], new_slab: Callable[[int], Tensor]) -> Iterator[Tensor]:
    """Yields a buffer of each size, as many as fit in each slab."""
    start = 0
    while start < len(sizes):
        stop, total = start + 1, sizes[start]
        while stop < len(sizes) and total + sizes[stop] <= SLAB:
            total += sizes[stop]
            stop += 1
        yield from new_slab(total).split(list(sizes[start:stop]))
        start = stop


def host_group(group: Group, dtypes: Dtypes, buffer: Tensor) -> HostGroup:
    """Returns the tensors of a group in a buffer."""
    state = views(buffer, group, dtypes)
    state.exp_avg.zero_()
    state.exp_avg_sq.zero_()
    rest = buffer[state_bytes(group, dtypes) :]
    count = group.length * dtypes.gradient.itemsize if group.trained else 0
    gradient, weights = rest[:count].view(dtypes.gradient), rest[count:].view(dtypes.weights)
    return HostGroup(group, state, gradient, weights if len(weights) else state.master)


def as_parameter(shard: Tensor, member: Member, meshes: dict[DeviceMesh, DeviceMesh]) -> Tensor:
    """Returns a shard in the host's memory as a tensor that is sharded like its parameter: a
    DTensor on a mesh of the same ranks with CPU tensors, of which `meshes` has those made so far.
    """
    parameter = member.parameter
    if not isinstance(parameter, DTensor):
        return shard
    mesh = parameter.device_mesh
    if mesh.device_type != "cpu":
        if mesh not in meshes:
            names = mesh.mesh_dim_names
            groups = mesh.get_all_groups()
            meshes[mesh] = DeviceMesh.from_group(groups, "cpu", mesh.mesh, mesh_dim_names=names)
        mesh = meshes[mesh]
    return DTensor.from_local(
        shard, mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip
