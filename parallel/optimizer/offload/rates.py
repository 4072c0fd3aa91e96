"""How fast this machine updates and copies: measured while training, equal on all ranks."""

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from colonnade.parallel.lanes.tasks import (
    GRADIENT,
    HOST,
    LOAD,
    STORE,
    UPDATE,
    WEIGHTS,
    Task,
)

RATE_OF = {
    HOST: "host",
    UPDATE: "device",
    LOAD: "to_device",
    WEIGHTS: "to_device",
    GRADIENT: "to_host",
    STORE: "to_host",
}


@dataclass(frozen=True)
class Rates:
    """Rates of a rank, with all that works beside it.

    Attributes:
        host: parameters per second that the host updates, rounding of the weights included.
        device: parameters per second that the device updates, with the same.
        to_device: bytes per second of copies to the device.
        to_host: bytes per second of copies to the host.
        duplex: whether copies both ways run at once.
    """

    host: float
    device: float
    to_device: float
    to_host: float
    duplex: bool = True

    def seconds(self, task: Task) -> float:
        """Returns how long a task takes when nothing else uses its part of the machine."""
        return task.amount / getattr(self, RATE_OF[task.kind])


# Before the first measurement: a rank of four with an H100 on PCIe 5 (the published artifact's logs
# of Deep Optimizer States: 2.2e9 updates a second on the host of such a rank).
TYPICAL = Rates(host=2.2e9, device=6e10, to_device=5e10, to_host=5e10)


@dataclass
class Measured:
    """Sums of what was measured, in which older measurements count less and less."""

    amounts: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    keep: float = 0.5  # weight of all earlier measurements at each `rates`

    def observe(self, task: Task, seconds: float) -> None:
        """Adds a measurement."""
        name = RATE_OF[task.kind]
        self.amounts[name] = self.amounts.get(name, 0.0) + task.amount
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def rates(self, before: Rates) -> Rates:
        """Returns the mean rates of all ranks; `before` where nothing was measured. Collective:
        all-reduces the sums, so that every rank places groups alike."""
        names = sorted(set(RATE_OF.values()))
        sums = [d.get(n, 0.0) for d in (self.amounts, self.seconds) for n in names]
        totals = torch.tensor(sums, dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(totals)
        amounts, seconds = totals.split(len(names))
        found = {
            name: (amount / second).item()
            for name, amount, second in zip(names, amounts, seconds, strict=True)
            if amount > 0 and second > 0
        }
        for sums_by_name in (self.amounts, self.seconds):
            for name in sums_by_name:
                sums_by_name[name] *= self.keep
        return replace(before, **found)
