"""Lanes of a GPU: a stream each, so that copies both ways overlap with updates and passes."""

import time
from collections.abc import Sequence

import torch

from colonnade.parallel.lanes.tasks import LANES, Event, Observe, Run, Task


class CudaLanes:
    """Lanes of a GPU.

    Memory that the lanes use must live until the events of its users have passed: the caller keeps
    references. `observe` learns the times of a step's operations when that has ended.
    """

    def __init__(self, device: torch.device, observe: Observe) -> None:
        self.streams = {kind: torch.cuda.Stream(device) for kind in LANES}
        self.observe = observe
        self.timed: list[tuple[Task, torch.cuda.Event, torch.cuda.Event]] = []

    def launch(self, task: Task, run: Run, after: Sequence[Event] = ()) -> Event:
        stream = self.streams[task.kind]
        for event in after:
            stream.wait_event(event)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            start.record(stream)
            run()
            end.record(stream)
        self.timed.append((task, start, end))
        return end

    def run_on_host(self, task: Task, run: Run) -> None:
        start = time.perf_counter()
        run()
        self.observe(task, time.perf_counter() - start)

    def ready(self) -> Event:
        return torch.cuda.current_stream().record_event()

    def wait(self, event: Event) -> None:
        event.synchronize()

    def passed(self, event: Event) -> bool:
        return event.query()

    def finish(self) -> None:
        for task, start, end in self.timed:
            self.observe(task, start.elapsed_time(end) / 1e3)
        self.timed.clear()
