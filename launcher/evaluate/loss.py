"""The summed loss of rows of text, under any layout: every token counts once."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from colonnade.kernels.loss import IGNORED
from colonnade.launcher.data import Batch
from colonnade.launcher.evaluate.rows import WholeRows
from colonnade.launcher.generate.opening import Trained
from colonnade.launcher.train.step import TOGETHER, sync_errors
from colonnade.parallel.engine import all_reduced
from colonnade.parallel.mesh import data_rank, ranks_per_loss, ranks_per_sample
from colonnade.parallel.passes import Inputs


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

    def figures(self) -> dict[str, float | int | None]:
        """Returns loss in nats and perplexity per token, bits per byte, tokens and bytes."""
        loss = self.nats / self.tokens if self.tokens else math.nan
        bits = self.nats / math.log(2) / self.bytes if self.bytes else None
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if not loss > 700 else math.inf,
            "bits_per_byte": bits,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def sum_losses(trained: Trained, rows: WholeRows, samples: Sequence[int], batch: int) -> Sums:
    """Sums the loss of rows. Collective: all-reduces the sums.

    Every rank runs as many forward passes as the others, because they are collective: a rank that
    has no row left runs the first one without labels.

    Args:
        samples: indices of the rows.
        batch: rows of a forward pass of one rank.
    """
    lengths = None if trained.tokenizer is None else trained.tokenizer.byte_lengths()
    nats = tokens = text_bytes = 0.0
    for inputs in inputs_of(trained, rows, samples, batch):
        outcomes = trained.passes.evaluate(inputs)
        nats += sum(o.objective.item() for o in outcomes if o.objective is not None)
        labels = torch.cat([one.batch.labels.flatten() for one in inputs])
        label = labels[labels != IGNORED].long()
        tokens += label.numel()
        if lengths is not None:
            text_bytes += float(lengths[label].sum())
    if (mesh := trained.mesh) is not None:
        nats, tokens, text_bytes = all_reduced([nats, tokens, text_bytes], trained.device)
        # A rank's loss covers its segments of the rows, but its labels are those of the full rows.
        nats /= ranks_per_loss(mesh)
        tokens, text_bytes = (total / ranks_per_sample(mesh) for total in (tokens, text_bytes))
    return Sums(nats, round(tokens), None if lengths is None else round(text_bytes))


def inputs_of(
    trained: Trained, rows: WholeRows, samples: Sequence[int], batch: int
) -> Iterator[list[Inputs]]:
    """Yields the inputs of this rank's passes, several at a time, so that the stages of a pipeline
    work at the same time. Collective: errors are shared."""
    rank, ranks = (0, 1) if trained.mesh is None else data_rank(trained.mesh)

    def read(start: int) -> Inputs:
        first = start + rank * batch
        some = list(samples[first : first + batch])
        read_rows: Batch = rows.batch(some or [0])
        labels: Tensor = read_rows.labels
        if not some:
            labels = torch.full_like(labels, IGNORED)
        return Inputs(read_rows._replace(labels=labels), some or [0])

    starts = range(0, len(samples), batch * ranks)
    for first in range(0, len(starts), TOGETHER):
        some = starts[first : first + TOGETHER]
        reads = partial(lambda some: [read(start) for start in some], some)
        yield reads() if trained.mesh is None else sync_errors(reads, trained.device)
