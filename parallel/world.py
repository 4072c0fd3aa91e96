"""One rank's place in the job: process group, device, and the tidy end that gloo needs."""

import gc
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous


@dataclass(frozen=True)
class World:
    """This rank among all ranks, and the device it computes on.

    `meshes`, by degrees, are those made so far: their groups keep threads. `store` is what the
    ranks met by; None where nothing has to be waited for (`meet`).
    """

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = field(default=None, compare=False, repr=False)
    meetings: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)
    meshes: dict[tuple[int, ...], DeviceMesh] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that prints and writes for all."""
        return self.rank == 0

    def meet(self, pause: float = 0.2) -> None:
        """Wait until every rank has called this as often, however long that takes.

        A collective would end the job after the group's time-out: this asks the store instead,
        every `pause` seconds. Collective.
        """
        if self.store is None:
            return
        name = f"meeting/{next(self.meetings)}"
        self.store.add(name, 1)
        while self.store.add(name, 0) < self.size:
            time.sleep(pause)


@contextmanager
def world(
    rank: int,
    size: int,
    device: torch.device,
    store: dist.Store | None = None,
    timeout: float | None = None,
) -> Iterator[World]:
    """Open the process group of `size` ranks, and close it without the crash gloo is prone to.

    `store` defaults to the launcher's rendezvous (`env://`), or to memory for a single rank.
    `timeout` is how many seconds a collective may take; None: PyTorch's default. After a failure
    one rank of several leaves the group open: the others learn of it when this process ends, which
    is after it has told why.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if store is None:
        store = dist.HashStore() if size == 1 else next(rendezvous("env://", rank, size))[0]
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = None if timeout is None else timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    failed = True
    try:
        yield World(rank, size, device, dist.PrefixStore("colonnade", store))
        failed = False
    finally:
        if not failed or size == 1:
            gc.collect()  # FSDP's cycles hold work handles; they must go before the group does
            if not failed:
                dist.barrier()
            dist.destroy_process_group()
