"""Parts of `bench pipeline` that compute: FLOPs of a pipeline's passes, and two ranks in training.

FLOPs are those of products and attention, as PyTorch counts them, in the passes of a step on two
ranks: a schedule that splits backward has to cost no more than 1F1B, which does not.

Two ranks of one thread train the Llama of `bench step` as two stages under 1F1B, beside one process
of one thread, and beside two such processes that have nothing to do with each other: what these
lose is what the processor's cores share.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from colonnade.bench.step import SHAPE
from colonnade.bench.timing import alternate, median_ratio
from colonnade.bench.worker_pool import Worker, WorkerPool
from colonnade.launcher.cluster.products import settle_products
from colonnade.launcher.data import Batch
from colonnade.launcher.recipe.tables import Recipe, TrainConfig
from colonnade.launcher.train.job import build_engine
from colonnade.models.config import ModelConfig
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.engine import Engine
from colonnade.parallel.pipeline.bubble import PassTimes, idle_share
from colonnade.parallel.pipeline.pipeline import Pipeline
from colonnade.parallel.pipeline.placement import divide_row, end_cost, sub_block_costs
from colonnade.parallel.world import World

RANKS = 2
SPLIT, WHOLE = "zbv", "1f1b"
PASSES = ("forward", "backward", "input gradient", "weight gradient")
FLOP_MICRO_BATCHES, MICRO_BATCHES = 4, 8  # of a row each


class Pool(Protocol):
    """Ranks in one group, as a `RankPool`."""

    def run(self, function: Callable[..., Any], *args: object) -> list[Any]:
        """Calls `function(world, *args)` on every rank; returns the results by rank."""
        ...


def recipe_of(model: ModelConfig, seq_len: int, parallel: ParallelConfig, **train: str) -> Recipe:
    """A recipe of micro-batches of one row, with other fields of `train`."""
    sizes = {"seq_len": seq_len, "micro_batch": 1, "loss_chunk": 256}
    fields = TrainConfig.model_validate(sizes | train)
    return Recipe(model=model, parallel=parallel, train=fields)


def gradients(engine: Engine, seq_len: int, micro_batches: int) -> Any:
    """Runs the passes of a step; returns its report."""
    generator = torch.Generator().manual_seed(0)
    vocab = engine.model.config.vocab
    rows = torch.randint(vocab, (micro_batches, 1, seq_len + 1), generator=generator)
    positions, documents = torch.arange(seq_len)[None], torch.zeros(1, seq_len, dtype=torch.long)
    batches = [Batch(row[:, :-1], row[:, 1:], positions, documents) for row in rows]
    return engine.gradients(batches, [[n] for n in range(micro_batches)], micro_batches, 0)


def attention(query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
    """Returns the FLOPs of attention's products, from the shapes of its arguments, `[B, H, S, P]`;
    those that no token sees are among them."""
    (B, H, S, P), (*_, T, V) = query, value
    return int(2 * B * H * S * T * (P + V))


def attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *others: Any, **named: Any
) -> int:
    """Returns those of its backward, which computes scores again, and four gradients."""
    (B, H, S, P), (*_, T, V) = query, value
    return int(2 * B * H * S * T * (3 * P + 2 * V))


# PyTorch counts those of its operators on GPUs.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


class FlopObserver:
    """Counts the FLOPs of a rank's actions, by kind."""

    def __init__(self) -> None:
        self.flops: dict[str, float] = defaultdict(float)

    @contextmanager
    def action(self, kind: str, stage: int, number: int) -> Iterator[None]:
        """Counts those of an action."""
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            yield
        self.flops[kind] += counter.get_total_flops()

    @contextmanager
    def wait(self, kind: str, stage: int, number: int) -> Iterator[None]:
        """Counts nothing more."""
        yield


def pass_flops(
    world: World, model: ModelConfig, seq_len: int, schedule: str, recompute: str
) -> dict[str, float]:
    """Counts the FLOPs of a step on one rank; returns them by kind of pass."""
    parallel = ParallelConfig.model_validate({"pp": RANKS, "schedule": schedule})
    # PyTorch counts the products of its own library, which has all of those in fp64.
    recipe = recipe_of(model, seq_len, parallel, recompute=recompute, precision="fp64")
    engine = build_engine(recipe, world)
    assert isinstance(engine.passes, Pipeline)
    engine.passes.observer = observer = FlopObserver()
    gradients(engine, seq_len, FLOP_MICRO_BATCHES)
    return dict(observer.flops)


def flop_figures(pool: Pool, model: ModelConfig | None, seq_len: int) -> dict[str, float]:
    """GFLOPs of the passes of a micro-batch on two ranks, with and without recomputation, split
    and not."""
    figures: dict[str, float] = {}
    for recompute in ("none", "block"):
        totals = {}
        for schedule in (WHOLE, SPLIT):
            by_rank = pool.run(pass_flops, model or SHAPE, seq_len, schedule, recompute)
            case = f"FLOPs, {schedule}, recompute {recompute}"
            flops = {kind: sum(rank.get(kind, 0) for rank in by_rank) for kind in PASSES}
            totals[schedule] = sum(flops.values())
            figures |= {
                f"{case}: {kind} GFLOP": value / FLOP_MICRO_BATCHES / 1e9
                for kind, value in flops.items()
                if value
            }
            figures[f"{case}: all GFLOP"] = totals[schedule] / FLOP_MICRO_BATCHES / 1e9
        ratio = totals[SPLIT] / totals[WHOLE]
        figures[f"FLOPs, recompute {recompute}: {SPLIT} / {WHOLE}"] = ratio
    return figures


class Trainer(Worker):
    """A process of one thread that trains a model, or a stage of it."""

    def open_alone(self) -> None:
        """Becomes the only rank of a group of its own."""
        self.number, self.index = self.index, 0
        self.join(1, dist.HashStore())

    def open(self, port: int) -> None:
        """Becomes a rank of the group of all, whose store listens on this port."""
        self.number = 0  # every rank takes part in every step
        self.join(RANKS, dist.TCPStore("127.0.0.1", port, is_master=False))

    def build(self, model: ModelConfig, seq_len: int) -> None:
        """Builds the engine, set up as `train` does it."""
        settle_products(self.world.device)
        parallel = ParallelConfig(pp=self.world.size)
        self.engine = build_engine(recipe_of(model, seq_len, parallel), self.world)
        self.seq_len = seq_len

    def step(self, processes: int) -> None:
        """Takes a training step, if this is one of the first `processes`."""
        if self.number < processes:
            report = gradients(self.engine, self.seq_len, MICRO_BATCHES)
            self.engine.update(report, 1e-3, 1.0)


def two_rank_figures(model: ModelConfig | None, seq_len: int, rounds: int) -> dict[str, float]:
    """Tokens per second of two stages on two ranks, and of one process, one thread each.

    The limit of two ranks is twice one process, less the bubble of the schedule's formula.
    """
    model, parallel = model or SHAPE, ParallelConfig(pp=RANKS)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with WorkerPool(Trainer, RANKS) as alone, WorkerPool(Trainer, RANKS) as pair:
        alone.call("open_alone")
        pair.call("open", store.port)
        for pool in (alone, pair):
            pool.call("build", model, seq_len)
        seconds = alternate(
            {
                "one process": lambda: alone.call("step", 1),
                "two ranks": lambda: pair.call("step", RANKS),
                "two processes": lambda: alone.call("step", RANKS),
            },
            rounds,
            warmup=2,
        )
    tokens = MICRO_BATCHES * seq_len
    one, two, both = (seconds[n] for n in ("one process", "two ranks", "two processes"))
    busy = 1 - idle_share(parallel, PassTimes(1, 2, 0), MICRO_BATCHES)
    costs = sub_block_costs(model, seq_len)
    first, end = divide_row(model, parallel, seq_len)[0], end_cost(model, seq_len)
    share = max(sum(costs[:first]), sum(costs[first:]) + end) / (sum(costs) + end)
    figures = {
        **{f"{name}: tokens/s": tokens / statistics.median(s) for name, s in seconds.items()},
        "two ranks: bubble, by the formula": 1 - busy,
        "two ranks: larger stage's share of the FLOPs": share,
        "two ranks: speed / one process": median_ratio(one, two),
        "two ranks: speed / (two times one process, less the bubble)": median_ratio(one, two)
        / (2 * busy),
        "two processes: speed / two times one process": median_ratio(one, both),
        "two ranks: speed / (two processes, less the bubble)": median_ratio(both, two) / (2 * busy),
    }
    figures["two processes: tokens/s"] *= 2
    return figures
