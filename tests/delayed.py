"""Lanes for tests, on which the passes run at once, and other operations as late as they may."""

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
    after: list["Queued"]

    @property
    def able(self) -> bool:
        """Whether all that it waits for has run."""
        return all(event.run is None for event in self.after)


@dataclass
class DelayedLanes:
    """Lanes whose operations run when somebody waits for them, or earlier by chance.

    The passes do not wait for operations of the kind `dropped`, and every `drop`-th operation waits
    for no event.
    """

    rng: random.Random
    dropped: str | None = None
    drop: int | None = None
    queues: dict[str, deque[Queued]] = field(default_factory=dict)
    count: int = 0

    def launch(self, task: Task, run: Run, after: Sequence[Event] = ()) -> Queued:
        self.count += 1
        kept = [event for event in after if event is not None]
        operation = Queued(task, run, [] if self.drop and self.count % self.drop == 0 else kept)
        self.queues.setdefault(task.kind, deque()).append(operation)
        while self.rng.random() < 0.3 and (able := self.able_queues()):
            self.run_next(self.rng.choice(able))
        return operation

    def able_queues(self) -> list[deque[Queued]]:
        """Returns the lanes whose next operation waits for nothing."""
        return [queue for queue in self.queues.values() if queue and queue[0].able]

    def run_next(self, queue: deque[Queued]) -> None:
        operation = queue.popleft()
        assert operation.run is not None
        operation.run()
        operation.run = None  # frees what it works on

    def run_on_host(self, task: Task, run: Run) -> None:
        run()

    def ready(self) -> Event:
        return None

    def wait(self, event: Queued | None) -> None:
        """Runs no more than an event needs."""
        while event is not None and event.run is not None:
            queue = self.queues[event.task.kind]
            for earlier in queue[0].after:
                self.wait(earlier)
            self.run_next(queue)

    def passes_wait(self, event: Queued) -> None:
        if event.task.kind != self.dropped:
            self.wait(event)

    def passed(self, event: Queued | None) -> bool:
        return event is None or event.run is None

    def finish(self) -> None:
        assert not any(self.queues.values())
