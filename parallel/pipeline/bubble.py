"""The idle time of a pipeline's schedule: by its formula, and by the order of its actions.

Imports no torch.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from colonnade.parallel.config import ParallelConfig

if TYPE_CHECKING:
    from colonnade.parallel.pipeline.schedule import Action


class PassTimes(NamedTuple):
    """Seconds of a rank's passes of one micro-batch, over all of its stages.

    Attributes:
        forward: of the forward passes.
        input_gradient: of the backward passes, without the gradients of weights.
        weight_gradient: of these. A schedule that does not split backward needs only the sum.
    """

    forward: float
    input_gradient: float
    weight_gradient: float

    @property
    def total(self) -> float:
        """Seconds of all passes of a micro-batch."""
        return sum(self)


def bubble(parallel: ParallelConfig, times: PassTimes) -> float:
    """Returns the seconds that a rank idles in a step by the schedule's formula, with equal stages
    and instant transfers.

    GPipe (arXiv:1811.06965) and 1F1B; interleaved, also breadth first (arXiv:2104.04473, section
    2.2); zero bubble H1 over v stages of a rank (arXiv:2401.10241, table 2); ZB-V (section 6 of it)
    has none if forward, input and weight gradients take the same time; DualPipeV, by the formula in
    its repository, with passes that do not overlap.
    """
    p, v = parallel.pp, parallel.stages_of_rank
    forward, inputs, weights = times
    match parallel.schedule:
        case "gpipe" | "1f1b" | "interleaved" | "bfs":
            return (p - 1) * times.total / v
        case "zb1p":
            return (p - 1) * (forward + inputs - weights) / v
        case "zbv":
            return 0.0
        case "dualpipev":
            return (p - 1) * (forward + 2 * inputs - weights) / v
    raise ValueError(f"no formula for the schedule {parallel.schedule}")


def idle_share(parallel: ParallelConfig, times: PassTimes, micro_batches: int) -> float:
    """Returns the share of a step that a rank idles by the schedule's formula."""
    idle = bubble(parallel, times)
    return idle / (micro_batches * times.total + idle)


def shortest_step(
    actions: Mapping[int, Sequence["Action"]], parallel: ParallelConfig, times: PassTimes
) -> float:
    """Returns the seconds of a step whose ranks take these actions in order, with equal stages and
    instant transfers: from the first rank's start to the last one's end.

    The formulas count what a rank idles between its own first and last pass, or in a common window,
    as their papers do; here the step is one window for all ranks.
    """
    v, last = parallel.stages_of_rank, parallel.stage_count - 1
    forward, inputs, weights = (seconds / v for seconds in times)
    seconds = {
        "forward": forward,
        "backward": inputs + weights,
        "input gradient": inputs,
        "weight gradient": weights,
    }
    waiting = {r: [a for a in order if a.kind in seconds][::-1] for r, order in actions.items()}
    free = dict.fromkeys(waiting, 0.0)
    ends: dict[tuple[bool, int, int], float] = {}  # by whether it is forward, stage, micro-batch
    while any(waiting.values()):
        ready = {r: at for r, order in waiting.items() if (at := start(order, ends, last)) >= 0}
        if not ready:
            raise ValueError("every rank waits for another one")
        for rank, at in ready.items():
            action = waiting[rank].pop()
            free[rank] = max(free[rank], at) + seconds[action.kind]
            if action.kind != "weight gradient":
                ends[action.kind == "forward", action.stage, action.micro_batch] = free[rank]
    return max(free.values())


def start(
    order: Sequence["Action"], ends: Mapping[tuple[bool, int, int], float], last: int
) -> float:
    """Returns when the input of the next pass, the last of `order`, is there; -1: not yet known."""
    if not order:
        return -1.0
    kind, stage, number = order[-1]
    is_forward = kind == "forward"
    if kind == "weight gradient" or stage == (0 if is_forward else last):
        return 0.0
    return ends.get((is_forward, stage + (-1 if is_forward else 1), number), -1.0)
