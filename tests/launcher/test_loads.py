"""Loads of experts: their records, the report of a router that collapsed, and the heat map."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train import plot
from colonnade.launcher.train.loads import LoadWatch, shares
from colonnade.launcher.train.metrics import curves
from colonnade.launcher.train.plot import figure_of_panels, heat_maps, plot_loads
from colonnade.launcher.train.run import Run

Write = Callable[[str], Path]
Faults = Callable[..., list[Fault]]
Settings = Callable[..., Recipe]
Observed = tuple[list[dict[str, Any]], list[str]]


@pytest.fixture
def recipe(write: Write) -> Settings:
    """Makes a recipe with a mixture of experts: a token chooses 2 of 8."""
    return lambda *overrides: load_recipe(write('[model]\npattern = "*E"'), overrides)


def observe(
    recipe: Recipe, *steps: dict[int, list[int]], skipped: tuple[int, ...] = ()
) -> Observed:
    """Returns the metrics and the lines of a watch on the loads of steps 1, 2, …"""
    watch, lines = LoadWatch(recipe), list[str]()
    metrics = [
        watch.observe(
            step,
            {layer: torch.tensor(counts) for layer, counts in loads.items()},
            step in skipped,
            lines.append,
        )
        for step, loads in enumerate(steps, start=1)
    ]
    return metrics, lines


def towards(*experts: int, others: int = 15) -> list[int]:
    """Returns the loads of 8 experts, of which these get 100 tokens each and the rest `others`."""
    return [100 if e in experts else others for e in range(8)]


EVEN = towards()


def collapsed(observed: Observed) -> list[dict[str, Any] | None]:
    """Returns what the metrics of each step say of collapses."""
    return [row.get("collapsed") for row in observed[0]]


def test_share_is_the_fraction_of_tokens() -> None:
    """Ten tokens choose two experts each: the first is chosen by all, the last by none."""
    loads = torch.tensor([[10, 6, 4, 0], [5, 5, 5, 5], [0, 0, 0, 0]])
    expected = torch.tensor([[1.0, 0.6, 0.4, 0.0], [0.5] * 4, [0.0] * 4])
    assert torch.equal(shares(loads, top_k=2), expected)


def test_loads_are_recorded_every_few_steps_and_at_the_end(recipe: Settings) -> None:
    loads = {11: towards(3), 2: EVEN}
    metrics, _ = observe(recipe("train.steps=7", "train.loads_every=3"), *[loads] * 7)
    assert [bool(row) for row in metrics] == [False, False, True, False, False, True, True]
    assert metrics[2] == {
        "loads": {"2": EVEN, "11": towards(3)},
        "largest_share": {"2": 0.25, "11": round(200 / 205, 4)},
    }
    assert all(type(n) is int for n in metrics[2]["loads"]["11"])


def test_no_loads_are_recorded(recipe: Settings) -> None:
    metrics, _ = observe(recipe("train.steps=7", "train.loads_every=0"), *[{1: EVEN}] * 7)
    assert metrics == [{}] * 7
    assert LoadWatch(recipe()).observe(1, {}, False, print) == {}  # no mixture


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (200, 1), (240, 2), (10**6, 5000)])
def test_a_run_of_any_length_records_as_many(recipe: Settings, steps: int, every: int) -> None:
    assert recipe(f"train.steps={steps}").train.loads_interval == every
    assert recipe(f"train.steps={steps}", "train.loads_every=9").train.loads_interval == 9


COLLAPSE = ("train.collapse_steps=3", "train.loads_every=0", "train.steps=20")


def test_a_collapse_is_reported_once_per_layer(recipe: Settings) -> None:
    """Layer 1 collapses in steps 3 to 8 and again in 10 to 12, layer 3 in steps 5 to 12."""
    one = [EVEN] * 2 + [towards(5)] * 6 + [EVEN] + [towards(2)] * 3
    three = [EVEN] * 4 + [towards(0)] * 8
    steps = [{1: a, 3: b} for a, b in zip(one, three, strict=True)]
    observed = observe(recipe(*COLLAPSE), *steps)
    share = round(2 * 100 / (100 + 7 * 15), 4)
    expected: list[Any] = [None] * 12
    expected[4] = {"1": {"expert": 5, "share": share}}
    expected[6] = {"3": {"expert": 0, "share": share}}
    assert collapsed(observed) == expected
    first, second = observed[1]
    assert first.startswith("step 5: the router of sub-block 1 collapsed: 98% of the tokens chose")
    assert "expert 5 for 3 steps in a row" in first
    assert "sub-block 3" in second


def test_a_collapse_has_to_last(recipe: Settings) -> None:
    """One expert for three steps in a row: an even step ends it, and so does another expert."""
    a, b = {1: towards(5)}, {1: towards(2)}
    assert observe(recipe(*COLLAPSE), a, a, {1: EVEN}, a, a, b, b, a, a)[1] == []
    assert len(observe(recipe(*COLLAPSE), a, a, {1: EVEN}, a, a, a)[1]) == 1


def test_two_experts_may_take_all_tokens_in_turn(recipe: Settings) -> None:
    """Either has the largest share in some step; both have nearly all tokens in every step."""
    both = [{1: [100, 99 + step % 2 * 2, *[0] * 6]} for step in range(3)]
    (line,) = observe(recipe(*COLLAPSE), *both)[1]
    assert "expert 0" in line


def test_the_expert_that_collapsed_longest_is_named(recipe: Settings) -> None:
    """Another one has more tokens in the last step, but had few before."""
    loads = [{1: [100, 20, *[13] * 6]}] * 2 + [{1: [97, 100, *[0] * 6]}]
    (line,) = observe(recipe(*COLLAPSE), *loads)[1]
    assert "98% of the tokens chose expert 0" in line


def test_the_share_of_a_collapse_is_a_setting(recipe: Settings) -> None:
    """Of the 60 tokens, 36 choose expert 4."""
    loads = [{1: [12, 12, 12, 12, 36, 12, 12, 12]}] * 3
    assert len(observe(recipe(*COLLAPSE, "train.collapse_share=0.6"), *loads)[1]) == 1
    assert observe(recipe(*COLLAPSE, "train.collapse_share=0.61"), *loads)[1] == []


def test_a_skipped_step_neither_counts_nor_ends_a_collapse(recipe: Settings) -> None:
    """The logits of its routers may be NaN, of which every token chooses the same experts."""
    a = {1: towards(5)}
    assert observe(recipe(*COLLAPSE), a, a, a, skipped=(2,))[1] == []
    assert len(observe(recipe(*COLLAPSE), a, {1: EVEN}, a, a, skipped=(2,))[1]) == 1


@pytest.mark.parametrize("overrides", [
    ("model.experts=1", "model.top_k=1"), ("model.experts=8", "model.top_k=8"),
    ("model.experts=10", "model.top_k=9"),
])  # fmt: skip
def test_an_even_load_is_no_collapse(recipe: Settings, overrides: tuple[str, ...]) -> None:
    """Where every token chooses all experts, or all but one, each has at least 0.9 of them."""
    settings = recipe(*overrides)
    loads = {1: [9] * settings.model.experts}
    assert observe(settings, *[loads] * 50)[1] == []


def test_collapses_are_not_reported(recipe: Settings) -> None:
    assert observe(recipe("train.collapse_steps=0"), *[{1: towards(5)}] * 50)[1] == []


@pytest.mark.parametrize("field", [
    "loads_every=-1", "collapse_steps=-1", "collapse_share=0", "collapse_share=1.1",
])  # fmt: skip
def test_bounds(faults: Faults, field: str) -> None:
    (fault,) = faults("model.pattern=*E", f"train.{field}")
    assert fault.field == f"train.{field.partition('=')[0]}"
    assert fault.remedy.startswith("give a")  # it is the bound, not a field without effect


@pytest.mark.parametrize(("overrides", "remedy"), [
    ((), "model.router_bias = true"),
    (("model.router_bias=true",), "raise model.router_bias_rate = 0.001"),
])  # fmt: skip
def test_the_line_names_remedies(recipe: Settings, overrides: tuple[str, ...], remedy: str) -> None:
    (line,) = observe(recipe(*COLLAPSE, *overrides), *[{1: towards(5)}] * 3)[1]
    assert remedy in line
    assert "model.balance = 0.01" in line
    assert "optimizer.lr = 0.001" in line
    assert "even: 25%" in line


def test_curves_are_numbers() -> None:
    row = {
        "step": 3, "loss": 2.0, "grad_norm": None, "loads": {"1": [1, 2]},
        "largest_share": {"1": 0.5, "3": 0.75}, "collapsed": {"1": {"expert": 2, "share": 0.9}},
    }  # fmt: skip
    assert curves(row) == {"loss": 2.0, "largest_share/1": 0.5, "largest_share/3": 0.75}


def test_the_summary_names_collapses_and_no_loads(tmp_path: Path) -> None:
    a, b = {"expert": 2, "share": 0.9}, {"expert": 0, "share": 1.0}
    rows = [
        {"step": 1, "loss": 2.0, "loads": {"1": [1, 2]}, "collapsed": {"1": a}},
        {"step": 2, "loss": 1.0, "collapsed": {"3": b}},
        {"step": 3, "loss": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Run(tmp_path, 0).summary() == {
        "run": str(tmp_path), "status": 0, "step": 3, "loss": 0.5, "collapsed": {"1": a, "3": b},
    }  # fmt: skip


def test_a_heat_map_is_the_load_over_an_even_load() -> None:
    steps, loads = np.array([1, 2, 3, 4]), np.array([[6, 2], [0, 8], [4, 4], [0, 0]])[:, None]
    expected = [[[1.5, 0.0, 1.0, 0.0], [0.5, 2.0, 1.0, 0.0]]]
    assert heat_maps(steps, loads, 4).tolist() == expected
    assert heat_maps(steps, loads, 2).tolist() == [[[0.75, 1.0], [1.25, 1.0]]]  # sums of two steps


def test_a_record_stands_for_the_steps_before_it() -> None:
    """Records of steps 2, 4 and 10, as of a run resumed with other intervals, over 10 columns."""
    loads = np.array([[4, 0], [0, 4], [2, 2]])[:, None]
    (first,) = heat_maps(np.array([2, 4, 10]), loads, 10)[:, 0]
    assert first.tolist() == [2, 2, 0, 0, 1, 1, 1, 1, 1, 1]


def write_loads(run: Path, layers: int, experts: int, steps: int) -> None:
    """Writes metrics of a run in which the first layer collapsed in the last step."""
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [{"step": 1, "loss": 1.0}]
    for step in range(1, steps + 1):
        counts = {str(2 * n + 1): generator.integers(0, 50, experts) for n in range(layers)}
        rows.append({"step": step, "loads": {k: v.tolist() for k, v in counts.items()}})
    rows[-1]["collapsed"] = {"1": {"expert": 0, "share": 0.9}}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("layers", "experts", "steps"), [(1, 2, 1), (7, 5, 30), (100, 256, 3)])
def test_loads_are_drawn(tmp_path: Path, layers: int, experts: int, steps: int) -> None:
    write_loads(tmp_path, layers, experts, steps)
    path = plot_loads(tmp_path)
    assert path == tmp_path / "loads.png"
    assert path.stat().st_size > 5000


def test_nothing_is_drawn_without_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert plot_loads(tmp_path) is None
    write_loads(tmp_path, 1, 2, 1)
    monkeypatch.setattr(plot, "pyplot", lambda: None)  # without matplotlib
    assert plot_loads(tmp_path) is None


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (1, 256), (2, 8), (5, 64), (100, 256)])
def test_panels_are_large_enough_and_do_not_overlap(layers: int, experts: int) -> None:
    plt = plot.pyplot()
    figure, panels, bar = figure_of_panels(plt, layers, experts)
    pixels = figure.get_size_inches() * plot.DPI
    boxes = [axes.get_position() for axes in [*panels, bar]]
    assert all(box.height * pixels[1] > experts - 1e-6 for box in boxes[:-1])
    assert all(0 < box.x0 < box.x1 < 1 and 0 < box.y0 < box.y1 < 1 for box in boxes)
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    assert 0.4 < pixels[0] / pixels[1] < 2.5
    plt.close(figure)
