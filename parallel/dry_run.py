"""Runs one rank of a job of any size in one process, without data: its build and its step on fake
tensors and PyTorch's `fake` process groups, counting what it holds and what it sends.

The rank's program is the product's own. What needs numbers, and not only shapes, is taken to be
even: rows are single documents, and every expert is chosen as often as any other.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.report import PassReport
from colonnade.parallel.collectives import AxisNames, CollectiveCounter
from colonnade.parallel.engine import RunningSums
from colonnade.parallel.gradients import clip_gradients, gradient_norm
from colonnade.parallel.mesh import ranks_per_token
from colonnade.parallel.optimizer import Optimizer, OptimizerSettings, build_optimizer
from colonnade.parallel.parallelize import COMPUTE, set_last_micro_batch
from colonnade.parallel.storages import ACTIVATIONS, GATHERED, Peak, StorageLedger, storage_bytes
from colonnade.parallel.tensor import complete_gradients
from colonnade.parallel.world import World

CPU = torch.device("cpu")


class DryTrainSettings(Protocol):
    """What a dry run reads of `[train]`."""

    @property
    def precision(self) -> str: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def seq_len(self) -> int: ...


class DrySettings(Protocol):
    """What a dry run reads of a recipe."""

    @property
    def train(self) -> DryTrainSettings: ...
    @property
    def optimizer(self) -> OptimizerSettings: ...


class Traffic(NamedTuple):
    """Calls of a collective, and the bytes that the rank sends by them."""

    calls: int
    bytes: int


Collectives = dict[tuple[str, str], Traffic]  # by axis and collective


@dataclass(frozen=True)
class RankReport:
    """What one rank holds and sends, all in bytes.

    Attributes:
        parameters: its shards.
        gradients: of their gradients, all of which are held when a step's last backward ends.
        optimizer: of the optimizer's state.
        held: activations that one micro-batch keeps from the end of its forward pass on.
        peak: the most that a micro-batch allocates beside the shards, forward and backward:
            activations, and the weights that FSDP2 has gathered then with the buffers of its
            collectives.
        update_peak: the same of the rest of the step: norm, clipping, optimizer.
        micro_batch: what one micro-batch sends.
        step: what is sent once a step.
        operators: that were run.
        seconds: that the dry run itself took, by its phases.
    """

    parameters: int
    gradients: int
    optimizer: int
    held: int
    peak: Peak
    update_peak: Peak
    micro_batch: Collectives
    step: Collectives
    operators: int
    seconds: dict[str, float]

    def collectives(self, micro_batches: int) -> Collectives:
        """What a step of this many micro-batches sends."""
        total: Collectives = {}
        for part, times in ((self.micro_batch, micro_batches), (self.step, 1)):
            for key, (calls, sent) in part.items():
                before = total.get(key, Traffic(0, 0))
                total[key] = Traffic(before.calls + times * calls, before.bytes + times * sent)
        return total

    def with_seconds(self, before: dict[str, float]) -> "RankReport":
        """The report with the seconds of earlier phases."""
        return dataclasses.replace(self, seconds={**before, **self.seconds})

    def memory(self, in_flight: int = 1) -> int:
        """The most bytes that the rank holds at once, with `in_flight` micro-batches between
        forward and backward: the last one's peak comes upon what the others keep."""
        passes = (in_flight - 1) * self.held + self.peak.total
        state = self.parameters + self.gradients + self.optimizer
        return state + max(passes, self.update_peak.total)


@dataclass
class Clock:
    """Seconds of phases."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time within it to a phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def open_fake_world(rank: int, size: int) -> World:
    """Opens the process group of a rank among `size` ranks that do not exist.

    It stays open: PyTorch cannot set up another one in the same process, because DTensor keeps
    meshes of the first in its caches. One world serves any number of dry runs.

    Raises:
        RuntimeError: this process has a process group already.
    """
    if dist.is_initialized():
        raise RuntimeError("this process has a process group already; a dry run needs a new one")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    return World(rank, size, CPU)


def dry_run(
    stages: Sequence[Decoder],
    mesh: DeviceMesh,
    expert_mesh: DeviceMesh | None,
    recipe: DrySettings,
) -> RankReport:
    """Runs a step of one micro-batch on this rank.

    Args:
        stages: what the rank computes, in order, each built on meta and parallelized: the model, or
            its stages of a pipeline. All are run forward, and then backward.
        mesh: the dense view.
        expert_mesh: the expert view, or None.
        recipe: from which precision, shapes and the optimizer are read.
    """
    clock = Clock()
    counter = CollectiveCounter(AxisNames([m for m in (mesh, expert_mesh) if m is not None]))
    ledger = StorageLedger()
    parameters: list[nn.Parameter] = [p for stage in stages for p in stage.parameters()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        with clock.phase("allocation"):
            optimizers = [allocate(stage, recipe) for stage in stages]
            batch = FakeBatch.of(recipe.train)
            hold_state(ledger, stages, optimizers)
        with counter, ledger:
            with clock.phase("micro-batch"):
                start = ledger.mark()
                reports, middle = forward_backward(stages, batch, ledger)
                ledger.hold("gradients", gradients(parameters))
                stop, sent = ledger.mark(), collectives(counter)
            with clock.phase("update"):
                update(stages, optimizers, reports, ranks_per_token(mesh))
                end = ledger.mark()
        held = ledger.held(middle)
        total = collectives(counter)
        micro_batch = {key: t for key, t in sent.items() if not once_a_step(*key)}
        return RankReport(
            parameters=storage_bytes(p for stage in stages for p in shards(stage)),
            gradients=storage_bytes(gradients(parameters)),
            optimizer=storage_bytes(t for o in optimizers for t in o.named_state().values()),
            held=held.get(ACTIVATIONS, 0),
            peak=ledger.peak(start, stop, (ACTIVATIONS, GATHERED)),
            update_peak=ledger.peak(stop, end, (ACTIVATIONS, GATHERED)),
            micro_batch=micro_batch,
            step=difference(total, micro_batch),
            operators=counter.operators,
            seconds=clock.seconds,
        )


def allocate(stage: Decoder, recipe: DrySettings) -> Optimizer:
    """Gives a stage on meta fake weights, which nothing fills, and builds its optimizer."""
    stage.to_empty(device=CPU)
    return build_optimizer(stage, recipe.optimizer, COMPUTE[recipe.train.precision])


def shards(stage: Decoder) -> list[Tensor]:
    """This rank's parameters and buffers."""
    return [*stage.parameters(), *stage.buffers()]


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients that there are."""
    return [p.grad for p in parameters if p.grad is not None]


def hold_state(
    ledger: StorageLedger, stages: Sequence[Decoder], optimizers: Sequence[Optimizer]
) -> None:
    """Tells the ledger what was allocated before the step."""
    for stage, optimizer in zip(stages, optimizers, strict=True):
        ledger.hold("parameters", shards(stage))
        ledger.hold("optimizer", optimizer.named_state().values())


class FakeBatch(NamedTuple):
    """A micro-batch of rows of one document each, `[S, B]`; `samples` are their indices `[B]`."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    samples: Tensor

    @classmethod
    def of(cls, train: DryTrainSettings) -> "FakeBatch":
        """The micro-batch of these settings."""
        shape = train.seq_len, train.micro_batch
        tokens, labels, positions = (torch.zeros(shape, dtype=torch.int32) for _ in range(3))
        return cls(tokens, labels, positions, torch.arange(train.micro_batch))


def forward_backward(
    stages: Sequence[Decoder], batch: FakeBatch, ledger: StorageLedger
) -> tuple[list[PassReport], int]:
    """Runs one micro-batch forward through all stages of the rank, and backward from the last to
    the first, as the last micro-batch of a step.

    Returns:
        the reports, and the ledger's mark between forward and backward.
    """
    outputs, reports = [], []
    for stage in stages:
        stage.train()
        stage.begin_step()
        set_last_micro_batch(stage, True)
        output, report = forward(stage, batch)
        outputs.append(output)
        reports.append(report)
    middle = ledger.mark()
    while outputs:
        backward(outputs.pop())
    return reports, middle


def forward(stage: Decoder, batch: FakeBatch) -> tuple[Tensor, PassReport]:
    """Runs a stage forward: the mean objective per token, and the report of the pass."""
    context = Context(batch.positions, None, 1.0, batch.samples, 0)
    objective, report = stage(batch.tokens, context, batch.labels)
    return objective / batch.tokens.numel(), report


def backward(output: Tensor) -> None:
    """Runs a stage backward from what `forward` returned."""
    output.backward()


def update(
    stages: Sequence[Decoder],
    optimizers: Sequence[Optimizer],
    reports: Sequence[PassReport],
    copies: int,
) -> None:
    """The rest of a step, as `engine.Engine` takes it, without reading results on the host: sums
    over all ranks, complete gradients, norm, clipping, the optimizer's step.

    Args:
        copies: ranks that have the same tokens.
    """
    dist.all_reduce(torch.zeros(1, dtype=torch.float64))  # valid tokens
    extras = {name for report in reports for name in report.extras}
    dist.all_reduce(torch.zeros(2 + len(extras), dtype=torch.float64))  # loss, balance, and these
    loads = RunningSums()
    for stage, report in zip(stages, reports, strict=True):
        complete_gradients(stage)
        loads.add(report.loads)
    parameters = [p for stage in stages for p in stage.parameters()]
    norm = gradient_norm(parameters)
    totals = loads.all_reduce(copies)
    clip_gradients(parameters, norm, 1.0)
    for stage, optimizer in zip(stages, optimizers, strict=True):
        optimizer.step(1e-3)
        stage.end_step(totals)


def collectives(counter: CollectiveCounter) -> Collectives:
    """What was counted so far."""
    return {key: Traffic(calls, counter.bytes[key]) for key, calls in counter.calls.items()}


def once_a_step(axis: str, collective: str) -> bool:
    """Whether what a step's last micro-batch sends is sent by no other: under HSDP gradients are
    all-reduced over `dp_replicate` after the last one."""
    return collective == "all_reduce" and "dp_replicate" in axis


def difference(total: Collectives, part: Collectives) -> Collectives:
    """What is in `total` and not in `part`."""
    calls = Counter({key: t.calls for key, t in total.items()})
    sent = Counter({key: t.bytes for key, t in total.items()})
    for key, t in part.items():
        calls[key] -= t.calls
        sent[key] -= t.bytes
    return {key: Traffic(n, sent[key]) for key, n in calls.items() if n}
