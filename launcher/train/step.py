"""Runs one optimizer step over the global batch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from colonnade.kernels.draws import hashed
from colonnade.launcher.cluster.collective import on_all_ranks
from colonnade.launcher.data import Batch
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.stages import TrainingStage
from colonnade.launcher.train.schedule import batch_size, stage_learning_rate
from colonnade.launcher.train.timer import Timer
from colonnade.parallel.engine import Engine, Report, all_reduced
from colonnade.parallel.lanes.pinned import PinnedMemoryError

T = TypeVar("T")


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


def keys_of_step(stage: TrainingStage, step: int) -> tuple[float, int]:
    """Returns the balance groups of a step's batch, and the key of its random draws."""
    recipe = stage.recipe
    groups = batch_size(recipe.train, step) / recipe.model.balance_samples
    return groups, int(hashed(recipe.train.seed, step))


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    samples: Sequence[Sequence[int]],
    stage: TrainingStage,
    step: int,
    timer: Timer | None = None,
    before_update: Callable[[], object] = lambda: None,
    trained: int | None = None,
) -> Result:
    """Runs this rank's micro-batches forward and backward, and updates the model. Collective.

    A step without valid tokens, or with a non-finite objective or gradient, updates nothing.
    `timer` measures its parts `passes` and `update`. `before_update` is called before parameters
    and optimizer state change. `trained` is how many of the micro-batches, from the first on, are
    trained on (`trained_micro_batches`); None: all.
    """
    timer, recipe = timer or Timer(), stage.recipe
    groups, rng_key = keys_of_step(stage, step)
    with timer.part("passes"):
        try:
            report = engine.gradients(batches, samples, groups, rng_key, trained)
        except PinnedMemoryError as error:  # of stashed inputs, in the first step
            raise UserError(str(error)) from error
    lr = stage_learning_rate(stage, step)
    if not report.finite or not report.tokens:
        engine.discard()
        return Result(report, lr)
    before_update()
    with timer.part("update"):
        engine.update(report, lr, recipe.optimizer.clip)
    return Result(report, lr)
