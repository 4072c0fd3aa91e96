"""The dry run of a rank with offloaded optimizer state, beside the same rank of a real job."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from ranks import Ranks
from test_dry_run import MICRO_BATCHES, RANK, ROWS, SMALL, TOKENS, spread_evenly

from colonnade.bench.traffic import random_batch
from colonnade.kernels.host_adamw import TorchKernel
from colonnade.launcher.checkpoint.tensors import named_tensors
from colonnade.launcher.plan.rank import run_rank
from colonnade.launcher.recipe.tables import OptimizerConfig, Recipe, TrainConfig
from colonnade.launcher.train.host_memory import saved_bytes
from colonnade.launcher.train.job import build_engine
from colonnade.models.config import ModelConfig
from colonnade.models.shapes import measure
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.dry_run import (
    FakeBatch,
    RankReport,
    forward_backward,
    open_fake_world,
    update,
)
from colonnade.parallel.engine import Engine, connect
from colonnade.parallel.gradients import local
from colonnade.parallel.mesh import data_rank, ranks_per_loss
from colonnade.parallel.optimizer import Offload, OffloadedAdamW
from colonnade.parallel.optimizer.offload.groups import ALIGNMENT
from colonnade.parallel.optimizer.offload.report import DeviceLanes
from colonnade.parallel.optimizer.offload.sizes import host_report
from colonnade.parallel.rank_state import gradients, hold_state, shards
from colonnade.parallel.storages import ACTIVATIONS, GATHERED, StorageLedger, storage_bytes
from colonnade.parallel.world import World

CPU = torch.device("cpu")
KINDS = (ACTIVATIONS, GATHERED)


class Case(NamedTuple):
    """Ranks, the pattern, and fields of `[parallel]`, `[train]`, `[model]` and `[optimizer]`."""

    ranks: int
    pattern: str
    layout: dict[str, Any]
    train: dict[str, Any] = {}  # noqa: RUF012  # a default of a tuple's field, never changed
    model: dict[str, Any] = {}  # noqa: RUF012
    optimizer: dict[str, Any] = {}  # noqa: RUF012


BF16 = {"precision": "bf16"}
HOST, INTERLEAVED = {"offload": "host"}, {"offload": "interleaved"}
CASES = {
    "FSDP, host": Case(2, "*-*-", {}, BF16, {}, HOST),
    "FSDP, interleaved": Case(2, "*-*-", {}, BF16, {}, INTERLEAVED),
    "bf16 moments and gradients": Case(
        2, "*-M-", {}, BF16, {}, {**INTERLEAVED, "offload_moments": "bf16",
                                  "offload_gradients": "bf16"},
    ),
    "8bit moments": Case(
        2, "*-M-", {}, BF16, {}, {**INTERLEAVED, "offload_moments": "8bit"},
    ),
    "fp64": Case(2, "*-", {}, {"precision": "fp64"}, {}, INTERLEAVED),
    "frozen": Case(2, "*-*-", {}, {**BF16, "freeze": ("embedding.*", "blocks.0.*")}, {}, HOST),
    "tp, late keys": Case(2, "*-M-", {"tp": 2}, BF16, {"kv_heads": 1}, HOST),
    "tp, fp32": Case(2, "*-", {"tp": 2}, {}, {"residual": "ladder"}, INTERLEAVED),
    "pp without FSDP": Case(2, "*-M-", {"pp": 2}, {}, {}, HOST),
    "sharded over four": Case(4, "*-*-", {}, BF16, {}, HOST),
    "HSDP": Case(4, "*-*-", {"dp_replicate": 2}, BF16, {}, INTERLEAVED),
    "tp, FSDP, recomputed": Case(
        4, "M*-", {"tp": 2}, {**BF16, "recompute": "block"}, {}, INTERLEAVED
    ),
    "ep": Case(4, "*E", {"ep": 2}, BF16, {}, INTERLEAVED),
    "cp": Case(4, "M*-", {"cp": 2}, BF16, {}, HOST),
    "pp, FSDP": Case(4, "*-*-", {"pp": 2}, BF16, {}, INTERLEAVED),
    "pp, tied": Case(4, "*-*-", {"pp": 2}, BF16, {"tied": True}, INTERLEAVED),
    "pp, tied, V": Case(
        4, "*-*-", {"pp": 2, "schedule": "zbv"}, BF16, {"tied": True}, HOST
    ),
}  # fmt: skip


def recipe(name: str) -> Recipe:
    case = CASES[name]
    model: dict[str, Any] = {"pattern": case.pattern, **SMALL, **case.model}
    return Recipe(
        model=ModelConfig(**model),
        parallel=ParallelConfig(**case.layout),
        optimizer=OptimizerConfig(host_kernel="torch", **case.optimizer),
        train=TrainConfig(micro_batch=ROWS, seq_len=TOKENS, **case.train),
    )


class Run(NamedTuple):
    """What a rank holds, in bytes: as in `RankReport`, `OffloadReport` and `host_report`; and what
    an update allocates."""

    parameters: int
    gradients: int
    kept: int
    host: dict[str, int]
    announced: dict[str, int]
    elements: int
    saved: int
    update: int


def real_runs(rank: int, size: int) -> dict[str, Run]:
    names = [name for name, case in CASES.items() if case.ranks == size]
    return {name: real_run(World(rank, size, CPU), name) for name in names}


def real_run(world: World, name: str) -> Run:
    """Two steps of the engine on a real rank, and a third whose update is measured."""
    case, announced = recipe(name), list[dict[str, int]]()
    engine = build_engine(
        case, world, check=lambda model: announced.append(host_report(model, case.optimizer))
    )
    spread_evenly(engine.model)
    model, optimizer = engine.model, engine.optimizer
    assert isinstance(optimizer, OffloadedAdamW)
    first, second = step_gradients(engine, case), step_gradients(engine, case)
    parameters = list(model.parameters())
    return Run(
        storage_bytes(shards(model)),
        first,
        second,
        slabs_by_kind(optimizer),
        announced[0],
        sum(local(p).numel() for p in parameters),
        sum(local(t).nbytes for t in named_tensors(model, optimizer).values()),
        update_peak(engine, case),
    )


def step_gradients(engine: Engine, case: Recipe) -> int:
    """Takes a step; returns the bytes of gradients on the device when the last backward ended."""
    index, ranks = data_rank(engine.mesh)
    samples = [
        list(range(start, start + ROWS))
        for start in range(index * ROWS, MICRO_BATCHES * ranks * ROWS, ranks * ROWS)
    ]
    batches = [random_batch(ROWS, TOKENS, case.model.vocab, rows[0]) for rows in samples]
    report = engine.gradients(batches, samples, 1.0, 0)
    held = storage_bytes(gradients(list(engine.model.parameters())))
    engine.update(report, 1e-3, 1.0)
    return held


def slabs_by_kind(optimizer: OffloadedAdamW) -> dict[str, int]:
    """Bytes of the tensors on the host, which fill the slabs to the last byte, and of copies that
    are made for saving."""
    sizes = dict.fromkeys(("masters", "moments", "gradients", "weights"), 0)
    for host in optimizer.host:
        sizes["masters"] += host.state.master.nbytes
        sizes["moments"] += len(host.state.buffer) - host.state.master.nbytes
        sizes["gradients"] += host.gradient.nbytes
        sizes["weights"] += host.weights.nbytes if host.weights is not host.state.master else 0
    slabs = storage_bytes(host.state.buffer for host in optimizer.host)
    assert sum(sizes.values()) == slabs
    buffers = [host.state.buffer for host in optimizer.host]
    both = storage_bytes([*buffers, *optimizer.named_state().values()])
    return {**sizes, "widened": both - slabs}


def update_peak(engine: Engine, case: Recipe) -> int:
    """The most that a real update allocates on the device, the same memory as the host's: without
    what updates on the host allocate, which lanes leave out. A thread of gloo may drop the tensors
    of a collective later than the rank does, so it is the lowest of several."""
    offload = Offload(TorchKernel(), CPU, lanes=lambda measured: DeviceLanes())
    optimizer = OffloadedAdamW(engine.model, case.optimizer, offload)
    connect(engine.passes, optimizer)
    batch, peaks = FakeBatch.of(case.train), []
    for _ in range(5):
        engine.discard()
        ledger = StorageLedger()
        hold_state(ledger, engine.model, optimizer)
        with ledger:
            ran = forward_backward(engine.passes, batch, ledger)
            ledger.hold("gradients", gradients(list(engine.model.parameters())))
            stop = ledger.mark()
            update(engine.passes, optimizer, ran.reports, ranks_per_loss(engine.mesh), None)
            end = ledger.mark()
        peaks.append(ledger.peak(stop, end, KINDS).total)
    return min(peaks)


def dry_reports(size: int) -> dict[str, RankReport]:
    """Dry runs of all cases of this many ranks, in one world; they take a process of their own."""
    torch.set_num_threads(1)
    world = open_fake_world(RANK[size], size)
    reports = {}
    for name in (name for name, case in CASES.items() if case.ranks == size):
        of_pipeline = run_rank(recipe(name), world)
        reports[name] = of_pipeline[RANK[size] // (size // len(of_pipeline))]
    return reports


@cache
def dry(size: int) -> dict[str, RankReport]:
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(dry_reports, size).result()


@pytest.mark.parametrize("size", [2, 4])
def test_device_and_host_hold_what_those_of_a_real_rank_do(
    ranks2: Ranks, ranks4: Ranks, size: int
) -> None:
    real = (ranks2 if size == 2 else ranks4).run(real_runs, limit=280)[RANK[size]]
    assert real.keys() == dry(size).keys()
    for name, report in dry(size).items():
        run, state = real[name], report.offload
        assert state is not None
        assert (report.parameters, report.gradients) == run[:2], name
        assert report.optimizer == 0
        assert state.kept == run.kept, name
        assert state.host == run.host == run.announced, name
        assert (report.elements, report.saved) == (run.elements, run.saved), name
        assert report.update_peak.total == run.update, name


def test_which_gradients_stay() -> None:
    """None where the host updates all and each is complete when backward has made it."""
    reports = {**dry(2), **dry(4)}
    kept = {name: report.offload.kept for name, report in reports.items() if report.offload}
    everything = [name for name, report in reports.items() if kept[name] == report.gradients]
    nothing = [name for name in kept if not kept[name]]
    assert everything == ["pp without FSDP"]
    assert nothing == ["FSDP, host", "frozen", "sharded over four", "cp", "pp, tied, V"]


def test_sums_by_hand() -> None:
    """Of bf16 over four ranks: 6 bytes a parameter on the device, 18 on the host; norms are in fp32
    everywhere, and each tensor is padded on the host."""
    name, norms = "sharded over four", 5  # of each sub-block, and of the head
    report, elements = dry(4)[name], measure(recipe(name).model, TOKENS).parameters
    share, of_norms = elements // 4, norms * SMALL["hidden"] // 4
    assert report.elements == share
    assert report.gradients == 4 * share
    assert report.parameters == 2 * (share - of_norms) + 4 * of_norms
    assert report.saved == 12 * share
    assert report.offload is not None
    padded = report.offload.host["masters"] // 4
    assert share < padded < share + ALIGNMENT * 20
    assert report.offload.host == {
        "masters": 4 * padded,
        "moments": 8 * padded,
        "gradients": 4 * padded,
        "weights": 2 * (padded - norms * ALIGNMENT),
        "widened": 0,
    }
    narrow = dry(2)["bf16 moments and gradients"].offload
    assert narrow is not None
    assert narrow.host["widened"] == 2 * narrow.host["masters"] == 4 * narrow.host["gradients"]


def test_slots_are_of_the_device() -> None:
    """Two, of the largest group that the device updates; without offload there is no report."""
    report = dry(2)["FSDP, interleaved"]
    state = report.offload
    assert state is not None
    assert 2 <= state.device_groups < state.groups
    assert 2 * state.slot <= report.update_peak.total < 2 * state.slot + report.gradients
    host = dry(2)["FSDP, host"]
    assert host.offload is not None
    assert (host.offload.slot, host.offload.device_groups) == (0, 0)
    assert host.update_peak.total < state.slot
    assert host.memory(0) == host.parameters + host.gradients + host.peak.total - sum(
        host.held.values()
    )


def saved_of_ranks(rank: int, size: int, name: str) -> tuple[int, int]:
    """What a rank says before the start that it saves, and what the saver copies of it."""
    from colonnade.launcher.checkpoint.plan import make_plan

    said: list[int] = []
    case = recipe(name)
    engine = build_engine(case, World(rank, size, CPU), check=lambda m: said.append(saved_bytes(m)))
    tensors = named_tensors(engine.model, engine.optimizer)
    chunks = make_plan(tensors).chunks(tensors)
    return said[0], sum(chunk.nbytes for chunk in chunks.values())


@pytest.mark.parametrize("name", ["HSDP", "tp, FSDP, recomputed", "ep", "pp, FSDP"])
def test_what_a_rank_will_save(ranks4: Ranks, name: str) -> None:
    for said, copied in ranks4.run(saved_of_ranks, name):
        assert said == copied
