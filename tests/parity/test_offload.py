"""Optimizer state in the host's memory: bit-equal to AdamW on the device, copies in any order."""

import random
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from delayed import DelayedLanes
from ranks import Ranks
from test_data_parallel import LADDER, recipe_for
from torch import Tensor

from colonnade.kernels.host_adamw import TorchKernel
from colonnade.launcher.checkpoint.tensors import named_tensors
from colonnade.launcher.cluster.host_kernels import host_kernel_choice
from colonnade.launcher.recipe.stages import training_stages
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build_engine
from colonnade.launcher.train.schedule import micro_batches
from colonnade.launcher.train.step import train_step
from colonnade.launcher.verify.trace import random_rows
from colonnade.parallel.engine import Engine, connect
from colonnade.parallel.gradients import local
from colonnade.parallel.lanes.tasks import HOST, LOAD, STORE, UPDATE, Task
from colonnade.parallel.mesh import data_rank
from colonnade.parallel.optimizer.offload.adamw import Offload, OffloadedAdamW
from colonnade.parallel.optimizer.offload.rates import Measured
from colonnade.parallel.world import World

CPU = torch.device("cpu")
ROUTED = {"router_score": "sigmoid", "router_bias": True, "router_bias_rate": 0.1}


class PoisonedKernel(TorchKernel):
    """The reference kernel, which spoils gradients that it has used."""

    def __call__(self, **operands: Any) -> None:
        super().__call__(**operands)
        operands["grad"].fill_(float("nan"))


class Trained(NamedTuple):
    """Losses and norms of all steps, the final local tensors, and facts of the optimizer."""

    losses: list[tuple[float, float]]
    tensors: dict[str, Tensor]
    unrounded: list[str]
    on_device: list[int]


def settings_of(recipe: Recipe, **fields: Any) -> Recipe:
    """A recipe with other `[optimizer]` fields."""
    return recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update=fields)})


def with_lanes(engine: Engine, recipe: Recipe, seed: int, drop: int | None) -> Engine:
    """An engine whose copies run in a random order, with a random placement."""

    def lanes(measured: Measured) -> DelayedLanes:
        return DelayedLanes(random.Random(seed), drop=drop)

    offload = Offload(PoisonedKernel(), CPU, lanes=lanes)
    optimizer = OffloadedAdamW(engine.model, recipe.optimizer, offload)
    assert isinstance(engine.optimizer, OffloadedAdamW)
    for name, master in optimizer.masters().items():
        local(master).copy_(local(engine.optimizer.masters()[name]))
    connect(engine.passes, optimizer)
    return replace(engine, optimizer=optimizer)


def train(
    rank: int,
    size: int,
    recipe: Recipe,
    seed: int | None = None,
    drop: int | None = None,
    steps: int = 3,
) -> Trained:
    """Trains a few steps; with a seed copies are delayed, and every step has another placement."""
    engine = build_engine(recipe, World(rank, size, CPU))
    if seed is not None:
        engine = with_lanes(engine, recipe, seed, drop)
    optimizer, rng = engine.optimizer, random.Random(seed)
    (stage,), losses, on_device = training_stages(recipe), [], []
    for step in range(steps):
        if isinstance(optimizer, OffloadedAdamW):
            if seed is not None:
                optimizer.placer.placement = [rng.random() < 0.5 for _ in optimizer.groups]
            on_device.append(sum(optimizer.placement))
        samples = micro_batches(stage, step, *data_rank(engine.mesh))
        rows = [random_rows(s, recipe.model.vocab, recipe.train.seq_len) for s in samples]
        report = train_step(engine, rows, samples, stage, step).report
        losses.append((report.loss, report.grad_norm))
    tensors = {n: local(t).clone() for n, t in named_tensors(engine.model, optimizer).items()}
    unrounded = [
        name
        for name, p in engine.model.named_parameters()
        if not torch.equal(local(p), tensors[name].to(p.dtype))
    ]
    return Trained(losses, tensors, unrounded, on_device)


def differing(ours: Trained, reference: Trained) -> list[str]:
    """The names of tensors that differ in a bit."""
    assert ours.tensors.keys() == reference.tensors.keys()
    names = ours.tensors
    return [n for n in names if not torch.equal(names[n], reference.tensors[n])]


LAYOUTS: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    "FSDP, accumulation": ("M-*E", {"dp_shard": 2}, 2, {**LADDER, **ROUTED}),
    "HSDP": ("*-M-", {"dp_shard": 2, "dp_replicate": 2}, 2, {}),
    "tp with sequence parallelism": ("M-*E", {"tp": 2, "dp_shard": 2}, 4, {**LADDER, **ROUTED}),
    "tp, tied": ("*-", {"tp": 2, "sequence": False}, 4, {"tied": True}),
    "experts": ("*E*E", {"ep": 2, "dp_shard": 2, "tp": 2}, 4, ROUTED),
    "context": ("*-M-", {"cp": 2, "dp_shard": 2}, 4, LADDER),
    "pipeline, tied": ("*-M-", {"pp": 2, "dp_shard": 2}, 4, {"tied": True}),
    "pipeline alone": ("*-M-", {"pp": 2}, 4, LADDER),
    "zero bubble": ("*-*-", {"pp": 2, "schedule": "zbv", "dp_shard": 2}, 2, {}),
    "shared depth": ("*-", {"dp_shard": 2}, 4, {"repeat": 2, "share": True}),
    "muP": ("*-M-", {"dp_shard": 2}, 4, {"mup_base": {"hidden": 12, "ffn": 20}}),
}


def pool(ranks1: Ranks, ranks2: Ranks, ranks4: Ranks, layout: dict[str, Any]) -> Ranks:
    """The ranks that a layout needs."""
    size = 1
    for axis in ("dp_shard", "dp_replicate", "tp", "cp", "pp"):
        size *= layout.get(axis, 1)
    return {1: ranks1, 2: ranks2, 4: ranks4}[size]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_bit_is_that_of_adamw_on_the_device(
    ranks1: Ranks, ranks2: Ranks, ranks4: Ranks, name: str, precision: str
) -> None:
    pattern, layout, micro, fields = LAYOUTS[name]
    ranks = pool(ranks1, ranks2, ranks4, layout)
    recipe = recipe_for(pattern, layout, micro, vocab=64, experts=4, **fields)
    recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"precision": precision})}
    )
    device = ranks.run(train, recipe)
    for kind, seed in (("host", None), ("interleaved", None), ("interleaved", 7)):
        changed = settings_of(recipe, offload=kind, host_kernel="torch")
        for ours, reference in zip(ranks.run(train, changed, seed), device, strict=True):
            assert ours.losses == reference.losses, kind
            assert not differing(ours, reference), kind
            assert not ours.unrounded
            assert any(ours.on_device) == (kind != "host")


def failures(rank: int, size: int, recipe: Recipe, reference: Trained, drop: int) -> int:
    """In how many of eight random orders a step differs whose every `drop`-th operation does not
    wait."""
    found = 0
    for seed in range(8):
        try:
            ours = train(rank, size, recipe, seed, drop, steps=1)
        except (AssertionError, AttributeError):
            found += 1
        else:
            found += bool(differing(ours, reference)) or bool(ours.unrounded)
    return found


def test_a_forgotten_wait_is_noticed(ranks1: Ranks) -> None:
    recipe = recipe_for("*-M-", {}, 4, precision="bf16")
    changed = settings_of(recipe, offload="interleaved", host_kernel="torch")
    (reference,) = ranks1.run(train, recipe, None, None, 1)
    assert ranks1.run(failures, changed, reference, 1_000_000) == [0]
    (found,) = ranks1.run(failures, changed, reference, 3)
    assert found


def skipped_step(rank: int, size: int, recipe: Recipe, seed: int) -> tuple[list[str], bool]:
    """Spoils the last backward pass of a step; returns the tensors that changed, and whether the
    next step changes all."""
    engine = with_lanes(build_engine(recipe, World(rank, size, CPU)), recipe, seed, None)
    optimizer = engine.optimizer
    assert isinstance(optimizer, OffloadedAdamW)
    (stage,) = training_stages(recipe)

    def run(step: int) -> bool:
        samples = micro_batches(stage, step, *data_rank(engine.mesh))
        rows = [random_rows(s, recipe.model.vocab, recipe.train.seq_len) for s in samples]
        return train_step(engine, rows, samples, stage, step).skipped

    def copies() -> dict[str, Tensor]:
        tensors = dict(named_tensors(engine.model, optimizer)) | dict(
            (f"on device: {n}", p.detach()) for n, p in engine.model.named_parameters()
        )
        return {name: local(t).clone() for name, t in tensors.items()}

    assert not run(0)
    before = copies()
    parameter = engine.model.embedding.weight
    handle = parameter.register_post_accumulate_grad_hook(
        lambda p: local(p.grad).fill_(float("nan")) if p.grad is not None else None
    )
    optimizer.arrivals.expected = None  # the hook comes behind the optimizer's
    assert run(1)
    handle.remove()
    after = copies()
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert all(p.grad is None for p in engine.model.parameters())
    assert not run(1)
    moved = copies()
    return changed, all(not torch.equal(moved[n], after[n]) for n in moved if ".exp_avg" in n)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_step_that_is_not_finite_updates_no_group(ranks2: Ranks, seed: int) -> None:
    recipe = recipe_for("*-M-", {"dp_shard": 2}, 2, precision="bf16")
    changed = settings_of(recipe, offload="interleaved", host_kernel="torch")
    for tensors, moved in ranks2.run(skipped_step, changed, seed):
        assert not tensors
        assert moved


def inexact(rank: int, size: int, recipe: Recipe) -> float:
    """The largest relative difference of the parameters from those of exact moments."""
    exact = train(rank, size, settings_of(recipe, offload_moments="fp32", offload_gradients="fp32"))
    ours = train(rank, size, recipe)
    assert not ours.unrounded
    names = [n for n in exact.tensors if not n.startswith("optimizer.")]
    distances = [(ours.tensors[n] - exact.tensors[n]).norm() / exact.tensors[n].norm()
                 for n in names if exact.tensors[n].numel()]  # fmt: skip
    return float(torch.stack(distances).max())


@pytest.mark.parametrize("kind", ["host", "interleaved"])
@pytest.mark.parametrize(
    ("field", "value", "most"),
    [
        ("offload_moments", "bf16", 0.02),
        ("offload_moments", "8bit", 0.05),
        ("offload_gradients", "bf16", 0.02),
    ],
)
def test_narrow_moments_and_gradients_are_close_and_not_equal(
    ranks1: Ranks, field: str, value: str, most: float, kind: str
) -> None:
    recipe = recipe_for("*-M-", {}, 4, precision="bf16")
    changed = settings_of(recipe, offload=kind, host_kernel="torch", **{field: value})
    (distance,) = ranks1.run(inexact, changed)
    assert 0 < distance < most


def distance(ours: Trained, reference: Trained, moments: bool) -> float:
    """The largest relative difference of a tensor's local shard, by 2-norms."""
    return max(
        float((t - ours.tensors[name]).norm() / t.norm())
        for name, t in reference.tensors.items()
        if t.is_floating_point() and t.norm() and (moments or not name.startswith("optimizer."))
    )


@pytest.mark.parametrize("kind", ["host", "interleaved"])
def test_two_kernels_differ_by_rounding_alone(ranks2: Ranks, kind: str) -> None:
    """All state after one update, and parameters after three in fp32, whose passes amplify the
    rounding of some moments, which are sums of gradients that cancel."""
    assert host_kernel_choice("compiled")[0].name == "compiled"
    recipe = recipe_for("*-M-", {"dp_shard": 2}, 2, precision="fp32", **LADDER)
    changed = settings_of(recipe, offload=kind, host_kernel="compiled")
    for steps in (1, 3):
        device = ranks2.run(train, recipe, None, None, steps)
        found = ranks2.run(train, changed, None, None, steps)
        for ours, reference in zip(found, device, strict=True):
            assert not ours.unrounded
            assert differing(ours, reference)
            assert distance(ours, reference, moments=steps == 1) < 1e-6


def placements(rank: int, size: int, recipe: Recipe) -> list[list[bool]]:
    """Where groups are placed by rates that differ between ranks: while every rank has memory, and
    when rank 1 has none."""
    optimizer = build_engine(recipe, World(rank, size, CPU)).optimizer
    assert isinstance(optimizer, OffloadedAdamW)
    found = []
    for free in (float("inf"), 0.0 if rank == 1 else float("inf")):
        for kind, rate in ((HOST, 1e8), (UPDATE, 1e11), (LOAD, 1e9), (STORE, 1e9)):
            optimizer.placer.measured.observe(Task(kind, 0, int(rate * (1 + 2 * rank))), 1.0)
        optimizer.placer.room = free
        optimizer.placer.place_anew()
        found.append(optimizer.placement)
    assert optimizer.placer.rates.host == pytest.approx(2e8)
    return found


def test_ranks_place_alike(ranks2: Ranks) -> None:
    recipe = recipe_for("*-M-", {"dp_replicate": 2, "dp_shard": 1}, 2)
    first, second = ranks2.run(placements, settings_of(recipe, offload="interleaved"))
    assert first == second
    assert any(first[0])
    assert not any(first[1])


def without_gradient(rank: int, size: int, recipe: Recipe) -> set[str]:
    """The parameters that an update leaves, on the device and in a checkpoint, when two have no
    gradient and the host's memory has one of an earlier step."""
    engine = build_engine(recipe, World(rank, size, CPU))

    def copies() -> dict[str, Tensor]:
        weights = {f"weight of {n}": p.detach() for n, p in engine.model.named_parameters()}
        saved = named_tensors(engine.model, engine.optimizer)
        return {name: local(t).clone() for name, t in (weights | saved).items()}

    for host in getattr(engine.optimizer, "host", []):
        host.gradient.fill_(1.0)
    for name, parameter in engine.model.named_parameters():
        if name not in ("blocks.0.q", "norms.1.weight"):
            parameter.grad = torch.ones_like(parameter, dtype=torch.float32)
    before = copies()
    engine.optimizer.step(0.1, 0.5)
    after = copies()
    return {name for name in after if torch.equal(after[name], before[name])}


@pytest.mark.parametrize("kind", ["none", "host", "interleaved"])
def test_parameters_without_a_gradient_stay(ranks1: Ranks, kind: str) -> None:
    recipe = settings_of(recipe_for("*-", {}, 16, precision="bf16"), offload=kind)
    (left,) = ranks1.run(without_gradient, recipe)
    of_one = "{0}", "weight of {0}", "optimizer.{0}.exp_avg", "optimizer.{0}.exp_avg_sq"
    names = ("blocks.0.q", "norms.1.weight")
    assert left == {kind_of.format(name) for name in names for kind_of in of_one}


def test_rounded_gradients_do_not_depend_on_the_placement(ranks1: Ranks) -> None:
    recipe = settings_of(recipe_for("*-M-", {}, 4, precision="bf16"), host_kernel="torch",
                         offload_gradients="bf16")  # fmt: skip
    host, both = (
        ranks1.run(train, settings_of(recipe, offload=kind), seed)[0]
        for kind, seed in (("host", None), ("interleaved", 3))
    )
    assert host.losses == both.losses
    assert not differing(both, host)
