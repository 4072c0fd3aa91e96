"""Inputs of sub-blocks in the host's memory, on every layout: no bit of a step changes."""

import random
from typing import Any, NamedTuple

import pytest
import torch
from delayed import DelayedLanes
from ranks import Ranks
from test_data_parallel import LADDER, recipe_for
from torch import Tensor

from colonnade.launcher.recipe.stages import training_stages
from colonnade.launcher.recipe.tables import Recipe, changed
from colonnade.launcher.train.job import build_engine
from colonnade.launcher.train.schedule import micro_batches
from colonnade.launcher.train.step import train_step
from colonnade.launcher.verify.trace import random_rows
from colonnade.parallel.gradients import local
from colonnade.parallel.mesh import data_rank
from colonnade.parallel.recompute import stash_of
from colonnade.parallel.world import World

STEPS = 2


class Steps(NamedTuple):
    """Losses, norms and local gradients of every step; what a stash has on the host after each of
    them, and how often it was used."""

    reports: list[tuple[float, float]]
    gradients: list[dict[str, Tensor]]
    buffers: list[int]
    stashed: int


def steps(rank: int, size: int, recipe: Recipe, seed: int | None = None) -> Steps:
    """Trains a few steps; with a seed copies are as late as they may be."""
    engine = build_engine(recipe, World(rank, size, torch.device("cpu")))
    stash, (stage,) = stash_of(engine.model), training_stages(recipe)
    assert (stash is not None) == recipe.train.offload_inputs
    if stash is not None and seed is not None:
        stash.new_lanes = lambda device: DelayedLanes(random.Random(seed))
    result = Steps([], [], [], 0)

    def note_gradients() -> None:
        named = engine.model.named_parameters()
        result.gradients.append({n: local(p.grad).clone() for n, p in named if p.grad is not None})

    for step in range(STEPS):
        samples = micro_batches(stage, step, *data_rank(engine.mesh))
        rows = [random_rows(s, recipe.model.vocab, recipe.train.seq_len) for s in samples]
        report = train_step(engine, rows, samples, stage, step, before_update=note_gradients).report
        result.reports.append((report.loss, report.grad_norm))
        if stash is not None:
            assert not stash.on_device()
            result.buffers.append(len(stash.on_host()))
    return result._replace(stashed=0 if stash is None else stash.count)


LAYOUTS: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    "accumulation": ("*-M-", {}, 4, LADDER),
    "FSDP": ("*-ME", {"dp_shard": 2}, 2, {}),
    "tp, sequence, ladder": ("M-*E", {"tp": 2}, 8, LADDER),
    "tp, sequence": ("*-m-", {"tp": 2}, 8, {"norm_position": "both"}),
    "tp": ("*-M-", {"tp": 2, "sequence": False}, 8, LADDER),
    "cp": ("*-MG", {"cp": 2}, 8, {}),
    "ep, ladder": ("*E*E", {"ep": 2}, 4, LADDER),
    "1f1b": ("*-M-*-", {"pp": 2}, 4, {}),
    "1f1b, ladder": ("*-M-*-", {"pp": 2, "dp_shard": 1}, 4, LADDER),
    "zbv": ("*-M-*-E-", {"pp": 2, "schedule": "zbv"}, 4, {"tied": True}),
    "gpipe": ("*-M-", {"pp": 2, "schedule": "gpipe"}, 4, LADDER),
    "mtp": ("*-", {}, 8, {"mtp": 2, "mtp_pattern": "*E"}),
}


@pytest.mark.parametrize(
    ("name", "recompute"),
    [(name, ("block", "selective")[number % 2]) for number, name in enumerate(LAYOUTS)]
    + [("tp, sequence, ladder", "selective"), ("1f1b", "selective"), ("zbv", "block")],
)
def test_no_bit_of_a_step_changes(ranks1: Ranks, ranks2: Ranks, name: str, recompute: str) -> None:
    """Nor do the host's buffers change after the first step."""
    pattern, layout, micro, fields = LAYOUTS[name]
    ranks = ranks2 if layout else ranks1
    recipe = recipe_for(pattern, layout, micro, recompute=recompute, vocab=64, experts=4, **fields)
    offloaded = recipe.model_copy(update={"train": changed(recipe.train, {"offload_inputs": True})})
    expected = ranks.run(steps, recipe)
    for seed in (None, 3):
        for ours, plain in zip(ranks.run(steps, offloaded, seed), expected, strict=True):
            assert ours.reports == plain.reports
            assert len(ours.gradients) == STEPS
            for found, reference in zip(ours.gradients, plain.gradients, strict=True):
                assert found.keys() == reference.keys()
                assert [n for n, t in found.items() if not torch.equal(t, reference[n])] == []
            assert ours.buffers == [ours.buffers[0]] * STEPS
            assert ours.stashed >= STEPS * ours.buffers[0] > 0
