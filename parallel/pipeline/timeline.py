"""Records when a rank of a pipeline runs its passes and transfers, and when it waits."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch


class Interval(NamedTuple):
    """What a rank did for some time.

    Attributes:
        kind: that of an action; or `wait forward`, `wait backward`: for what the stage needs.
        stage: the index of the stage.
        micro_batch: the index of the micro-batch.
        start: seconds since the epoch.
        end: likewise.
    """

    kind: str
    stage: int
    micro_batch: int
    start: float
    end: float


class Observer(Protocol):
    """Looks on while a rank performs actions."""

    def action(self, kind: str, stage: int, number: int) -> AbstractContextManager[None]:
        """A context manager around an action of the schedule."""
        ...

    def wait(self, kind: str, stage: int, number: int) -> AbstractContextManager[None]:
        """A context manager around a wait for a transfer; it may be within an action."""
        ...


def observe_action(
    observer: Observer | None, kind: str, stage: int, number: int
) -> AbstractContextManager[None]:
    """A context manager around an action of the schedule; without an observer it does nothing."""
    return nullcontext() if observer is None else observer.action(kind, stage, number)


def observe_wait(
    observer: Observer | None, kind: str, stage: int, number: int
) -> AbstractContextManager[None]:
    """A context manager around a wait for a transfer; without an observer it does nothing."""
    return nullcontext() if observer is None else observer.wait(f"wait {kind}", stage, number)


Mark = float | torch.cuda.Event  # a point in time: of this process, or of the GPU's stream


class Recorder:
    """Records the actions of a rank, and its waits, as intervals.

    On a GPU an interval is that of the current stream, between two events; only `intervals`
    synchronizes the device. Times are those of this host's clock: the clocks of several hosts have
    to be synchronised, as by NTP, or their rows are shifted against each other. Within a host they
    agree.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.first, self.epoch = self.now(), time.time()
        self.began = self.first  # of the action in progress
        self.marks: list[tuple[str, int, int, Mark, Mark]] = []

    def now(self) -> Mark:
        """Marks this point in time."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def action(self, kind: str, stage: int, number: int) -> Iterator[None]:
        """Records an action; one that first waits begins after the wait."""
        self.began = self.now()
        yield
        self.marks.append((kind, stage, number, self.began, self.now()))

    @contextmanager
    def wait(self, kind: str, stage: int, number: int) -> Iterator[None]:
        """Records a wait."""
        start = self.now()
        yield
        self.began = self.now()
        self.marks.append((kind, stage, number, start, self.began))

    def intervals(self) -> list[Interval]:
        """Returns what has been recorded, in order."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [
            Interval(kind, stage, number, self.epoch_of(start), self.epoch_of(end))
            for kind, stage, number, start, end in self.marks
        ]

    def epoch_of(self, mark: Mark) -> float:
        """Returns the seconds since the epoch of a mark."""
        if isinstance(self.first, float):
            assert isinstance(mark, float)
            return self.epoch + mark - self.first
        assert not isinstance(mark, float)
        return self.epoch + self.first.elapsed_time(mark) / 1000
