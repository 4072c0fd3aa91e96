"""Compares the ranks' own working times of a step, and names ranks that are slow.

A rank's working time is that of its parts `data`, `passes` and `update`, without the time by which
it waits longer for other ranks than the rank that waits least: the rank for which all others wait
has worked all of the time. So a rank of 1.5 times the median makes the step up to 1.5 times as
long; what a collective itself takes, or communication that is hidden behind computation, is no
difference between ranks. Of the steps of a window the median counts, so that a single long one
(a compilation, a page from the disk) is no slow rank.

It does not see why a rank is slow, nor which of two ranks is where one waits outside of a step's
parts, in a save, a validation or a report. Two ranks that are equally slow among four are half of
all, and the lower median is that of the others.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from colonnade.launcher.cluster.collective import on_all_ranks
from colonnade.launcher.cluster.waits import Waits, waits_of
from colonnade.launcher.recipe.tables import MonitorConfig
from colonnade.launcher.train.timer import BETWEEN_STEPS


class Measured(NamedTuple):
    """What a rank measured of a step: seconds in its parts, and those waited in them."""

    seconds: float
    waited: float


@dataclass(frozen=True)
class Comparison:
    """The working times of all ranks in a window of steps.

    Attributes:
        seconds: the working time of each rank.
        limit: how many times the median makes a rank slow.
    """

    seconds: Sequence[float]
    limit: float

    @property
    def median(self) -> float:
        """The median of all ranks, the lower one of two."""
        return statistics.median_low(self.seconds)

    @property
    def slowest(self) -> int:
        """The rank that works longest."""
        return max(range(len(self.seconds)), key=self.seconds.__getitem__)

    @property
    def slow(self) -> set[int]:
        """The ranks whose time is above the limit."""
        return {r for r, s in enumerate(self.seconds) if s > self.limit * self.median}

    def row(self, hosts: Sequence[str]) -> dict[str, Any]:
        """Returns what metrics.jsonl records; `hosts` by rank."""
        largest = self.seconds[self.slowest]
        return {
            "working_seconds": {"median": round(self.median, 6), "largest": round(largest, 6)},
            "slowest_rank": self.slowest,
            "slowest_host": hosts[self.slowest],
        }


def working_times(window: Sequence[Sequence[Measured]]) -> list[float]:
    """Returns every rank's working time, its median over the steps of a window; NaN where no step
    was measured on all ranks. `window` has a sequence of ranks for each step."""
    times: list[list[float]] = []
    for ranks in window:
        least = min(rank.waited for rank in ranks)
        working = [rank.seconds - (rank.waited - least) for rank in ranks]
        if all(map(math.isfinite, working)):
            times.append(working)
    if not times:
        return [math.nan] * len(window[0])
    return [statistics.median(of_rank) for of_rank in zip(*times, strict=True)]


class RankTimes:
    """Measures this rank's working time, and compares it with that of others every few steps.

    Attributes:
        waits: measures how long other ranks are waited for.
        seconds: of the parts of the steps since the last comparison.
        slow: ranks that were slow in the last comparison.
    """

    def __init__(self, settings: MonitorConfig, device: torch.device) -> None:
        self.settings = settings
        self.waits: Waits = waits_of(device)
        self.seconds: list[float] = []
        self.slow: set[int] = set()

    def add(self, parts: Mapping[str, float]) -> None:
        """Takes the parts of a step of this rank, which has ended."""
        self.waits.end_step()
        self.seconds.append(sum(s for name, s in parts.items() if name not in BETWEEN_STEPS))

    @property
    def due(self) -> bool:
        """Whether a window of steps is complete; it is on all ranks at once."""
        return len(self.seconds) >= self.settings.ranks_every

    def compare(self) -> Comparison | None:
        """All-gathers the times of the steps since the last call, and returns the working times;
        None where they are unknown. Collective."""
        seconds, self.seconds = self.seconds, []
        waited = self.waits.take() or [math.nan] * len(seconds)
        steps = [Measured(*step) for step in zip(seconds, waited, strict=True)]
        of_ranks = on_all_ranks(lambda: steps)
        window = list(zip(*of_ranks, strict=True))
        times = working_times(window)
        known = all(map(math.isfinite, times))
        return Comparison(times, self.settings.slow_rank) if known else None
