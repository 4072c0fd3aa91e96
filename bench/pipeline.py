"""`bench pipeline`: idle time of every schedule, FLOPs of split backward passes, and two ranks.

Stages that sleep, under the pipeline that trains: sleeping takes no processor time, so four ranks
run at the same time on any machine, and what is idle beyond a schedule's formula is the order of
actions, their communication, and the time that Python takes. Every rank sleeps as long for the
forward pass of a micro-batch as for its input gradients and for its weight gradients.

What sleeping stages cannot show is measured on models (`bench/stages.py`): whether the passes of a
split backward cost as many FLOPs as one that is not split, and what two ranks train.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colonnade.bench.stages import Pool, flop_figures, two_rank_figures
from colonnade.bench.timing import median_ratio
from colonnade.bench.worker_pool import RankPool
from colonnade.kernels.deferred import PutOff, put_off
from colonnade.launcher.data import Batch
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.report import PassReport
from colonnade.models.wiring import Stage, State
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.mesh import build_mesh
from colonnade.parallel.passes import Inputs
from colonnade.parallel.pipeline.bubble import PassTimes, bubble, idle_share, shortest_step
from colonnade.parallel.pipeline.pipeline import Pipeline
from colonnade.parallel.pipeline.schedule import actions_of
from colonnade.parallel.world import World

RANKS = 4
UNIT = 0.1  # seconds of a rank's forward passes of a micro-batch
MICRO_BATCHES = (8, 16)
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb1p", "zbv", "dualpipev")
ROWS, LENGTH, HIDDEN = 1, 8, 64  # of a micro-batch


class Nap(torch.autograd.Function):
    """The identity, whose passes sleep; see `nap`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, defer: PutOff | None, seconds: float
    ) -> Tensor:
        ctx.defer, ctx.seconds = defer, seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        def weight_gradient() -> Tensor:
            time.sleep(ctx.seconds)
            return torch.zeros(1)

        time.sleep(ctx.seconds)
        if ctx.defer is None:
            return grad, weight_gradient(), None, None
        ctx.defer(weight_gradient)
        return grad, None, None, None


def nap(x: Tensor, weight: Tensor, seconds: float) -> Tensor:
    """Sleeps for `seconds`, and as long for the gradient of x, and for that of the weight."""
    weight, defer = put_off(weight, x)
    return cast(Tensor, Nap.apply(x, weight, defer, seconds))


class SleepingStages(nn.Module):
    """In place of the stages of a decoder that a rank has: each sleeps for `seconds` a pass."""

    def __init__(self, config: ModelConfig, seconds: float) -> None:
        super().__init__()
        self.config, self.seconds = config, seconds
        self.weight = nn.Parameter(torch.zeros(1))

    def ends(self) -> list[nn.Module]:
        """Returns embedding and head, of which there are none."""
        return []

    def forward(
        self,
        tokens: Tensor,
        context: Context,
        labels: Tensor,
        last: int | None,
        state: State | None,
        stage: Stage,
    ) -> tuple[State | Tensor, PassReport]:
        """Runs a stage forward, as `Decoder` does."""
        if state is None:
            state = State(torch.zeros(*tokens.shape, HIDDEN, requires_grad=True))
        x = nap(state.stream, self.weight, self.seconds)
        is_last = stage.stop == len(self.config.symbols)
        return x.sum() if is_last else State(x), PassReport({}, {}, {})


def layout(schedule: str) -> ParallelConfig:
    """The layout of a schedule."""
    return ParallelConfig.model_validate({"pp": RANKS, "schedule": schedule})


def sleep_step(world: World, schedule: str, micro_batches: int, unit: float) -> tuple[float, float]:
    """Runs a step of sleeping stages on one rank; returns its start and its end."""
    parallel = layout(schedule)
    stages = RANKS * parallel.stages_of_rank
    recipe = Recipe(model=ModelConfig(pattern="-", repeat=stages, hidden=HIDDEN), parallel=parallel)
    model = cast(Decoder, SleepingStages(recipe.model, unit / parallel.stages_of_rank))
    of_stages = [Stage(index, index + 1) for index in range(stages)]
    pipeline = Pipeline(model, of_stages, build_mesh(parallel, world), recipe, world.device)
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    inputs = [Inputs(Batch(tokens, tokens, tokens, tokens), [0])] * micro_batches
    actions_of(parallel, micro_batches)  # ordered once, before the clock starts
    dist.barrier()
    start = time.perf_counter()
    pipeline.train(inputs, 1.0)
    return start, time.perf_counter()


def sleep_figures(
    pool: Pool, schedules: Sequence[str], micro_batches: int, unit: float, rounds: int
) -> dict[str, float]:
    """The figures of all schedules, which take turns, with one number of micro-batches."""
    seconds: dict[str, list[float]] = {schedule: [] for schedule in schedules}
    for _ in range(rounds):
        for schedule, steps in seconds.items():
            spans = pool.run(sleep_step, schedule, micro_batches, unit)
            steps.append(max(end for _, end in spans) - min(start for start, _ in spans))
    times = PassTimes(unit, unit, unit)
    busy = micro_batches * times.total
    first = layout(schedules[0])
    figures: dict[str, float] = {}
    for schedule, steps in seconds.items():
        parallel = layout(schedule)
        shortest = shortest_step(actions_of(parallel, micro_batches), parallel, times)
        values = {
            "step ms": 1e3 * statistics.median(steps),
            "idle": statistics.median(1 - busy / step for step in steps),
            "idle, by the formula": idle_share(parallel, times, micro_batches),
            "idle, by the order of passes": 1 - busy / shortest,
        }
        if parallel != first:
            faster = f"step, {first.schedule} / {schedule}"
            values[faster] = median_ratio(seconds[first.schedule], steps)
            by_formula = (busy + bubble(first, times)) / (busy + bubble(parallel, times))
            values[f"{faster}, by the formula"] = by_formula
        figures |= {f"{schedule}, m={micro_batches}: {name}": v for name, v in values.items()}
    return figures


def run(
    unit: float = UNIT,
    micro_batches: Sequence[int] = MICRO_BATCHES,
    schedules: Sequence[str] = SCHEDULES,
    rounds: int = 3,
    model: ModelConfig | None = None,
    seq_len: int = 512,
    step_rounds: int = 7,
) -> dict[str, Any]:
    """Medians of rounds in which schedules take turns.

    Args:
        unit: seconds of a rank's sleep for each kind of pass of a micro-batch.
        micro_batches: of a step of sleeping stages.
        schedules: the first is the one that the others are compared with.
        rounds: of sleeping stages.
        model: of the other parts; None: that of `bench step`.
        seq_len: of the other parts.
        step_rounds: of two ranks beside one process.
    """
    report: dict[str, Any] = {
        "shape": f"{RANKS} ranks over gloo; forward, input and weight gradients of a micro-batch "
        f"sleep {1e3 * unit:g} ms each on every rank"
    }
    with RankPool(RANKS) as pool:
        for schedule in schedules:  # connects the ranks
            pool.run(sleep_step, schedule, micro_batches[0], unit / 10)
        for count in micro_batches:
            report |= sleep_figures(pool, schedules, count, unit, rounds)
    with RankPool(2) as pool:
        report |= flop_figures(pool, model, seq_len)
    return report | two_rank_figures(model, seq_len, step_rounds)
