"""Master weights and moments in the host's memory, in a few slabs."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from colonnade.kernels.eight_bit import BLOCK, Coded
from colonnade.parallel.optimizer.offload.groups import Group, Member

SCALE = torch.float32  # of the blocks of moments in 8 bits
HOST_KINDS = ("masters", "moments", "gradients", "weights")
SLAB = 1 << 32  # bytes: few calls to pin memory, each of which is slow


Moment = Tensor | Coded


@dataclass(eq=False)
class Views:
    """Master weights and moments of a group in one buffer of bytes: on the host, or in a slot of
    the device. Each is `[length]`, moments perhaps in 8 bits; a group that is not trained has none.
    """

    buffer: Tensor
    master: Tensor
    exp_avg: Moment
    exp_avg_sq: Moment


@contextmanager
def moments_of(
    state: Views, served: Collection[torch.dtype] = ()
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gives the moments of a group as tensors `[length]` in the dtype of its master weights, or in
    one of those `served` as they are; rounds them back at the end."""
    moments = state.exp_avg, state.exp_avg_sq
    opened = [opened_moment(moment, state.master.dtype, served) for moment in moments]
    yield opened[0], opened[1]
    for moment, values in zip(moments, opened, strict=True):
        round_moment(moment, values)


def opened_moment(
    moment: Moment, dtype: torch.dtype, served: Collection[torch.dtype] = ()
) -> Tensor:
    """Returns a moment as `moments_of` gives it."""
    if isinstance(moment, Coded):
        return moment.decode()
    return moment if moment.dtype in served else moment.to(dtype)


def round_moment(moment: Moment, values: Tensor) -> None:
    """Rounds values to a moment, unless they are the moment itself."""
    if isinstance(moment, Coded):
        moment.encode(values)
    elif moment is not values:
        moment.copy_(values)


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
    """The dtypes of a group: of its master weights, its moments (uint8: in 8 bits with scales), its
    gradients on the host, and its weights on the device."""

    master: torch.dtype
    moments: torch.dtype
    gradient: torch.dtype
    weights: torch.dtype


def moment_bytes(group: Group, dtypes: Dtypes) -> int:
    """Returns the bytes of one moment of a group."""
    if not group.trained:
        return 0
    scales = group.length // BLOCK * SCALE.itemsize if dtypes.moments == torch.uint8 else 0
    return group.length * dtypes.moments.itemsize + scales


def host_sizes(group: Group, dtypes: Dtypes) -> dict[str, int]:
    """Returns the bytes that the host holds of a group: `masters`, `moments`, `gradients` that
    arrive, and `weights`, those that are rounded on their way to the device."""
    trained, rounded = bool(group.trained), dtypes.weights != dtypes.master
    return {
        "masters": group.length * dtypes.master.itemsize,
        "moments": 2 * moment_bytes(group, dtypes),
        "gradients": group.length * dtypes.gradient.itemsize * trained,
        "weights": group.length * dtypes.weights.itemsize * rounded,
    }


def state_bytes(group: Group, dtypes: Dtypes) -> int:
    """Returns the bytes of the master weights and moments of a group."""
    sizes = host_sizes(group, dtypes)
    return sizes["masters"] + sizes["moments"]


def host_bytes(group: Group, dtypes: Dtypes) -> int:
    """Returns all bytes that the host holds of a group."""
    return sum(host_sizes(group, dtypes).values())


def views(buffer: Tensor, group: Group, dtypes: Dtypes) -> Views:
    """Returns the master weights and moments of a group in a buffer of at least that many bytes."""
    buffer = buffer[: state_bytes(group, dtypes)]
    start = group.length * dtypes.master.itemsize
    size = moment_bytes(group, dtypes)
    first, second, third = buffer.tensor_split([start, start + size])
    return Views(
        buffer,
        first.view(dtypes.master),
        moment_in(second, group, dtypes, signed=True),
        moment_in(third, group, dtypes, signed=False),
    )


def moment_in(buffer: Tensor, group: Group, dtypes: Dtypes, signed: bool) -> Moment:
    """Returns a moment of a group in a buffer of its bytes."""
    if dtypes.moments != torch.uint8:
        return buffer.view(dtypes.moments)
    count = group.length if group.trained else 0
    return Coded(buffer[:count], buffer[count:].view(SCALE), signed)


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
    state.buffer[group.length * dtypes.master.itemsize :].zero_()  # in 8 bits, too
    rest, count = buffer[state_bytes(group, dtypes) :], host_sizes(group, dtypes)["gradients"]
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
