"""Runs one optimizer step over the global batch, or one pass over the validation rows."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.kernels.draws import hashed
from colonnade.kernels.loss import IGNORED
from colonnade.launcher.cluster.collective import on_all_ranks
from colonnade.launcher.data import Batch, Rows
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.stages import TrainingStage
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.schedule import batch_size, stage_learning_rate
from colonnade.launcher.train.timer import Timer
from colonnade.parallel.engine import Engine, Report, all_reduced
from colonnade.parallel.mesh import data_rank, ranks_per_loss, ranks_per_sample
from colonnade.parallel.passes import Inputs

T = TypeVar("T")

TOGETHER = 16  # validation passes whose rows are read before they run
VALIDATION = -1  # in place of a step, so that no key of validation is that of a step


class Result(NamedTuple):
    """A step's report, and the learning rate of its update, if there was one."""

    report: Report
    lr: float

    @property
    def skipped(self) -> bool:
        """Whether the update was skipped because the loss or a gradient was not finite."""
        return not self.report.finite


def sync_errors(action: Callable[[], T], device: torch.device) -> T:
    """Runs `action` on every rank; if it raises UserError on any rank, every rank raises it.

    Collective: all-reduces one number, which is cheap enough for every step. Only after an error
    are objects all-gathered. Where several ranks fail, all raise the error of the lowest rank.
    """
    outcome: tuple[T] | None = None  # a tuple, because the result may be None
    fault: UserError | None = None
    try:
        outcome = (action(),)
    except UserError as error:
        fault = error
    if all_reduced([float(fault is not None)], device, dist.ReduceOp.MAX)[0]:
        on_all_ranks(lambda: raise_if(fault))
    assert outcome is not None  # otherwise every rank has raised
    return outcome[0]


def raise_if(fault: UserError | None) -> None:
    """Raises `fault` unless it is None."""
    if fault is not None:
        raise fault


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    samples: Sequence[Sequence[int]],
    stage: TrainingStage,
    step: int,
    timer: Timer | None = None,
    before_update: Callable[[], object] = lambda: None,
) -> Result:
    """Runs this rank's micro-batches forward and backward, and updates the model. Collective.

    A step without valid tokens, or with a non-finite objective or gradient, updates nothing.
    `timer` measures its parts `passes` and `update`. `before_update` is called before parameters
    and optimizer state change.
    """
    timer, recipe = timer or Timer(), stage.recipe
    groups = batch_size(recipe.train, step) / recipe.model.balance_samples
    rng_key = int(hashed(recipe.train.seed, step))
    with timer.part("passes"):
        report = engine.gradients(batches, samples, groups, rng_key)
    lr = stage_learning_rate(stage, step)
    if not report.finite or not report.tokens:
        engine.discard()
        return Result(report, lr)
    before_update()
    with timer.part("update"):
        engine.update(report, lr, recipe.optimizer.clip)
    return Result(report, lr)


def validation_key(seed: int, step: int) -> int:
    """The key of random draws in the validation after `step` steps of a run of this seed.

    A resumed run and any layout repeat the draws of a step; different steps draw anew.
    """
    return int(hashed(seed, VALIDATION, step))


def validate_loss(
    engine: Engine,
    rows: Rows,
    recipe: Recipe,
    byte_lengths: Tensor | None,
    rng_key: int,
) -> tuple[float, float | None]:
    """Computes the mean loss per token, in nats, and bits per byte, over `validate_rows` rows.

    The rows are spaced evenly over the validation set, and are the same at every call and on every
    layout. Every rank runs the same number of forward passes, because they are collective: a rank
    without remaining rows runs row 0 without labels. Collective: all-reduces the sums over all
    ranks.

    Args:
        byte_lengths: bytes of every token of the vocabulary; None: unknown, and so are bits per
            byte, which are then None.
        rng_key: the key of the call (`validation_key`), by which random experts (THOR) are drawn
            for the rows: inference activates random experts, too (arXiv:2110.04260).
    """
    nats = tokens = text_bytes = 0.0
    for inputs in validation_inputs(engine, rows, recipe, rng_key):
        outcomes = engine.passes.evaluate(inputs)
        nats += sum(o.objective.item() for o in outcomes if o.objective is not None)
        labels = torch.cat([one.batch.labels.flatten() for one in inputs])
        label = labels[labels != IGNORED].long()
        tokens += label.numel()
        if byte_lengths is not None:
            text_bytes += float(byte_lengths[label].sum())
    sums = all_reduced([nats, tokens, text_bytes], engine.device)
    # A rank's loss covers its segments of the rows, but its labels are those of the full rows.
    nats = sums[0] / ranks_per_loss(engine.mesh)
    tokens, text_bytes = (total / ranks_per_sample(engine.mesh) for total in sums[1:])
    bits = nats / math.log(2) / text_bytes if byte_lengths is not None and text_bytes else None
    return nats / max(tokens, 1), bits


def validation_inputs(
    engine: Engine, rows: Rows, recipe: Recipe, rng_key: int
) -> Iterator[list[Inputs]]:
    """Yields the inputs of this rank's validation passes, of up to `TOGETHER` of them at a time, so
    that the stages of a pipeline work at the same time. Collective: errors are shared."""
    rank, ranks = data_rank(engine.mesh)
    size, available = recipe.train.micro_batch, rows.rows or 0
    count = min(recipe.train.validate_rows, available)
    samples = [i * available // count for i in range(count)]

    def read(start: int) -> Inputs:
        first = start + rank * size
        local_samples = samples[first : first + size]
        batch = rows.batch(local_samples or [0])
        labels = batch.labels if local_samples else torch.full_like(batch.labels, IGNORED)
        return Inputs(batch._replace(labels=labels), local_samples or [0], rng_key=rng_key)

    starts = range(0, count, size * ranks)
    for first in range(0, len(starts), TOGETHER):
        some = starts[first : first + TOGETHER]
        yield sync_errors(partial(list, map(read, some)), engine.device)
