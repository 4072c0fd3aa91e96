"""A step of training: micro-batches forward and backward, reduced gradients, and the update."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from colonnade.kernels.loss import IGNORED
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.report import PassReport
from colonnade.parallel.gradients import clip_gradients, gradient_norm
from colonnade.parallel.mesh import ranks_per_sample, ranks_per_token
from colonnade.parallel.optimizer import Optimizer
from colonnade.parallel.parallelize import set_last_micro_batch
from colonnade.parallel.tensor import complete_gradients


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
class Report:
    """The results of a step's forward and backward passes: global figures, equal on all ranks."""

    loss: float  # mean negative log likelihood per valid token, in nats
    balance: float  # balancing terms, as they enter the objective
    extras: dict[str, float]  # other terms of the objective, per valid token, by name
    grad_norm: float
    tokens: int  # valid tokens
    loads: dict[int, Tensor]  # tokens of every expert, by the mixture's index in the row

    @property
    def finite(self) -> bool:
        """Whether the objective and all gradients are finite."""
        return math.isfinite(sum(self.extras.values(), self.loss + self.balance + self.grad_norm))


@dataclass(frozen=True)
class Engine:
    """Trains a sharded model: `gradients`, and then `update` or `discard`."""

    model: Decoder
    optimizer: Optimizer
    mesh: DeviceMesh
    device: torch.device

    def gradients(
        self,
        batches: Sequence[MicroBatch],
        samples: Sequence[Sequence[int]],
        groups: float,
        rng_key: int,
    ) -> Report:
        """Gradients of the mean objective per valid token of the global batch, on every rank.

        Each rank divides by the number of valid tokens of all ranks, and gradients are summed:
        FSDP2 reduce-scatters them over the data axes and `cp` after every micro-batch, and those
        that are partial over `tp` or `etp` are all-reduced once at the end. Collective.

        Args:
            batches: this rank's micro-batches.
            samples: the indices of their rows among all samples.
            groups: balance groups of the global batch.
            rng_key: of the step, by which random draws are keyed.
        """
        valid = sum(int((b.labels != IGNORED).sum()) for b in batches)
        tokens = int(all_reduced([valid], self.device)[0]) // ranks_per_sample(self.mesh)
        losses, loads = RunningSums(), RunningSums()
        copies = ranks_per_token(self.mesh)  # ranks that add the same tokens to a sum
        self.model.train()
        self.model.begin_step()
        for number, (batch, indices) in enumerate(zip(batches, samples, strict=True), start=1):
            set_last_micro_batch(self.model, number == len(batches))
            objective, report = forward(self.model, batch, indices, self.device, groups, rng_key)
            objective = objective / max(tokens, 1)
            objective.backward()
            extras = {name: v.double() / max(tokens, 1) for name, v in report.extras.items()}
            loss = objective.detach().double() - sum(extras.values())
            balance = sum(t.double() for t in report.terms.values()) + torch.zeros_like(loss)
            losses.add({"loss": loss, "balance": balance, **extras})
            loads.add(report.loads)
        totals = {name: value.item() for name, value in losses.all_reduce(copies).items()}
        complete_gradients(self.model)  # before the norm, which needs complete sums
        norm = gradient_norm(list(self.model.parameters())).item()
        return Report(
            totals.pop("loss"),
            totals.pop("balance"),
            totals,
            norm,
            tokens,
            loads.all_reduce(copies),
        )

    def update(self, report: Report, lr: float, clip: float) -> None:
        """Clips the gradients, takes one optimizer step and drops the gradients. Collective.

        Args:
            report: what `gradients` returned.
            lr: the learning rate of this step.
            clip: the largest norm of all gradients; 0 does not clip.
        """
        if clip:
            parameters = list(self.model.parameters())
            norm = torch.tensor(report.grad_norm, dtype=parameters[0].dtype, device=self.device)
            clip_gradients(parameters, norm, clip)
        self.optimizer.step(lr)
        self.model.end_step(report.loads)
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """Drops the gradients without an update."""
        self.optimizer.zero_grad()


def forward(
    model: Decoder,
    batch: MicroBatch,
    samples: Sequence[int],
    device: torch.device,
    groups: float = 1.0,
    rng_key: int = 0,
) -> tuple[Tensor, PassReport]:
    """The objective of one micro-batch, summed over its tokens, and the report of the pass."""
    tokens, labels, positions, documents = to_device(batch, device)
    indices = torch.tensor(samples, device=device)
    return model(tokens, Context(positions, documents, groups, indices, rng_key), labels)


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


def all_reduced(
    values: list[float],
    device: torch.device,
    operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> list[float]:
    """All-reduces each value over all ranks, in fp64, to its sum or by another operation."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total, operation)
    return total.tolist()


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
