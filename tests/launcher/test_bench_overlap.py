"""`bench overlap`: the link that is a delay, its figures' arithmetic, and a tiny run."""

import time

import pytest
import torch

from colonnade.bench import overlap, row
from colonnade.bench.overlap import Link, linked
from colonnade.bench.row import VARIANTS, Row, Shape
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.mesh import build_mesh

TINY = Shape(repeat=1, hidden=64, seq=32)
TOOK = {"none": [1.0, 0.9, 1.1], "standard": [2.0, 1.9, 2.1], "ladder": [1.25, 1.2, 1.3]}


def test_hidden_is_what_ladder_saves_of_what_communication_costs() -> None:
    found = row.hidden(TOOK, blocks=16)
    assert found["standard ms"] == pytest.approx(2000)
    assert found["hidden"] == pytest.approx(0.75)
    assert found["bound by the ends"] == 15 / 16


def test_steps_are_compared_round_by_round() -> None:
    found = row.steps({"none": [1.0], "standard": [2.0], "ladder": [1.25]})
    assert found["communication / standard step"] == pytest.approx(0.5)
    assert found["step, standard / ladder"] == pytest.approx(1.6)
    assert found["step, without communication / ladder"] == pytest.approx(0.8)


def test_messages_go_over_the_link_one_after_the_other() -> None:
    link, x = Link(0, 2), torch.arange(4.0)
    link.seconds = 0.05
    start = time.perf_counter()
    gathered, scattered = torch.empty(8), torch.empty(2)
    first = link.all_gather_single_coalesced([gathered], [x])
    second = link.reduce_scatter_single_coalesced([scattered], [x])
    first.wait()
    assert time.perf_counter() - start >= 0.05
    second.wait()
    assert time.perf_counter() - start >= 0.1
    assert gathered.tolist() == [0.0, 1.0, 2.0, 3.0] * 2
    assert scattered.tolist() == [0.0, 1.0]
    assert link.calls == 2
    first.wait()  # is there: nothing to wait for
    assert 0.05 <= link.waited <= time.perf_counter() - start


@pytest.mark.parametrize("sequence", [False, True])
def test_every_collective_of_the_row_goes_over_the_link(sequence: bool) -> None:
    """Forward two per sub-block with sequence parallelism, else one; backward as many."""
    device = torch.device("cpu")
    with linked(device) as world:
        mesh = build_mesh(ParallelConfig(tp=2), world)
        link = mesh.get_group("tp")
        assert isinstance(link, Link)
        only = Row(TINY, "*-", sequence, mesh, device)
        watch = overlap.Stopwatch(only, link, device)
        per_pass = 2 * TINY.blocks if sequence else TINY.blocks
        for variant in VARIANTS:
            link.calls, watch.delay = 0, 0.01
            took = watch.step(variant)
            assert link.calls == 2 * per_pass
            if variant == "standard":
                assert min(took[:2]) >= per_pass * watch.delay
                assert per_pass * watch.delay / 2 < took.forward_waited <= took.forward
            assert only.wiring.skips_newest == [False, variant == "ladder"]


def test_a_tiny_run_has_figures() -> None:
    report = overlap.run(TINY, rounds=1)
    for case in ("attention-MLP, plain", "Mamba-MLP, sequence parallel"):
        assert report[f"{case}: ms of each"] > 0
        for direction in ("forward", "backward"):
            assert all(report[f"{case}: {direction}, {variant} ms"] > 0 for variant in VARIANTS)
