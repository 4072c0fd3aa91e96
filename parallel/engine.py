"""A step of training: micro-batches forward and backward, reduced gradients, and the update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colonnade.kernels.labels import IGNORED
from colonnade.models.decoder import Decoder
from colonnade.models.report import PassReport
from colonnade.parallel.gradients import clip_factor, gradient_norm, wide_dtype
from colonnade.parallel.mesh import ranks_per_loss, ranks_per_sample
from colonnade.parallel.optimizer import Optimizer
from colonnade.parallel.passes import Inputs, MicroBatch, Passes, RunningSums
from colonnade.parallel.tensor import complete_gradients


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
    passes: Passes

    def gradients(
        self,
        batches: Sequence[MicroBatch],
        samples: Sequence[Sequence[int]],
        groups: float,
        rng_key: int,
        counted: int | None = None,
    ) -> Report:
        """Gradients of the mean objective per valid token of the global batch, on every rank.

        Each rank divides by the number of valid tokens of all ranks, and gradients are summed:
        FSDP2 reduce-scatters them over the data axes and `cp` after every micro-batch (in a
        pipeline once), those that are partial over `tp` or `etp` are all-reduced once at the end,
        and then those of weights that several stages share are summed over these. Collective.

        Args:
            batches: this rank's micro-batches.
            samples: the indices of their rows among all samples.
            groups: balance groups of the global batch.
            rng_key: of the step, by which random draws are keyed.
            counted: how many of the micro-batches, from the first on, are trained on; None: all.
                The others are there so that all ranks run as many passes.
        """
        valid = sum(int((b.labels != IGNORED).sum()) for b in batches[:counted])
        tokens = int(all_reduced([valid], self.device)[0]) // ranks_per_sample(self.mesh)
        self.model.train()
        self.model.begin_step()
        limit = len(batches) if counted is None else counted
        inputs = [
            Inputs(*both, groups, rng_key, counted=number < limit)
            for number, both in enumerate(zip(batches, samples, strict=True))
        ]
        losses, loads = RunningSums(), RunningSums()
        outcomes = self.passes.train(inputs, 1 / max(tokens, 1))
        self.optimizer.backward_ended()
        for objective, report in outcomes:
            losses.add(losses_of(objective, report, tokens))
            loads.add(report.loads)
        self.passes.unite("losses", losses)
        self.passes.unite("loads", loads)
        copies = ranks_per_loss(self.mesh)
        totals = {name: value.item() for name, value in losses.all_reduce(copies).items()}
        complete_gradients(self.model)  # before the norm, which needs complete sums
        self.passes.complete_gradients()
        of_stages = self.passes.group, self.passes.copies
        norms = self.optimizer.local_norms
        norm = gradient_norm(self.model.parameters(), *of_stages, norms).item()
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
        dtype = wide_dtype(next(self.model.parameters()))
        self.optimizer.step(lr, clip_factor(report.grad_norm, clip, dtype))
        self.model.end_step(report.loads)
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """Drops the gradients without an update."""
        self.optimizer.zero_grad()


def connect(passes: Passes, optimizer: Optimizer) -> None:
    """Lets passes tell an optimizer when gradients are about to be complete, and which are complete
    only when pipeline stages have summed them."""
    passes.expect_gradients = optimizer.expect_gradients
    optimizer.share_with_stages(passes.shared_parameters)


def losses_of(objective: Tensor | None, report: PassReport, tokens: int) -> dict[str, Tensor]:
    """Returns a pass's terms of the objective per valid token, in fp64: the negative log likelihood
    `loss`, the `balance` terms as they enter the objective, and those in `extras` of the report."""
    terms = [t.double() for t in report.terms.values()]
    losses = {"balance": torch.stack(terms).sum()} if terms else {}
    if objective is not None:
        extras = {name: v.double() / max(tokens, 1) for name, v in report.extras.items()}
        loss = objective.double() / max(tokens, 1) - sum(extras.values())
        losses |= {"loss": loss, **extras, "balance": losses.get("balance", torch.zeros_like(loss))}
    return losses


def all_reduced(
    values: list[float],
    device: torch.device,
    operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> list[float]:
    """All-reduces each value over all ranks, in fp64, to its sum or by another operation."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total, operation)
    return total.tolist()
