"""A few of `tests/fuzz.py`'s recipes; that script runs as many as one likes."""

import fuzz
import pytest
from random_recipes import random_recipe
from ranks import Ranks

from colonnade.launcher.recipe.validate import validate
from colonnade.launcher.verify.layouts import with_layout
from colonnade.models.config import CARDS

SEEDS = {28: "-", 70: "m", 46: "S", 31: "D"}  # of recipes that take little time


def test_recipes_are_valid_and_follow_from_their_seed() -> None:
    """And they have all symbols, and all axes of parallelism that are built."""
    symbols, axes = set(), set()
    for seed in range(60):
        recipe, layout = random_recipe(seed, 4)
        assert (recipe, layout) == random_recipe(seed, 4)
        assert not validate(with_layout(recipe, layout), 4)
        symbols |= set(recipe.model.pattern)
        axes |= {name for name, degree in layout.items() if str(degree) not in ("1", "False")}
    assert symbols == set(CARDS)
    assert {"tp", "sequence", "cp", "context", "recurrence", "dp_shard", "dp_replicate"} <= axes


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_recipe_is_equal(ranks1: Ranks, ranks2: Ranks, seed: int) -> None:
    assert random_recipe(seed, 2)[0].model.pattern == SEEDS[seed]
    found, line = fuzz.verdict(seed, 2, "", fault=False)
    assert found == "equal", line


@pytest.mark.parametrize("seed", list(SEEDS)[1:])
def test_a_broken_sum_is_found(ranks1: Ranks, ranks2: Ranks, seed: int) -> None:
    found, line = fuzz.verdict(seed, 2, "", fault=True)
    assert found == "not equal", line
    assert line.count("not equal") == 2  # in either precision
