"""The device mesh: all ranks, with an axis for each kind of parallelism."""

from datetime import timedelta

import torch
from torch.distributed import ProcessGroup, new_subgroups_by_enumeration
from torch.distributed.device_mesh import DeviceMesh

from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.world import World

DATA = ("dp_replicate", "dp_shard")  # axes over which the batch is divided


def build_mesh(config: ParallelConfig, world: World) -> DeviceMesh:
    """The mesh `(pp, dp_replicate, dp_shard, cp, tp)` over all ranks; consecutive ranks lie along
    tp.

    `validate` has checked the degrees.
    """
    return mesh_of(config.degrees(world.size), world)


def build_expert_mesh(config: ParallelConfig, world: World) -> DeviceMesh | None:
    """The mesh `(pp, dp_replicate, edp, ep, etp)` over all ranks, folded over the axes dp_shard, cp
    and tp of the other one; None where experts need none, for tp shards them like other weights."""
    return mesh_of(config.expert_degrees(world.size), world) if config.folds_experts else None


def mesh_of(degrees: dict[str, int], world: World) -> DeviceMesh:
    """The mesh of these axes. Each is made once, and stays in `world.meshes`.

    Groups hold threads, so meshes of several layouts share those along an axis of the same name
    that have the same ranks.
    """
    key = tuple(degrees.items())
    if key not in world.meshes:
        ranks = torch.arange(world.size).view(tuple(degrees.values()))
        groups = []
        for dim, axis in enumerate(degrees):
            along = ranks.movedim(dim, -1).flatten(0, -2).tolist()
            name = axis if degrees[axis] > 1 else ""  # a rank by itself communicates with none
            groups_key = name, tuple(map(tuple, along))
            if groups_key not in world.groups:
                world.groups[groups_key] = new_group(*groups_key, world.timeout)
            groups.append(world.groups[groups_key])
        world.meshes[key] = DeviceMesh.from_group(
            groups, world.device.type, ranks, mesh_dim_names=tuple(degrees)
        )
    return world.meshes[key]


def new_group(
    axis: str, along: tuple[tuple[int, ...], ...], timeout: timedelta | None
) -> ProcessGroup:
    """Makes the groups of an axis with these ranks; returns that of this rank. Collective."""
    ranks_of_groups = [list(ranks) for ranks in along]
    group, _ = new_subgroups_by_enumeration(ranks_of_groups, timeout=timeout)
    assert group is not None
    return group


def ranks_per_sample(mesh: DeviceMesh) -> int:
    """How many ranks work on the same samples: the axes pp, cp and tp."""
    return mesh.size() // data_rank(mesh)[1]


def ranks_per_loss(mesh: DeviceMesh) -> int:
    """How many ranks compute the same loss of the same tokens: the axis tp. Of a pipeline, one
    stage computes it, and every report of a sub-block."""
    return mesh["tp"].size()


def weights_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh over which FSDP shards weights: the axes `dp_shard` and `cp`, flattened, whose ranks
    have different tokens, and before them `dp_replicate` under HSDP."""
    shard = mesh["dp_shard"]
    if mesh["cp"].size() > 1:
        shard = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    if mesh["dp_replicate"].size() == 1:
        return shard
    (name,) = shard.mesh_dim_names or ()
    return mesh["dp_replicate", name]


def expert_weights_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh over which FSDP shards the weights of experts: the axis `edp`, and before it
    `dp_replicate` under HSDP."""
    return mesh["edp"] if mesh["dp_replicate"].size() == 1 else mesh["dp_replicate", "edp"]


def split_group(mesh: DeviceMesh, inner: int) -> tuple[ProcessGroup, ProcessGroup]:
    """Splits the ranks of a one-dimensional mesh into groups of `inner` neighbours.

    Returns:
        this rank's (inner, outer) groups: its neighbours, and the ranks that have its index among
        their own neighbours.
    """
    split = mesh._unflatten(0, (mesh.size() // inner, inner), ("outer", "inner"))
    return split.get_group("inner"), split.get_group("outer")


def data_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """This rank's index over the axes `dp_replicate` and `dp_shard`, which divide the batch, and
    the size of both together."""
    rank, size = 0, 1
    for axis in DATA:
        axis_size = mesh.get_group(axis).size()
        rank, size = rank * axis_size + mesh.get_local_rank(axis), size * axis_size
    return rank, size
