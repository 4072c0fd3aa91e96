"""Numbers of ranks that do not divide the batch, against one process."""

from typing import Any

import pytest
from ranks import Ranks, pool
from test_data_parallel import MODELS, compare, recipe_for, reference, trained

from colonnade.launcher.errors import RecipeError
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.stages import training_stages
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.schedule import micro_batches, trained_micro_batches

# On two of four data-parallel ranks, or on one of two, a micro-batch is repeated.
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp_shard=4": {},
    "HSDP": {"dp_replicate": 2},
    "tp=2": {"tp": 2},
    "cp=2": {"cp": 2},
    "ep=2": {"ep": 2},
    "pp=2, 1f1b": {"pp": 2},
    "pp=2, zbv": {"pp": 2, "schedule": "zbv"},
}


def of_six_rows(recipe: Recipe) -> Recipe:
    train = recipe.train.model_copy(update={"global_batch": 6})
    return recipe.model_copy(update={"train": train})


@pytest.mark.parametrize("name", MODELS)
def test_three_ranks_equal_one_process(ranks1: Ranks, name: str) -> None:
    """Eight micro-batches: one of three ranks repeats one."""
    pattern, fields = MODELS[name]
    recipe = recipe_for(pattern, {"elastic": True}, 2, **fields)
    expected = reference(ranks1, recipe_for(pattern, {}, 16, **fields))
    compare(pool(3).run(trained, recipe)[0], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_equal_one_process(ranks1: Ranks, ranks4: Ranks, layout: str) -> None:
    """Three micro-batches: of four data-parallel ranks one has none of its own."""
    fields: dict[str, Any] = {
        "experts": 4, "heads": 4, "router_score": "sigmoid", "router_bias": True,
        "router_bias_rate": 0.1, "balance_sequence": 0.1, "capacity": 1.0, "logit_z": 0.1,
    }  # fmt: skip
    if layout == "tp=2":
        fields["vocab"] = 62
    recipe = of_six_rows(recipe_for("M-*E", {"elastic": True, **LAYOUTS[layout]}, 2, **fields))
    expected = reference(ranks1, of_six_rows(recipe_for("M-*E", {}, 6, **fields)))
    compare(ranks4.run(trained, recipe)[0], expected)


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_sample_is_trained_once_whatever_the_ranks(count: int, ranks: int) -> None:
    recipe = recipe_for("*-", {"elastic": True}, 2)
    train = recipe.train.model_copy(update={"global_batch": 2 * count})
    (stage,) = training_stages(recipe.model_copy(update={"train": train}))
    read = [micro_batches(stage, 3, rank, ranks) for rank in range(ranks)]
    trained_on = [trained_micro_batches(stage, 3, rank, ranks) for rank in range(ranks)]
    samples = [
        s for of_rank, n in zip(read, trained_on, strict=True) for b in of_rank[:n] for s in b
    ]
    assert sorted(samples) == list(range(6 * count, 8 * count))
    assert len({len(of_rank) for of_rank in read}) == 1  # passes are collective
    for of_rank in read:  # as a stream must be read
        flat = [s for of_batch in of_rank for s in of_batch]
        assert flat == sorted(set(flat))


def test_without_elastic_the_ranks_divide_the_batch() -> None:
    batch = ["train.global_batch=16", "train.micro_batch=2"]
    with pytest.raises(RecipeError, match=r"train.global_batch = 16: .*parallel.elastic to true"):
        load_recipe("quickstart", batch, 3)
    assert load_recipe("quickstart", [*batch, "parallel.elastic=true"], 3).parallel.elastic
    with pytest.raises(RecipeError, match=r"multiple of train\.micro_batch = 3"):
        load_recipe("quickstart", [*batch, "parallel.elastic=true", "train.micro_batch=3"], 3)
