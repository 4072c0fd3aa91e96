"""Records a step of a pipeline, and writes `timeline.json` and `timeline.svg`: ranks by time."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from colonnade.launcher.cluster.collective import on_rank_zero
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.picture import Box, draw
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.passes import Passes
from colonnade.parallel.pipeline.bubble import PassTimes, idle_share, shortest_step
from colonnade.parallel.pipeline.pipeline import Pipeline
from colonnade.parallel.pipeline.schedule import actions_of
from colonnade.parallel.pipeline.timeline import Interval, Recorder

PASSES = ("forward", "backward", "input gradient", "weight gradient")
COMMUNICATION = "communication"
CLOCK = "seconds from the first interval; ranks of several hosts by their synchronised clocks"


@contextmanager
def timeline_of(
    step: int,
    recipe: Recipe,
    passes: Passes,
    run: Path,
    write: Callable[[Callable[[], None]], None],
) -> Iterator[None]:
    """A context manager around a step: if `train.timeline` names it, records the actions of every
    rank, gathers those of a pipeline, and writes rank 0's into the run's folder. Collective.

    Args:
        step: from 1.
        recipe: of the run.
        passes: what runs the step's passes.
        run: the folder.
        write: calls a function that writes files, and turns its errors into those of a user.
    """
    if step != recipe.train.timeline:
        yield
        return
    assert isinstance(passes, Pipeline)  # the field is a fault without one
    recorder = passes.observer = Recorder(passes.device)
    try:
        yield
    finally:
        passes.observer = None
    group = passes.pipeline_group
    gathered: list[list[Interval]] = [[]] * group.size()
    dist.all_gather_object(gathered, recorder.intervals(), group=group)
    timeline = Timeline(step, recipe.parallel, gathered)
    on_rank_zero(lambda: write(partial(timeline.write, run)))


@dataclass(frozen=True)
class Timeline:
    """The intervals of the ranks of a pipeline in one step.

    Attributes:
        step: from 1.
        parallel: the layout.
        ranks: what each rank along `pp` did, in order.
    """

    step: int
    parallel: ParallelConfig
    ranks: Sequence[Sequence[Interval]]

    @property
    def window(self) -> tuple[float, float]:
        """The first start of any interval and the last end."""
        intervals = [i for rank in self.ranks for i in rank]
        return min(i.start for i in intervals), max(i.end for i in intervals)

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches of the step."""
        return 1 + max(i.micro_batch for rank in self.ranks for i in rank)

    @property
    def idle(self) -> float:
        """The share of the step, from its first start to its last end, in which a rank of the
        pipeline runs no pass; the mean over ranks."""
        start, end = self.window
        busy = sum(i.end - i.start for rank in self.ranks for i in rank if i.kind in PASSES)
        return 1 - busy / (len(self.ranks) * (end - start))

    @property
    def pass_times(self) -> PassTimes:
        """The mean seconds of a rank's passes of one micro-batch."""
        count = self.micro_batches * len(self.ranks)
        seconds: dict[str, list[float]] = defaultdict(list)
        for interval in (i for rank in self.ranks for i in rank):
            seconds[interval.kind].append(interval.end - interval.start)
        sums = {kind: sum(values) for kind, values in seconds.items()}
        forward = sums.get("forward", 0.0) / count
        backward = sum(sums.get(kind, 0.0) for kind in PASSES[1:]) / count
        if "weight gradient" not in sums:
            return PassTimes(forward, backward, 0.0)
        # Of passes that are not split the parts are unknown: the others' ratio holds for them.
        weights, inputs = (statistics.fmean(seconds[k]) for k in ("weight gradient", PASSES[2]))
        return PassTimes(
            forward, backward * inputs / (inputs + weights), backward * weights / (inputs + weights)
        )

    @property
    def formula(self) -> float:
        """The idle share by the schedule's formula, at the mean times of the passes."""
        return idle_share(self.parallel, self.pass_times, self.micro_batches)

    @property
    def by_order(self) -> float:
        """The idle share by the order of the actions alone, at the mean times of the passes."""
        times, count = self.pass_times, self.micro_batches
        return 1 - count * times.total / shortest_step(
            actions_of(self.parallel, count), self.parallel, times
        )

    def boxes(self) -> list[list[Box]]:
        """Returns what to draw of each rank.

        A wait is communication from when the other rank has begun to send, and idle before.
        """
        sent = {
            (i.kind, i.stage, i.micro_batch): i.start
            for rank in self.ranks
            for i in rank
            if i.kind.startswith("send")
        }
        first, _ = self.window

        def box(i: Interval) -> Box:
            kind, begin = i.kind, i.start
            if kind.startswith("wait"):
                direction = kind.removeprefix("wait ")
                source = i.stage + (-1 if direction == "forward" else 1)
                sending = sent.get((f"send {direction}", source, i.micro_batch), begin)
                begin = min(max(begin, sending), i.end)
            colour = kind if kind in PASSES else COMMUNICATION
            return Box(kind, colour, i.stage, i.micro_batch, begin - first, i.end - first)

        return [[box(i) for i in rank] for rank in self.ranks]

    def caption(self) -> list[str]:
        """Returns the lines above the picture."""
        times, several = self.pass_times, self.parallel.stages_of_rank
        split = (
            f"input gradient {1e3 * times.input_gradient:,.1f}, "
            f"weight gradient {1e3 * times.weight_gradient:,.1f}"
            if times.weight_gradient
            else f"backward {1e3 * times.input_gradient:,.1f}"
        )
        return [
            f"step {self.step}: {self.parallel.schedule}, {len(self.ranks)} ranks, "
            f"{len(self.ranks) * several} stages, {self.micro_batches} micro-batches",
            f"idle {self.idle:.1%} measured; {self.formula:.1%} by the schedule's formula, "
            f"{self.by_order:.1%} by the order of passes, with equal stages and instant transfers",
            f"a rank's mean ms for a micro-batch: forward {1e3 * times.forward:,.1f}, {split}",
        ]

    def record(self) -> dict[str, Any]:
        """Returns what timeline.json has: the figures, and every rank's intervals."""
        first, end = self.window
        return {
            "step": self.step,
            "schedule": self.parallel.schedule,
            "stages": len(self.ranks) * self.parallel.stages_of_rank,
            "micro_batches": self.micro_batches,
            "seconds": end - first,
            "idle": self.idle,
            "idle_by_formula": self.formula,
            "idle_by_order": self.by_order,
            "clock": CLOCK,
            "ranks": [
                [i._replace(start=i.start - first, end=i.end - first)._asdict() for i in rank]
                for rank in self.ranks
            ],
        }

    def write(self, folder: Path) -> None:
        """Writes `timeline.json` and `timeline.svg` into a folder."""
        text = json.dumps(self.record()) + "\n"
        (folder / "timeline.json").write_text(text, encoding="utf-8")
        svg = draw(self.boxes(), self.window[1] - self.window[0], self.caption())
        (folder / "timeline.svg").write_text(svg, encoding="utf-8")
