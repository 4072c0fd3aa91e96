"""`bench overlap`: collectives that are delays, the figures' arithmetic, and a tiny run."""

import time

import pytest
import torch

from colonnade.bench import overlap, row
from colonnade.bench.overlap import DelayGroup, delayed_world
from colonnade.bench.row import VARIANTS, Shape, TensorRow
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.mesh import build_mesh

TINY = Shape(repeat=1, hidden=64, seq=32)
SECONDS = {"none": [1.0, 0.9, 1.1], "standard": [2.0, 1.9, 2.1], "ladder": [1.25, 1.2, 1.3]}


def test_hidden_is_what_ladder_saves_of_what_communication_costs() -> None:
    figures = row.overlap_figures(SECONDS, blocks=16)
    assert figures["standard ms"] == pytest.approx(2000)
    assert figures["hidden"] == pytest.approx(0.75)
    assert figures["bound by the ends"] == 15 / 16


def test_steps_are_compared_round_by_round() -> None:
    figures = row.step_figures({"none": [1.0], "standard": [2.0], "ladder": [1.25]})
    assert figures["communication / standard step"] == pytest.approx(0.5)
    assert figures["step, standard / ladder"] == pytest.approx(1.6)
    assert figures["step, without communication / ladder"] == pytest.approx(0.8)


def test_the_link_carries_one_collective_at_a_time() -> None:
    group, x = DelayGroup(0, 2), torch.arange(4.0)
    group.seconds = 0.05
    start = time.perf_counter()
    gathered, scattered = torch.empty(8), torch.empty(2)
    first = group.all_gather_single_coalesced([gathered], [x])
    second = group.reduce_scatter_single_coalesced([scattered], [x])
    first.wait()
    assert time.perf_counter() - start >= 0.05
    second.wait()
    assert time.perf_counter() - start >= 0.1
    assert gathered.tolist() == [0.0, 1.0, 2.0, 3.0] * 2
    assert scattered.tolist() == [0.0, 1.0]
    assert group.calls == 2
    first.wait()  # already complete, so this adds nothing to `waited`
    assert 0.05 <= group.waited <= time.perf_counter() - start


@pytest.mark.parametrize("sequence", [False, True])
def test_every_collective_of_the_row_is_delayed(sequence: bool) -> None:
    """Forward launches two per sub-block with sequence parallelism, else one; backward as many."""
    device = torch.device("cpu")
    with delayed_world(device) as world:
        mesh = build_mesh(ParallelConfig(tp=2), world)
        group = mesh.get_group("tp")
        assert isinstance(group, DelayGroup)
        timed_row = TensorRow(TINY, "*-", sequence, mesh, device)
        timer = overlap.RowTimer(timed_row, group, device)
        per_pass = 2 * TINY.blocks if sequence else TINY.blocks
        for variant in VARIANTS:
            group.calls, timer.delay = 0, 0.01
            sample = timer.step(variant)
            assert group.calls == 2 * per_pass
            if variant == "standard":
                assert min(sample.forward, sample.backward) >= per_pass * timer.delay
                assert per_pass * timer.delay / 2 < sample.forward_waited <= sample.forward
            assert timed_row.wiring.skips_newest == [False, variant == "ladder"]


def test_a_tiny_run_has_figures() -> None:
    report = overlap.run(TINY, rounds=1)
    for case in ("attention-MLP, plain", "Mamba-MLP, sequence parallel"):
        assert report[f"{case}: ms of each"] > 0
        for direction in ("forward", "backward"):
            assert all(report[f"{case}: {direction}, {variant} ms"] > 0 for variant in VARIANTS)
