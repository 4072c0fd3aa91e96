"""`bench ladder`: how much of tensor parallelism's communication hides, between two hosts.

Two ranks, one on each of two hosts (`hosts`), over a link so slow that communication takes about a
third of the standard step. What runs is the wiring alone (`row`). Standard residual, ladder
residual and the same work without communication take turns, forward and backward timed apart.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.bench import row
from colonnade.bench.hosts import LINK, NETWORK, Host, Hosts
from colonnade.bench.row import PATTERNS, RANKS, SHARE, VARIANTS, Row, Seams, Shape
from colonnade.launcher.cluster.environment import cores
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.mesh import build_mesh

PORT = 29500
FASTEST = 1e10  # bytes/s: no limit
SHAPE = Shape()


class Sample(NamedTuple):
    """What one rank saw of one step."""

    forward: float  # seconds
    backward: float
    forward_work: float  # seconds of this process's processor time
    backward_work: float
    machine_work: float  # seconds of all processors' time, for whatever purpose
    sent: int  # bytes


class _Gather(torch.autograd.Function):
    """The shapes of gathering along the sequence, from this rank's part alone; backward as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.cat([x] * RANKS)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad[: len(grad) // RANKS]


class _Scatter(torch.autograd.Function):
    """The shapes of reducing and scattering along the sequence; backward as well."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h[: len(h) // RANKS]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.cat([grad] * RANKS)


def same(x: Tensor) -> Tensor:
    """A seam that does nothing."""
    return x


def machine_work() -> float:
    """Seconds that this machine's processors have worked since it started, all together."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, interrupt, soft = map(int, file.readline().split()[1:8])
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


class Rank(Host):
    """One rank: builds the wiring and times its steps."""

    def open(self) -> None:
        """Bring up the link and join the other rank over it."""
        super().open()
        os.environ["GLOO_SOCKET_IFNAME"] = LINK
        self.join(RANKS, dist.TCPStore(f"{NETWORK}1", PORT, RANKS, is_master=self.number == 0))
        self.mesh = build_mesh(ParallelConfig(tp=RANKS), self.world)

    def build(self, shape: Shape, pattern: str, sequence: bool) -> None:
        """Make a row, its input and the gradient of its output."""
        self.row = Row(shape, pattern, sequence, self.mesh, self.world.device)
        alone: Seams = (_Gather.apply, _Scatter.apply) if sequence else (same, same)
        self.variants = {"none": ("standard", alone), "standard": ("standard", None)}
        self.variants["ladder"] = "ladder", None

    def step(self, variant: str) -> Sample:
        """One forward and one backward pass, each from a barrier to the last of its results."""
        self.row.become(*self.variants[variant])
        sent, machine = self.sent(), machine_work()
        end, forward, forward_work = timed(self.row.forward)
        _, backward, backward_work = timed(lambda: self.row.backward(end))
        return Sample(
            forward=forward,
            backward=backward,
            forward_work=forward_work,
            backward_work=backward_work,
            machine_work=machine_work() - machine,
            sent=self.sent() - sent,
        )


def timed(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, seconds, and seconds of this process's processor time, from a barrier on."""
    dist.barrier()
    start, before = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - start, time.process_time() - before


def rate_for(share: float, without: float, sent: float) -> float:
    """The rate in bytes/s at which sending so many takes `share` of all time, the rest `without`.

    `without` is the seconds of a step without communication.
    """
    return sent * (1 - share) / (share * without)


def corrected(rate: float, share: float, without: float, standard: float) -> float:
    """The rate that would have made communication `share` of a standard step of `standard` s."""
    wanted = without * share / (1 - share)
    return rate * (standard - without) / wanted


def calibrate(hosts: Hosts, share: float, tries: int) -> float:
    """Limit the link so that communication takes `share` of the standard step; bytes/s."""

    def typical(variant: str) -> float:
        return statistics.median(seconds(hosts.call("step", variant)) for _ in range(tries))

    hosts.call("limit", FASTEST)
    for variant in VARIANTS:
        sent = max(s.sent for s in hosts.call("step", variant))
    rate = rate_for(share, typical("none"), sent)
    for _ in range(2):  # what a collective takes besides the link's time per byte is seen only now
        hosts.call("limit", rate)
        better = corrected(rate, share, typical("none"), typical("standard"))
        rate = min(max(better, rate / 3), 3 * rate)
    hosts.call("limit", rate)
    return rate


def seconds(samples: list[Sample]) -> float:
    """Forward and backward of the slower rank."""
    return max(s.forward for s in samples) + max(s.backward for s in samples)


Rounds = dict[str, list[list[Sample]]]  # by variant: of each round, of each rank


def hidden(steps: Rounds, of: str, blocks: int) -> dict[str, float]:
    """How much communication hides in `forward` or `backward`, and how much at most could.

    No order can hide the processor time that communication itself takes, where the cores that
    compute do that work too.
    """
    took = {
        name: [max(getattr(s, of) for s in ranks) for ranks in rounds]
        for name, rounds in steps.items()
    }
    work = {
        name: [statistics.mean(getattr(s, f"{of}_work") for s in ranks) for ranks in rounds]
        for name, rounds in steps.items()
    }
    figures = row.hidden(took, blocks)
    busy = 1000 * (statistics.median(work["standard"]) - statistics.median(work["none"]))
    exposed = figures["standard ms"] - figures["none ms"]
    figures["processor ms of communication"] = busy
    figures["bound by the ends and the processor"] = figures["bound by the ends"] - busy / exposed
    return figures


def assemble(steps: Rounds, blocks: int) -> dict[str, float]:
    """The figures of one case: pattern and kind of parallelism."""
    figures = row.steps({name: [seconds(r) for r in rounds] for name, rounds in steps.items()})
    for of in ("forward", "backward"):
        figures |= {f"{of}, {k}": value for k, value in hidden(steps, of, blocks).items()}
    return figures


def others(steps: Rounds) -> float:
    """The share of the processors that other programs took, seen in steps without communication."""
    taken = [
        max(s.machine_work for s in ranks) - sum(s.forward_work + s.backward_work for s in ranks)
        for ranks in steps["none"]
    ]
    time = [seconds(ranks) for ranks in steps["none"]]
    return max(0.0, sum(taken) / (sum(time) * (os.cpu_count() or 1)))


def measure(
    hosts: Hosts, shape: Shape, pattern: str, sequence: bool, rounds: int, share: float
) -> dict[str, float]:
    """The figures of one case."""
    hosts.call("build", shape, pattern, sequence)
    rate = calibrate(hosts, share, tries=min(3, rounds))
    steps: Rounds = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            steps[variant].append(hosts.call("step", variant))
    return {
        "link Mbit/s": 8e-6 * rate,
        "MB that a rank sends": 1e-6 * max(s.sent for s in steps["standard"][-1]),
        "other programs' share of the processors": others(steps),
        **assemble(steps, shape.blocks),
    }


def run(shape: Shape = SHAPE, rounds: int = 5, share: float = SHARE) -> dict[str, Any]:
    """Medians over rounds in which the three variants take turns; times are the slower rank's.

    Raises:
        UserError: this machine cannot play two hosts.
    """
    way = f"over gloo, 1 thread a rank, {cores()} cores"
    report: dict[str, Any] = {"shape": f"{shape}; {way}"}
    with Hosts(Rank) as hosts:
        for pattern, name in PATTERNS.items():
            for sequence in (True, False):
                case = f"{name}, {'sequence parallel' if sequence else 'plain'}"
                figures = measure(hosts, shape, pattern, sequence, rounds, share)
                report |= {f"{case}: {figure}": value for figure, value in figures.items()}
    return report
