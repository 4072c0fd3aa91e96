"""`verify`: equal layouts are equal, a broken reduction is found and named, mistakes are told."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh

from colonnade.launcher.cli import main
from colonnade.launcher.errors import RecipeError, UserError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.verify import run
from colonnade.launcher.verify.equal import BOUNDS, EXACT, Bounds, compare
from colonnade.launcher.verify.judgement import Pass, beside, judge
from colonnade.launcher.verify.layouts import laid_out, parse_layout
from colonnade.launcher.verify.run import Job, compared, planned
from colonnade.launcher.verify.shrink import alone, on_layout, shrink
from colonnade.launcher.verify.table import table
from colonnade.launcher.verify.trace import Trace, assembled, piece, traced
from colonnade.models.decoder import Decoder
from colonnade.parallel import engine
from colonnade.parallel.world import World

LAYOUTS = ("tp=2,sequence=true", "tp=2,sequence=false", "dp_shard=2")
REPEAT = ["model.repeat=1"]
TINY = [*REPEAT, "model.pattern=*E", "model.mamba_head_dim=", "train.micro_batch=4"]


def here(rank: int, size: int) -> World:
    return World(rank, size, torch.device("cpu"))


def small_recipe() -> Recipe:
    return shrink(load_recipe("quickstart", TINY), 2, map(parse_layout, LAYOUTS))


def reference(rank: int, size: int) -> Trace:
    return traced(alone(small_recipe()), here(rank, size))


def passes(rank: int, size: int, exact: Trace) -> list[Pass]:
    """What a rank finds for all layouts."""
    layouts = tuple(map(parse_layout, LAYOUTS))
    job = Job(load_recipe("quickstart", TINY), layouts)
    return list(compared(job, small_recipe(), exact, here(rank, size)))


def forgetful(rank: int, size: int, layout: str) -> Trace:
    """Gradients that are partial over tensor-parallel ranks are not summed."""
    recipe = on_layout(small_recipe(), size, parse_layout(layout), "fp64")
    with patch.object(engine, "complete_gradients", lambda model, mesh: None):
        return traced(recipe, here(rank, size))


def forgets_router(rank: int, size: int) -> Trace:
    """The same for one weight alone."""
    complete = engine.complete_gradients

    def all_but_one(model: Decoder, mesh: DeviceMesh) -> None:
        router = model.wiring.block(1).small
        router.specs["router"].partial = False
        complete(model, mesh)

    recipe = on_layout(small_recipe(), size, parse_layout(LAYOUTS[0]), "fp64")
    with patch.object(engine, "complete_gradients", all_but_one):
        return traced(recipe, here(rank, size))


def test_layouts_are_equal(ranks1: Ranks, ranks2: Ranks) -> None:
    """In fp64, and in fp32 beside it; every rank has the report."""
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
        counts = {kind: part["tensors"] for kind, part in result["compared"].items()}
        parameters = counts["parameters"]
        assert parameters > 10
        assert counts == {
            "losses": 6, "norms": 3, "gradients": parameters, "parameters": parameters
        }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_missing_reduction_is_found(ranks1: Ranks, ranks2: Ranks, layout: str) -> None:
    """Also in fp32's bounds, which are all there is on GPUs. Of the first step exactly what is
    wrong is named; afterwards all is.
    """
    (exact,) = ranks1.run(reference)
    broken = ranks2.run(forgetful, layout)[0]
    partial = {"router": "router"}
    if "true" in layout:
        partial |= {"norms": "norms.", "final": "final."}
    for precision, bounds in BOUNDS.items():
        (result,) = judge([beside(layout, precision, broken, exact)], {})
        assert not result["equal"]
        assert result["verdict"] == "not equal"
        wrong = unequal(broken, exact, bounds)
        first = [name for name in wrong if name.startswith("step 1: ")]
        assert all(any(part in name for part in partial.values()) for name in first), first
        assert all(any(part in name for name in first) for part in partial.values()), first
        assert result["compared"]["gradients"]["worst"] == first[0]
        assert result["compared"]["gradients"]["unequal"] == len(wrong)
    assert broken.apart  # ranks have drifted apart


def unequal(ours: Trace, exact: Trace, bounds: Bounds) -> list[str]:
    found = compare(ours.gradients, exact.gradients, bounds, ours.apart)
    return [d.name for d in found if d.excess > 1]


def shown(*results: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    report = {"recipe": "r", "ranks": 2, "device": "cpu", "steps": 3}
    return table({**report, "layouts": results, "skipped": []}).splitlines()


def test_a_single_tensor_is_named(ranks1: Ranks, ranks2: Ranks) -> None:
    (exact,) = ranks1.run(reference)
    broken = ranks2.run(forgets_router)[0]
    name = "step 1: blocks.1.router"
    assert [n for n in unequal(broken, exact, EXACT) if n.startswith("step 1: ")] == [name]
    text = shown(*judge([beside(LAYOUTS[0], "fp64", broken, exact)], {}))
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
    apart = compare(a, b, Bounds(0.1, 0.02), {"a": 0.3})[0]
    assert apart.name == "a"
    assert apart.difference == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("ours", "why"),
    [
        ({}, "is missing"),
        ({"a": torch.ones(3)}, "is (3,), its reference (2,)"),
        ({"a": torch.tensor([1.0, float("nan")])}, "is not finite"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, "has no reference"),
    ],
)
def test_what_cannot_be_compared_is_different(ours: dict[str, torch.Tensor], why: str) -> None:
    worst = compare(ours, {"a": torch.ones(2)}, Bounds(1e9, 1e9))[0]
    assert worst.excess == float("inf")
    assert why in str(worst)


def test_nothing_differs_from_zeros() -> None:
    zeros = {"a": torch.zeros(2), "empty": torch.zeros(0)}
    assert all(d.excess == 0 for d in compare(zeros, zeros))
    assert compare({**zeros, "a": torch.full((2,), 1e-30)}, zeros)[0].excess == float("inf")


def test_pieces_make_a_whole() -> None:
    """Parts side by side, copies of them compared, a part that no rank has is not a number."""
    row = piece(torch.arange(6.0).view(2, 3))
    parts = [row._replace(offset=(start, 0), shape=(4, 3)) for start in (0, 2)]
    whole, apart = assembled([*parts, parts[1]])
    assert torch.equal(whole, torch.arange(6.0).view(2, 3).repeat(2, 1))
    assert apart == 0
    _, apart = assembled([row, row._replace(values=row.values + 0.5)])
    assert apart == 0.5
    whole, apart = assembled([parts[0], None])
    assert whole[2:].isnan().all()
    assert apart == float("inf")


# Layouts and mistakes


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("tp=2,heads=4", "heads is no field of [parallel]"),
        ("tp", "tp = '': give a whole number"),
        ("tp=2,tp=4", "stands in it twice"),
        ("tp=0", "tp = 0: give a whole number of at least 1"),
        ("sequence=1", "sequence = 1: give true or false"),
        ("cp=2,context=rng", "context = 'rng': give one of ring, ulysses, ring+ulysses"),
        ("cp=8,ulysses=1", "ulysses = 1: give a whole number of at least 2"),
        ("", "an empty entry is no field"),
    ],
)
def test_layouts_that_are_none(layout: str, said: str) -> None:
    with pytest.raises(UserError) as told:
        parse_layout(layout)
    assert f"--layout {layout}: " in str(told.value)
    assert said in str(told.value)


def test_all_faults_of_all_layouts_at_once() -> None:
    with pytest.raises(RecipeError) as told:
        planned("quickstart", [], 4, ["tp=4,pp=2", "dp_shard=3"])
    fields = {fault.field for fault in told.value.faults}
    assert {"parallel.pp", "parallel.dp_shard"} <= fields


@pytest.mark.parametrize(
    ("overrides", "ranks", "said"),
    [
        ([], 1, "--nproc"),
        (["parallel.tp=2"], 4, "--layout tp=2"),
        (["parallel.cp=2"], 4, "--layout cp=2"),
        (["model.heads=3", "model.kv_heads=", "model.hidden=96", "model.vocab=257",
          "train.global_batch=8", "train.seq_len=255", "model.mamba_heads=5"], 4,
         "no layout of 4 ranks is valid"),
        (["model.hedas=3"], 4, "model.hedas"),
    ],
)  # fmt: skip
def test_mistakes(overrides: list[str], ranks: int, said: str) -> None:
    with pytest.raises(UserError) as told:
        planned("quickstart", overrides, ranks, [])
    assert said in str(told.value)


def test_covering_set_names_what_it_leaves_out() -> None:
    job = planned("quickstart", [], 4, [])
    assert len(job.layouts) == 10  # a batch of 16 rows is no 4 micro-batches of 8
    assert [layout for layout, _ in job.skipped] == [
        {"dp_shard": 4}, {"dp_shard": 2, "dp_replicate": 2}, {"dp_shard": 1, "dp_replicate": 4}
    ]  # fmt: skip
    assert all("train.global_batch = 16" in why for _, why in job.skipped)
    again = Job.read(job.write())
    assert again == job
    assert again.recipe.model.model_fields_set == job.recipe.model.model_fields_set


@pytest.mark.parametrize("value", ["true", "false"])
def test_an_override_holds_for_every_layout(value: str) -> None:
    """A field that is no degree; layouts in which it changes nothing go without it."""
    override = f"parallel.sequence={value}"
    job = planned("quickstart", [override], 4, ["tp=4", "tp=2,dp_replicate=2"])
    assert [laid_out(job.recipe, layout).parallel.sequence for layout in job.layouts] == [
        value == "true"
    ] * 2
    covered = planned("quickstart", [override, "train.micro_batch=2"], 4, []).layouts
    assert {layout.get("sequence") for layout in covered} == {value == "true", None}
    with pytest.raises(UserError, match=r"did you mean parallel\.sequence"):
        planned("quickstart", ["parallel.sequenc=true"], 4, ["tp=4"])


def test_how_sequences_are_shared_holds_for_every_layout() -> None:
    """`parallel.ulysses` counts ranks, and is no degree: layouts it does not suit are left out."""
    words = ["parallel.context=ring+ulysses", "parallel.ulysses=4", "train.micro_batch=1"]
    job = planned("quickstart", words, 8, [])
    shared = [layout for layout in job.layouts if "cp" in layout]
    assert shared == [{"cp": 8, "dp_shard": 1}]
    assert laid_out(job.recipe, shared[0]).parallel.ulysses == 4
    left_out = [(layout["cp"], why) for layout, why in job.skipped if "cp" in layout]
    assert {cp for cp, _ in left_out} == {2, 4}
    assert all("parallel.ulysses = 4" in why for _, why in left_out)
    (layout,) = planned("quickstart", [], 4, ["cp=2,tp=2,context=ulysses,zigzag=false"]).layouts
    assert layout == {"cp": 2, "tp": 2, "context": "ulysses", "zigzag": False}
    with pytest.raises(RecipeError, match=r"model\.heads / parallel\.tp = 4 / 2 = 2"):
        planned("quickstart", [], 8, ["cp=4,tp=2,context=ulysses"])


def test_the_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ranks of its own; the report as JSON, as a table, and as the exit status."""
    monkeypatch.chdir(tmp_path)
    words = ["verify", "quickstart", *TINY, "--nproc", "2", "--layout", "tp=2"]
    assert main([*words, "--json", "report.json"]) == 0
    report = json.loads(Path("report.json").read_text())
    assert report["equal"]
    assert [r["precision"] for r in report["layouts"]] == ["fp64", "fp32"]
    part = report["layouts"][0]["compared"]["gradients"]
    assert 0 <= part["difference"] <= part["allowed"] < 1e-6
    monkeypatch.setattr(run, "verify", lambda *_, **__: report)
    capfd.readouterr()
    assert main(words) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "equal: 1 layout"
    report["layouts"][0]["verdict"] = "equal up to rounding"
    assert main(words) == 0
    report["layouts"][0]["verdict"] = "not equal"
    report["equal"] = report["layouts"][0]["equal"] = False
    assert main(words) == 1
