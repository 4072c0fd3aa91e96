"""`bench moe --nproc N`: a mixture of experts whose experts are divided among N ranks of this host.

Forward and backward of the sub-block, part by part: router, dispatch, the experts' products, and
combine. Dispatch and combine are all that expert parallelism adds and all that moves rows: sorts,
launches, waits, permutations, weighted sums, and their gradients. Each part begins after a barrier,
so none waits for another rank's earlier part. Every expert gets as many rows from every rank.

The floor of dispatch and combine is the time of as many bytes in bare all-to-alls. Beside the
experts' products stands one dense MLP of as many FLOPs through the same `kernels.linear`.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.bench.experts import (
    LocalExchange,
    even_choices,
    set_exchange,
    sharded_model,
)
from colonnade.bench.moe import EXPERTS, SIZES, TOP_K
from colonnade.bench.timing import median_ratio
from colonnade.bench.worker_pool import RankPool
from colonnade.kernels.activation import activated_linear
from colonnade.kernels.experts import expert_mlp
from colonnade.kernels.linear import linear
from colonnade.kernels.routing import route
from colonnade.launcher.cluster.environment import cores
from colonnade.launcher.errors import UserError
from colonnade.models.blocks.experts import Routed
from colonnade.models.blocks.mixture import Mixture
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.cost import ExpertTraffic
from colonnade.parallel.experts import TokenExchange
from colonnade.parallel.materialise import materialise
from colonnade.parallel.seams import expert_blocks
from colonnade.parallel.world import World

PARTS = ("router", "dispatch", "products", "combine")
NUMBER = 4  # bytes of an activation
Seconds = dict[str, list[float]]  # by name and round


def model_config(D: int, F: int) -> ModelConfig:
    """The config of one mixture."""
    return ModelConfig(
        pattern="E", hidden=D, ffn=F, experts=EXPERTS, top_k=TOP_K, balance=0.0, vocab=64
    )


def leaf(t: Tensor) -> Tensor:
    """The same values without history, for gradients."""
    return t.detach().requires_grad_()


class TimedMixture:
    """One rank of a mixture, with its tokens `[T, 1, D]` and the gradient of its output."""

    def __init__(self, world: World, T: int, D: int, F: int) -> None:
        model, arguments = sharded_model(model_config(D, F), world)
        materialise(model, world.device, seed=0)
        self.exchange, self.local_exchange = TokenExchange(*arguments), LocalExchange(*arguments)
        set_exchange(model, self.exchange)
        (block,) = expert_blocks(model)
        assert isinstance(block, Mixture)
        self.block, self.context = block, Context(torch.arange(T)[:, None])
        self.x, self.grad = torch.randn(2, T, 1, D)
        self.chosen = even_choices(torch.empty(T, 1, TOP_K), EXPERTS)

    def whole(self) -> object:
        """Runs forward and backward as the model does."""
        x = leaf(self.x)
        return torch.autograd.grad(
            self.block(x, self.context), [x, *self.block.parameters()], self.grad
        )

    def weights(self, x: Tensor) -> Tensor:
        """Runs the router; returns the weights of the choices."""
        return route(self.block.small(x, self.context), self.block.routing)[2]

    def parts(self, exchange: TokenExchange) -> dict[str, float]:
        """Runs forward and backward part by part; returns the seconds of each."""
        seconds: dict[str, float] = defaultdict(float)
        grad = torch.autograd.grad

        def timed(part: str, action: Callable[[], Any]) -> Any:
            dist.barrier()
            start = time.perf_counter()
            result = action()
            seconds[part] += time.perf_counter() - start
            return result

        def dispatch() -> Any:
            sent = exchange.dispatch(Routed(x, self.chosen, None, weight), EXPERTS)
            return sent, *sent.receive()

        def combine() -> Tensor:
            returned = exchange.combine(computed, sent, weight)
            return returned.receive(returned.rows)

        x, routed_x = leaf(self.x), leaf(self.x)
        routed = timed("router", lambda: self.weights(routed_x))
        weight = leaf(routed)
        sent, arrived, counts = timed("dispatch", dispatch)
        rows = leaf(arrived)
        out = timed("products", lambda: self.block.experts(rows, counts, None))
        computed = leaf(out)
        y = timed("combine", combine)
        d_out, d_weight = timed("combine", lambda: grad(y, [computed, weight], self.grad))
        inputs = [rows, *self.block.experts.parameters()]
        d_rows = timed("products", lambda: grad(out, inputs, d_out))[0]
        timed("dispatch", lambda: grad(arrived, x, d_rows))
        inputs = [routed_x, *self.block.small.parameters()]
        timed("router", lambda: grad(routed, inputs, d_weight))
        return dict(seconds)

    def bare_all_to_alls(self) -> None:
        """Sends what dispatch and combine send, one after another."""
        rows = torch.empty(len(self.x) * TOP_K, self.x.shape[-1])
        received, counts = torch.empty_like(rows), torch.empty(EXPERTS, dtype=torch.int64)
        group = self.exchange.group
        dist.all_to_all_single(torch.empty_like(counts), counts, group=group)
        for _ in range(4):
            dist.all_to_all_single(received, rows, group=group)

    def products(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """Forward and backward of the MLPs of this rank's experts on as many rows each, and of one
        of them, a dense MLP, on all these rows."""
        experts, activation = self.block.experts, self.block.config.activation
        gate, up, down = (leaf(experts.weight_of(name)) for name in ("gate", "up", "down"))
        counts = torch.full((len(up),), len(self.x) * TOP_K // len(up))
        rows, grad = (torch.randn(len(self.x) * TOP_K, self.x.shape[-1]) for _ in range(2))
        rows.requires_grad_()
        dense = [leaf(weight[0]) for weight in (gate, up, down)]

        def of_experts() -> object:
            y = expert_mlp(rows, counts, gate, up, down, activation)
            return torch.autograd.grad(y, [rows, gate, up, down], grad)

        def of_one() -> object:
            y = activated_linear(
                linear(rows, dense[1]), linear(rows, dense[0]), dense[2], activation
            )
            return torch.autograd.grad(y, [rows, *dense], grad)

        return of_experts, of_one


def measure(world: World, T: int, D: int, F: int, rounds: int) -> Seconds:
    """Times everything on one rank, in turn; returns the seconds by name and round."""
    torch.manual_seed(world.rank)
    mixture = TimedMixture(world, T, D, F)
    of_experts, of_one = mixture.products()
    candidates: dict[str, Callable[[], Any]] = {
        "": lambda: mixture.parts(mixture.exchange),
        "nothing sent, ": lambda: mixture.parts(mixture.local_exchange),
        "undivided": mixture.whole,
        "bare all-to-alls": mixture.bare_all_to_alls,
        "experts' MLPs": of_experts,
        "one dense MLP": of_one,
    }
    seconds: Seconds = defaultdict(list)
    for round_index in range(2 + rounds):
        for name, action in candidates.items():
            dist.barrier()
            start = time.perf_counter()
            result = action()
            taken = time.perf_counter() - start
            if round_index < 2:  # warms up
                continue
            if isinstance(result, dict):
                for part, part_seconds in result.items():
                    seconds[f"{name}{part}"].append(part_seconds)
            else:
                seconds[name].append(taken)
    return dict(seconds)


def summed(seconds: Seconds, names: Sequence[str]) -> list[float]:
    """The sums of several parts, by round."""
    return [sum(values) for values in zip(*(seconds[name] for name in names), strict=True)]


def figures(seconds: Seconds, bytes_sent: int) -> dict[str, float]:
    """The figures of one size, from the slowest rank's seconds and the bytes that a rank sends."""
    sum_of_parts, moving = summed(seconds, PARTS), summed(seconds, ("dispatch", "combine"))
    unsent = summed(seconds, ("nothing sent, dispatch", "nothing sent, combine"))
    bare, experts = seconds["bare all-to-alls"], seconds["experts' MLPs"]
    names = (*PARTS, "undivided", "bare all-to-alls", "experts' MLPs", "one dense MLP")
    return {
        **{f"{name} ms": 1e3 * statistics.median(seconds[name]) for name in names},
        "share of dispatch and combine": median_ratio(moving, sum_of_parts),
        "share of what they do besides sending": median_ratio(unsent, sum_of_parts),
        "floor of the share, bare all-to-alls": median_ratio(bare, sum_of_parts),
        "sum of the parts / undivided": median_ratio(sum_of_parts, seconds["undivided"]),
        "MB that a rank sends": 1e-6 * bytes_sent,
        "bare all-to-alls, MB/s": 1e-6 * bytes_sent / statistics.median(bare),
        "speed, experts' MLPs / one dense MLP": median_ratio(seconds["one dense MLP"], experts),
    }


def run(
    nproc: int, sizes: Sequence[tuple[int, int, int]] = SIZES, rounds: int = 15
) -> dict[str, Any]:
    """Figures at several sizes (tokens of a rank, hidden, inner width of an expert).

    Times are the slowest rank's, medians of rounds in which all take turns.

    Raises:
        UserError: the experts cannot be divided among so many ranks.
    """
    if EXPERTS % nproc:
        raise UserError(f"bench moe --nproc {nproc}: {EXPERTS} experts do not divide among them")
    report: dict[str, Any] = {
        "shape": f"{EXPERTS} experts, top {TOP_K}, fp32, forward and backward, ep {nproc}, even "
        f"loads; over gloo, 1 thread a rank, {cores()} cores"
    }
    with RankPool(nproc) as pool:
        for T, D, F in sizes:
            by_rank = pool.run(measure, T, D, F, rounds)
            slowest = {
                name: [max(t) for t in zip(*(rank[name] for rank in by_rank), strict=True)]
                for name in by_rank[0]
            }
            traffic = ExpertTraffic(model_config(D, F), ParallelConfig(ep=nproc), NUMBER)
            report |= {
                f"T={T} D={D} F={F}: {name}": value
                for name, value in figures(slowest, traffic.even_bytes(T, TOP_K)).items()
            }
    return report
