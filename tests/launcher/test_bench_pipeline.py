"""`bench pipeline`: a tiny run of every part; no test asserts a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Ranks

from colonnade.bench import pipeline, stages
from colonnade.kernels.deferred import DeferredGradients, deferring
from colonnade.models.config import ModelConfig
from colonnade.parallel.world import World

TINY = ModelConfig(pattern="*-", repeat=2, hidden=32, heads=2, ffn=48, vocab=64)


def with_world(rank: int, size: int, function: Callable[..., Any], *args: object) -> Any:
    """Calls a function of the benchmark on one rank."""
    return function(World(rank, size, torch.device("cpu")), *args)


class Pool:
    """The tests' ranks as those of a benchmark."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def run(self, function: Callable[..., Any], *args: object) -> list[Any]:
        """Calls `function(world, *args)` on every rank."""
        return self.ranks.run(with_world, function, *args)


def test_a_nap_puts_its_weight_gradient_off(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr("time.sleep", naps.append)
    x, weight = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    pipeline.nap(x, weight, 1.0).sum().backward()
    assert naps == [1.0] * 3
    deferred = DeferredGradients()
    with deferring(deferred):
        pipeline.nap(x, weight, 1.0).sum().backward()
    assert naps == [1.0] * 5
    deferred.compute()
    assert naps == [1.0] * 6


def test_sleeping_stages_have_figures_of_every_schedule(ranks4: Ranks) -> None:
    figures = pipeline.sleep_figures(Pool(ranks4), pipeline.SCHEDULES, 8, unit=0.004, rounds=1)
    for schedule in pipeline.SCHEDULES:
        case = f"{schedule}, m=8"
        shortest = 8 * 3 * 4 / (1 - figures[f"{case}: idle, by the order of passes"])
        assert figures[f"{case}: step ms"] >= shortest  # nobody sleeps for less than that
        assert figures[f"{case}: idle"] < 1
    assert figures["zb1p, m=8: step, 1f1b / zb1p, by the formula"] == pytest.approx(33 / 27)
    assert figures["1f1b, m=8: idle, by the formula"] == pytest.approx(3 / 11)


def test_split_passes_cost_as_many_flops(ranks2: Ranks) -> None:
    figures = stages.flop_figures(Pool(ranks2), TINY, 16)
    assert figures["FLOPs, recompute none: zbv / 1f1b"] == 1
    assert figures["FLOPs, recompute block: zbv / 1f1b"] < 1.1
    case = "FLOPs, zbv, recompute none"
    passes = ("forward", "input gradient", "weight gradient")
    parts = [figures[f"{case}: {kind} GFLOP"] for kind in passes]
    assert sum(parts) == pytest.approx(figures[f"{case}: all GFLOP"])


def test_two_ranks_have_figures() -> None:
    figures = stages.two_rank_figures(TINY, 16, rounds=1)
    assert figures["two ranks: bubble, by the formula"] == pytest.approx(1 / 9)
    assert 0.5 <= figures["two ranks: larger stage's share of the FLOPs"] < 0.9
    for name in ("one process", "two ranks", "two processes"):
        assert figures[f"{name}: tokens/s"] > 0
