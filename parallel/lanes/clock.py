"""Lanes on a simulated clock: for predictions, tests, and benchmarks of devices elsewhere."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from colonnade.parallel.lanes.tasks import (
    FETCH,
    GRADIENT,
    HOST,
    LANES,
    LOAD,
    STASH,
    STASH_LANES,
    STORE,
    UPDATE,
    WEIGHTS,
    Run,
    Task,
)

# The part of the machine that operations of a kind take in turns: a direction of the link, or a
# processor.
RESOURCES = {
    GRADIENT: "to host",
    STORE: "to host",
    LOAD: "to device",
    WEIGHTS: "to device",
    UPDATE: "device",
    HOST: "host",
    STASH: "to host",
    FETCH: "to device",
}
ALL_LANES = (*LANES, *STASH_LANES)


@dataclass(eq=False)
class Operation:
    """A queued operation; `end` is None until its time is known."""

    task: Task | None
    run: Run
    after: list["Operation"]
    queued: float
    start: float = 0.0
    end: float | None = None


@dataclass
class ClockLanes:
    """Lanes whose operations take the seconds that a function gives.

    Operations that are ready take the parts of the machine that they share in the order in which
    they became ready. `run` is called in the order of the starts.

    Attributes:
        seconds: of a task.
        duplex: whether copies both ways run at once.
        now: the time of the calling thread.
        log: all operations that have run, by their starts; updates on the host too.
    """

    seconds: Callable[[Task], float]
    duplex: bool = True
    now: float = 0.0
    queues: dict[str, deque[Operation]] = field(
        default_factory=lambda: {kind: deque() for kind in ALL_LANES}
    )
    lane_ends: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ALL_LANES, 0.0))
    resource_ends: dict[str, float] = field(default_factory=dict)
    log: list[Operation] = field(default_factory=list)

    def launch(self, task: Task, run: Run, after: Sequence[Operation] = ()) -> Operation:
        operation = Operation(task, run, list(after), self.now)
        self.queues[task.kind].append(operation)
        return operation

    def run_on_host(self, task: Task, run: Run) -> None:
        start, seconds = self.now, self.seconds(task)
        self.pass_time(seconds)
        run()
        self.log.append(Operation(task, run, [], start, start, start + seconds))

    def ready(self) -> Operation:
        return Operation(None, lambda: None, [], self.now, self.now, self.now)

    def wait(self, event: Operation) -> None:
        while event.end is None:
            if not self.run_next():
                raise RuntimeError(f"{event.task} waits for an operation that was never queued")
        self.now = max(self.now, event.end)

    def passes_wait(self, event: Operation) -> None:
        """The device's own stream waits, whose time is that of the calling thread."""
        self.wait(event)

    def passed(self, event: Operation) -> bool:
        self.pass_time(0.0)
        return event.end is not None and event.end <= self.now

    def finish(self) -> None:
        """Does nothing."""

    def pass_time(self, seconds: float) -> None:
        """The calling thread, and the device's own stream, are busy for so long."""
        self.now += seconds
        while self.run_next(self.now):
            pass

    def run_next(self, until: float = float("inf")) -> bool:
        """Runs the operation that can start first, if that is before `until`."""
        heads = [queue[0] for queue in self.queues.values() if queue]
        able = [h for h in heads if all(event.end is not None for event in h.after)]
        if not able:
            return False
        chosen = min(able, key=self.start_of)
        task, start = chosen.task, self.start_of(chosen)
        if start >= until:
            return False
        assert task is not None
        self.queues[task.kind].popleft()
        chosen.start, chosen.end = start, start + self.seconds(task)
        self.lane_ends[task.kind] = self.resource_ends[self.resource(task)] = chosen.end
        chosen.run()
        self.log.append(chosen)
        return True

    def start_of(self, operation: Operation) -> float:
        """Returns when an operation whose events' times are known can start."""
        task = operation.task
        assert task is not None
        events = (event.end or 0.0 for event in operation.after)
        resource = self.resource_ends.get(self.resource(task), 0.0)
        return max([operation.queued, self.lane_ends[task.kind], resource, *events])

    def resource(self, task: Task) -> str:
        """Returns the part of the machine that a task takes."""
        name = RESOURCES[task.kind]
        return "link" if name.startswith("to ") and not self.duplex else name
