"""`verify`: equal layouts are equal, a missing reduction is detected, mistakes are reported."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import Ranks

from colonnade.launcher.cli import main
from colonnade.launcher.errors import RecipeError, UserError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.verify import run
from colonnade.launcher.verify.cases import Case
from colonnade.launcher.verify.equal import BOUNDS, EXACT, Bounds, compare
from colonnade.launcher.verify.judgement import Pass, compare_traces, judge
from colonnade.launcher.verify.layouts import with_layout
from colonnade.launcher.verify.plan import Job, plan_job
from colonnade.launcher.verify.run import compare_cases
from colonnade.launcher.verify.shrink import in_one_process, on_case, shrink
from colonnade.launcher.verify.table import table
from colonnade.launcher.verify.trace import Trace, assemble, copy_shard, record_trace
from colonnade.models.decoder import Decoder
from colonnade.parallel import engine
from colonnade.parallel.world import World

LAYOUTS = ("tp=2,sequence=true", "tp=2,sequence=false", "dp_shard=2")
REPEAT = ["model.repeat=1"]
TINY = [*REPEAT, "model.pattern=*E", "model.mamba_head_dim=", "train.micro_batch=4"]


def world_of(rank: int, size: int) -> World:
    return World(rank, size, torch.device("cpu"))


def small_recipe() -> Recipe:
    return shrink(load_recipe("quickstart", TINY), 2, map(Case.parse, LAYOUTS))


def reference(rank: int, size: int) -> Trace:
    return record_trace(in_one_process(small_recipe()), world_of(rank, size))


def passes(rank: int, size: int, exact: Trace) -> list[Pass]:
    """The comparisons of all layouts, on one rank."""
    job = Job(load_recipe("quickstart", TINY), tuple(map(Case.parse, LAYOUTS)))
    references = {"ladder": exact} if rank == 0 else {}
    return list(compare_cases(job, small_recipe(), references, world_of(rank, size)))


def without_reduction(rank: int, size: int, layout: str) -> Trace:
    """A trace in which gradients that are partial over tp ranks are not all-reduced."""
    recipe = on_case(small_recipe(), size, Case.parse(layout), "fp64")
    with patch.object(engine, "complete_gradients", lambda model: None):
        return record_trace(recipe, world_of(rank, size))


def without_reduction_of_router(rank: int, size: int) -> Trace:
    """The same for the gradient of one weight only."""
    complete = engine.complete_gradients

    def all_but_one(model: Decoder) -> None:
        router = model.wiring.block(1).small
        router.specs["router"].partial = None
        complete(model)

    recipe = on_case(small_recipe(), size, Case.parse(LAYOUTS[0]), "fp64")
    with patch.object(engine, "complete_gradients", all_but_one):
        return record_trace(recipe, world_of(rank, size))


def test_layouts_are_equal(ranks1: Ranks, ranks2: Ranks) -> None:
    """In fp64 and in fp32; every rank has the report."""
    (exact,) = ranks1.run(reference)
    first, second = ranks2.run(passes, exact)
    assert first == second
    results = judge(first, {})
    assert [(r["layout"], r["precision"]) for r in results] == [
        (layout, precision) for layout in LAYOUTS for precision in ("fp64", "fp32")
    ]
    for result in results:
        assert result["equal"], result
        assert result["verdict"] == "equal"
        counts = {kind: entry["tensors"] for kind, entry in result["compared"].items()}
        parameters = counts["parameters"]
        assert parameters > 10
        assert counts == {
            "losses": 6, "norms": 3, "gradients": parameters, "parameters": parameters
        }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_missing_reduction_is_detected(ranks1: Ranks, ranks2: Ranks, layout: str) -> None:
    """Also by the bounds of fp32, the only ones on GPUs.

    At the first step, exactly the faulty gradients are named; later ones all differ.
    """
    (exact,) = ranks1.run(reference)
    broken = ranks2.run(without_reduction, layout)[0]
    partial = {"router": "router"}
    if "true" in layout:
        partial |= {"norms": "norms.", "final": "final."}
    for precision, bounds in BOUNDS.items():
        (result,) = judge([compare_traces(layout, precision, broken, exact)], {})
        assert not result["equal"]
        assert result["verdict"] == "not equal"
        wrong = unequal(broken, exact, bounds)
        first = [name for name in wrong if name.startswith("step 1: ")]
        assert all(any(part in name for part in partial.values()) for name in first), first
        assert all(any(part in name for name in first) for part in partial.values()), first
        assert result["compared"]["gradients"]["worst"] == first[0]
        assert result["compared"]["gradients"]["unequal"] == len(wrong)
    assert broken.replica_differences  # the ranks have different weights


def unequal(ours: Trace, exact: Trace, bounds: Bounds) -> list[str]:
    differences = compare(ours.gradients, exact.gradients, bounds, ours.replica_differences)
    return [d.name for d in differences if d.excess > 1]


def shown(*results: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    report = {"recipe": "r", "ranks": 2, "device": "cpu", "steps": 3}
    return table({**report, "layouts": results}).splitlines()


def test_a_single_tensor_is_named(ranks1: Ranks, ranks2: Ranks) -> None:
    (exact,) = ranks1.run(reference)
    broken = ranks2.run(without_reduction_of_router)[0]
    name = "step 1: blocks.1.router"
    assert [n for n in unequal(broken, exact, EXACT) if n.startswith("step 1: ")] == [name]
    text = shown(*judge([compare_traces(LAYOUTS[0], "fp64", broken, exact)], {}))
    (line,) = [line for line in text if line.startswith("  NOT EQUAL: ")]
    assert f"worst: {name} differs by " in line
    assert text[-1] == f"NOT EQUAL: {LAYOUTS[0]} in fp64"


# The rule


def test_rule() -> None:
    """Relative to the tensor's own largest element, and to the norm of all."""
    b = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    a = {"a": torch.tensor([3.0, 0.2]), "b": torch.tensor([4.4])}
    worst, other = compare(a, b, Bounds(0.1, 0.02))
    assert (worst.name, other.name) == ("b", "a")
    assert worst.allowed == pytest.approx(0.4 + 0.02 * 5)
    assert worst.difference == pytest.approx(0.4)
    assert other.excess == pytest.approx(0.2 / 0.4)
    differing = compare(a, b, Bounds(0.1, 0.02), {"a": 0.3})[0]
    assert differing.name == "a"
    assert differing.difference == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("ours", "why"),
    [
        ({}, "is missing"),
        ({"a": torch.ones(3)}, "is (3,), its reference (2,)"),
        ({"a": torch.tensor([1.0, float("nan")])}, "is not finite"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, "has no reference"),
    ],
)
def test_tensors_that_cannot_be_compared_differ(ours: dict[str, torch.Tensor], why: str) -> None:
    worst = compare(ours, {"a": torch.ones(2)}, Bounds(1e9, 1e9))[0]
    assert worst.excess == float("inf")
    assert why in str(worst)


def test_nothing_differs_from_zeros() -> None:
    zeros = {"a": torch.zeros(2), "empty": torch.zeros(0)}
    assert all(d.excess == 0 for d in compare(zeros, zeros))
    assert compare({**zeros, "a": torch.full((2,), 1e-30)}, zeros)[0].excess == float("inf")


def test_shards_are_assembled() -> None:
    """Adjacent shards; copies of a shard are compared; elements that no rank has are NaN."""
    rows = copy_shard(torch.arange(6.0).view(2, 3))
    shards = [rows._replace(offset=(start, 0), shape=(4, 3)) for start in (0, 2)]
    tensor, difference = assemble([*shards, shards[1]])
    assert torch.equal(tensor, torch.arange(6.0).view(2, 3).repeat(2, 1))
    assert difference == 0
    _, difference = assemble([rows, rows._replace(values=rows.values + 0.5)])
    assert difference == 0.5
    tensor, difference = assemble([shards[0], None])
    assert tensor[2:].isnan().all()
    assert difference == float("inf")


# Layouts and mistakes


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("tp=2,heads=4", "heads is no field of [parallel]"),
        ("tp", "tp = '': give a whole number"),
        ("tp=2,tp=4", "stands in it twice"),
        ("tp=0", "tp = 0: give a whole number of at least 1"),
        ("sequence=1", "sequence = 1: give true or false"),
        ("cp=2,context=rng", "context = 'rng': give one of ring, ulysses, ring+ulysses"),
        ("cp=8,ulysses=1", "ulysses = 1: give a whole number of at least 2"),
        ("residual=ladders", "residual = 'ladders': give one of standard, ladder, parallel"),
        ("recompute=all,tp=2", "recompute = 'all': give one of none, selective, block"),
        ("", "an empty entry is no field of [parallel], nor residual, recompute or offload"),
    ],
)
def test_faulty_layouts(layout: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        Case.parse(layout)
    assert f"--layout {layout}: " in str(raised.value)
    assert message in str(raised.value)


def test_all_faults_of_all_layouts_at_once() -> None:
    with pytest.raises(RecipeError) as raised:
        plan_job("quickstart", [], 4, ["tp=4,pp=2", "dp_shard=3"])
    fields = {fault.field for fault in raised.value.faults}
    assert {"parallel.pp", "parallel.dp_shard"} <= fields


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        ([], 1, "--nproc"),
        (["parallel.tp=2"], 4, "--layout tp=2"),
        (["parallel.cp=2"], 4, "--layout cp=2"),
        (["model.hedas=3"], 4, "model.hedas"),
    ],
)  # fmt: skip
def test_mistakes(overrides: list[str], ranks: int, message: str) -> None:
    with pytest.raises(UserError) as raised:
        plan_job("quickstart", overrides, ranks, [])
    assert message in str(raised.value)


def test_an_override_applies_to_every_layout() -> None:
    """Except to layouts under which the field has no effect."""
    for value in (True, False):
        override = f"parallel.sequence={str(value).lower()}"
        job = plan_job("quickstart", [override], 4, ["tp=4", "tp=2,dp_replicate=2"])
        placed = [with_layout(job.recipe, case.layout).parallel for case in job.cases]
        assert [parallel.sequence for parallel in placed] == [value] * 2
    with pytest.raises(UserError, match=r"did you mean parallel\.sequence"):
        plan_job("quickstart", ["parallel.sequenc=true"], 4, ["tp=4"])


def test_layouts_are_named_with_their_options() -> None:
    named = "cp=2,tp=2,context=ulysses,zigzag=false,residual=standard,recompute=block"
    (case,) = plan_job("quickstart", [], 4, [named]).cases
    layout = {"cp": 2, "tp": 2, "context": "ulysses", "zigzag": False}
    assert case == Case(layout, "standard", "block")
    assert str(case) == named
    with pytest.raises(RecipeError, match=r"model\.heads / parallel\.tp = 4 / 2 = 2"):
        plan_job("quickstart", [], 8, ["cp=4,tp=2,context=ulysses"])


def test_a_job_survives_writing_and_reading() -> None:
    job = plan_job("quickstart", ["model.vocab=262"], 4, [], sample=5)
    assert len(job.cases) == 5
    copy = Job.read(job.write())
    assert copy == job
    assert copy.recipe.model.model_fields_set == job.recipe.model.model_fields_set


def test_the_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It starts ranks, and reports as JSON, as a table, and by the exit status."""
    monkeypatch.chdir(tmp_path)
    words = ["verify", "quickstart", *TINY, "--nproc", "2", "--layout", "tp=2"]
    assert main([*words, "--json", "report.json"]) == 0
    report = json.loads(Path("report.json").read_text())
    assert report["equal"]
    assert [r["precision"] for r in report["layouts"]] == ["fp64", "fp32"]
    gradients = report["layouts"][0]["compared"]["gradients"]
    assert 0 <= gradients["difference"] <= gradients["allowed"] < 1e-6
    monkeypatch.setattr(run, "verify", lambda *_, **__: report)
    capfd.readouterr()
    assert main(words) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "equal: 1 layout"
    report["layouts"][0]["verdict"] = "equal up to rounding"
    assert main(words) == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("equal: 1 layout, up to rounding: ")
    report["layouts"][0]["verdict"] = "not equal"
    report["equal"] = report["layouts"][0]["equal"] = False
    assert main(words) == 1
