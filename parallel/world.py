"""One rank's place in the job: process group, device, and the tidy end that gloo needs."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class World:
    """This rank among all ranks, and the device it computes on.

    `meshes`, by degrees, are those made so far: their groups keep threads.
    """

    rank: int
    size: int
    device: torch.device
    meshes: dict[tuple[int, ...], DeviceMesh] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that prints and writes for all."""
        return self.rank == 0


@contextmanager
def world(
    rank: int, size: int, device: torch.device, store: dist.Store | None = None
) -> Iterator[World]:
    """Open the process group of `size` ranks, and close it without the crash gloo is prone to.

    `store` defaults to the launcher's rendezvous (`env://`), or to memory for a single rank.
    After a failure one rank of several leaves it open: the others learn of it when this process
    ends, which is after it has told why.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if store is None and size == 1:
        store = dist.HashStore()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    failed = True
    try:
        yield World(rank, size, device)
        failed = False
    finally:
        if not failed or size == 1:
            gc.collect()  # FSDP's cycles hold work handles; they must go before the group does
            if not failed:
                dist.barrier()
            dist.destroy_process_group()
