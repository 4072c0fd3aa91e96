"""What offloaded state takes of a rank's device and of its host, for plans and at the start of a
run."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from colonnade.parallel.lanes.tasks import Event, ImmediateLanes, Run, Task
from colonnade.parallel.optimizer.offload.adamw import OffloadedAdamW
from colonnade.parallel.storages import storage_bytes


@dataclass(frozen=True)
class OffloadReport:
    """What a rank's offloaded state takes, in bytes.

    Attributes:
        host: of the host's memory, by the kinds of `host_report`.
        kept: of gradients that the device still has when the last backward pass of a step has
            ended, but for the first step, in which none has left until then.
        slot: of the device's memory for the state of one group at a time, of which two or more are
            in use during updates; 0 where the host updates all.
        groups: whose state moves together.
        device_groups: those that the device updates.
    """

    host: dict[str, int]
    kept: int
    slot: int
    groups: int
    device_groups: int

    @classmethod
    def of(cls, optimizer: OffloadedAdamW, kept: Sequence[nn.Parameter]) -> "OffloadReport":
        """Reports an optimizer whose parameters have gradients, those of `kept` to their end."""
        gradients = [p.grad for p in kept if p.grad is not None]
        groups, on_device = len(optimizer.groups), sum(optimizer.placement)
        size = storage_bytes(gradients)
        return cls(optimizer.host_sizes, size, slot_size(optimizer), groups, on_device)


def slot_size(optimizer: OffloadedAdamW) -> int:
    """Returns the bytes of the largest group that the device updates; where placements follow what
    is measured, of the largest that it may update."""
    if optimizer.settings.offload != "interleaved":
        return 0
    movable = optimizer.placer.movable
    updated = [group for group in movable if optimizer.refit or optimizer.placement[group]]
    return max((optimizer.scheduler.sizes[g].state for g in updated), default=0)


def kept_gradients(optimizer: OffloadedAdamW) -> list[nn.Parameter]:
    """Returns the parameters whose gradients do not leave the device during backward: the device
    updates them, or their gradients are complete only afterwards."""
    return [
        parameter
        for parameter, (group, index) in optimizer.numbers.items()
        if optimizer.placement[group]
        or optimizer.groups[group].trained[index].partial
        or parameter in optimizer.arrivals.late
    ]


class DeviceLanes(ImmediateLanes):
    """Lanes on which every operation runs when it is queued, but for updates on the host."""

    def launch(self, task: Task, run: Run, after: Sequence[Event] = ()) -> Event:
        run()
        return None

    def run_on_host(self, task: Task, run: Run) -> None:
        """Does nothing."""
