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
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from colonnade.kernels.eight_bit import tables
from colonnade.kernels.host_adamw import TorchKernel
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.report import PassReport
from colonnade.models.wiring import Stage
from colonnade.parallel.collectives import AxisNames, CollectiveCounter
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.gradients import gradient_norm, local
from colonnade.parallel.held import Mark, held_by_stage, on_host
from colonnade.parallel.mesh import ranks_per_loss
from colonnade.parallel.optimizer import Offload, Optimizer, OptimizerSettings, build_optimizer
from colonnade.parallel.optimizer.offload.report import DeviceLanes, OffloadReport
from colonnade.parallel.parallelize import COMPUTE, reduce_gradients, set_last_micro_batch
from colonnade.parallel.passes import DeviceInputs, Passes, RunningSums
from colonnade.parallel.pipeline.build import build_passes
from colonnade.parallel.pipeline.dry_run import (
    CountedRun,
    run_passes,
    sent_for_shared_weights,
    sum_over_all_ranks,
)
from colonnade.parallel.pipeline.pipeline import Pipeline
from colonnade.parallel.rank_state import (
    device_state,
    gradients,
    hold_state,
    offload_report,
    saved_bytes,
    shards,
)
from colonnade.parallel.storages import (
    ACTIVATIONS,
    GATHERED,
    STASHED,
    Peak,
    StorageLedger,
    storage_bytes,
)
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
    @property
    def recompute(self) -> str: ...
    @property
    def offload_inputs(self) -> bool: ...
    @property
    def compile(self) -> bool: ...
    @property
    def freeze(self) -> Sequence[str]: ...


class DrySettings(Protocol):
    """What a dry run reads of a recipe."""

    @property
    def train(self) -> DryTrainSettings: ...
    @property
    def parallel(self) -> ParallelConfig: ...
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
        optimizer: of the optimizer's state on the device.
        held: activations that one micro-batch keeps from the end of its forward pass on, by stage.
        stashed: the same in the host's memory, under `train.offload_inputs`.
        peak: the most that a micro-batch allocates beside the shards, forward and backward:
            activations, and the weights that FSDP2 has gathered then with the buffers of its
            collectives.
        update_peak: the same of the rest of the step: norm, clipping, optimizer.
        micro_batch: what one micro-batch sends.
        step: what is sent once a step.
        operators: that were run.
        seconds: that the dry run itself took, by its phases.
        extras: terms of the objective beside loss and balance.
        summed: unsharded gradients that FSDP2 sums over the micro-batches of a pipeline.
        elements: of its parameters.
        saved: what a checkpoint has of the rank.
        offload: of optimizer state in the host's memory, where it is; None: it is on the device.
    """

    parameters: int
    gradients: int
    optimizer: int
    held: dict[int, int]
    stashed: dict[int, int]
    peak: Peak
    update_peak: Peak
    micro_batch: Collectives
    step: Collectives
    operators: int
    seconds: dict[str, float]
    extras: int
    summed: int
    elements: int
    saved: int
    offload: OffloadReport | None

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

    def memory(self, in_flight: int, micro_batches: int = 1) -> int:
        """The most bytes that the rank holds at once in a step of so many micro-batches, where
        forward passes keep `in_flight` bytes: the last one's peak comes upon what the others keep,
        and, from the second micro-batch on, upon the unsharded sums of gradients."""
        passes = in_flight - sum(self.held.values()) + self.peak.total
        passes += self.summed if micro_batches > 1 else 0
        state = self.parameters + self.gradients + self.optimizer
        return state + max(passes, self.update_peak.total)


@dataclass
class Clock:
    """Adds up the seconds of phases."""

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
    model: Decoder,
    stages: Sequence[Stage],
    mesh: DeviceMesh,
    expert_mesh: DeviceMesh | None,
    recipe: DrySettings,
    rank: int = 0,
    extras: int | None = None,
) -> RankReport:
    """Runs a step of one micro-batch on this rank.

    Args:
        model: what the rank computes, built on meta and parallelized.
        stages: all stages of the pipeline.
        mesh: the dense view.
        expert_mesh: the expert view, or None.
        recipe: from which precision, shapes, the layout and the optimizer are read.
        rank: of a pipeline, the one that is run.
        extras: terms of the objective beside loss and balance; None: those that the model reports.
    """
    clock = Clock()
    counter = CollectiveCounter(AxisNames([m for m in (mesh, expert_mesh) if m is not None]))
    ledger = StorageLedger()
    for signed in (True, False):
        tables(signed, CPU)  # of codes in 8 bits: made once of numbers, which fake tensors lack
    with FakeTensorMode(allow_non_fake_inputs=True):
        with clock.phase("allocation"):
            optimizer = allocate(model, recipe)
            passes = build_passes(model, stages, mesh, recipe, CPU, rank)
            optimizer.share_with_stages(passes.shared_parameters)
            batch = FakeBatch.of(recipe.train)
            hold_state(ledger, model, optimizer)
        parameters = list(model.parameters())
        with counter, ledger:
            with clock.phase("micro-batch"):
                start = ledger.mark()
                ran = forward_backward(passes, batch, ledger)
                ledger.hold("gradients", gradients(parameters))
                ledger.hold(STASHED, on_host(model))
                offload = offload_report(passes, optimizer)
                stop, sent = ledger.mark(), collectives(counter)
            with clock.phase("update"):
                update(passes, optimizer, ran.reports, ranks_per_loss(mesh), extras)
                end = ledger.mark()
        in_pipeline = isinstance(passes, Pipeline)
        micro_batch = {key: t for key, t in sent.items() if not once_a_step(*key, in_pipeline)}
        step = difference(collectives(counter), micro_batch)
        if isinstance(passes, Pipeline):
            micro_batch |= {("pp", name): traffic for name, traffic in ran.sent.items()}
            if (shared := Traffic(*sent_for_shared_weights(passes))).calls:
                step["pp", "send"] = shared
        return RankReport(
            parameters=storage_bytes(shards(model)),
            gradients=ledger.held(stop).get("gradients", 0),
            optimizer=storage_bytes(device_state(optimizer)),
            held=held_by_stage(ledger, ran.marks),
            stashed=held_by_stage(ledger, ran.marks, STASHED),
            peak=ledger.peak(start, stop, (ACTIVATIONS, GATHERED)),
            update_peak=ledger.peak(stop, end, (ACTIVATIONS, GATHERED)),
            micro_batch=micro_batch,
            step=step,
            operators=counter.operators,
            seconds=clock.seconds,
            extras=len({name for report in ran.reports for name in report.extras}),
            summed=0 if ran.end is None else ledger.held(ran.end).get(ACTIVATIONS, 0),
            elements=sum(local(p).numel() for p in parameters),
            saved=saved_bytes(model, optimizer),
            offload=offload,
        )


def allocate(model: Decoder, recipe: DrySettings) -> Optimizer:
    """Gives a model on meta fake weights, which nothing fills, and builds its optimizer."""
    model.to_empty(device=CPU)
    offload = Offload(TorchKernel(), CPU, lanes=lambda measured: DeviceLanes())
    return build_optimizer(model, recipe.optimizer, COMPUTE[recipe.train.precision], offload)


class FakeBatch(NamedTuple):
    """A micro-batch of rows of one document each, `[S, B]`; `samples` are their indices `[B]`."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    samples: Tensor

    @classmethod
    def of(cls, train: DryTrainSettings) -> "FakeBatch":
        """Returns the micro-batch of these settings."""
        shape = train.seq_len, train.micro_batch
        tokens, labels, positions = (torch.zeros(shape, dtype=torch.int32) for _ in range(3))
        return cls(tokens, labels, positions, torch.arange(train.micro_batch))


class Ran(NamedTuple):
    """What one micro-batch through a model, or through a rank's stages, left behind.

    Attributes:
        reports: of its passes.
        marks: at the end of each stage's forward pass; without a pipeline, of 0.
        sent: to other stages' ranks.
        end: the ledger's mark in a pipeline before gradients are reduced.
    """

    reports: list[PassReport]
    marks: dict[int, Mark]
    sent: dict[str, Traffic]
    end: int | None = None


def forward_backward(passes: Passes, batch: FakeBatch, ledger: StorageLedger) -> Ran:
    """Runs one micro-batch forward through all stages of the rank, and backward from the last to
    the first, as the last micro-batch of a step."""
    model, scale = passes.model, 1 / batch.tokens.numel()
    model.train()
    model.begin_step()
    context = Context(batch.positions, None, 1.0, batch.samples, 0)
    inputs = DeviceInputs(batch.tokens, context, batch.labels)
    if isinstance(passes, Pipeline):
        run = CountedRun(passes, inputs, scale)
        marks = run_passes(run, partial(Mark.of, ledger, model))
        reports, end = [outcome.report for outcome in run.outcomes], ledger.mark()
        reduce_gradients(model)
        sent = {name: Traffic(calls, run.bytes[name]) for name, calls in run.calls.items()}
        return Ran(reports, marks, sent, end)
    set_last_micro_batch(model, True)
    objective, report = model(*inputs)
    scaled = objective * scale
    marks = {0: Mark.of(ledger, model)}
    del objective
    scaled.backward()
    return Ran([report], marks, {})


def update(
    passes: Passes,
    optimizer: Optimizer,
    reports: Sequence[PassReport],
    copies: int,
    extras: int | None,
) -> None:
    """The rest of a step, as `engine.Engine` takes it, without reading results on the host: sums
    over all ranks, complete gradients, norm, clipping, the optimizer's step.

    Args:
        copies: ranks that have the same tokens.
        extras: as in `dry_run`.
    """
    model = passes.model
    dist.all_reduce(torch.zeros(1, dtype=torch.float64))  # valid tokens
    if extras is None:
        extras = len({name for report in reports for name in report.extras})
    dist.all_reduce(torch.zeros(2 + extras, dtype=torch.float64))  # loss, balance, and these
    complete_gradients(model)
    if isinstance(passes, Pipeline):
        sum_over_all_ranks(passes)
    gradient_norm(model.parameters(), passes.group, passes.copies, optimizer.local_norms)
    loads = RunningSums()
    for report in reports:
        loads.add(report.loads)
    for index in mixtures(model.config):  # of other stages
        if index not in loads:
            loads[index] = torch.zeros(model.config.experts, dtype=torch.int64)
    totals = loads.all_reduce(copies)
    optimizer.step(1e-3, 0.5)  # clipped
    model.end_step(totals)


def mixtures(config: ModelConfig) -> list[int]:
    """The indices of the sub-blocks that report loads, those of MTP modules after the row's."""
    row = config.symbols + config.mtp_pattern * config.mtp
    return [index for index, symbol in enumerate(row) if symbol == "E"]


def collectives(counter: CollectiveCounter) -> Collectives:
    """Returns what was counted so far."""
    return {key: Traffic(calls, counter.bytes[key]) for key, calls in counter.calls.items()}


def once_a_step(axis: str, collective: str, in_pipeline: bool) -> bool:
    """Whether what a step's last micro-batch sends is sent by no other: under HSDP gradients are
    all-reduced over `dp_replicate` after the last one; in a pipeline FSDP2 gathers weights and
    reduces gradients once."""
    of_fsdp = collective in ("all_gather", "reduce_scatter") and ("dp_" in axis or "edp" in axis)
    return (collective == "all_reduce" and "dp_replicate" in axis) or (in_pipeline and of_fsdp)


def difference(total: Collectives, part: Collectives) -> Collectives:
    """Returns what is in `total` and not in `part`."""
    calls = Counter({key: t.calls for key, t in total.items()})
    sent = Counter({key: t.bytes for key, t in total.items()})
    for key, t in part.items():
        calls[key] -= t.calls
        sent[key] -= t.bytes
    return {key: Traffic(n, sent[key]) for key, n in calls.items() if n}
