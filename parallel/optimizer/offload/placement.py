"""Where each group is updated: the placement that takes the least time, by measured rates.

With U parameters per second on the host and B bytes per second each way, of a group of n parameters
the host takes n / U seconds, and 12 n / B pass before the device has its fp32 master weights and
moments. Both work at once, so the device should update the share 1 / (1 + 12 U / B) of all
parameters. A fixed stride cannot express most shares: groups are marked by error diffusion.
"""

from collections.abc import Sequence

from colonnade.parallel.lanes.clock import ClockLanes, Operation
from colonnade.parallel.optimizer.offload.rates import Rates
from colonnade.parallel.optimizer.offload.scheduler import GroupSize, Scheduler

SHARES = 16  # that are tried, evenly spaced, beside the one of the formula


class NoWork:
    """Work of a scheduler whose operations do nothing."""

    def has_gradient(self, group: int, index: int) -> bool:
        return False

    def allocate(self, size: int) -> None:
        return None

    def copy_gradient(self, group: int, index: int) -> None: ...
    def drop_gradient(self, group: int, index: int) -> None: ...
    def load(self, group: int, memory: None) -> None: ...
    def update(self, group: int, memory: None) -> None: ...
    def store(self, group: int, memory: None) -> None: ...
    def update_on_host(self, group: int, indices: Sequence[int]) -> None: ...
    def copy_weights(self, group: int, indices: Sequence[int]) -> None: ...


def diffuse(sizes: Sequence[int], share: float) -> list[bool]:
    """Marks groups so that of the parameters up to any group about this share is marked."""
    marked, owed = [], 0.0
    for size in sizes:
        owed += share * size
        marked.append(size > 0 and owed >= size / 2)
        owed -= size * marked[-1]
    return marked


def share_on_device(sizes: Sequence[GroupSize], rates: Rates) -> float:
    """Returns the share of the parameters with which host and link take the same time."""
    parameters = sum(size.parameters for size in sizes)
    if not parameters:
        return 0.0
    state = sum(size.state for size in sizes) / parameters
    slower = min(rates.to_device, rates.to_host) / (1 if rates.duplex else 2)
    return 1 / (1 + rates.host * state / slower)


def bound(sizes: Sequence[GroupSize], on_device: Sequence[bool], rates: Rates) -> float:
    """Returns the seconds below which no order can come: the busiest part of the machine's."""
    marked = list(zip(sizes, on_device, strict=True))
    loads = sum(size.state for size, chosen in marked if chosen)
    weights = sum(size.weights for size, chosen in marked if not chosen)
    into, out = (loads + weights) / rates.to_device, loads / rates.to_host
    host = sum(size.parameters for size, chosen in marked if not chosen) / rates.host
    device = sum(size.parameters for size, chosen in marked if chosen) / rates.device
    return max(host, device, *((into, out) if rates.duplex else (into + out,)))


def simulate(
    sizes: Sequence[GroupSize], on_device: Sequence[bool], rates: Rates, slots: int
) -> tuple[float, list[Operation]]:
    """Runs a step's updates by the scheduler on a simulated clock, gradients being in their places.

    Returns:
        its seconds, and its operations.
    """
    lanes = ClockLanes(rates.seconds, rates.duplex)
    scheduler = Scheduler(lanes, NoWork(), sizes, lambda size: True, slots)
    scheduler.step(on_device)
    return lanes.now, lanes.log


def place(sizes: Sequence[GroupSize], rates: Rates, slots: int = 2) -> tuple[list[bool], float]:
    """Returns which groups the device should update, and the predicted seconds of the updates.

    Of placements that take the same time it is the one with the fewest groups on the device.
    """
    counts = [size.parameters for size in sizes]
    shares = [number / SHARES for number in range(SHARES + 1)] + [share_on_device(sizes, rates)]
    tried = {tuple(diffuse(counts, share)) for share in shares if slots or not share}
    found = [(simulate(sizes, marks, rates, slots)[0], sum(marks), marks) for marks in tried]
    seconds, _, marks = min(found)
    return list(marks), seconds
