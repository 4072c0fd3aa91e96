"""Frozen weights under every kind of layout: equal to one process, unchanged, without state."""

from typing import Any

import pytest
import torch
from equal import assert_equal
from ranks import Ranks
from test_data_parallel import LADDER, compare, recipe_for, reference, trained

from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build_engine
from colonnade.launcher.verify.trace import Trace
from colonnade.parallel.world import World

FIRST = ["embedding.*", "norms.[01].*", "blocks.[01].*"]  # the graph begins after these
SOME = ["*.up", "*.q", "*.k_left", "*.k_right", "norms.*", "*.in_x", "*.router*"]
STEERED = {"router_score": "sigmoid", "router_bias": True, "router_bias_rate": 0.1}
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "first sub-blocks, ladder": ("M-*E", {**LADDER, **STEERED}, FIRST),
    "some of each sub-block": ("M*-E", STEERED, SOME),
    "tied embedding": ("*-m-", {"tied": True}, FIRST),
    "shared depth, σReparam": ("*E", {"repeat": 2, "share": True, "sigma_reparam": True}, SOME),
}


def frozen(
    pattern: str, layout: dict[str, Any], micro: int, names: list[str], **fields: Any
) -> Recipe:
    """The recipe of the other parity tests, with frozen parameters."""
    recipe = recipe_for(pattern, layout, micro, vocab=64, experts=4, **fields)
    return recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"freeze": tuple(names)})}
    )


@pytest.mark.parametrize("name", CASES)
def test_layouts_equal_one_process(ranks1: Ranks, ranks2: Ranks, ranks4: Ranks, name: str) -> None:
    pattern, fields, names = CASES[name]
    expected = reference(ranks1, frozen(pattern, {}, 16, names, **fields))

    def check(ranks: Ranks, layout: dict[str, Any], micro: int, **more: Any) -> None:
        recipe = frozen(pattern, layout, micro, names, **fields, **more)
        compare(ranks.run(trained, recipe)[0], expected)

    check(ranks2, {"tp": 2, "sequence": True}, 8)
    check(ranks4, {"dp_shard": 2, "dp_replicate": 2}, 2, recompute="block")
    check(ranks4, {"pp": 2, "cp": 2}, 4)
    check(ranks2, {"pp": 2, "schedule": "zb1p"}, 4, recompute="selective")
    if "E" in pattern:
        check(ranks4, {"ep": 2, "tp": 2}, 4)


@pytest.mark.parametrize("name", CASES)
def test_frozen_weights_stay_and_others_get_the_gradients_of_an_unfrozen_run(
    ranks1: Ranks, name: str
) -> None:
    pattern, fields, names = CASES[name]
    free = reference(ranks1, frozen(pattern, {}, 16, [], **fields))
    held = reference(ranks1, frozen(pattern, {}, 16, names, **fields))
    first = "step 1: "
    assert held.losses[f"{first}loss"] == free.losses[f"{first}loss"]
    gradients = {n: g for n, g in held.gradients.items() if n.startswith(first)}
    missing = {n for n in free.gradients if n.startswith(first)} - set(gradients)
    assert missing
    assert gradients
    assert_equal(gradients, {n: free.gradients[n] for n in gradients})
    kept = unchanged(held)
    assert {n.removeprefix(first) for n in missing} <= kept
    assert not {n.removeprefix(first) for n in gradients} & kept
    if "router_bias" in fields:
        assert any("router_bias" in n for n in kept) == (names is SOME)
    if "sigma_reparam" in fields:  # the singular vectors of weights that stay
        assert {"blocks.0.q_left", "blocks.0.q_right", "blocks.0.k_left"} <= kept
        assert "blocks.0.v_left" not in kept


def unchanged(trace: Trace) -> set[str]:
    """The names of parameters and buffers that are the same after both steps."""
    after = "after step 1: ", "after step 2: "
    names = {n.removeprefix(after[0]) for n in trace.parameters if n.startswith(after[0])}
    return {n for n in names if torch.equal(*(trace.parameters[step + n] for step in after))}


def elements_of(rank: int, size: int, recipe: Recipe) -> tuple[int, set[str]]:
    engine = build_engine(recipe, World(rank, size, torch.device("cpu")))
    state = engine.optimizer.named_state()
    return sum(t.numel() for t in state.values()), {n.rpartition(".")[0] for n in state}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_weights_have_no_optimizer_state(ranks1: Ranks, optimizer: str) -> None:
    def sizes(names: list[str]) -> tuple[int, set[str]]:
        recipe = frozen("M-*E", {}, 16, names)
        other = recipe.optimizer.model_copy(update={"name": optimizer})
        return ranks1.run(elements_of, recipe.model_copy(update={"optimizer": other}))[0]

    all_elements, all_names = sizes([])
    some_elements, some_names = sizes(FIRST)
    gone = all_names - some_names
    assert gone
    assert all(n.startswith(("embedding.", "norms.0", "norms.1", "blocks.")) for n in gone)
    assert some_elements < 0.7 * all_elements
