"""A few recipes of `tests/fuzz.py`, a script that runs any number of them."""

import fuzz
import pytest
from random_recipes import random_recipe
from ranks import Ranks

from colonnade.launcher.recipe.validate import validate
from colonnade.launcher.verify.layouts import with_layout
from colonnade.models.config import CARDS

# Recipes that take little time, with their patterns: a pipeline, tp and two of cp.
SEEDS = {251: "SG", 317: "S-", 356: "D", 284: "E"}


def test_recipes_are_valid_and_follow_from_their_seed() -> None:
    """Together they have all symbols, and all axes of parallelism that are built."""
    symbols, axes = set(), set()
    for seed in range(60):
        recipe, layout = random_recipe(seed, 4)
        assert (recipe, layout) == random_recipe(seed, 4)
        assert not validate(with_layout(recipe, layout), 4)
        symbols |= set(recipe.model.pattern)
        axes |= {name for name, degree in layout.items() if str(degree) not in ("1", "False")}
    assert symbols == set(CARDS)
    assert {"tp", "sequence", "cp", "context", "recurrence", "dp_shard", "dp_replicate"} <= axes
    assert {"pp", "schedule", "ep"} <= axes


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_recipe_is_equal(ranks1: Ranks, ranks2: Ranks, seed: int) -> None:
    assert random_recipe(seed, 2)[0].model.pattern == SEEDS[seed]
    verdict, line = fuzz.verdict(seed, 2, "", fault=False)
    assert verdict == "equal", line


@pytest.mark.parametrize("seed", list(SEEDS)[:3])
def test_a_wrong_reduction_is_detected(ranks1: Ranks, ranks2: Ranks, seed: int) -> None:
    verdict, line = fuzz.verdict(seed, 2, "", fault=True)
    assert verdict == "not equal", line
    assert line.count("not equal") == 2  # in either precision
