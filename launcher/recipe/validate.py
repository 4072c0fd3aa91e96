"""Validates a recipe: runs all rules across its fields, on any machine.

Types and bounds of single fields are defined with the fields (`launcher.recipe.tables`,
`models.config`), unused settings in `launcher.recipe.unused`, rules in `launcher.recipe.rules`.
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
    pipeline,
    row,
    run,
    sizes,
)
from colonnade.launcher.recipe.rules.base import Rule
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import explicit_fields, involved_fields, unused_setting

RULES: list[tuple[tuple[str, ...], Rule]] = [
    *row.RULES,
    *attention.RULES,
    *sizes.RULES,
    *experts.RULES,
    *base_model.RULES,
    *layout.RULES,
    *pipeline.RULES,
    *context.RULES,
    *run.RULES,
]


class Finding(NamedTuple):
    """A fault, and the fields that the rule which reports it looks at."""

    fault: Fault
    involves: tuple[str, ...]


def validate(recipe: Recipe, world_size: int | None) -> list[Fault]:
    """Returns all faults of a recipe on `world_size` ranks; None skips the rules about ranks.

    A field counts as set if it was given explicitly (pydantic's `model_fields_set`), so derive a
    recipe from another one with `model_copy` or `model_dump(exclude_unset=True)`.
    """
    return [finding.fault for finding in findings(recipe, world_size)]


def findings(recipe: Recipe, world_size: int | None) -> Iterator[Finding]:
    """Yields the faults that `validate` returns, each with the fields it involves."""
    for involves, check in RULES:
        for fault in check(recipe, world_size):
            yield Finding(fault, (*involves, fault.field))
    for field, value in explicit_fields(recipe):
        if unused := unused_setting(recipe, field):
            remedy = f"has no effect {unused.otherwise}; leave it out (in an override: {field}=)"
            yield Finding(Fault(field, value, remedy), (*involved_fields(unused, field), field))
