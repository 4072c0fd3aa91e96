"""The dry run of a rank, beside the same rank of a real job."""

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from ranks import Ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from colonnade.bench.traffic import random_batch
from colonnade.kernels.selective_scan import selective_scan
from colonnade.launcher.plan.rank import run_rank
from colonnade.launcher.recipe.tables import OptimizerConfig, Recipe, TrainConfig
from colonnade.launcher.train.job import build_engine
from colonnade.models.blocks.experts import Routed, Sent
from colonnade.models.config import ModelConfig
from colonnade.models.decoder import Decoder
from colonnade.models.shapes import measure
from colonnade.parallel.collectives import AxisNames, CollectiveCounter, sent_by
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.dry_run import (
    Collectives,
    FakeBatch,
    RankReport,
    Traffic,
    collectives,
    forward_backward,
    gradients,
    hold_state,
    open_fake_world,
    shards,
)
from colonnade.parallel.held import held_by_stage, on_host
from colonnade.parallel.mesh import build_expert_mesh, data_rank
from colonnade.parallel.pipeline.dry_run import in_flight
from colonnade.parallel.seams import expert_blocks
from colonnade.parallel.storages import (
    ACTIVATIONS,
    GATHERED,
    STASHED,
    Peak,
    StorageLedger,
    storage_bytes,
)
from colonnade.parallel.world import World

ROWS, TOKENS, MICRO_BATCHES = 2, 16, 4
RANK = {2: 1, 4: 2}  # that is run dry, of this many
SMALL: dict[str, Any] = {
    "hidden": 16, "vocab": 16, "heads": 4, "head_dim": 4, "ffn": 16, "experts": 8,
    "expert_ffn": 8, "mamba_heads": 4, "mamba_head_dim": 8, "mamba_state": 4, "mamba_groups": 4,
    "mamba_chunk": 4, "mamba1_inner": 16, "mamba1_state": 4, "mamba1_chunk": 4, "mamba1_rank": 4,
    "s4d_inner": 16, "s4d_state": 4, "s4d_chunk": 4, "delta_heads": 4, "delta_key_heads": 4,
    "delta_key_dim": 4, "delta_value_dim": 4, "delta_chunk": 4,
}  # fmt: skip


class Case(NamedTuple):
    """Ranks, the pattern, and fields of `[parallel]`, `[train]` and `[model]`."""

    ranks: int
    pattern: str
    layout: dict[str, Any]
    train: dict[str, Any] = {}  # noqa: RUF012  # a default of a tuple's field, never changed
    model: dict[str, Any] = {}  # noqa: RUF012
    optimizer: str = "adamw"


HYBRID = "M*-mSG"
RECOMPUTED = {"precision": "bf16", "recompute": "block"}
STASHED_INPUTS = {**RECOMPUTED, "offload_inputs": True}
CASES = {
    "tp, sequence": Case(2, "*-", {"tp": 2}),
    "tp": Case(2, "M-", {"tp": 2, "sequence": False}),
    "FSDP, bf16": Case(2, "*-", {}, {"precision": "bf16"}),
    "FSDP, Muon, ladder": Case(2, "*-", {}, {}, {"residual": "ladder"}, "muon"),
    "cp": Case(2, HYBRID, {"cp": 2}),
    "ulysses": Case(2, "*M", {"cp": 2, "context": "ulysses", "recurrence": "heads"}),
    "recomputed": Case(2, "*-", {"tp": 2}, {"recompute": "selective"}),
    "ep": Case(2, "*E", {"ep": 2}),
    "sharded, dense": Case(4, "*-", {}, {"precision": "bf16"}),
    "sharded, hybrid": Case(4, HYBRID, {}),
    "sharded, mixture": Case(4, "*E", {"ep": 4}),
    "HSDP": Case(4, "*-", {"dp_replicate": 2}, {"precision": "bf16"}),
    "HSDP, mixture": Case(4, "*E", {"dp_replicate": 2, "ep": 2}),
    "tp, FSDP, hybrid": Case(4, HYBRID, {"tp": 2}),
    "tp, cp": Case(4, "M*-", {"tp": 2, "cp": 2}),
    "ep over tp": Case(4, "*E", {"ep": 4, "tp": 2, "etp": 1}),
    "ep, etp, loads": Case(4, "*E", {"ep": 2, "etp": 2}, {}, {"balance": 0.1}),
    "pp": Case(2, "*-M-", {"pp": 2}, {}, {"residual": "ladder"}),
    "pp, tied": Case(2, "*-*-", {"pp": 2}, {}, {"tied": True}),  # both ranks have a copy
    "pp, tied, V": Case(2, "*-*-", {"pp": 2, "schedule": "zbv"}, {}, {"tied": True}),
    "pp, FSDP, bf16": Case(4, "*-", {"pp": 2}, {"precision": "bf16"}),
    "pp, HSDP": Case(4, "*-", {"pp": 2, "dp_replicate": 2}),
    "pp, tp, loads": Case(4, "*E-M", {"pp": 2, "tp": 2}, {}, {"balance": 0.1, "logit_z": 0.1}),
    "pp=4, tied": Case(4, "*-M-", {"pp": 4, "schedule": "gpipe"}, {}, {"tied": True}),
    "pp, shared depth": Case(4, "*-", {"pp": 4}, {}, {"share": True, "repeat": 2}),
    "FSDP, recomputed": Case(2, "*-", {}, RECOMPUTED, {"repeat": 3}),
    "FSDP, stashed": Case(2, "*-", {}, STASHED_INPUTS, {"repeat": 3}),
    "pp, stashed": Case(4, "*-", {"pp": 2, "schedule": "zbv"}, STASHED_INPUTS, {"repeat": 8}),
    "ep, recomputed": Case(4, "*E", {"ep": 2}, {"recompute": "block"}, {"residual": "ladder"}),
}  # fmt: skip


def recipe(name: str) -> Recipe:
    case = CASES[name]
    model: dict[str, Any] = {"pattern": case.pattern, **SMALL, **case.model}
    return Recipe(
        model=ModelConfig(**model),
        parallel=ParallelConfig(**case.layout),
        optimizer=OptimizerConfig(name=case.optimizer),
        train=TrainConfig(micro_batch=ROWS, seq_len=TOKENS, **case.train),
    )


class Run(NamedTuple):
    """What a rank holds and sends in a step, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    sent: Collectives


def spread_evenly(model: Decoder) -> None:
    """Makes every expert chosen as often as any other, in place of the router's choices."""
    for block in expert_blocks(model):
        dispatch = block.first.dispatch

        def even(routed: Routed, experts: int, dispatch: Any = dispatch) -> Sent:
            chosen = torch.arange(routed.chosen.numel()).view_as(routed.chosen) % experts
            return dispatch(routed._replace(chosen=chosen), experts)

        block.first.dispatch = even


def meshes_of(case: Recipe, world: World, mesh: DeviceMesh) -> list[DeviceMesh]:
    return [m for m in (mesh, build_expert_mesh(case.parallel, world)) if m is not None]


def real_runs(rank: int, size: int) -> dict[str, Run]:
    """Steps of the engine on real ranks."""
    names = [name for name, case in CASES.items() if case.ranks == size]
    return {name: real_run(World(rank, size, torch.device("cpu")), name) for name in names}


def real_run(world: World, name: str) -> Run:
    case = recipe(name)
    engine = build_engine(case, world)
    mesh, model, optimizer = engine.mesh, engine.model, engine.optimizer
    spread_evenly(model)
    index, ranks = data_rank(mesh)
    samples = [
        list(range(start, start + ROWS))
        for start in range(index * ROWS, MICRO_BATCHES * ranks * ROWS, ranks * ROWS)
    ]
    batches = [random_batch(ROWS, TOKENS, case.model.vocab, rows[0]) for rows in samples]
    engine.gradients(batches, samples, 1.0, 0)  # the first step also shares the names of sums
    engine.discard()
    with CollectiveCounter(AxisNames(meshes_of(case, world, mesh))) as counter:
        report = engine.gradients(batches, samples, 1.0, 0)
        held = storage_bytes(gradients(list(model.parameters())))
        engine.update(report, 1e-3, 1.0)
    return Run(
        storage_bytes(shards(model)),
        held,
        storage_bytes(optimizer.named_state().values()),
        collectives(counter),
    )


def dry_reports(size: int) -> dict[str, RankReport]:
    """Dry runs of all cases of this many ranks, in one world; they take a process of their own."""
    torch.set_num_threads(1)
    world = open_fake_world(RANK[size], size)
    with pytest.raises(RuntimeError, match="a dry run needs a new one"):
        open_fake_world(0, size)
    names = [name for name, case in CASES.items() if case.ranks == size]
    reports = {}
    for name in names:
        of_pipeline = run_rank(recipe(name), world)
        # The real rank's place in the pipeline; along the other axes all ranks are alike.
        reports[name] = of_pipeline[RANK[size] // (size // len(of_pipeline))]
    return reports


@cache
def dry(size: int) -> dict[str, RankReport]:
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(dry_reports, size).result()


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_and_sends_what_a_real_one_does(
    ranks2: Ranks, ranks4: Ranks, size: int
) -> None:
    """A step of several micro-batches, of which the dry run has run one."""
    real = (ranks2 if size == 2 else ranks4).run(real_runs, limit=280)[RANK[size]]
    assert real.keys() == dry(size).keys()
    for name, report in dry(size).items():
        sent = report.collectives(MICRO_BATCHES)
        assert sent == real[name].sent, name
        assert any(traffic.bytes for traffic in sent.values())
        state = report.parameters, report.gradients, report.optimizer
        assert state == real[name][:3], name


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("sharded")])
def test_state_by_formula(name: str) -> None:
    """Where every parameter divides over all ranks, each holds 1/n, and AdamW two numbers more."""
    elements = measure(recipe(name).model, TOKENS).parameters
    report, share = dry(4)[name], 4 * elements // 4
    assert elements % 4 == 0
    assert report.parameters == report.gradients == share
    assert report.optimizer == 2 * share


def test_traffic_by_formula() -> None:
    """Of FSDP and HSDP over parameters of which n ranks have 1/n each."""
    elements = measure(recipe("sharded, dense").model, TOKENS).parameters
    fsdp = dry(4)["sharded, dense"]
    # Under `norm` in fp32, of all others in bf16; gradients are reduce-scattered in fp32.
    assert fsdp.micro_batch["dp_shard", "reduce_scatter"].bytes == 4 * elements * 3 // 4
    hsdp = dry(4)["HSDP"]
    assert hsdp.micro_batch["dp_shard", "reduce_scatter"].bytes == 4 * elements // 2
    # of half of the elements, all-reduced over two ranks, once a step
    assert hsdp.step["dp_replicate", "all_reduce"].bytes == 4 * elements // 2
    assert not any(axis == "dp_replicate" for axis, _ in hsdp.micro_batch)


def real_peaks(rank: int, size: int, name: str) -> tuple[Peak, dict[int, int], dict[int, int]]:
    """Peak, held and stashed bytes of a real micro-batch. A thread of gloo may drop the tensors of
    a collective later than the rank does, so the peak is the lowest of several."""
    engine = build_engine(recipe(name), World(rank, size, torch.device("cpu")))
    batch, peaks = FakeBatch.of(recipe(name).train), []
    for _ in range(5):
        engine.discard()
        ledger = StorageLedger()
        hold_state(ledger, engine.model, engine.optimizer)
        with ledger:
            start = ledger.mark()
            marks = forward_backward(engine.passes, batch, ledger).marks
            ledger.hold("gradients", gradients(list(engine.model.parameters())))
            ledger.hold(STASHED, on_host(engine.model))
            stop = ledger.mark()
        peaks.append(ledger.peak(start, stop, (ACTIVATIONS, GATHERED)))
    stashed = held_by_stage(ledger, marks, STASHED)
    return min(peaks, key=lambda peak: peak.total), held_by_stage(ledger, marks), stashed


@pytest.mark.parametrize(
    "name", ["FSDP, bf16", "HSDP", "pp, FSDP, bf16", "FSDP, stashed", "pp, stashed"]
)
def test_peaks_of_real_tensors(ranks2: Ranks, ranks4: Ranks, name: str) -> None:
    """Without kernels that a dry run takes as one operator, it allocates and frees the same."""
    size = CASES[name].ranks
    peak, held, stashed = (ranks2 if size == 2 else ranks4).run(real_peaks, name)[RANK[size]]
    report = dry(size)[name]
    assert (report.peak, report.held, report.stashed) == (peak, held, stashed)
    assert 0 < sum(held.values()) < peak.by_kind[ACTIVATIONS]
    assert 0 < peak.by_kind[GATHERED] < 4 * measure(recipe(name).model, TOKENS).parameters


def test_bytes_of_stashed_inputs() -> None:
    """Of every sub-block its input, and that of its norm; none of them counts for the device, which
    keeps the other activations that it would keep without a stash."""
    one = TOKENS * ROWS * SMALL["hidden"] * 2
    plain, stashed = dry(2)["FSDP, recomputed"], dry(2)["FSDP, stashed"]
    assert plain.stashed == {0: 0}
    assert stashed.stashed == {0: 2 * 6 * one}
    scales = 6 * TOKENS * ROWS * 4  # of the rows of a norm
    assert stashed.held[0] == plain.held[0] - 2 * 6 * one - scales
    assert stashed.peak.total < plain.peak.total - (2 * 6 - 6) * one
    assert sum(dry(4)["pp, stashed"].stashed.values()) == 2 * 8 * one


def real_step_peak(rank: int, size: int, name: str) -> int:
    """The peak of a real step of several micro-batches beside parameters and optimizer state."""
    engine = build_engine(recipe(name), World(rank, size, torch.device("cpu")))
    index, _ = data_rank(engine.mesh)
    samples = [[2 * index, 2 * index + 1]] * MICRO_BATCHES
    batches = [random_batch(ROWS, TOKENS, recipe(name).model.vocab, 0) for _ in samples]
    peaks = []
    for _ in range(5):
        engine.discard()
        ledger = StorageLedger()
        hold_state(ledger, engine.model, engine.optimizer)
        with ledger:
            start = ledger.mark()
            engine.gradients(batches, samples, 1.0, 0)
            stop = ledger.mark()
        peaks.append(ledger.peak(start, stop, (ACTIVATIONS, GATHERED)).total)
    return min(peaks)


def test_memory_of_a_step_of_a_pipeline(ranks4: Ranks) -> None:
    """From the second micro-batch on, activations stand beside the unsharded sums of gradients."""
    name = "pp, FSDP, bf16"
    real, report = ranks4.run(real_step_peak, name)[RANK[4]], dry(4)[name]
    kept, _ = in_flight(recipe(name).parallel, 1, MICRO_BATCHES, report.held)
    state = report.parameters + report.optimizer
    assert report.memory(kept, MICRO_BATCHES) - state >= real
    assert report.memory(kept, 1) - state < real


def ledger_of_two() -> StorageLedger:
    """A ledger over two tensors of 40 bytes, of which one outlives the other."""
    ledger = StorageLedger()
    with ledger:
        first = torch.zeros(10)
        second = first + 1
        view = second[2:]
        del first, second
        ledger.kept = [view.mul_(2)]  # type: ignore[attr-defined]
    return ledger


def test_ledger_by_hand() -> None:
    ledger = ledger_of_two()
    assert ledger.events == [(0, 40), (1, 40), (0, -40)]
    assert ledger.peak(0, 3, (ACTIVATIONS,)) == Peak(80, {ACTIVATIONS: 80})
    assert ledger.peak(2, 3, (ACTIVATIONS,)).total == 80
    assert ledger.held(3) == {ACTIVATIONS: 40}
    ledger.hold("gradients", ledger.kept)  # type: ignore[attr-defined]
    assert ledger.peak(0, 3, (ACTIVATIONS,)) == Peak(40, {ACTIVATIONS: 40})
    assert ledger.held(3) == {ACTIVATIONS: 0, "gradients": 40}


def test_ledger_sees_resized_storages() -> None:
    """As FSDP2 frees gathered weights, and allocates them again."""
    ledger = StorageLedger()
    with ledger:
        weight = torch.zeros(8)
        ledger.record_gathered([weight])
        weight.untyped_storage().resize_(0)
        torch.zeros(2)
        weight.untyped_storage().resize_(32)
        ledger.record_gathered([weight])
    assert ledger.peak(0, ledger.mark(), (ACTIVATIONS, GATHERED)).total == 32
    assert ledger.held(ledger.mark()) == {GATHERED: 32, ACTIVATIONS: 0}


def test_memory_of_micro_batches_in_flight() -> None:
    """Those before forward and backward of the last keep their activations."""
    report = dry(2)["tp"]
    held = sum(report.held.values())
    one, three = report.memory(held), report.memory(3 * held)
    assert one == report.parameters + report.gradients + report.optimizer + report.peak.total
    assert three == one + 2 * held
    wide = dataclasses.replace(report, update_peak=Peak(one, {}))
    assert wide.memory(held) == 2 * one - report.peak.total


@pytest.mark.parametrize(
    ("schedule", "rank", "expected"),
    [
        ("1f1b", 0, (4 * 10, 4)),
        ("1f1b", 3, (10, 1)),
        ("gpipe", 2, (8 * 10, 8)),
        ("zbv", 0, (8 * 10, 8)),  # as 1F1B's first rank, whose stages are twice as large
    ],
)
def test_passes_in_flight(schedule: str, rank: int, expected: tuple[int, int]) -> None:
    """1F1B: pp - rank; GPipe: all (algorithms of these schedules)."""
    parallel = ParallelConfig(pp=4, schedule=schedule)
    held = dict.fromkeys(range(8), 10)
    assert in_flight(parallel, rank, 8, held) == expected


def test_step_of_several_micro_batches() -> None:
    report = dataclasses.replace(
        dry(2)["tp"],
        micro_batch={("tp", "all_reduce"): Traffic(2, 10)},
        step={("tp", "all_reduce"): Traffic(1, 3), ("world", "all_reduce"): Traffic(1, 4)},
    )
    assert report.collectives(3) == {
        ("tp", "all_reduce"): Traffic(7, 33),
        ("world", "all_reduce"): Traffic(1, 4),
    }


def operators_of_a_scan(tokens: int) -> int:
    with FakeTensorMode(), CollectiveCounter(AxisNames([])) as counter:
        x, dt, B, C = (torch.zeros(tokens, 1, width, requires_grad=True) for width in (4, 4, 2, 2))
        A = torch.zeros(4, 2, requires_grad=True)
        selective_scan(x, dt, A, B, C, None, chunk=4)[0].sum().backward()
    return counter.operators


def test_a_scan_is_as_many_operators_at_any_length() -> None:
    assert operators_of_a_scan(8) == operators_of_a_scan(64)


def test_an_unknown_collective_is_refused() -> None:
    broadcast = torch.ops._c10d_functional.broadcast.default
    with pytest.raises(NotImplementedError, match="how many bytes it sends is not known"):
        sent_by(broadcast, (torch.zeros(2), 0, "0"))
    assert sent_by(torch.ops.aten.add.Tensor, (torch.zeros(2), torch.zeros(2))) is None
