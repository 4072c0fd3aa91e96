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
    guard,
    layout,
    pipeline,
    row,
    run,
    sizes,
    stages,
)
from colonnade.launcher.recipe.rules.base import Rule
from colonnade.launcher.recipe.stages import (
    field_in_force,
    field_to_change,
    set_by,
    setter,
    stages_from,
    training_stages,
    unused_in_run,
)
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import explicit_fields, involved_fields

NamedRule = tuple[tuple[str, ...], Rule]  # the fields that it looks at, and the rule
RULES: list[NamedRule] = [
    *row.RULES,
    *attention.RULES,
    *sizes.RULES,
    *experts.RULES,
    *base_model.RULES,
    *layout.RULES,
    *pipeline.RULES,
    *context.RULES,
    *run.RULES,
    *guard.RULES,
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


def findings(recipe: Recipe, world_size: int | None, step: int = 0) -> Iterator[Finding]:
    """Yields the faults that `validate` returns, each with the fields it involves; of a run that is
    at `step` those of training stages that have ended are none."""
    if recipe.stage:
        of_all = list(of_rules(stages.RULES, recipe, world_size))
        yield from of_all
        if not any(finding.fault.field.startswith("stage.") for finding in of_all):
            yield from of_stages(recipe, world_size, step)
    else:
        yield from of_rules(RULES, recipe, world_size)
    for field, value in explicit_fields(recipe):
        if unused := unused_in_run(recipe, field):
            remedy = f"has no effect {unused.otherwise}; leave it out (in an override: {field}=)"
            yield Finding(Fault(field, value, remedy), (*involved_fields(unused, field), field))


def of_rules(rules: list[NamedRule], recipe: Recipe, world_size: int | None) -> Iterator[Finding]:
    """Yields the faults that rules find."""
    for involves, check in rules:
        for fault in check(recipe, world_size):
            yield Finding(fault, (*involves, fault.field))


def of_stages(recipe: Recipe, world_size: int | None, step: int) -> Iterator[Finding]:
    """Yields the faults of every training stage's recipe; one of fields that the stage does not set
    and that an earlier stage has had, once."""
    seen: list[Fault] = []
    for stage in stages_from(training_stages(recipe), step):
        own = set_by(recipe.stage[stage.index])
        for fault, involves in of_rules(RULES, stage.checked, world_size):
            if fault in seen and not any(setter(name, own) for name in involves):
                continue
            seen.append(fault)
            field = field_to_change(recipe, stage.index, fault.field)
            remedy = fault.remedy.replace(fault.field, field) + f" (in stage {stage.index})"
            others = (field_in_force(recipe, stage.index, name) for name in involves)
            yield Finding(Fault(field, fault.value, remedy), (field, *others))
