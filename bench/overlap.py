"""`bench overlap`: ladder beside collectives that take a set time and do nothing else.

One rank of two, on whatever device there is: the other rank is not there, and a collective is a
delay, on a side stream of a GPU. So it shows how much the order of work can hide, without a network
and without the processor time that a network takes; `bench ladder` has both.
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
    PATTERNS,
    RANKS,
    SHARE,
    VARIANTS,
    Row,
    Shape,
    hidden,
    steps,
)  # fmt: skip
from colonnade.launcher.cluster.ranks import settle_memory
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.mesh import build_mesh
from colonnade.parallel.world import World

ON_CPU = Shape(hidden=512, seq=512)
ON_GPU = Shape(hidden=4096, seq=4096, dtype=torch.bfloat16)
CYCLES = 10**7  # of a delay by which the GPU's clock is learnt


class Arrived(dist._Work):
    """What a collective returns: waiting lasts until the link has passed it on."""

    def __init__(self, link: "Link", until: "float | torch.cuda.Event") -> None:
        super().__init__()
        self.link, self.until = link, until

    def wait(self, timeout: object = None) -> bool:
        """Have this thread, or the GPU's current stream, wait."""
        if isinstance(self.until, float):
            start = time.perf_counter()
            if start < self.until:
                time.sleep(self.until - start)
                self.link.waited += time.perf_counter() - start
        else:
            torch.cuda.current_stream().wait_event(self.until)
        return True


class Link(dist.ProcessGroup):  # whose methods PyTorch calls with lists alone
    """A group whose other ranks hold what this one does, behind a link that one message takes.

    Each collective takes `seconds`, one after the other; `calls` counts them. On a CPU `waited`
    adds up the seconds for which any of them was waited for.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # not in PyTorch's stubs
        self.seconds, self.calls, self.waited = 0.0, 0, 0.0
        self.free = 0.0  # when the link is, on a CPU
        self.side: torch.cuda.Stream | None = None
        self.cycles = 0.0  # of the GPU's clock in a second

    def getBackendName(self) -> str:
        """Of the backend that makes these groups."""
        return "link"

    @property
    def group_name(self) -> Any:
        """What functional collectives find the group by."""
        return dist.distributed_c10d._world.pg_names[self]

    def allreduce(  # type: ignore[override]
        self, tensors: Sequence[Tensor], opts: Any = None
    ) -> Arrived:
        """Sum over the ranks."""
        return self.passed([(t, t) for t in tensors])

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Arrived:
        """Every rank's part in each output."""
        return self.passed(
            [(part, i) for o, i in zip(outputs, inputs, strict=True) for part in o.chunk(RANKS)]
        )

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Arrived:
        """This rank's part of each sum."""
        return self.passed(
            [(o, i.chunk(RANKS)[self.rank()]) for o, i in zip(outputs, inputs, strict=True)]
        )

    # Names that PyTorch before 2.13 calls them by.
    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]

    def passed(self, copies: Sequence[tuple[Tensor, Tensor]]) -> Arrived:
        """Fill each first tensor with the second; what they make known arrives later."""
        self.calls += 1
        if copies[0][0].device.type == "cpu":
            for target, source in copies:
                target.copy_(source)
            self.free = max(self.free, time.perf_counter()) + self.seconds
            return Arrived(self, self.free)
        if self.side is None:
            self.side, self.cycles = torch.cuda.Stream(), CYCLES / spun(CYCLES)
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            for target, source in copies:
                target.copy_(source)
                target.record_stream(self.side)
                source.record_stream(self.side)
            torch.cuda._sleep(int(self.seconds * self.cycles))
            event = torch.cuda.Event()
            event.record()
        return Arrived(self, event)


def spun(cycles: int) -> float:
    """Seconds that the GPU takes to count so many cycles."""
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def linked(device: torch.device) -> Iterator[World]:
    """This process as one of two ranks."""

    def create(store: dist.Store, rank: int, size: int, timeout: object) -> Link:
        return Link(rank, size)

    if "link" not in dist.Backend.backend_list:
        dist.Backend.register_backend("link", create, devices=["cpu", "cuda"])
    dist.init_process_group("link", store=dist.HashStore(), rank=0, world_size=RANKS)
    try:
        yield World(0, RANKS, device)
    finally:
        dist.destroy_process_group()


class Sample(NamedTuple):
    """Seconds of forward and backward, and for how many of each the link was waited for."""

    forward: float
    backward: float
    forward_waited: float
    backward_waited: float


class Stopwatch:
    """Times a row's passes, with all that they started on a GPU."""

    def __init__(self, row: Row, link: Link, device: torch.device) -> None:
        self.row, self.link, self.device = row, link, device
        self.delay = 0.0  # seconds of a collective

    def now(self) -> tuple[float, float]:
        """When all that was started has ended, and what was waited until then."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), self.link.waited

    def step(self, variant: str) -> Sample:
        """One forward and one backward pass."""
        self.row.become("ladder" if variant == "ladder" else "standard")
        self.link.seconds = 0.0 if variant == "none" else self.delay
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


def measure(watch: Stopwatch, blocks: int, rounds: int, share: float) -> dict[str, float]:
    """The figures of one case."""

    def seconds(sample: Sample) -> float:
        return sample.forward + sample.backward

    for variant in VARIANTS:
        before = watch.link.calls
        watch.step(variant)
    calls = watch.link.calls - before
    without = statistics.median(seconds(watch.step("none")) for _ in range(3))
    watch.delay = share * without / ((1 - share) * calls)
    took: dict[str, list[Sample]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            took[variant].append(watch.step(variant))
    figures = {
        "collectives a step": calls,
        "ms of each": 1000 * watch.delay,
        **steps({name: [seconds(s) for s in of] for name, of in took.items()}),
    }
    for direction in ("forward", "backward"):
        times = {name: [getattr(s, direction) for s in of] for name, of in took.items()}
        found = hidden(times, blocks)
        if watch.device.type == "cpu":
            waited = {
                name: statistics.median(getattr(s, f"{direction}_waited") for s in of)
                for name, of in took.items()
            }
            found["hidden, by the waits"] = 1 - waited["ladder"] / waited["standard"]
        figures |= {f"{direction}, {name}": value for name, value in found.items()}
    return figures


def run(shape: Shape | None = None, rounds: int = 15, share: float = SHARE) -> dict[str, Any]:
    """Medians over rounds in which the three variants take turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settle_memory(device)
    shape = shape or (ON_GPU if device.type == "cuda" else ON_CPU)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report: dict[str, Any] = {"shape": f"{shape}; one rank of them, {where}"}
    with linked(device) as world:
        mesh = build_mesh(ParallelConfig(tp=RANKS), world)
        link = mesh.get_group("tp")
        assert isinstance(link, Link)
        for pattern, name in PATTERNS.items():
            for sequence in (True, False):
                watch = Stopwatch(Row(shape, pattern, sequence, mesh, device), link, device)
                case = f"{name}, {'sequence parallel' if sequence else 'plain'}"
                figures = measure(watch, shape.blocks, rounds, share)
                report |= {f"{case}: {figure}": value for figure, value in figures.items()}
    return report
