"""Forward and backward passes of micro-batches through a model that is whole on every rank.

`Passes` runs one micro-batch after the other. A pipeline (`parallel.pipeline.pipeline`) is another
implementation of the same interface, which the step, validation and generation use.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colonnade.kernels.labels import IGNORED
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.report import PassReport
from colonnade.parallel.parallelize import reshard, set_last_micro_batch


class MicroBatch(Protocol):
    """Rows that go forward together, integers `[B, S]` each, in CPU memory."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...  # the next token, or IGNORED
    @property
    def positions(self) -> Tensor: ...  # counted from each document's start
    @property
    def documents(self) -> Tensor: ...  # number of the document within the row


@dataclass(frozen=True)
class Inputs:
    """The inputs of one pass.

    Attributes:
        batch: the micro-batch.
        samples: the indices of its rows among all samples.
        groups: balance groups of the global batch.
        rng_key: by which random draws are keyed.
        counted: whether it is trained on; otherwise it repeats a micro-batch of another rank, so
            that all ranks run as many passes, and adds nothing to losses, loads and gradients.
    """

    batch: MicroBatch
    samples: Sequence[int]
    groups: float = 1.0
    rng_key: int = 0
    counted: bool = True

    def on(self, device: torch.device) -> "DeviceInputs":
        """Copies them to a device."""
        tokens, labels, positions, documents = to_device(self.batch, device)
        indices = torch.tensor(self.samples, device=device)
        groups = self.groups
        if not self.counted:  # balancing terms are divided by the groups
            labels, groups = torch.full_like(labels, IGNORED), math.inf
        context = Context(positions, documents, groups, indices, self.rng_key)
        return DeviceInputs(tokens, context, labels)

    def counted_report(self, report: PassReport) -> PassReport:
        """Returns the report of a pass, whose loads are zeros if the pass is not counted."""
        if self.counted:
            return report
        zeros = {index: torch.zeros_like(loads) for index, loads in report.loads.items()}
        return report._replace(loads=zeros)


class DeviceInputs(NamedTuple):
    """The inputs of one pass as the model takes them; without labels it returns logits, of the
    `last` tokens alone if that is given."""

    tokens: Tensor
    context: Context
    labels: Tensor | None = None
    last: int | None = None


class Outcome(NamedTuple):
    """The result of a pass of the model, or of one of its stages, detached.

    Attributes:
        objective: a scalar, summed over the tokens of the micro-batch; None: of a stage that is not
            the last.
        report: of the sub-blocks that ran.
    """

    objective: Tensor | None
    report: PassReport


class Passes:
    """Runs micro-batches one after the other; FSDP2 reduces gradients after each of them.

    `expect_gradients` is called before the backward pass, or the reduction by FSDP2, that completes
    the gradients of a step, except for those that are summed afterwards.
    """

    def __init__(self, model: Decoder, device: torch.device) -> None:
        self.model, self.device = model, device
        self.expect_gradients: Callable[[], None] = lambda: None

    def train(self, inputs: Sequence[Inputs], scale: float) -> list[Outcome]:
        """Runs forward and backward passes of a step; gradients are those of `scale` times the
        objective, and balancing terms, reduced over data-parallel ranks. Collective."""
        outcomes = []
        for number, one in enumerate(inputs, start=1):
            set_last_micro_batch(self.model, number == len(inputs))
            objective, report = self.model(*one.on(self.device))
            if number == len(inputs):
                self.expect_gradients()
            (objective * scale).backward()
            outcomes.append(Outcome(objective.detach(), one.counted_report(report)))
        return outcomes

    def repeat(self, inputs: Inputs, scale: float) -> None:
        """Runs forward and backward of one micro-batch, as `train` does, between two steps: no
        optimizer expects its gradients. Collective."""
        set_last_micro_batch(self.model, True)
        objective, _ = self.model(*inputs.on(self.device))
        (objective * scale).backward()

    def evaluate(self, inputs: Sequence[Inputs]) -> list[Outcome]:
        """Runs forward passes in evaluation mode, without gradients. Collective."""
        with evaluating(self.model):
            outcomes = [Outcome(*self.model(*one.on(self.device))) for one in inputs]
        reshard(self.model)
        return outcomes

    def next_logits(self, tokens: Tensor, context: Context) -> Tensor:
        """Returns the logits `[B, V]` after the last of these tokens `[S, B]`, on every rank. The
        model is in the caller's mode. Collective."""
        return self.logits(tokens, context, 1)[-1]

    def logits(self, tokens: Tensor, context: Context, last: int | None = None) -> Tensor:
        """Returns the logits `[S, B, V]` after each of these tokens `[S, B]`, or after the `last`
        ones, on every rank. The model is in the caller's mode. Collective."""
        return self.model(tokens, context, last=last)

    def unite(self, kind: str, sums: "RunningSums") -> None:
        """Adds zeros under the names that only other stages' ranks have; sums of one `kind` have
        the same names in every step. Collective."""

    def complete_gradients(self) -> None:
        """Sums the gradients of weights of which several stages have copies. Collective."""

    @property
    def copies(self) -> Set[nn.Parameter]:
        """The parameters of this rank whose gradients another rank counts."""
        return frozenset()

    @property
    def shared_parameters(self) -> Set[nn.Parameter]:
        """The parameters of this rank of which other stages have copies."""
        return frozenset()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of ranks with the other stages; None: there are no others."""
        return None


def forward(
    model: Decoder,
    batch: MicroBatch,
    samples: Sequence[int],
    device: torch.device,
    groups: float = 1.0,
    rng_key: int = 0,
) -> tuple[Tensor, PassReport]:
    """The objective of one micro-batch, summed over its tokens, and the report of the pass."""
    return model(*Inputs(batch, samples, groups, rng_key).on(device))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context manager: the model is in evaluation mode without gradients, and then as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def to_device(
    batch: MicroBatch, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Copies a micro-batch to a device: tokens, labels, positions and documents, `[S, B]` each.

    Documents are None where every row is a single document.
    """

    def move(t: Tensor) -> Tensor:
        return t.T.contiguous().to(device, non_blocking=True)

    tokens, labels, positions = (move(t) for t in (batch.tokens, batch.labels, batch.positions))
    packed = bool(batch.documents.any())
    return tokens, labels, positions, move(batch.documents) if packed else None


class RunningSums(dict[Any, Tensor]):
    """Sums of tensors over the micro-batches of a step, by name."""

    def add(self, named: Mapping[Any, Tensor]) -> None:
        """Adds each tensor to the sum of its name."""
        for name, value in named.items():
            self[name] = self[name] + value if name in self else value

    def all_reduce(self, copies: int) -> dict[Any, Tensor]:
        """All-reduces the sums over all ranks; `copies` ranks each hold the same sum, which counts
        once. All ranks have the same names. Sums of integers stay integers."""
        if not self:
            return self
        names = sorted(self)
        stacked = torch.stack([self[name] for name in names])
        dist.all_reduce(stacked)
        sums = stacked / copies if stacked.is_floating_point() else stacked // copies
        return dict(zip(names, sums, strict=True))
