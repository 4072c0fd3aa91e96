"""The device mesh: every axis of parallelism over all ranks."""

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.world import World

DATA = ("dp_replicate", "dp_shard")  # axes over which the batch is divided


def build_mesh(config: ParallelConfig, here: World) -> DeviceMesh:
    """The mesh `(pp, dp_replicate, dp_shard, cp, tp)` over all ranks, neighbours along tp.

    Degrees are valid: see `validate`.
    """
    degrees = config.degrees(here.size)
    shape = tuple(degrees.values())
    if shape not in here.meshes:
        here.meshes[shape] = init_device_mesh(
            here.device.type, shape, mesh_dim_names=tuple(degrees)
        )
    return here.meshes[shape]


def ranks_per_sample(mesh: DeviceMesh) -> int:
    """How many ranks work on the same rows."""
    return mesh.size() // data_rank(mesh)[1]


def ranks_per_token(mesh: DeviceMesh) -> int:
    """How many of these work on the same tokens of them."""
    return ranks_per_sample(mesh) // mesh["cp"].size()


def weights_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Over which FSDP shards weights: the axes whose ranks have their own tokens."""
    shard = mesh["dp_shard"]
    if mesh["cp"].size() > 1:
        shard = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    if mesh["dp_replicate"].size() == 1:
        return shard
    (name,) = shard.mesh_dim_names or ()
    return mesh["dp_replicate", name]


def fold(mesh: DeviceMesh, inner: int) -> tuple[ProcessGroup, ProcessGroup]:
    """Groups of so many neighbours of a one-dimensional mesh, and across these: (inner, outer)."""
    names = ("outer", "inner")
    folded = mesh._unflatten(0, (mesh.size() // inner, inner), names)
    return folded.get_group("inner"), folded.get_group("outer")


def data_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """This rank's number among the ranks that divide the batch, and how many they are."""
    rank, count = 0, 1
    for axis in DATA:
        size = mesh.get_group(axis).size()
        rank, count = rank * size + mesh.get_local_rank(axis), count * size
    return rank, count
