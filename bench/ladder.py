"""`bench ladder`: how much of tensor parallelism's communication ladder hides between two hosts.

Two ranks, one on each of two simulated hosts (`hosts`), over a link so slow that communication
takes about a third of the standard step. Only a row of sub-blocks runs (`row`). The standard
residual, the ladder residual and the same computation without communication take turns; forward and
backward are timed separately.
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
from colonnade.bench.hosts import ADDRESS_PREFIX, INTERFACE, Host, Hosts
from colonnade.bench.row import (
    COMMUNICATION_SHARE,
    PATTERNS,
    RANKS,
    VARIANTS,
    Row,
    Seams,
    Shape,
    TensorRow,
)
from colonnade.launcher.cluster.environment import cores
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.mesh import build_mesh

PORT = 29500
UNLIMITED = 1e10  # bytes/s, more than the link can carry
SHAPE = Shape()


class Sample(NamedTuple):
    """What one rank measured in one step; `..._cpu` are seconds of processor time."""

    forward: float  # seconds
    backward: float  # seconds
    forward_cpu: float  # of this process
    backward_cpu: float  # of this process
    machine_cpu: float  # of all programs on all processors
    bytes_sent: int


class _LocalAllGather(torch.autograd.Function):
    """Has the shapes of an all-gather along the sequence, but repeats the local shard.

    Backward has the shapes of the reduce-scatter, and returns the first shard. Nothing is sent.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.cat([x] * RANKS)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad[: len(grad) // RANKS]


class _LocalReduceScatter(torch.autograd.Function):
    """Has the shapes of a reduce-scatter along the sequence, but returns the first shard.

    Backward has the shapes of the all-gather, and repeats the gradient. Nothing is sent.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h[: len(h) // RANKS]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.cat([grad] * RANKS)


def identity(x: Tensor) -> Tensor:
    """A seam that returns its argument."""
    return x


def machine_cpu_seconds() -> float:
    """Processor time that all programs on this machine have taken since it started, in seconds."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, interrupt, soft = map(int, file.readline().split()[1:8])
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


class TimedRank(Host):
    """One rank, which times the steps of a row; subclasses build it.

    `variants` has the `model.residual` and the seams of every variant, as `Row.rewire` takes them.
    """

    row: Row
    variants: dict[str, tuple[str, Any]]

    def open(self) -> None:
        """Brings up the link, and joins the other rank over it."""
        super().open()
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
        store = dist.TCPStore(f"{ADDRESS_PREFIX}1", PORT, RANKS, is_master=self.index == 0)
        self.join(RANKS, store)

    def set_variants(self, local_seams: Any) -> None:
        """Lists the variants; the one without communication has `local_seams`."""
        self.variants = {
            "none": ("standard", local_seams),
            "standard": ("standard", None),
            "ladder": ("ladder", None),
        }

    def step(self, variant: str) -> Sample:
        """Runs and measures a forward and a backward pass, each after a barrier."""
        self.row.rewire(*self.variants[variant])
        sent_before, machine_before = self.bytes_sent(), machine_cpu_seconds()
        output, forward, forward_cpu = timed(self.row.forward)
        _, backward, backward_cpu = timed(lambda: self.row.backward(output))
        return Sample(
            forward=forward,
            backward=backward,
            forward_cpu=forward_cpu,
            backward_cpu=backward_cpu,
            machine_cpu=machine_cpu_seconds() - machine_before,
            bytes_sent=self.bytes_sent() - sent_before,
        )


class Rank(TimedRank):
    """One rank of a row under tensor parallelism."""

    def build(self, shape: Shape, pattern: str, sequence: bool) -> None:
        """Builds a row; `sequence`: with sequence parallelism."""
        mesh = build_mesh(ParallelConfig(tp=RANKS), self.world)
        self.row = TensorRow(shape, pattern, sequence, mesh, self.world.device)
        local_seams: Seams = (identity, identity)
        if sequence:
            local_seams = _LocalAllGather.apply, _LocalReduceScatter.apply
        self.set_variants(local_seams)


def timed(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """Runs the action after a barrier.

    Returns:
        The action's result, its seconds, and the seconds of this process's processor time.
    """
    dist.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - start, time.process_time() - cpu_start


def link_rate(share: float, compute_seconds: float, bytes_sent: float) -> float:
    """The rate in bytes/s at which communication takes `share` of a step, if only bytes cost time.

    Args:
        share: communication's share of the step's time.
        compute_seconds: of a step without communication.
        bytes_sent: by a rank in a step.
    """
    return bytes_sent * (1 - share) / (share * compute_seconds)


def corrected_rate(
    rate: float, share: float, compute_seconds: float, standard_seconds: float
) -> float:
    """The rate in bytes/s at which communication would have taken `share` of the standard step.

    Args:
        rate: at which the steps were measured, in bytes/s.
        share: communication's share of the step's time.
        compute_seconds: of a step without communication.
        standard_seconds: of a standard step at `rate`.
    """
    wanted = compute_seconds * share / (1 - share)  # seconds of communication
    return rate * (standard_seconds - compute_seconds) / wanted


def calibrate(hosts: Hosts, share: float, tries: int) -> float:
    """Limits the link so that communication takes `share` of the standard step.

    Returns:
        The rate of the link in bytes/s.
    """

    def median_seconds(variant: str) -> float:
        return statistics.median(step_seconds(hosts.call("step", variant)) for _ in range(tries))

    hosts.call("limit", UNLIMITED)
    for variant in VARIANTS:  # warms up; the last variant communicates
        bytes_sent = max(s.bytes_sent for s in hosts.call("step", variant))
    rate = link_rate(share, median_seconds("none"), bytes_sent)
    # A collective's costs besides the link's time per byte show only in steps at such a rate.
    for _ in range(2):
        hosts.call("limit", rate)
        better = corrected_rate(rate, share, median_seconds("none"), median_seconds("standard"))
        rate = min(max(better, rate / 3), 3 * rate)
    hosts.call("limit", rate)
    return rate


def step_seconds(samples: list[Sample]) -> float:
    """Seconds of forward and backward, each of its slower rank."""
    return max(s.forward for s in samples) + max(s.backward for s in samples)


Rounds = dict[str, list[list[Sample]]]  # by variant, round and rank


def overlap_figures(rounds: Rounds, direction: str, blocks: int) -> dict[str, float]:
    """The share of communication that ladder hides in `forward` or `backward`, with two bounds.

    Where the cores that compute also do the work of communication, no order of work can hide the
    processor time of that.
    """
    seconds = {  # of the slower rank
        name: [max(getattr(s, direction) for s in samples) for samples in by_round]
        for name, by_round in rounds.items()
    }
    cpu = {  # of the ranks' mean
        name: [
            statistics.mean(getattr(s, f"{direction}_cpu") for s in samples) for samples in by_round
        ]
        for name, by_round in rounds.items()
    }
    figures = row.overlap_figures(seconds, blocks)
    communication_cpu = 1000 * (
        statistics.median(cpu["standard"]) - statistics.median(cpu["none"])
    )  # ms
    exposed = figures["standard ms"] - figures["none ms"]
    figures["processor ms of communication"] = communication_cpu
    figures["bound by the ends and the processor"] = (
        figures["bound by the ends"] - communication_cpu / exposed
    )
    return figures


def case_figures(rounds: Rounds, blocks: int) -> dict[str, float]:
    """The figures of one case: a pattern, with or without sequence parallelism."""
    figures = row.step_figures(
        {name: [step_seconds(samples) for samples in by_round] for name, by_round in rounds.items()}
    )
    for direction in ("forward", "backward"):
        overlap = overlap_figures(rounds, direction, blocks)
        figures |= {f"{direction}, {name}": value for name, value in overlap.items()}
    return figures


def other_programs_share(rounds: Rounds) -> float:
    """The share of the processors that other programs took during steps without communication."""
    cpu = [
        max(s.machine_cpu for s in samples) - sum(s.forward_cpu + s.backward_cpu for s in samples)
        for samples in rounds["none"]
    ]
    seconds = [step_seconds(samples) for samples in rounds["none"]]
    return max(0.0, sum(cpu) / (sum(seconds) * (os.cpu_count() or 1)))


def measure(
    hosts: Hosts, shape: Shape, *case: object, round_count: int, share: float
) -> dict[str, float]:
    """Measures one case, which `case` tells the ranks to build, and returns its figures."""
    hosts.call("build", shape, *case)
    rate = calibrate(hosts, share, tries=min(3, round_count))
    rounds: Rounds = {variant: [] for variant in VARIANTS}
    for _ in range(round_count):
        for variant in VARIANTS:
            rounds[variant].append(hosts.call("step", variant))
    return {
        "link Mbit/s": 8e-6 * rate,
        "MB that a rank sends": 1e-6 * max(s.bytes_sent for s in rounds["standard"][-1]),
        "other programs' share of the processors": other_programs_share(rounds),
        **case_figures(rounds, shape.blocks),
    }


def run(
    shape: Shape = SHAPE, rounds: int = 5, share: float = COMMUNICATION_SHARE
) -> dict[str, Any]:
    """Medians over rounds in which the three variants take turns; times are the slower rank's.

    Raises:
        UserError: this machine cannot simulate two hosts.
    """
    transport = f"over gloo, 1 thread a rank, {cores()} cores"
    report: dict[str, Any] = {"shape": f"{shape}; {transport}"}
    with Hosts(Rank) as hosts:
        for pattern, name in PATTERNS.items():
            for sequence in (True, False):
                case = f"{name}, {'sequence parallel' if sequence else 'plain'}"
                figures = measure(hosts, shape, pattern, sequence, round_count=rounds, share=share)
                report |= {f"{case}: {figure}": value for figure, value in figures.items()}
    return report
