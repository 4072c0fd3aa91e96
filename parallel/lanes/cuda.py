"""Lanes of a GPU: a stream each, so that copies both ways overlap with updates and passes."""

from collections.abc import Sequence

import torch

from colonnade.parallel.lanes.tasks import LANES, Event, Observe, Run, Task, run_timed


class CudaLanes:
    """Lanes of a GPU.

    Memory that the lanes use must live until the events of its users have passed: the caller keeps
    references. `observe` learns the times of a step's operations when that has ended; None: they
    are not measured.
    """

    def __init__(
        self, device: torch.device, observe: Observe | None = None, kinds: Sequence[str] = LANES
    ) -> None:
        self.streams = {kind: torch.cuda.Stream(device) for kind in kinds}
        self.observe = observe
        self.timed: list[tuple[Task, torch.cuda.Event, torch.cuda.Event]] = []

    def launch(self, task: Task, run: Run, after: Sequence[Event] = ()) -> Event:
        stream = self.streams[task.kind]
        for event in after:
            stream.wait_event(event)
        timing = self.observe is not None
        start, end = (torch.cuda.Event(enable_timing=timing) for _ in range(2))
        with torch.cuda.stream(stream):
            if timing:
                start.record(stream)
            run()
            end.record(stream)
        if timing:
            self.timed.append((task, start, end))
        return end

    def run_on_host(self, task: Task, run: Run) -> None:
        run_timed(task, run, self.observe)

    def ready(self) -> Event:
        return torch.cuda.current_stream().record_event()

    def wait(self, event: Event) -> None:
        event.synchronize()

    def passes_wait(self, event: Event) -> None:
        torch.cuda.current_stream().wait_event(event)

    def passed(self, event: Event) -> bool:
        return event.query()

    def finish(self) -> None:
        for task, start, end in self.timed:
            assert self.observe is not None
            self.observe(task, start.elapsed_time(end) / 1e3)
        self.timed.clear()
