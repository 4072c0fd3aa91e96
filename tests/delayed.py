"""Lanes for tests of the stash, on which the passes run at once, and copies as late as they may."""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from colonnade.parallel.lanes.tasks import Event, Run, Task


@dataclass(eq=False)
class Queued:
    """An operation of a lane that runs later."""

    task: Task
    run: Run | None  # None: it has run


@dataclass
class DelayedLanes:
    """Lanes whose operations run when the passes wait for them, or earlier by chance.

    The passes do not wait for operations of the kind `dropped`.
    """

    rng: random.Random
    dropped: str | None = None
    queues: dict[str, deque[Queued]] = field(default_factory=dict)

    def launch(self, task: Task, run: Run, after: Sequence[Event] = ()) -> Queued:
        operation = Queued(task, run)
        self.queues.setdefault(task.kind, deque()).append(operation)
        while self.rng.random() < 0.3 and (able := [q for q in self.queues.values() if q]):
            self.run_next(self.rng.choice(able))
        return operation

    def run_next(self, queue: deque[Queued]) -> None:
        operation = queue.popleft()
        assert operation.run is not None
        operation.run()
        operation.run = None  # frees what it works on

    def run_on_host(self, task: Task, run: Run) -> None:
        run()

    def ready(self) -> Event:
        return None

    def wait(self, event: Queued) -> None:
        while event.run is not None:
            self.run_next(self.queues[event.task.kind])

    def passes_wait(self, event: Queued) -> None:
        if event.task.kind != self.dropped:
            self.wait(event)

    def passed(self, event: Queued) -> bool:
        return event.run is None

    def finish(self) -> None:
        assert not any(self.queues.values())
