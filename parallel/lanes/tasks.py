"""Operations that run beside the passes, and the lanes that run them.

A lane is a queue of the device: its operations run one after the other, those of different lanes at
once, unless one waits for an event of another. Host updates run on the thread that calls.

    lane       from, to          what
    gradient   device to host    a gradient of a group that the host updates
    load       host to device    master weights and moments of a group that the device updates
    update     device            AdamW of that group, and its weights
    store      device to host    its master weights and moments
    weights    host to device    the weights of a group that the host has updated
    stash      device to host    what backward needs, from forward to its use
    fetch      host to device    the same, before its use
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

GRADIENT, LOAD, UPDATE, STORE, WEIGHTS, HOST = (
    "gradient", "load", "update", "store", "weights", "host",
)  # fmt: skip
LANES = (GRADIENT, LOAD, UPDATE, STORE, WEIGHTS)  # of the optimizer
STASH, FETCH = "stash", "fetch"
STASH_LANES = (STASH, FETCH)  # of backward

Event = Any  # a point in a lane; None: it has passed
Run = Callable[[], None]


class Task(NamedTuple):
    """One operation.

    Attributes:
        kind: its lane, or `host`.
        group: whose state it works on, or the number of a stashed tensor.
        amount: bytes of a copy, parameters of an update.
    """

    kind: str
    group: int
    amount: int


Observe = Callable[[Task, float], None]  # a task, and the seconds that it took


class Lanes(Protocol):
    """The lanes of a device."""

    def launch(self, task: Task, run: Run, after: Sequence[Event] = ()) -> Event:
        """Queues an operation on the lane of its kind: `run` begins after those that were queued
        before it, and after these events. Returns the event of its end."""

    def run_on_host(self, task: Task, run: Run) -> None:
        """Runs an operation on the calling thread."""

    def ready(self) -> Event:
        """Returns the event at which all that the caller has queued on the device's own stream,
        such as the backward pass, has run."""

    def wait(self, event: Event) -> None:
        """Returns when an event has passed."""

    def passes_wait(self, event: Event) -> None:
        """What the caller queues on the device's own stream from now on runs after an event."""

    def passed(self, event: Event) -> bool:
        """Whether an event has passed."""

    def finish(self) -> None:
        """Is called at the end of a step, when every event has passed."""


def run_timed(task: Task, run: Run, observe: Observe | None) -> None:
    """Runs an operation on the calling thread; `observe` learns its time."""
    start = time.perf_counter()
    run()
    if observe is not None:
        observe(task, time.perf_counter() - start)


class ImmediateLanes:
    """Lanes of a device whose memory is the host's: every operation runs when it is queued.

    `observe` learns the times of operations; None: nobody does.
    """

    def __init__(self, observe: Observe | None = None) -> None:
        self.observe = observe

    def launch(self, task: Task, run: Run, after: Sequence[Event] = ()) -> Event:
        self.run_on_host(task, run)
        return None

    def run_on_host(self, task: Task, run: Run) -> None:
        run_timed(task, run, self.observe)

    def ready(self) -> Event:
        return None

    def wait(self, event: Event) -> None:
        """Returns at once."""

    def passes_wait(self, event: Event) -> None:
        """Returns at once."""

    def passed(self, event: Event) -> bool:
        return True

    def finish(self) -> None:
        """Does nothing."""
