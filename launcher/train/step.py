"""One optimizer step over the global batch, and one pass over the validation rows."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colonnade.kernels.draws import hashed
from colonnade.kernels.loss import IGNORED
from colonnade.launcher.cluster.collective import on_all_ranks
from colonnade.launcher.data import Batch, Rows
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.schedule import batch_size, learning_rate
from colonnade.models.decoder import Decoder
from colonnade.parallel.engine import Engine, Report, all_reduced, evaluating, forward
from colonnade.parallel.mesh import data_rank, ranks_per_sample, ranks_per_token
from colonnade.parallel.parallelize import reshard

T = TypeVar("T")

VALIDATION = -1  # in place of a step's number, where random draws are keyed by it


class Result(NamedTuple):
    """One step: what was found, and at which learning rate the model was updated, if it was."""

    report: Report
    lr: float

    @property
    def skipped(self) -> bool:
        """Whether nothing was updated: loss or gradient was not finite."""
        return not self.report.finite


def agreed(action: Callable[[], T], device: torch.device) -> T:
    """Run `action` on every rank; where it raises UserError on any, every rank raises that one.

    Collective: all-reduces one number, so that it may be called in every step.
    """
    outcome: tuple[T] | None = None
    fault: UserError | None = None
    try:
        outcome = (action(),)
    except UserError as error:
        fault = error
    if all_reduced([float(fault is not None)], device, dist.ReduceOp.MAX)[0]:
        on_all_ranks(lambda: raise_if(fault))
    assert outcome is not None  # else all ranks have raised
    return outcome[0]


def raise_if(fault: UserError | None) -> None:
    """Raise a fault that there may be."""
    if fault is not None:
        raise fault


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    samples: Sequence[Sequence[int]],
    recipe: Recipe,
    step: int,
) -> Result:
    """Run this rank's micro-batches forward and backward, and update the model. Collective.

    A step without tokens, or whose objective or gradients are not finite, updates nothing.
    """
    groups = batch_size(recipe.train, step) / recipe.model.balance_samples
    rng_key = int(hashed(recipe.train.seed, step))
    report = engine.gradients(batches, samples, groups, rng_key)
    lr = learning_rate(recipe.optimizer, step, recipe.train.steps)
    if report.finite and report.tokens:
        engine.update(report, lr, recipe.optimizer.clip)
    else:
        engine.discard()
    return Result(report, lr)


def validate_loss(
    model: Decoder,
    rows: Rows,
    recipe: Recipe,
    mesh: DeviceMesh,
    device: torch.device,
    byte_lengths: Tensor | None,
) -> tuple[float, float | None]:
    """Mean loss per token, and bits per byte where known, over `validate_rows` rows.

    The rows are spread evenly over all there are, and the same at every call and on every layout.
    Every rank makes the same number of forward passes; one that has run out of rows repeats one
    without labels. Random experts (THOR) are drawn for each row, the same at every call.
    """
    rank, ranks = data_rank(mesh)
    size, there = recipe.train.micro_batch, rows.rows or 0
    count = min(recipe.train.validate_rows, there)
    chosen = [number * there // count for number in range(count)]
    rng_key = int(hashed(recipe.train.seed, VALIDATION))
    nats = tokens = units = 0.0
    for start in range(0, count, size * ranks):
        first = start + rank * size
        mine = chosen[first : first + size]
        batch = agreed(partial(rows.batch, mine or [0]), device)
        labels = batch.labels if mine else torch.full_like(batch.labels, IGNORED)
        batch = batch._replace(labels=labels)
        with evaluating(model):
            loss, _ = forward(model, batch, mine or [0], device, rng_key=rng_key)
        nats += loss.item()
        label = labels[labels != IGNORED].long()
        tokens += label.numel()
        if byte_lengths is not None:
            units += float(byte_lengths[label].sum())
    reshard(model)
    sums = all_reduced([nats, tokens, units], device)
    nats = sums[0] / ranks_per_token(mesh)  # a rank's are those of its part of the rows
    tokens, units = (total / ranks_per_sample(mesh) for total in sums[1:])
    bits = nats / math.log(2) / units if byte_lengths is not None and units else None
    return nats / max(tokens, 1), bits
