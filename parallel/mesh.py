"""The device mesh: all ranks, with an axis for each kind of parallelism."""

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.world import World

DATA = ("dp_replicate", "dp_shard")  # axes over which the batch is divided


def build_mesh(config: ParallelConfig, world: World) -> DeviceMesh:
    """The mesh `(pp, dp_replicate, dp_shard, cp, tp)` over all ranks; consecutive ranks lie along
    tp.

    `validate` has checked the degrees. Each mesh is made once, and stays in `world.meshes`.
    """
    degrees = config.degrees(world.size)
    shape = tuple(degrees.values())
    if shape not in world.meshes:
        world.meshes[shape] = init_device_mesh(
            world.device.type, shape, mesh_dim_names=tuple(degrees)
        )
    return world.meshes[shape]


def ranks_per_sample(mesh: DeviceMesh) -> int:
    """How many ranks work on the same samples: the axes pp, cp and tp."""
    return mesh.size() // data_rank(mesh)[1]


def ranks_per_token(mesh: DeviceMesh) -> int:
    """How many ranks work on the same tokens of the same samples: the axes pp and tp."""
    return ranks_per_sample(mesh) // mesh["cp"].size()


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
