"""Stages of a pipeline: where the row of sub-blocks is divided, and which rank has which of them.

Imports no torch.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from colonnade.models.config import CARDS, ModelConfig
from colonnade.models.records import join, writing_std
from colonnade.parallel.config import V_SHAPED, ParallelConfig

SPLIT_BACKWARD = ("zb1p", "zbv", "dualpipev")  # weight gradients are computed separately


class Placement(NamedTuple):
    """The ranks of the stages of a pipeline.

    Attributes:
        ranks: the index along `pp` of each stage's rank, in the order of the stages.
    """

    ranks: tuple[int, ...]

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "Placement":
        """Returns the placement that the schedule of a layout has."""
        pp = parallel.pp
        if parallel.schedule in V_SHAPED:
            return cls((*range(pp), *reversed(range(pp))))
        return cls(tuple(range(pp)) * parallel.stages_of_rank)

    def stages_of(self, rank: int) -> list[int]:
        """Returns the stages of a rank, in ascending order."""
        return [stage for stage, owner in enumerate(self.ranks) if owner == rank]


def micro_batches_fit(parallel: ParallelConfig, count: int) -> str:
    """Returns why a schedule cannot run this number of micro-batches in a step, or an empty string.

    Fewer than the ranks of a pipeline would leave some of them idle throughout, except where the
    schedule runs all forward passes first. Interleaved schedules go round by round, with the same
    number of micro-batches, about pp, in each.
    """
    pp, schedule = parallel.pp, parallel.schedule
    if pp == 1 or schedule in ("gpipe", "bfs"):
        return ""
    least = 2 * pp if schedule == "dualpipev" else pp
    if count < least:
        what = f"2 x parallel.pp = {least}" if least > pp else f"parallel.pp = {pp}"
        return f"needs at least {what} micro-batches"
    if schedule in ("interleaved", "zb1p") and count % (rounds := count // pp):
        return f"runs micro-batches in {rounds} equal rounds of at least parallel.pp = {pp}"
    return ""


def sub_block_costs(config: ModelConfig, seq_len: int) -> list[float]:
    """Returns the forward FLOPs per token of each sub-block of the row.

    Kernels without matrix products (norms, convolutions) are not counted.
    """
    std = writing_std(config, config.symbols)
    weights = {
        symbol: sum(float(r.elements * r.used) for r in CARDS[symbol].parameters(config, std))
        for symbol in set(config.symbols)
    }
    return [
        2 * weights[symbol] + CARDS[symbol].mixing_flops(config, seq_len, index)
        for index, symbol in enumerate(config.symbols)
    ]


def end_cost(config: ModelConfig, seq_len: int) -> float:
    """Returns the forward FLOPs per token of what follows the row: the head, and the modules for
    multi-token prediction, each of which uses the head again."""
    projection = 2.0 * config.vocab * config.hidden
    if not config.mtp:
        return projection
    row = config.changed(pattern=config.mtp_pattern, repeat=1, mtp=0)
    module = sum(sub_block_costs(row, seq_len)) + 2.0 * sum(r.elements for r in join(config))
    return projection + config.mtp * (projection + module)


def divide_row(config: ModelConfig, parallel: ParallelConfig, seq_len: int) -> list[int]:
    """Returns the number of sub-blocks of each stage: `parallel.stages`, or such numbers that the
    costliest stage costs as little as possible.

    Raises:
        ValueError: there are more stages than sub-blocks.
    """
    if parallel.stages is not None:
        return list(parallel.stages)
    stages = parallel.stage_count
    costs = sub_block_costs(config, seq_len)
    if len(costs) < stages:
        raise ValueError(f"{stages} stages need as many sub-blocks, and there are {len(costs)}")
    return balanced_division(costs, end_cost(config, seq_len), stages)


def balanced_division(costs: Sequence[float], end: float, stages: int) -> list[int]:
    """Divides a row into contiguous stages, each of at least one sub-block, so that the largest
    cost is as small as possible, and below it the costs are as equal as possible.

    The cost `end` belongs to the last stage.
    """
    sums = [0.0, *accumulate(costs)]
    sums[-1] += end

    def cost(start: int, stop: int) -> float:
        return sums[stop] - sums[start]

    largest, _ = best_division(len(costs), stages, lambda best, i, j: max(best, cost(i, j)))

    def squares(best: float, start: int, stop: int) -> float:
        one = cost(start, stop)
        return best + one * one if one <= largest * (1 + 1e-9) else float("inf")

    _, bounds = best_division(len(costs), stages, squares)
    return [stop - start for start, stop in pairwise(bounds)]


def best_division(
    count: int, stages: int, add: Callable[[float, int, int], float]
) -> tuple[float, list[int]]:
    """Finds the division with the smallest value by dynamic programming over the stages.

    `add(value, start, stop)` returns the value of a division to which this stage is added; the one
    without stages has 0.

    Returns:
        the value, and the bounds of the stages.
    """
    infinite = float("inf")
    values, starts = [0.0] + [infinite] * count, []
    for stage in range(stages):
        following, chosen = [infinite] * (count + 1), [0] * (count + 1)
        for stop in range(stage + 1, count + 1):
            for start in range(stage, stop):
                if values[start] < infinite:
                    value = add(values[start], start, stop)
                    if value < following[stop]:
                        following[stop], chosen[stop] = value, start
        values = following
        starts.append(chosen)
    bounds = [count]
    for chosen in reversed(starts):
        bounds.append(chosen[bounds[-1]])
    return values[count], bounds[::-1]
