"""A sample of the parity matrix on four ranks: other cases every day.

`colonnade verify --all --nproc 4` compares all of them.
"""

from datetime import date
from functools import cache

import pytest
import torch
from ranks import Ranks

from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.verify.judgement import Pass, judge
from colonnade.launcher.verify.plan import FAMILIES, Job, plan_all
from colonnade.launcher.verify.run import References, compare_cases, train_references
from colonnade.launcher.verify.shrink import shrink
from colonnade.parallel.world import World

SAMPLE = 3  # cases of each family
SEED = date.today().toordinal()


@cache
def jobs() -> dict[str, Job]:
    """The sample of every family."""
    return dict(zip(FAMILIES, plan_all(4, SAMPLE, SEED), strict=True))


def references(rank: int, size: int, job: Job, small: Recipe) -> References:
    return train_references(job, small, World(rank, size, torch.device("cpu")))


def passes(rank: int, size: int, job: Job, small: Recipe, exact: References) -> list[Pass]:
    world = World(rank, size, torch.device("cpu"))
    return list(compare_cases(job, small, exact if rank == 0 else {}, world))


@pytest.mark.parametrize("family", FAMILIES)
def test_sample(ranks1: Ranks, ranks4: Ranks, family: str) -> None:
    """A failure is repeated by `colonnade verify RECIPE --nproc 4 --layout LAYOUT`."""
    job = jobs()[family]
    small = shrink(job.recipe, 4, job.cases, job.steps)
    (exact,) = ranks1.run(references, job, small)
    found = ranks4.run(passes, job, small, exact, limit=600.0)[0]
    assert [one.layout for one in found] == list(map(str, job.cases))
    unequal = [result for result in judge(found, {}) if not result["equal"]]
    assert not unequal, [(job.recipe.name, result["layout"]) for result in unequal]
