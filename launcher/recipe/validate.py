"""The one list of what is valid: rules across the fields of a recipe, checked on any machine.

Types and bounds of single fields stand with the fields (`launcher.recipe.tables`, `models.config`),
settings without effect in `launcher.recipe.unused`, rules in `launcher.recipe.rules`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules import (
    attention,
    base_model,
    context,
    experts,
    layout,
    row,
    run,
    sizes,
)
from colonnade.launcher.recipe.rules.base import Rule
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import given, involved, no_effect

RULES: list[tuple[tuple[str, ...], Rule]] = [
    *row.RULES,
    *attention.RULES,
    *sizes.RULES,
    *experts.RULES,
    *base_model.RULES,
    *layout.RULES,
    *context.RULES,
    *run.RULES,
]


class Finding(NamedTuple):
    """A fault, and the fields it was concluded from."""

    fault: Fault
    involves: tuple[str, ...]


def validate(recipe: Recipe, world_size: int | None) -> list[Fault]:
    """All faults of a recipe on `world_size` ranks; None skips the rules about ranks.

    A field counts as set if it was given, so rebuild a recipe from another one with
    `model_copy` or `model_dump(exclude_unset=True)`.
    """
    return [finding.fault for finding in findings(recipe, world_size)]


def findings(recipe: Recipe, world_size: int | None) -> Iterator[Finding]:
    """As `validate`, each fault with the fields it involves."""
    for involves, check in RULES:
        for fault in check(recipe, world_size):
            yield Finding(fault, (*involves, fault.field))
    for field, value in given(recipe):
        if effect := no_effect(recipe, field):
            remedy = f"has no effect {effect.otherwise}; leave it out (in an override: {field}=)"
            yield Finding(Fault(field, value, remedy), (*involved(effect, field), field))
