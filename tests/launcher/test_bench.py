"""Benchmarks run and report the figures that they document; no test asserts a speed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from colonnade.bench import (
    BENCHMARKS,
    bench,
    linear,
    loader,
    mixers,
    moe,
    mup,
    norm,
    step,
)
from colonnade.bench.timing import alternate, median_ratio
from colonnade.launcher.cli.parser import build_parser
from colonnade.launcher.cluster.doctor import doctor
from colonnade.launcher.errors import UserError
from colonnade.models.config import CARDS


@pytest.mark.parametrize(
    ("run", "figures"),
    [
        (
            lambda: loader.run(count=200_000, batches=2, rounds=2),
            ["loader tokens/s", "copy tokens/s (floor)", "speed, loader / copy"],
        ),
        (lambda: norm.run(rounds=2), ["ours ms", "speed, ours / torch"]),
    ],
)
def test_benchmarks_report_positive_figures(
    run: Callable[[], dict[str, Any]], figures: list[str]
) -> None:
    report = run()
    assert all(report[name] > 0 for name in figures)


@pytest.mark.slow
def test_a_step_has_positive_figures(
    preloaded_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the two steps that warm up before the first round."""

    def cold(steps: dict[str, Callable[[], object]], rounds: int, warmup: int) -> Any:
        return alternate(steps, rounds, warmup=0)

    monkeypatch.setattr(step, "alternate", cold)
    report = step.run(rounds=1)
    figures = ["ours tokens/s", "speed, floor / reference", "memory, ours / reference"]
    assert all(report[name] > 0 for name in figures)


def test_mixers_compute_the_same_in_linear_memory() -> None:
    report = mixers.run(S=70, rounds=1, lengths=(256, 512), selective_scan_peer_tokens=20)
    for name in mixers.CASES:
        # transformers has neither the ungated delta rule nor S4D
        has_peer = name not in ("delta_rule", "s4d")
        peers = ["recurrence", "transformers"] if has_peer else ["recurrence"]
        for peer in peers:
            assert report[f"{name}: largest difference from {peer}"] < 1e-4
            assert report[f"{name}: speed, chunked / {peer}"] > 0
        assert report[f"{name}: floor ms"] > 0
        for memory in ("kept beside the inputs", "at the peak"):
            assert 1 < report[f"{name}: growth of MiB {memory} on doubling S"] < 2.1


def test_memory_counts_saved_and_allocated_bytes() -> None:
    """exp saves its output for backward, a square its input."""
    x = torch.ones(1000, requires_grad=True)
    assert mixers.saved_bytes(lambda x: x.exp(), [x]) == 4000
    assert mixers.saved_bytes(lambda x: x * x, [x]) == 0

    def allocate_two_at_a_time() -> None:
        first = torch.ones(1000)
        del first
        pair = torch.ones(1000), torch.ones(1000)
        del pair

    assert 8000 <= mixers.peak_bytes(allocate_two_at_a_time) < 9000


def test_a_large_parent_does_not_count() -> None:
    """exec passes ru_maxrss on, so that a run started by a large process once measured nothing."""
    parent = bytearray(b"x" * 2**30)
    code = "from colonnade.launcher.cluster.memory import resident_mib; print(resident_mib())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 100 < float(child.stdout) < len(parent) / 2**20


def test_moe_computes_the_same() -> None:
    report = moe.run(sizes=((64, 16, 32),), rounds=1)
    size = "T=64 D=16 F=32"
    assert report[f"{size}: largest difference of ours from transformers"] < 1e-5
    assert 0 < report[f"{size}: choices dropped at capacity 1.0"] < 1
    for name in ("ours", "capacity 1.0", "floor"):
        assert report[f"{size}: speed, {name} / transformers"] > 0


def test_mup_plots_a_coordinate_check(tmp_path: Path) -> None:
    plot, rates = tmp_path / "mup.png", (1e-3, 3e-3)
    report = mup.run(
        widths=(32, 64, 128), steps=2, sweep_widths=(32, 64), rates=rates, sweep_steps=2, plot=plot
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
    names = ["logits", *(f"{t} {CARDS[s].title}" for t, s in enumerate(mup.PATTERN))]
    slope = {
        kind: [report[f"{kind}, {name}: slope of change over width"] for name in names]
        for kind in mup.PARAMETRISATIONS
    }
    assert max(slope["muP"]) < 0.3 < 1 < max(slope["standard"])
    best = {report[f"{kind}, width 64: best learning rate"] for kind in mup.PARAMETRISATIONS}
    assert best <= set(rates)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("mixers", "transformers", "bench"),
        ("moe", "transformers", "bench"),
        ("mup", "matplotlib", "plot"),
    ],
)
def test_missing_packages_are_named(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'colonnade\[{extra}\]'"):
        bench(name)


def test_the_command_line_knows_every_benchmark() -> None:
    for name in BENCHMARKS:
        assert build_parser().parse_args(["bench", name]).name == name


def test_linear_reports_every_product() -> None:
    report = linear.run(rounds=1)
    assert sum("ratio" in str(value) for value in report.values()) == 3 * len(linear.SHAPES)


def test_candidates_take_turns() -> None:
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
