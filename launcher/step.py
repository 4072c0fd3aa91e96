"""One optimizer step over the global batch, and one pass over the validation rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colonnade.kernels.draws import hashed
from colonnade.kernels.loss import IGNORED
from colonnade.launcher.corpus import Batch, Rows
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe import Recipe
from colonnade.launcher.schedule import batch_size, learning_rate
from colonnade.launcher.together import on_all
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.parallel.gradients import clip_gradients, gradient_norm
from colonnade.parallel.mesh import data_rank, data_sharers, token_sharers
from colonnade.parallel.optimizer import Optimizer
from colonnade.parallel.parallelize import last_micro_batch, put_away
from colonnade.parallel.tensor import complete_gradients

T = TypeVar("T")

VALIDATION = -1  # in place of a step's number, where random draws are keyed by it


@dataclass(frozen=True)
class Result:
    """One step: global figures, equal on all ranks."""

    loss: float  # mean negative log likelihood per valid token, in nats
    balance: float  # balancing terms, as they enter the objective
    extras: dict[str, float]  # other parts of the objective, per valid token, by name
    grad_norm: float
    lr: float
    tokens: int  # valid tokens
    skipped: bool  # nothing was updated: loss or gradient was not finite


def on_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """tokens, labels, positions and documents as `[S, B]`; documents None if all rows are whole."""
    packed = bool(batch.documents.any())
    move = [batch.tokens, batch.labels, batch.positions] + [batch.documents] * packed
    moved = [t.T.contiguous().to(device, non_blocking=True) for t in move]
    return moved[0], moved[1], moved[2], moved[3] if packed else None


def over_ranks(
    values: list[float],
    device: torch.device,
    operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> list[float]:
    """Sum each value over all ranks, in fp64, or combine them by another operation."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total, operation)
    return total.tolist()


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
    if over_ranks([float(fault is not None)], device, dist.ReduceOp.MAX)[0]:
        on_all(lambda: raise_if(fault))
    assert outcome is not None  # else all ranks have raised
    return outcome[0]


def raise_if(fault: UserError | None) -> None:
    """Raise a fault that there may be."""
    if fault is not None:
        raise fault


def forward(
    model: Decoder,
    batch: Batch,
    samples: Sequence[int],
    device: torch.device,
    groups: float = 1.0,
    draw: int = 0,
) -> tuple[Tensor, Context]:
    """Summed objective of one micro-batch, and the context with what else the pass found."""
    tokens, labels, positions, documents = on_device(batch, device)
    numbers = torch.tensor(samples, device=device)
    context = Context(positions, documents, groups, numbers, draw)
    return model(tokens, context, labels), context


class Sums(dict[Any, Tensor]):
    """Tensors added up by name over the micro-batches of a step."""

    def add(self, named: Mapping[Any, Tensor]) -> None:
        """Add each tensor to the one of its name."""
        for name, value in named.items():
            self[name] = self[name] + value if name in self else value

    def over_ranks(self, sharers: int) -> dict[Any, Tensor]:
        """The sums over all ranks, of which `sharers` each hold the same; all have all names."""
        if not self:
            return self
        names = sorted(self)
        stacked = torch.stack([self[name] for name in names])
        dist.all_reduce(stacked)
        return dict(zip(names, stacked / sharers, strict=True))


def train_step(
    model: Decoder,
    optimizer: Optimizer,
    batches: list[Batch],
    samples: list[list[int]],
    recipe: Recipe,
    step: int,
    mesh: DeviceMesh,
    device: torch.device,
) -> Result:
    """Forward and backward over this rank's micro-batches, then one update, or none if not finite.

    The loss is the mean over the valid tokens of the global batch: each rank divides by their
    count over all ranks, and gradients are summed.
    """
    sharers = token_sharers(mesh)
    valid = sum(int((b.labels != IGNORED).sum()) for b in batches)
    tokens = int(over_ranks([valid], device)[0]) // data_sharers(mesh)
    groups = batch_size(recipe.train, step) / recipe.model.balance_samples
    draw = int(hashed(recipe.train.seed, step))
    losses, loads = Sums(), Sums()
    model.begin_step()
    for number, (batch, numbers) in enumerate(zip(batches, samples, strict=True), start=1):
        last_micro_batch(model, number == len(batches))
        part, context = forward(model, batch, numbers, device, groups, draw)
        part = part / max(tokens, 1)
        part.backward()
        extras = {name: value.double() / max(tokens, 1) for name, value in context.extras.items()}
        loss = part.detach().double() - sum(extras.values())
        balance = sum(term.double() for term in context.terms.values()) + torch.zeros_like(loss)
        losses.add({"loss": loss, "balance": balance, **extras})
        loads.add(context.loads)
    totals = {name: value.item() for name, value in losses.over_ranks(sharers).items()}
    total_loss, total_balance = totals.pop("loss"), totals.pop("balance")
    parameters = list(model.parameters())
    complete_gradients(model, mesh)
    norm = gradient_norm(parameters)
    lr = learning_rate(recipe.optimizer, step, recipe.train.steps)
    finite = math.isfinite(sum(totals.values(), total_loss + total_balance))
    finite = finite and bool(norm.isfinite())
    if finite and tokens:
        if recipe.optimizer.clip:
            clip_gradients(parameters, norm, recipe.optimizer.clip)
        optimizer.step(lr)
        model.end_step(loads.over_ranks(sharers))
    optimizer.zero_grad()
    return Result(total_loss, total_balance, totals, norm.item(), lr, tokens, not finite)


@torch.no_grad()
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
    draw = int(hashed(recipe.train.seed, VALIDATION))
    nats = tokens = units = 0.0
    for start in range(0, count, size * ranks):
        first = start + rank * size
        mine = chosen[first : first + size]
        batch = agreed(partial(rows.batch, mine or [0]), device)
        labels = batch.labels if mine else torch.full_like(batch.labels, IGNORED)
        loss, _ = forward(model, batch._replace(labels=labels), mine or [0], device, draw=draw)
        nats += loss.item()
        label = labels[labels != IGNORED].long()
        tokens += label.numel()
        if byte_lengths is not None:
            units += float(byte_lengths[label].sum())
    put_away(model)
    sums = over_ranks([nats, tokens, units], device)
    nats = sums[0] / token_sharers(mesh)  # a rank's are those of its part of the rows
    tokens, units = (total / data_sharers(mesh) for total in sums[1:])
    bits = nats / math.log(2) / units if byte_lengths is not None and units else None
    return nats / max(tokens, 1), bits
