"""Benchmarks run and report what they promise; no figure is judged here."""

from collections.abc import Callable
from typing import Any

import pytest

from colonnade.launcher.benchmarks import linear, loader, norm, scan, step
from colonnade.launcher.benchmarks.timing import alternate, median_ratio
from colonnade.launcher.health import doctor


@pytest.mark.parametrize(
    ("run", "figures"),
    [
        (
            lambda: loader.run(count=200_000, batches=2, rounds=2),
            ["loader tokens/s", "copy tokens/s (floor)", "speed, loader / copy"],
        ),
        (
            lambda: scan.run(S=100, rounds=2),
            ["chunked ms", "recurrence ms", "speed, chunked / recurrence"],
        ),
        (lambda: norm.run(rounds=2), ["ours ms", "speed, ours / torch"]),
        pytest.param(
            lambda: step.run(rounds=1),
            ["ours tokens/s", "speed, floor / reference", "memory, ours / reference"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_benchmarks_report_positive_figures(
    run: Callable[[], dict[str, Any]], figures: list[str]
) -> None:
    report = run()
    assert all(report[name] > 0 for name in figures)


def test_linear_reports_every_product() -> None:
    report = linear.run(rounds=1)
    assert sum("ratio" in str(value) for value in report.values()) == 3 * len(linear.SHAPES)


def test_contestants_take_turns() -> None:
    order: list[str] = []
    seconds = alternate(
        {name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, warmup=1
    )
    assert order == ["a", "b"] * 4
    assert all(len(times) == 3 for times in seconds.values())
    assert median_ratio([4.0, 9.0, 1.0], [2.0, 3.0, 1.0]) == 2.0


def test_doctor_names_every_operator() -> None:
    report = doctor()
    served = {name.removeprefix("kernel: ") for name in report if name.startswith("kernel: ")}
    assert served >= {"linear", "attention", "ssd", "conv", "experts", "loss", "rms_norm"}
    assert all(report[name] for name in report)
