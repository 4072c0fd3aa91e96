"""Validation of all-to-all exchanges of heads: the rules against formulas, on random sizes."""

import random
from typing import Any

import pytest

from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.validate import validate
from colonnade.parallel.config import ParallelConfig


def test_an_exchange_of_heads_is_valid_exactly_if_every_rank_gets_equally_many() -> None:
    generator = random.Random(0)
    refused = 0
    for _ in range(200):
        tp, cp = generator.choice((1, 2, 4)), generator.choice((2, 3, 4, 6, 8))
        groups = generator.choice((1, 2))
        kv = generator.choice((1, 2, 3, 4, 6, 8))
        heads = kv * generator.choice((1, 2, 3, 4))
        local_heads, local_kv = heads // tp, max(1, kv // tp)
        if heads % tp or (kv % tp and tp % kv):
            continue
        recipe = Recipe.model_validate(
            {
                "model": {"pattern": "*M", "hidden": 4 * heads, "vocab": 264, "heads": heads,
                          "kv_heads": kv, "mamba_head_dim": 4, "mamba_heads": 8 * groups,
                          "mamba_groups": groups},
                "parallel": {"tp": tp, "cp": cp, "context": "ulysses", "recurrence": "heads"},
                "train": {"seq_len": 24 * 24},
            }
        )  # fmt: skip
        local_groups = max(1, groups // tp)
        wrong = local_heads % cp > 0 or (local_kv % cp > 0 and cp % local_kv > 0)
        wrong_state = 8 * groups // tp % cp > 0 or (local_groups % cp > 0 and cp % local_groups > 0)
        remedies = [f.remedy for f in validate(recipe, None)]
        assert any("parallel.context = ulysses" in r for r in remedies) == wrong
        assert any("parallel.recurrence = heads" in r for r in remedies) == wrong_state
        assert len(remedies) == wrong + wrong_state
        refused += wrong
    assert 20 < refused < 150


@pytest.mark.parametrize(
    ("given", "heads", "degree"),
    [
        ({"cp": 8}, 8, 1),
        ({"cp": 8, "context": "allgather"}, 8, 1),
        ({"cp": 8, "context": "ulysses"}, 8, 8),
        ({"cp": 8, "context": "ring+ulysses"}, 8, 4),
        ({"cp": 8, "context": "ring+ulysses"}, 6, 2),
        ({"cp": 12, "context": "ring+ulysses"}, 9, 3),
        ({"cp": 4, "context": "ring+ulysses"}, 3, 0),
        ({"cp": 5, "context": "ring+ulysses"}, 5, 5),
        ({"cp": 5, "context": "ring+ulysses"}, 4, 0),
        ({"cp": 8, "context": "ring+ulysses", "ulysses": 2}, 8, 2),
        ({"cp": 1, "context": "ring+ulysses"}, 8, 1),
    ],
)
def test_the_degree_of_ulysses(given: dict[str, Any], heads: int, degree: int) -> None:
    assert ParallelConfig.model_validate(given).ulysses_degree(heads) == degree
