"""A rank of the job: its process group and device, and the orderly shutdown that gloo needs."""

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
    """This rank among all ranks of the job, and the device it computes on.

    Attributes:
        rank: from 0.
        size: ranks of the job.
        device: of this rank.
        store: through which `wait_for_all` works; None: it returns at once.
        timeout: how long a collective may take; None: PyTorch's default.
        waits: numbers of the calls of `wait_for_all`, for keys of the store.
        meshes: those made so far, by axes and degrees, to be used again.
        groups: those of their axes, by name and ranks: they hold threads.
    """

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = field(default=None, compare=False, repr=False)
    timeout: timedelta | None = None
    waits: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)
    meshes: dict[tuple[tuple[str, int], ...], DeviceMesh] = field(
        default_factory=dict, compare=False, repr=False
    )
    groups: dict[tuple[str, tuple[tuple[int, ...], ...]], dist.ProcessGroup] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.rank == 0

    def wait_for_all(self, pause: float = 0.2) -> None:
        """A barrier over all ranks without a time-out.

        `dist.barrier` would end the job after the group's time-out: this counts ranks in the store
        instead, and asks for the count every `pause` seconds. Collective.
        """
        if self.store is None:
            return
        key = f"wait/{next(self.waits)}"
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.size:
            time.sleep(pause)


@contextmanager
def open_world(
    rank: int,
    size: int,
    device: torch.device,
    store: dist.Store | None = None,
    timeout: float | None = None,
) -> Iterator[World]:
    """Opens the process group of `size` ranks, and closes it without the crash gloo is prone to.

    Without a failure a barrier over all ranks comes before the close. After a failure one rank of
    several leaves the group open: the others learn of it when this process ends, which is after it
    has printed why.

    Args:
        rank: of this process.
        size: ranks of the job.
        device: of this rank.
        store: through which the ranks connect; None: the launcher's rendezvous (`env://`), or
            memory for a single rank.
        timeout: seconds that a collective may take; None: PyTorch's default.
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
        yield World(rank, size, device, dist.PrefixStore("colonnade", store), limit)
        failed = False
    finally:
        if not failed or size == 1:
            gc.collect()  # FSDP's cycles hold work handles; they must go before the group does
            if not failed:
                dist.barrier()
            dist.destroy_process_group()
