"""Compares the ranks' own working times of a step, and names ranks that are slow.

A rank's working time is that of its parts `data`, `passes` and `update`, without the time by which
it waits longer for other ranks than the rank that waits least: the rank for which all others wait
has worked all of the time. So a rank of 1.5 times the median makes the step up to 1.5 times as
long; what a collective itself takes, or communication that is hidden behind computation, is no
difference between ranks. A rank is slow that works that long in most steps of a window, so that a
few long ones (a compilation, another program on a core) are no slow rank.

It does not see why a rank is slow, nor one that is slow in every other step, nor who lets the
others wait outside of a step's parts, in a save, a validation or a report. Where half of the ranks
are slow the lower median is that of the others; where more are, none is named.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from colonnade.launcher.cluster.collective import on_all_ranks
from colonnade.launcher.cluster.waits import Waits, waits_of
from colonnade.launcher.recipe.tables import MonitorConfig
from colonnade.launcher.train.timer import BETWEEN_STEPS

SLOW_STEPS = 0.75  # the share of a window's steps in which a slow rank is above the limit


class Measured(NamedTuple):
    """What a rank measured of a step: seconds in its parts, and those waited in them."""

    seconds: float
    waited: float


@dataclass(frozen=True)
class Comparison:
    """The working times of all ranks in a window of steps.

    Attributes:
        times: those of each rank, in seconds, one for every step.
        limit: how many times the median makes a rank slow.
    """

    times: Sequence[Sequence[float]]
    limit: float

    @cached_property
    def seconds(self) -> list[float]:
        """The working time of each rank, the median of its steps."""
        return [statistics.median(times) for times in self.times]

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
        """The ranks whose time is above the limit in most steps."""
        limit = self.limit * self.median
        shares = [statistics.fmean(t > limit for t in times) for times in self.times]
        return {rank for rank, share in enumerate(shares) if share >= SLOW_STEPS}

    def row(self, hosts: Sequence[str]) -> dict[str, Any]:
        """Returns what metrics.jsonl records; `hosts` by rank."""
        largest = self.seconds[self.slowest]
        return {
            "working_seconds": {"median": round(self.median, 6), "largest": round(largest, 6)},
            "slowest_rank": self.slowest,
            "slowest_host": hosts[self.slowest],
        }


def working_times(window: Sequence[Sequence[Measured]]) -> list[list[float]]:
    """Returns every rank's working times in the steps of a window, without steps that were not
    measured on all ranks. `window` has a sequence of ranks for each step."""
    times: list[list[float]] = [[] for _ in window[0]]
    for ranks in window:
        least = min(rank.waited for rank in ranks)
        working = [rank.seconds - (rank.waited - least) for rank in ranks]
        if all(map(math.isfinite, working)):
            for of_rank, seconds in zip(times, working, strict=True):
                of_rank.append(seconds)
    return times


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
        return Comparison(times, self.settings.slow_rank) if times[0] else None
