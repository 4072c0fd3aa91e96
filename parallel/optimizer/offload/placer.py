"""Chooses where the groups of a rank are updated, again and again while training."""

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist

from colonnade.parallel.optimizer.offload.placement import place, simulate
from colonnade.parallel.optimizer.offload.rates import TYPICAL, Measured
from colonnade.parallel.optimizer.offload.scheduler import GroupSize

REFIT = 20  # updates between two placements
MOST_SLOTS = 2**31


class Placer:
    """The placement of groups, and what it follows.

    Ranks that have the same parameters must place them alike, since two kernels round differently:
    rates and memory are those of all ranks, and sizes those that all ranks know.

    Attributes:
        sizes: of the groups, if every rank had as large a shard as any other.
        interleaved: whether the device may update groups.
        placement: which groups it updates.
        predicted: the seconds of the updates by the cost model.
        measured: the times of operations.
        rates: by which groups were placed.
    """

    def __init__(self, sizes: Sequence[GroupSize], interleaved: bool) -> None:
        self.sizes, self.interleaved = sizes, interleaved
        self.placement, self.predicted = [False] * len(sizes), 0.0
        self.measured, self.rates = Measured(), TYPICAL
        self.on_host: set[int] = set()
        self.updates, self.room = 0, float("inf")

    @property
    def movable(self) -> list[int]:
        """The groups that the device may update."""
        trained = (group for group, size in enumerate(self.sizes) if size.parameters)
        return [group for group in trained if group not in self.on_host]

    def keep_on_host(self, groups: Collection[int]) -> None:
        """Lets the host update these groups from now on."""
        self.on_host = set(groups)
        self.placement = [d and g not in self.on_host for g, d in enumerate(self.placement)]

    def place(self, slots: int) -> None:
        """Places all groups, where the device has memory for so many slots."""
        self.placement = [False] * len(self.sizes)
        if self.interleaved and slots:
            movable = self.movable
            chosen, _ = place([self.sizes[g] for g in movable], self.rates, min(slots, 2))
            for group, on_device in zip(movable, chosen, strict=True):
                self.placement[group] = on_device
        self.predicted, _ = simulate(self.sizes, self.placement, self.rates, max(slots, 1))

    def end_update(self, room: float) -> None:
        """Notes the bytes that the device had for slots when an update began. After the first
        update, and `REFIT` updates later, it places all groups anew, which is collective."""
        self.room = min(self.room, room)
        if self.updates % REFIT == 0:
            self.place_anew()
        self.updates += 1

    def place_anew(self) -> None:
        """Places all groups by the rates of all ranks, and the fewest slots that fit on any.
        Collective: all-reduces both."""
        self.rates = self.measured.rates(self.rates)
        largest = max((size.state + size.scratch for size in self.sizes), default=0) or 1
        slots = torch.tensor(int(min(max(self.room, 0) // largest, MOST_SLOTS))
                             if self.room < float("inf") else MOST_SLOTS)  # fmt: skip
        if dist.is_initialized():
            dist.all_reduce(slots, dist.ReduceOp.MIN)
        self.place(int(slots))
        self.room = float("inf")
