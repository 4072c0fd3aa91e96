"""`bench experts`: how much of expert parallelism's all-to-alls ladder hides.

A row of attention and mixtures (`*E*E...`) on one of two ranks, whose experts are divided between
both; attention is replicated, and nothing else is sent. In a ladder the dispatch of a mixture hides
behind the second half of attention before it, the way back behind the first half of attention after
it. Every expert gets as many rows from either rank, so that all variants compute the same products.

Two modes: ranks on two simulated hosts over a rate-limited link, measured like `bench ladder`; and
one rank whose collectives are delays, measured like `bench overlap`.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colonnade.bench import ladder, overlap
from colonnade.bench.hosts import Hosts, unsupported_reason
from colonnade.bench.overlap import DelayGroup, RowTimer, delayed_world
from colonnade.bench.row import RANKS, Row, Shape
from colonnade.launcher.cluster.environment import cores
from colonnade.launcher.cluster.ranks import settle_memory
from colonnade.models.blocks.experts import Routed, Sent
from colonnade.models.config import ModelConfig
from colonnade.models.decoder import Decoder
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.experts import TokenExchange, exchange_group, expert_parallel
from colonnade.parallel.mesh import build_expert_mesh, build_mesh
from colonnade.parallel.seams import expert_blocks
from colonnade.parallel.world import World

PATTERN = "*E"
EXPERTS, TOP_K = 4, 2
# The share of a standard step that communication is to take. With more, an all-to-all would last
# longer than a half of attention, which is all that hides it.
COMMUNICATION_SHARE = 0.25


@dataclass(frozen=True)
class ExpertShape(Shape):
    """Sizes of the row: either half of attention lasts longer than the all-to-all that it hides."""

    def model(self, pattern: str) -> ModelConfig:
        """The config of a row whose attention is four times as wide as usual.

        Keys and values are as wide as makes both halves of attention last as long as each other, if
        scores run at half the speed of linear layers.
        """
        D, S = self.hidden, self.seq
        return ModelConfig(
            pattern=pattern,
            repeat=self.repeat,
            hidden=D,
            heads=4 * D // 64,
            kv_heads=4 * S // 64,
            head_dim=64,
            ffn=(D + S) // 2,
            experts=EXPERTS,
            top_k=TOP_K,
            balance=0.0,
            vocab=64,
        )

    def __str__(self) -> str:
        return (
            f"{self.blocks} sub-blocks {PATTERN}, hidden {self.hidden}, sequence {self.seq}, batch "
            f"{self.batch}, {EXPERTS} experts of width {self.model(PATTERN).expert_ffn}, top "
            f"{TOP_K}, {str(self.dtype).removeprefix('torch.')}, ep {RANKS}; without embedding, "
            "head, loss and optimizer"
        )


BETWEEN_HOSTS = ExpertShape()
ON_CPU = ExpertShape(hidden=512, seq=512)
ON_GPU = ExpertShape(hidden=4096, seq=4096, dtype=torch.bfloat16)


class LocalExchange(TokenExchange):
    """Has the shapes of the all-to-alls where loads are even, but sends nothing: this rank keeps
    its rows, and computes those for the other rank's experts with its own."""

    def received_counts(self, counts: Tensor) -> Tensor:
        """Returns this rank's numbers of rows, which are the other's as well."""
        return counts.view(self.group.size(), -1)

    def exchange(self, rows: Tensor, sizes: list[int], sent_sizes: list[int]) -> Tensor:
        """Returns the rows."""
        assert sizes == sent_sizes
        return rows


def even_choices(chosen: Tensor, experts: int) -> Tensor:
    """Choices of experts by the number of the assignment, `[S, B, k]`: even loads."""
    return torch.arange(chosen.numel(), device=chosen.device).view(chosen.shape) % experts


class EvenDispatch:
    """A seam `dispatch` that sends tokens to experts by number, whatever the router has chosen."""

    def __init__(self, exchange: TokenExchange) -> None:
        self.exchange = exchange

    def __call__(self, routed: Routed, experts: int) -> Sent:
        chosen = even_choices(routed.chosen, experts)
        return self.exchange.dispatch(routed._replace(chosen=chosen), experts)


def sharded_model(config: ModelConfig, world: World) -> tuple[Decoder, tuple[Any, ...]]:
    """A model on meta whose experts are divided among all ranks, all else replicated; and the
    arguments of its `TokenExchange`."""
    layout = ParallelConfig(ep=world.size)
    mesh, expert_mesh = build_mesh(layout, world), build_expert_mesh(layout, world)
    assert expert_mesh is not None
    with torch.device("meta"):
        model = Decoder(config)
    expert_parallel(model, expert_mesh, mesh["tp"])
    return model, exchange_group(expert_mesh, mesh["tp"])


def set_exchange(model: torch.nn.Module, exchange: TokenExchange) -> None:
    """Puts an exchange at the seams of all sub-blocks with experts, and gives them even loads."""
    for block in expert_blocks(model):
        block.first.dispatch = EvenDispatch(exchange)
        block.second.combine = exchange.combine


class ExpertRow(Row):
    """A row under expert parallelism, whose seams `dispatch` and `combine` communicate."""

    def __init__(self, shape: Shape, world: World) -> None:
        model, arguments = sharded_model(shape.model(PATTERN), world)
        super().__init__(model, shape, world.device)
        self.exchange, self.local_exchange = TokenExchange(*arguments), LocalExchange(*arguments)

    def rewire(self, residual: str, seams: TokenExchange | None = None) -> None:
        super().rewire(residual)
        set_exchange(self.wiring, seams or self.exchange)

    def attention_seconds(self, repeats: int = 5) -> tuple[float, float]:
        """Times the halves of the first sub-block, which is attention: medians of the forward
        pass."""
        block, context = self.wiring.block(0), self.context.at(0)
        x, seconds = self.stream.clone().requires_grad_(), []
        for _ in range(repeats):
            start = self.now()
            carried = block.begin(x, context)
            middle = self.now()
            block.finish(carried, context)
            seconds.append((middle - start, self.now() - middle))
        first, second = zip(*seconds, strict=True)
        return statistics.median(first), statistics.median(second)

    def now(self) -> float:
        """Synchronizes the device; returns the time."""
        if self.stream.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class ExpertRank(ladder.TimedRank):
    """One rank of a row under expert parallelism."""

    row: ExpertRow

    def build(self, shape: Shape) -> None:
        """Builds the row."""
        self.row = ExpertRow(shape, self.world)
        self.set_variants(self.row.local_exchange)

    def attention_seconds(self) -> tuple[float, float]:
        """Times the halves of attention, without communication."""
        return self.row.attention_seconds()


def hiding_places(attention: tuple[float, float], all_to_all: float) -> dict[str, float]:
    """How long the halves of attention last, forward, beside an all-to-all; in seconds."""
    return {
        "forward, ms of an all-to-all": 1000 * all_to_all,
        "forward, first half of attention / all-to-all": attention[0] / all_to_all,
        "forward, second half of attention / all-to-all": attention[1] / all_to_all,
    }


def between_hosts(shape: Shape, rounds: int, share: float) -> dict[str, Any]:
    """Measures two ranks on two simulated hosts."""
    with Hosts(ExpertRank) as hosts:
        figures = ladder.measure(hosts, shape, round_count=rounds, share=share)
        by_rank = hosts.call("attention_seconds")
    exposed = figures["forward, standard ms"] - figures["forward, none ms"]
    first, second = (max(seconds) for seconds in zip(*by_rank, strict=True))
    return figures | hiding_places((first, second), 1e-3 * exposed / shape.blocks)


def with_delays(shape: Shape, device: torch.device, rounds: int, share: float) -> dict[str, Any]:
    """Measures one rank whose collectives are delays."""
    with delayed_world(device) as world:
        row = ExpertRow(shape, world)
        group = row.exchange.group
        assert isinstance(group, DelayGroup)
        timer = RowTimer(row, group, device)
        figures = overlap.measure(timer, shape.blocks, rounds, share)
        group.seconds = 0.0
        return figures | hiding_places(row.attention_seconds(), timer.delay)


def run(
    host_shape: Shape = BETWEEN_HOSTS,
    delay_shape: Shape | None = None,
    host_rounds: int = 5,
    delay_rounds: int = 15,
    share: float = COMMUNICATION_SHARE,
) -> dict[str, Any]:
    """Medians over rounds in which the variants take turns, in both modes.

    Where this machine cannot simulate two hosts, the report says why and has the delays only.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settle_memory(device)
    delay_shape = delay_shape or (ON_GPU if device.type == "cuda" else ON_CPU)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report: dict[str, Any] = {"delays": f"{delay_shape}; one rank of them, {device_name}"}
    figures = with_delays(delay_shape, device, delay_rounds, share)
    report |= {f"delays: {name}": value for name, value in figures.items()}
    if reason := unsupported_reason():
        return report | {"between hosts": f"not measured: {reason}"}
    report["between hosts"] = f"{host_shape}; over gloo, 1 thread a rank, {cores()} cores"
    figures = between_hosts(host_shape, host_rounds, share)
    return report | {f"between hosts: {name}": value for name, value in figures.items()}
