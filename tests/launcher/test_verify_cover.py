"""The covering set of `verify`: every possible pair of choices, and few cases."""

from collections.abc import Iterator
from itertools import combinations

import pytest

from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.verify.cases import Case
from colonnade.launcher.verify.cover import (
    AXES,
    NEEDS,
    Choice,
    all_cases,
    all_pairs,
    choices_of,
    factorisations,
)
from colonnade.launcher.verify.plan import FAMILIES, Job, case_faults, plan_all, plan_job

LARGEST = 45  # cases of a recipe on eight ranks


@pytest.fixture(scope="module")
def eight() -> dict[str, Job]:
    """The jobs of `verify --all --nproc 8`, by family."""
    return dict(zip(FAMILIES, plan_all(8), strict=True))


def pairs_of(case: Case, ranks: int) -> Iterator[tuple[Choice, ...]]:
    """The pairs of choices of a case."""
    yield from combinations(choices_of(case, ranks).items(), 2)


def test_every_pair_of_axes_with_either_wiring(eight: dict[str, Job]) -> None:
    """In every family; experts have ranks of their own only where there are experts."""
    for family, job in eight.items():
        axes = AXES if "mixture" in family else AXES[:-1]
        choices = [choices_of(case, 8) for case in job.cases]
        for residual in ("standard", "ladder"):
            having = [c for c in choices if c["residual"] == residual]
            for a, b in combinations(axes, 2):
                assert any(c[a] == c[b] == "on" for c in having), (family, residual, a, b)


def test_eight_ranks(eight: dict[str, Job]) -> None:
    """The cases are valid, differ, are few, and can be named."""
    for job in eight.values():
        assert (job.steps, job.precisions) == (2, ("fp64",))
        assert len(job.recipe.model.symbols) <= 8
        assert len(job.cases) <= LARGEST
        assert len(set(map(str, job.cases))) == len(job.cases)
        for case in job.cases:
            assert Case.parse(str(case)) == case
            assert case_faults(job.recipe, 8, case) == []
    without = {pair.why for pair in eight["hybrid mixture"].covering.impossible}  # type: ignore[union-attr]
    assert not any("experts" in why for why in without)


@pytest.mark.parametrize("family", ["dense", "hybrid"])
def test_it_has_every_pair_that_a_valid_case_has(family: str) -> None:
    recipe = load_recipe(FAMILIES[family])
    job = plan_job(recipe, [], 4, [])
    valid = (c for c in all_cases(recipe, 4, {}) if c.recompute == "block")
    valid_cases = [c for c in valid if not case_faults(recipe, 4, c)]
    possible = {pair for case in valid_cases for pair in pairs_of(case, 4)}
    covered = {pair for case in job.cases for pair in pairs_of(case, 4)}
    assert possible <= covered
    assert job.covering is not None
    assert job.covering.pairs == len(covered)
    assert len(covered) + len(job.covering.impossible) == len(list(all_pairs()))


def test_why_a_pair_is_impossible() -> None:
    covering = plan_job("tiny-dense", ["model.vocab=262"], 4, []).covering
    assert covering is not None
    why = {one.pair: one.why for one in covering.impossible}
    assert why["dp_shard=on with ep=on"].startswith("parallel.ep has no effect without experts")
    assert why["cp=off with context=ring"] == "parallel.context has no effect with parallel.cp = 1"
    assert why["context=ring with zigzag=False"].startswith("parallel.zigzag = False: ranks with")
    job = plan_job("tiny-dense", ["model.vocab=262"], 4, [])
    assert {case.layout["tp"] for case in job.cases if "tp" in case.layout} == {2}
    few = plan_job("tiny-dense", [], 2, []).covering
    assert few is not None
    assert "no layout of 2 ranks has both" in {one.why for one in few.impossible}


def test_it_follows_from_the_recipe_and_samples_from_the_seed() -> None:
    whole = plan_job("tiny-hybrid", [], 4, [])
    assert plan_job("tiny-hybrid", [], 4, []) == whole
    samples = [plan_job("tiny-hybrid", [], 4, [], 6, seed).cases for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert len(samples[0]) == 6
    assert set(map(str, samples[0])) < set(map(str, whole.cases))
    assert plan_job("tiny-hybrid", [], 4, [], 10**6).cases == whole.cases


def test_an_override_fixes_an_option() -> None:
    """In every case in which it has an effect."""
    overrides = ["parallel.context=allgather", "model.residual=ladder", "train.recompute=block"]
    cases = plan_job("quickstart", overrides, 4, []).cases
    assert {case.layout.get("context") for case in cases} == {"allgather", None}
    assert {(case.residual, case.recompute) for case in cases} == {("ladder", "block")}
    both = plan_job("quickstart", overrides[:1], 4, []).cases
    assert {case.residual for case in both} == {"standard", "ladder"}
    own = plan_job("tiny-dense", ["model.residual=parallel"], 2, []).cases
    assert {case.residual for case in own} == {"parallel"}


@pytest.mark.parametrize("ranks", [1, 2, 6, 8, 64])
def test_degrees_multiply_to_the_ranks(ranks: int) -> None:
    sets = set()
    for degrees in factorisations(ranks):
        product = 1
        for degree in degrees.values():
            product *= degree
        assert product == ranks
        sets.add(tuple(axis for axis, degree in degrees.items() if degree > 1))
    most = {1: 0, 2: 1, 6: 2, 8: 3, 64: 5}[ranks]
    wanted = [c for n in range(min(1, most), most + 1) for c in combinations(AXES[:-1], n)]
    assert sets == set(wanted)


def test_options_stand_beside_the_axis_they_need(eight: dict[str, Job]) -> None:
    for job in eight.values():
        for case in job.cases:
            choices = choices_of(case, 8)
            assert all(choices[NEEDS[name]] == "on" for name in NEEDS if name in choices)
