"""Part of `bench offload`: devices that are not present, on a simulated clock.

The scheduler that training uses runs on lanes whose operations take the seconds that the rates of a
machine give; passes are busy for the seconds that the published artifact's logs of Deep Optimizer
States give for a micro-batch. Compared, from the beginning of the forward pass to the end of the
step:

    serial       gradients are copied during backward, which waits; the host updates all groups, one
                 after the other, and waits for each copy of weights
    flush        gradients leave asynchronously; the host updates all groups
    interleaved  some groups are updated on the device at the same time
    bound        passes, and below them the busiest of host, device and either direction of the
                 link, at the best share on the device that need not be made of whole groups
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from colonnade.parallel.lanes.clock import ClockLanes, Operation
from colonnade.parallel.lanes.tasks import LANES, Task
from colonnade.parallel.optimizer.offload.placement import NoWork, place, share_on_device
from colonnade.parallel.optimizer.offload.rates import Rates
from colonnade.parallel.optimizer.offload.scheduler import GroupSize, Scheduler

STATE, GRADIENT, WEIGHT = 12, 4, 2  # bytes of a parameter
GROUP = 100_000_000  # parameters of a group, as in the artifact
PICTURE = "offload.png"


@dataclass(frozen=True)
class Machine:
    """A rank of a machine, and its share of a model that is trained on it.

    Attributes:
        rates: of updates and copies.
        blocking: parameters per second whose gradients a copy converts and moves that backward
            waits for: 16 bits to the host, on one thread of which they become fp32.
        parameters: of the rank's shard.
        forward, backward: seconds of the passes of a micro-batch.
        source: of these figures.
    """

    rates: Rates
    blocking: float
    parameters: int
    forward: float
    backward: float
    source: str


# Updates on the device: memory bandwidth over 30 bytes of a parameter. Links: about 80% of nominal.
MACHINES = {
    "H100, PCIe 5": Machine(
        Rates(host=2.2e9, device=1.1e11, to_device=5e10, to_host=5e10),
        blocking=1.48e9,
        parameters=5_100_000_000,
        forward=0.212,
        backward=0.974,
        source="logs: 20B on four ranks, a sequence each; backward 4.450 s with blocking copies",
    ),
    "A100, PCIe 4": Machine(
        Rates(host=0.86e9, device=6.5e10, to_device=2.5e10, to_host=2.5e10),
        blocking=1.9e9,
        parameters=3_250_000_000,
        forward=0.377,
        backward=1.263,
        source="logs: 13B on four ranks, a sequence each; backward 2.970 s with blocking copies",
    ),
    "GH200": Machine(
        Rates(host=1.2e10, device=1.3e11, to_device=3.6e11, to_host=2.9e11),
        blocking=1.5e9,
        parameters=5_100_000_000,
        forward=0.212,
        backward=0.974,
        source="no logs: bandwidths of LPDDR5X and C2C, passes and blocking copies as on the H100",
    ),
}


def groups_of(machine: Machine) -> list[GroupSize]:
    """The groups of a rank's shard."""
    whole, rest = divmod(machine.parameters, GROUP)
    counts = [GROUP] * whole + ([rest] if rest else [])
    return [GroupSize(n, STATE * n, (GRADIENT * n,), WEIGHT * n) for n in counts]


def serial(machine: Machine) -> float:
    """Seconds of a step in which nothing overlaps."""
    rates, count = machine.rates, machine.parameters
    copies = count / machine.blocking + WEIGHT * count / rates.to_device
    return machine.forward + machine.backward + copies + count / rates.host


def simulated(machine: Machine, on_device: Sequence[bool]) -> tuple[float, float, list[Operation]]:
    """Seconds of a step, and of its updates, and all operations, with these groups on the device.

    Backward completes the gradients of one group after the other, in equal times; loads of the
    first two groups begin when backward ends, as their memory is that of activations.
    """
    lanes = ClockLanes(machine.rates.seconds)
    sizes = groups_of(machine)
    scheduler = Scheduler(lanes, NoWork(), sizes, lambda size: True)
    lanes.pass_time(machine.forward)
    scheduler.begin(on_device)
    for group, size in enumerate(sizes):
        lanes.pass_time(machine.backward * size.parameters / machine.parameters)
        if not on_device[group]:
            scheduler.send_gradient(group, 0)
    start = lanes.now
    scheduler.step(on_device)
    return lanes.now, lanes.now - start, lanes.log


def least_update(machine: Machine) -> float:
    """Seconds below which no updates can come, on whichever shares of host and device: the smallest
    time of the busiest of host, device and link."""
    rates, count = machine.rates, machine.parameters

    def busiest(share: float) -> float:
        host, device = (1 - share) * count / rates.host, share * count / rates.device
        into = (STATE * share + WEIGHT * (1 - share)) * count / rates.to_device
        return max(host, device, into, STATE * share * count / rates.to_host)

    return min(busiest(step / 10_000) for step in range(10_001))


def figures(machine: Machine) -> tuple[dict[str, Any], list[Operation]]:
    """The figures of a machine, and the operations of its interleaved step."""
    sizes, passes = groups_of(machine), machine.forward + machine.backward
    marks, predicted = place(sizes, machine.rates)
    flush, flush_update, _ = simulated(machine, [False] * len(sizes))
    interleaved, update, log = simulated(machine, marks)
    least = least_update(machine)
    report = {
        "rates": asdict(machine.rates),
        "source": machine.source,
        "groups": len(sizes),
        "groups_on_device": sum(marks),
        "share_by_formula": share_on_device(sizes, machine.rates),
        "seconds": {
            "passes": passes, "serial": serial(machine), "flush": flush,
            "interleaved": interleaved, "bound": passes + least,
        },
        "update_seconds": {
            "flush": flush_update, "interleaved": update, "predicted": predicted, "bound": least,
        },
        "serial / interleaved": serial(machine) / interleaved,
        "flush / interleaved": flush / interleaved,
        "bound / interleaved": (passes + least) / interleaved,
        "bound / interleaved, updates": least / update,
    }  # fmt: skip
    return report, log


def picture(logs: dict[str, tuple[Machine, list[Operation]]], path: Path) -> None:
    """Draws which lane is busy when, a panel for each machine; colours are groups."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps, pyplot

    rows = [*reversed(LANES), "host"]
    figure, axes = pyplot.subplots(len(logs), 1, figsize=(11, 2.6 * len(logs)), squeeze=False)
    colours = colormaps["tab20"]
    for (name, (machine, log)), axis in zip(logs.items(), axes[:, 0], strict=True):
        for operation in log:
            task, end = operation.task, operation.end
            assert isinstance(task, Task)
            assert end is not None
            span = (operation.start, end - operation.start)
            position = rows.index(task.kind) - 0.4
            axis.broken_barh([span], (position, 0.8), facecolors=colours(task.group % 20))
        passes = machine.forward, machine.forward + machine.backward
        for time in passes:
            axis.axvline(time, color="black", linewidth=0.8)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_title(f"{name}: backward between the lines, then updates", fontsize=9)
        axis.set_xlim(machine.forward, None)
    axes[-1, 0].set_xlabel("seconds from the beginning of the forward pass")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested figures as one level, a line each: `machine: seconds: serial`."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}: ") if isinstance(value, dict) else {name: value}
    return found


def run(path: Path | None = Path(PICTURE)) -> dict[str, Any]:
    """The figures of all machines; draws their schedules to `path`, unless that is None."""
    found = {name: figures(machine) for name, machine in MACHINES.items()}
    report = flat({name: of_machine for name, (of_machine, _) in found.items()})
    if path is not None:
        picture({name: (MACHINES[name], log) for name, (_, log) in found.items()}, path)
        report["picture"] = str(path)
    return report
