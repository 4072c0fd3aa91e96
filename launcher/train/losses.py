"""Losses without training, under any layout: of all rows of a source, or of a run's validation."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colonnade.kernels.draws import hashed
from colonnade.kernels.labels import IGNORED
from colonnade.launcher.data import Batch, Rows
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.step import sync_errors
from colonnade.parallel.engine import Engine, all_reduced
from colonnade.parallel.mesh import data_rank, ranks_per_loss, ranks_per_sample
from colonnade.parallel.passes import Inputs, Passes

TOGETHER = 16  # passes whose rows are read before they run
VALIDATION = -1  # in place of a step, so that no key of validation is that of a step


class ReadRows(Protocol):
    """Rows that are read by their index."""

    def batch(self, samples: Sequence[int]) -> Batch:
        """Reads the rows of these samples."""


class Sums(NamedTuple):
    """Sums over tokens that have a loss.

    Attributes:
        nats: the negative log likelihood.
        tokens: how many they are.
        bytes: of their text; None: it is not known, as no tokenizer is.
    """

    nats: float
    tokens: int
    bytes: int | None

    def plus(self, other: "Sums") -> "Sums":
        """Returns the sums of both."""
        known = self.bytes is not None and other.bytes is not None
        size = (self.bytes or 0) + (other.bytes or 0) if known else None
        return Sums(self.nats + other.nats, self.tokens + other.tokens, size)

    @property
    def bits_per_byte(self) -> float | None:
        """The negative log likelihood in bits per byte of text; None where that is not known."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    def figures(self) -> dict[str, float | int | None]:
        """Returns loss in nats and perplexity per token, bits per byte, tokens and bytes."""
        loss = self.nats / self.tokens if self.tokens else math.nan
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if not loss > 700 else math.inf,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def sum_losses(
    passes: Passes,
    mesh: DeviceMesh | None,
    rows: ReadRows,
    samples: Sequence[int],
    batch: int,
    byte_lengths: Tensor | None,
    rng_key: int = 0,
) -> Sums:
    """Sums the loss of rows. Collective: all-reduces the sums over all ranks.

    Every rank runs as many forward passes as the others, because they are collective: a rank that
    has no row left runs row 0 without labels.

    Args:
        passes: of the model.
        mesh: of the ranks; None: this process is the only one.
        rows: of which those at `samples` are read.
        samples: their indices.
        batch: rows of a forward pass of one rank.
        byte_lengths: bytes of every token of the vocabulary; None: unknown.
        rng_key: by which random experts (THOR) are drawn for the rows: inference activates random
            experts, too (arXiv:2110.04260).
    """
    nats = tokens = text_bytes = 0.0
    for inputs in inputs_of(passes.device, mesh, rows, samples, batch, rng_key):
        outcomes = passes.evaluate(inputs)
        nats += sum(o.objective.item() for o in outcomes if o.objective is not None)
        labels = torch.cat([one.batch.labels.flatten() for one in inputs])
        label = labels[labels != IGNORED].long()
        tokens += label.numel()
        if byte_lengths is not None:
            text_bytes += float(byte_lengths[label].sum())
    if mesh is not None:
        nats, tokens, text_bytes = all_reduced([nats, tokens, text_bytes], passes.device)
        # A rank's loss covers its segments of the rows, but its labels are those of the full rows.
        nats /= ranks_per_loss(mesh)
        tokens, text_bytes = (total / ranks_per_sample(mesh) for total in (tokens, text_bytes))
    return Sums(nats, round(tokens), None if byte_lengths is None else round(text_bytes))


def inputs_of(
    device: torch.device,
    mesh: DeviceMesh | None,
    rows: ReadRows,
    samples: Sequence[int],
    batch: int,
    rng_key: int,
) -> Iterator[list[Inputs]]:
    """Yields the inputs of this rank's passes, up to `TOGETHER` at a time, so that the stages of a
    pipeline work at the same time. Collective: errors are shared."""
    rank, ranks = (0, 1) if mesh is None else data_rank(mesh)

    def read(start: int) -> Inputs:
        first = start + rank * batch
        local_samples = list(samples[first : first + batch])
        some = rows.batch(local_samples or [0])
        labels = some.labels if local_samples else torch.full_like(some.labels, IGNORED)
        return Inputs(some._replace(labels=labels), local_samples or [0], rng_key=rng_key)

    starts = range(0, len(samples), batch * ranks)
    for first in range(0, len(starts), TOGETHER):
        reads: Callable[[], list[Inputs]] = partial(
            list, map(read, starts[first : first + TOGETHER])
        )
        yield reads() if mesh is None else sync_errors(reads, device)


def validation_key(seed: int, step: int) -> int:
    """The key of random draws in the validation after `step` steps of a run of this seed.

    A resumed run and any layout repeat the draws of a step; different steps draw anew.
    """
    return int(hashed(seed, VALIDATION, step))


def validate_loss(
    engine: Engine, rows: Rows, recipe: Recipe, byte_lengths: Tensor | None, rng_key: int
) -> tuple[float, float | None]:
    """Computes the mean loss per token, in nats, and bits per byte (None: unknown), over
    `validate_rows` rows. Collective, as `sum_losses`.

    The rows are spaced evenly over the validation set, and are the same at every call and on every
    layout. `rng_key` is that of the call (`validation_key`).
    """
    available = rows.rows or 0
    count = min(recipe.train.validate_rows, available)
    samples = [i * available // count for i in range(count)]
    sums = sum_losses(
        engine.passes, engine.mesh, rows, samples, recipe.train.micro_batch, byte_lengths, rng_key
    )
    return sums.nats / max(sums.tokens, 1), sums.bits_per_byte
