"""The device mesh: every axis of parallelism over all ranks."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.world import World

DATA = ("dp_replicate", "dp_shard")  # axes over which the batch is divided


def build_mesh(config: ParallelConfig, here: World) -> DeviceMesh:
    """The mesh `(pp, dp_replicate, dp_shard, cp, tp)` over all ranks, neighbours along tp.

    Degrees are valid: see `validate`.
    """
    degrees = config.degrees(here.size)
    return init_device_mesh(
        here.device.type, tuple(degrees.values()), mesh_dim_names=tuple(degrees)
    )


def data_sharers(mesh: DeviceMesh) -> int:
    """How many ranks work on the same rows."""
    return mesh.size() // data_rank(mesh)[1]


def data_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """This rank's number among the ranks that divide the batch, and how many they are."""
    rank, count = 0, 1
    for axis in DATA:
        size = mesh.get_group(axis).size()
        rank, count = rank * size + mesh.get_local_rank(axis), count * size
    return rank, count
