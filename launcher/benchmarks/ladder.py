"""`bench ladder`: how much of tensor parallelism's communication hides, between two hosts.

Two ranks, one on each of two hosts (`hosts`), over a link so slow that communication takes about a
third of the standard step. What runs is the wiring alone, on random activations and with a random
gradient of its output: embedding, head, loss and optimizer stand outside. Standard residual, ladder
residual and the same work without communication take turns, forward and backward timed apart.
"""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.launcher.benchmarks.hosts import LINK, NETWORK, Host, Hosts
from colonnade.launcher.ranks import cores, settle_memory
from colonnade.launcher.recipe import Recipe, TrainConfig
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.wiring import lacks_newest
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.materialise import materialise
from colonnade.parallel.mesh import build_mesh
from colonnade.parallel.parallelize import parallelize
from colonnade.parallel.world import world

PATTERNS = {"*-": "attention-MLP", "M-": "Mamba-MLP"}
VARIANTS = ("none", "standard", "ladder")
RANKS, PORT = 2, 29500
SHARE = 0.36  # of the standard step is to be communication
FASTEST = 1e10  # bytes/s: no limit


@dataclass(frozen=True)
class Shape:
    """Sizes of what is timed; fp32."""

    repeat: int = 8  # of a pattern of two sub-blocks
    hidden: int = 2048
    seq: int = 512
    batch: int = 1

    @property
    def blocks(self) -> int:
        """Sub-blocks in the row."""
        return 2 * self.repeat

    def model(self, pattern: str) -> ModelConfig:
        """A row of about equal sub-blocks, whose heads, groups and widths divide by the ranks.

        They are twice as wide inside as is usual: where the cores that compute do the link's work
        too, that work, which goes by `hidden` alone, should weigh as little as on a real network.
        """
        D = self.hidden
        return ModelConfig(
            pattern=pattern,
            repeat=self.repeat,
            hidden=D,
            heads=2 * D // 64,
            head_dim=64,
            ffn=16 * D // 3 // 64 * 64,
            mamba_heads=4 * D // 64,
            mamba_groups=RANKS,
            mamba_state=64,
            vocab=64,
        )

    def __str__(self) -> str:
        return (
            f"{self.blocks} sub-blocks, hidden {self.hidden}, sequence {self.seq}, batch "
            f"{self.batch}, fp32, tp 2 over gloo, 1 thread a rank, {cores()} cores; without "
            "embedding, head, loss and optimizer"
        )


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
        torch.set_num_threads(1)
        device = torch.device("cpu")
        settle_memory(device)
        os.environ["GLOO_SOCKET_IFNAME"] = LINK
        store = dist.TCPStore(f"{NETWORK}1", PORT, RANKS, is_master=self.number == 0)
        self.group = ExitStack()
        self.here = self.group.enter_context(world(self.number, RANKS, device, store))
        self.mesh = build_mesh(ParallelConfig(tp=RANKS), self.here)

    def close(self) -> None:
        """Leave the group together with the other rank."""
        self.group.close()

    def build(self, shape: Shape, pattern: str, sequence: bool) -> None:
        """Make a model, its input and the gradient of its output."""
        config = shape.model(pattern)
        recipe = Recipe(
            model=config,
            parallel=ParallelConfig(tp=RANKS, sequence=sequence),
            train=TrainConfig(seq_len=shape.seq),
        )
        with torch.device("meta"):
            model = Decoder(config)
        parallelize(model, self.mesh, recipe)
        materialise(model, self.here.device, seed=0)
        self.wiring = wiring = model.wiring
        positions = torch.arange(shape.seq)[:, None].expand(shape.seq, shape.batch)
        self.context = Context(positions)
        alone = (_Gather.apply, _Scatter.apply) if sequence else (same, same)
        seams = {"none": alone, "standard": (wiring.enter, wiring.leave)}
        self.seams = {**seams, "ladder": seams["standard"]}
        ladder = config.model_copy(update={"residual": "ladder"})
        late = {name: lacks_newest(config, config.symbols) for name in seams}
        self.late = {**late, "ladder": lacks_newest(ladder, config.symbols)}
        generator = torch.Generator().manual_seed(0)
        both = torch.randn(2, shape.seq, shape.batch, shape.hidden, generator=generator)
        if sequence:
            both = both.chunk(RANKS, dim=1)[self.number]
        self.stream, self.cotangent = both.unbind()

    def step(self, variant: str) -> Sample:
        """One forward and one backward pass, each from a barrier to the last of its results."""
        wiring = self.wiring
        wiring.late, (wiring.enter, wiring.leave) = self.late[variant], self.seams[variant]
        wiring.zero_grad()
        stream = self.stream.clone().requires_grad_()
        sent, machine = self.sent(), machine_work()
        end, forward, forward_work = timed(lambda: wiring(stream, self.context))
        _, backward, backward_work = timed(lambda: end.backward(self.cotangent))
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

    The ends stay exposed: in each direction one sub-block of the row has no other beside which its
    communication could run. Nor can the processor time hide that communication itself takes, where
    the cores that compute do that work too.
    """
    took = {
        name: [max(getattr(s, of) for s in ranks) for ranks in rounds]
        for name, rounds in steps.items()
    }
    work = {
        name: [statistics.mean(getattr(s, f"{of}_work") for s in ranks) for ranks in rounds]
        for name, rounds in steps.items()
    }
    middle = {name: statistics.median(values) for name, values in took.items()}
    exposed = middle["standard"] - middle["none"]
    busy = statistics.median(work["standard"]) - statistics.median(work["none"])
    return {
        **{f"{name} ms": 1000 * middle[name] for name in VARIANTS},
        "hidden": (middle["standard"] - middle["ladder"]) / exposed,
        "bound by the ends": 1 - 1 / blocks,
        "processor ms of communication": 1000 * busy,
        "bound by the ends and the processor": 1 - 1 / blocks - busy / exposed,
    }


def assemble(steps: Rounds, blocks: int) -> dict[str, float]:
    """The figures of one case: pattern and kind of parallelism."""
    total = {name: [seconds(ranks) for ranks in rounds] for name, rounds in steps.items()}
    of_round = list(zip(*(total[name] for name in VARIANTS), strict=True))
    figures = {
        "communication / standard step": statistics.median((s - n) / s for n, s, _ in of_round),
        "step, standard / ladder": statistics.median(s / fast for _, s, fast in of_round),
    }
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
    report: dict[str, Any] = {"shape": str(shape)}
    with Hosts(Rank) as hosts:
        for pattern, name in PATTERNS.items():
            for sequence in (True, False):
                case = f"{name}, {'sequence parallel' if sequence else 'plain'}"
                figures = measure(hosts, shape, pattern, sequence, rounds, share)
                report |= {f"{case}: {figure}": value for figure, value in figures.items()}
    return report
