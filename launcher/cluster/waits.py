"""Measures how long this rank waits for other ranks in collectives.

Ranks of a synchronous job wait for each other, so that all have the same time of a step: the slow
rank is the one that waits least. `Waits` is the interface, and measures nothing.

On a CPU (gloo) the thread that computes is blocked until a collective that it needs is complete:
`HostWaits` times these calls. On a GPU (NCCL) the host goes on, and it is the device's stream that
waits: `RecordedWaits` takes the times of the collectives' kernels, in which they wait for other
ranks, from the flight recorder, which records none for gloo.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

Interval = tuple[int, int]  # begin and end, in nanoseconds of the host's clock


class Waits:
    """Seconds for which this rank waits, for each step; this class measures none.

    Waits within `counted` count, for the step whose `end_step` comes next.
    """

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Prepares to measure the waits of the calling thread while the block runs."""
        yield

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Waits of this block count."""
        yield

    def end_step(self) -> None:
        """The waits that follow are those of the next step."""

    def take(self) -> list[float]:
        """Returns the seconds of every step since the last call, NaN where they are unknown."""
        return []


class HostWaits(Waits):
    """Times the calls that block this thread: `Work.wait`, which FSDP, pipelines and synchronous
    collectives call, and `wait_tensor` of functional collectives.

    It costs about 15 µs a call. It does not see collectives that are launched and waited for inside
    of C++, which there are none of on the way of a step, and counts the transfer itself as waiting.
    """

    def __init__(self) -> None:
        self.thread = 0
        self.counting = False
        self.seconds = 0.0
        self.steps: list[float] = []

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Replaces both calls by ones that time themselves, until the block ends."""
        self.thread = threading.get_ident()
        wait, operator = dist.Work.wait, torch.ops._c10d_functional.wait_tensor.default
        kernel = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)

        def wait_tensor(tensor: torch.Tensor) -> torch.Tensor:
            return operator.redispatch(kernel, tensor)

        with torch.library._scoped_library("_c10d_functional", "IMPL") as library:
            library.impl("wait_tensor", self.timed(wait_tensor), "CPU")
            dist.Work.wait = self.timed(wait)  # type: ignore[method-assign]
            try:
                yield
            finally:
                dist.Work.wait = wait  # type: ignore[method-assign]

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that adds up how long `call` takes."""

        @wraps(call)
        def timed_call(*arguments: Any, **keywords: Any) -> Any:
            if not self.counting or threading.get_ident() != self.thread:
                return call(*arguments, **keywords)
            start = time.perf_counter()
            try:
                return call(*arguments, **keywords)
            finally:
                self.seconds += time.perf_counter() - start

        return timed_call

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Waits of this block count."""
        self.counting = True
        try:
            yield
        finally:
            self.counting = False

    def end_step(self) -> None:
        """The waits that follow are those of the next step."""
        self.steps.append(self.seconds)
        self.seconds = 0.0

    def take(self) -> list[float]:
        """Returns the seconds of every step since the last call."""
        steps, self.steps = self.steps, []
        return steps


class RecordedWaits(Waits):
    """Adds up the times of NCCL's kernels, by the flight recorder.

    A kernel begins when its rank has reached the collective, and runs until all ranks have. One
    that runs beside computation counts as well: what is compared between ranks is by how much they
    differ. NCCL has to record times (`environment.time_collectives`), and the recorder to hold
    the collectives of a step (`TORCH_FR_BUFFER_SIZE`): steps that it does not hold are unknown.
    """

    def __init__(self, dump: Callable[[], bytes]) -> None:
        self.dump = dump
        self.intervals: list[Interval] = []  # that count, of this step
        self.steps: list[list[Interval]] = []

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Collectives that are launched in this block count."""
        begin = time.time_ns()
        try:
            yield
        finally:
            self.intervals.append((begin, time.time_ns()))

    def end_step(self) -> None:
        """The waits that follow are those of the next step."""
        self.steps.append(self.intervals)
        self.intervals = []

    def take(self) -> list[float]:
        """Returns the seconds of every step since the last call, NaN where they are unknown."""
        steps, self.steps = self.steps, []
        entries = json.loads(self.dump()).get("entries", [])
        return [recorded_seconds(entries, intervals) for intervals in steps]


def recorded_seconds(entries: Sequence[dict[str, Any]], intervals: Sequence[Interval]) -> float:
    """Returns the seconds of the recorded collectives that were launched in some intervals; NaN
    where the recorder does not hold all of them, or not their times."""
    if not entries or not intervals or entries[0]["time_created_ns"] > intervals[0][0]:
        return math.nan
    launched = [
        entry
        for entry in entries
        if any(begin <= entry["time_created_ns"] <= end for begin, end in intervals)
    ]
    times = [entry.get("duration_ms", math.nan) for entry in launched]
    return sum(times) / 1e3


def waits_of(device: torch.device) -> Waits:
    """Returns what measures the waits of a rank on this device; the one that measures nothing where
    this build of PyTorch records no times."""
    if device.type == "cpu":
        return HostWaits()
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    return Waits() if dump is None else RecordedWaits(dump)
