"""Lanes for tests of a simulated machine, and of the waits that its operations need."""

import random
from collections import deque

from colonnade.parallel.lanes.clock import ClockLanes, Operation
from colonnade.parallel.lanes.tasks import Run, Task

PASSES = "passes"  # the device's own stream


class OrderError(AssertionError):
    """An operation found something else than a correct order leaves."""


def require(condition: bool, what: str) -> None:
    """Raises OrderError unless the condition holds."""
    if not condition:
        raise OrderError(what)


class MachineLanes(ClockLanes):
    """Lanes of a machine whose passes run on a stream, behind the thread that queues them; the
    waits in `dropped` do not take place."""

    def __init__(self, rng: random.Random, dropped: str | None) -> None:
        super().__init__(lambda task: rng.choice([0.0, 0.1, 1.0, 10.0]) * rng.random())
        self.queues[PASSES], self.lane_ends[PASSES] = deque(), 0.0
        self.dropped, self.last_pass = dropped, super().ready()

    def resource(self, task: Task) -> str:
        return PASSES if task.kind == PASSES else super().resource(task)

    def pass_through(self, run: Run) -> None:
        self.last_pass = ClockLanes.launch(self, Task(PASSES, 0, 1), run)

    def ready(self) -> Operation:
        return self.last_pass

    def launch(self, task: Task, run: Run, after: tuple[Operation, ...] = ()) -> Operation:
        kept = [e for i, e in enumerate(after) if self.dropped != f"{task.kind} {i}"]
        return super().launch(task, run, kept)

    def wait(self, event: Operation) -> None:
        if event.task is None or self.dropped != f"wait {event.task.kind}":
            super().wait(event)
