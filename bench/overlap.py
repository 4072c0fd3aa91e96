"""`bench overlap`: ladder beside collectives that take a set time and do nothing else.

One rank of two runs, on whatever device the machine has. The other rank does not exist: a
collective is a delay, on a side stream if the device is a GPU. So the benchmark shows how much the
order of work can hide, without a network and without the processor time that a network takes;
`bench ladder` has both.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.bench.row import (
    COMMUNICATION_SHARE,
    PATTERNS,
    RANKS,
    VARIANTS,
    Row,
    Shape,
    TensorRow,
    overlap_figures,
    step_figures,
)
from colonnade.launcher.cluster.ranks import settle_memory
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.mesh import build_mesh
from colonnade.parallel.world import World

ON_CPU = Shape(hidden=512, seq=512)
ON_GPU = Shape(hidden=4096, seq=4096, dtype=torch.bfloat16)
CALIBRATION_CYCLES = 10**7  # of the delay that measures the GPU's clock
BACKEND = "delay"


class DelayedWork(dist._Work):
    """The handle of a collective that completes when its delay is over."""

    def __init__(self, group: "DelayGroup", completion: "float | torch.cuda.Event") -> None:
        super().__init__()
        self.group, self.completion = group, completion

    def wait(self, timeout: object = None) -> bool:
        """Makes this thread, or the GPU's current stream, wait for the collective."""
        if isinstance(self.completion, float):
            start = time.perf_counter()
            if start < self.completion:
                time.sleep(self.completion - start)
                self.group.waited += time.perf_counter() - start
        else:
            torch.cuda.current_stream().wait_event(self.completion)
        return True


class DelayGroup(dist.ProcessGroup):  # whose methods PyTorch calls with lists only
    """A process group whose other ranks hold the same tensors as this one, over a simulated link.

    The link carries one collective at a time, for `seconds` each; `calls` counts them. Integers,
    which are numbers of rows and few, take no time, and are not counted. On a CPU `waited` adds up
    the seconds that the caller spent waiting for collectives.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # not in PyTorch's stubs
        self.seconds, self.calls, self.waited = 0.0, 0, 0.0
        self.busy_until = 0.0  # on a CPU: when the link has carried all collectives so far
        self.side_stream: torch.cuda.Stream | None = None
        self.cycles_per_second = 0.0  # of the GPU's clock

    def getBackendName(self) -> str:
        """The name of the backend that creates these groups."""
        return BACKEND

    @property
    def group_name(self) -> Any:
        """The name by which functional collectives look up the group."""
        return dist.distributed_c10d._world.pg_names[self]

    def allreduce(  # type: ignore[override]
        self, tensors: Sequence[Tensor], opts: Any = None
    ) -> DelayedWork:
        """Launches an all-reduce, which leaves the tensors as they are."""
        return self._launch([(t, t) for t in tensors])

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> DelayedWork:
        """Launches an all-gather, which copies each input to every rank's chunk of its output."""
        return self._launch(
            [
                (chunk, source)
                for output, source in zip(outputs, inputs, strict=True)
                for chunk in output.chunk(RANKS)
            ]
        )

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> DelayedWork:
        """Launches a reduce-scatter, which copies this rank's chunk of each input to its output."""
        return self._launch(
            [
                (output, source.chunk(RANKS)[self.rank()])
                for output, source in zip(outputs, inputs, strict=True)
            ]
        )

    def alltoall_base(
        self,
        output: Tensor,
        source: Tensor,
        output_sizes: Sequence[int],
        sizes: Sequence[int],
        opts: Any = None,
    ) -> DelayedWork:
        """Launches an all-to-all, which copies the rows for this rank to every rank's rows of the
        output."""
        rows = source.split(list(sizes))[self.rank()]
        return self._launch([(target, rows) for target in output.split(list(output_sizes))])

    # The names by which PyTorch before 2.13 calls them.
    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]

    def _launch(self, copies: Sequence[tuple[Tensor, Tensor]]) -> DelayedWork:
        """Copies each pair's second tensor to its first; the handle completes after the delay."""
        takes_time = copies[0][0].is_floating_point()
        seconds = self.seconds if takes_time else 0.0
        self.calls += takes_time
        if copies[0][0].device.type == "cpu":
            for target, source in copies:
                target.copy_(source)
            self.busy_until = max(self.busy_until, time.perf_counter()) + seconds
            return DelayedWork(self, self.busy_until)
        if self.side_stream is None:
            self.side_stream = torch.cuda.Stream()
            self.cycles_per_second = CALIBRATION_CYCLES / spin_seconds(CALIBRATION_CYCLES)
        self.side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side_stream):
            for target, source in copies:
                target.copy_(source)
                target.record_stream(self.side_stream)
                source.record_stream(self.side_stream)
            torch.cuda._sleep(int(seconds * self.cycles_per_second))
            event = torch.cuda.Event()
            event.record()
        return DelayedWork(self, event)


def spin_seconds(cycles: int) -> float:
    """Seconds that the GPU takes to count `cycles` cycles of its clock."""
    torch.cuda._sleep(cycles)  # warms up
    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def delayed_world(device: torch.device) -> Iterator[World]:
    """Makes this process rank 0 of two, in process groups whose collectives are delays."""

    def create(store: dist.Store, rank: int, size: int, timeout: object) -> DelayGroup:
        return DelayGroup(rank, size)

    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, create, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=RANKS)
    try:
        yield World(0, RANKS, device)
    finally:
        dist.destroy_process_group()


class Sample(NamedTuple):
    """Seconds of forward and backward, and how many of each went by waiting for collectives."""

    forward: float
    backward: float
    forward_waited: float
    backward_waited: float


class RowTimer:
    """Times a row's passes, including the work that they launch on a GPU."""

    def __init__(self, row: Row, group: DelayGroup, device: torch.device) -> None:
        self.row, self.group, self.device = row, group, device
        self.delay = 0.0  # seconds of a collective, in variants that communicate

    def now(self) -> tuple[float, float]:
        """Synchronizes the device; returns the time, and the seconds waited until then."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), self.group.waited

    def step(self, variant: str) -> Sample:
        """Runs and times one forward and one backward pass."""
        self.row.rewire("ladder" if variant == "ladder" else "standard")
        self.group.seconds = 0.0 if variant == "none" else self.delay
        start = self.now()
        output = self.row.forward()
        middle = self.now()
        self.row.backward(output)
        end = self.now()
        return Sample(
            forward=middle[0] - start[0],
            backward=end[0] - middle[0],
            forward_waited=middle[1] - start[1],
            backward_waited=end[1] - middle[1],
        )


def measure(timer: RowTimer, blocks: int, rounds: int, share: float) -> dict[str, float]:
    """Measures one case: a pattern, with or without sequence parallelism.

    The delays of a step's collectives add up to `share` of a step that hides none of them.
    """

    def seconds(sample: Sample) -> float:
        return sample.forward + sample.backward

    for variant in VARIANTS:  # warms up
        calls_before = timer.group.calls
        timer.step(variant)
    calls = timer.group.calls - calls_before
    compute_seconds = statistics.median(seconds(timer.step("none")) for _ in range(3))
    timer.delay = share * compute_seconds / ((1 - share) * calls)
    samples: dict[str, list[Sample]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            samples[variant].append(timer.step(variant))
    figures = {
        "collectives a step": calls,
        "ms of each": 1000 * timer.delay,
        **step_figures({name: [seconds(s) for s in taken] for name, taken in samples.items()}),
    }
    for direction in ("forward", "backward"):
        times = {name: [getattr(s, direction) for s in taken] for name, taken in samples.items()}
        overlap = overlap_figures(times, blocks)
        if timer.device.type == "cpu":
            waited = {
                name: statistics.median(getattr(s, f"{direction}_waited") for s in taken)
                for name, taken in samples.items()
            }
            if waited["standard"]:  # none where the machine was busy for as long as the delays
                overlap["hidden, by the waits"] = 1 - waited["ladder"] / waited["standard"]
        figures |= {f"{direction}, {name}": value for name, value in overlap.items()}
    return figures


def run(
    shape: Shape | None = None, rounds: int = 15, share: float = COMMUNICATION_SHARE
) -> dict[str, Any]:
    """Medians over rounds in which the three variants take turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settle_memory(device)
    shape = shape or (ON_GPU if device.type == "cuda" else ON_CPU)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report: dict[str, Any] = {"shape": f"{shape}; one rank of them, {device_name}"}
    with delayed_world(device) as world:
        mesh = build_mesh(ParallelConfig(tp=RANKS), world)
        group = mesh.get_group("tp")
        assert isinstance(group, DelayGroup)
        for pattern, name in PATTERNS.items():
            for sequence in (True, False):
                timed_row = TensorRow(shape, pattern, sequence, mesh, device)
                timer = RowTimer(timed_row, group, device)
                case = f"{name}, {'sequence parallel' if sequence else 'plain'}"
                figures = measure(timer, shape.blocks, rounds, share)
                report |= {f"{case}: {figure}": value for figure, value in figures.items()}
    return report
