"""Reads layouts by name, such as `tp=2,dp_shard=2`, and puts a recipe on a layout."""

import itertools
import math
import re
import tomllib
from collections.abc import Mapping

from pydantic import ValidationError

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.hints import wrong_value
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import explicit_fields, unused_setting
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.pipeline.placement import micro_batches_fit

Layout = dict[str, object]  # fields of the `[parallel]` table
FIELDS = ParallelConfig.model_fields
NUMBERS = {name for name, field in FIELDS.items() if field.annotation in (int, int | None)}
DEGREES = NUMBERS - {"ulysses"}  # `ulysses` says how the ranks of cp are used
TABLES = dict.fromkeys(FIELDS, "parallel")  # by field: the table that has it


def parse_layout(text: str) -> Layout:
    """Parses a layout, `field=value,field=value`.

    Raises:
        UserError: a field that `[parallel]` does not have or that is named twice, or a bad value.
    """
    return parse_fields(text, TABLES, "")


def parse_fields(text: str, tables: Mapping[str, str], others: str) -> dict[str, object]:
    """Parses `field=value,field=value`.

    Args:
        text: what to parse.
        tables: by field, the table that has it; there are no others.
        others: names those that are not of `[parallel]`, for messages.

    Raises:
        UserError: a field that is unknown or named twice, or a bad value.
    """
    fields: dict[str, object] = {}
    for entry in re.split(r",(?![^\[]*\])", text):  # commas in brackets separate numbers
        name, _, value = (word.strip() for word in entry.partition("="))
        if name not in tables:
            raise UserError(
                f"--layout {text}: {name or 'an empty entry'} is no field of [parallel]{others}; "
                f"write field=value,field=value with fields of {', '.join(tables)}"
            )
        if name in fields:
            raise UserError(f"--layout {text}: {name} stands in it twice; leave one out")
        try:
            fields[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            fields[name] = value
    for name, value in fields.items():
        try:
            Recipe.model_validate({tables[name]: {name: value}})
        except ValidationError:
            remedy = wrong_value((tables[name], name), value)
            raise UserError(f"--layout {text}: {name} = {value!r}: {remedy}") from None
    return fields


def write_layout(layout: Mapping[str, object]) -> str:
    """The name of a layout, which `parse_layout` reads."""
    values = {k: str(v).lower() if isinstance(v, bool) else v for k, v in layout.items()}
    return ",".join(f"{name}={value}" for name, value in values.items()).replace(" ", "")


def with_layout(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe under a layout: the layout's degrees, and 1 or their default for all others.

    The other fields of the recipe's `[parallel]` table stay where they have an effect.
    """
    remaining = {
        n: value for n, value in explicit_fields(recipe.parallel) if n not in DEGREES | {*layout}
    }
    while True:
        parallel = ParallelConfig.model_validate(remaining | layout)
        changed = recipe.model_copy(update={"parallel": parallel})
        unused = [name for name in remaining if unused_setting(changed, f"parallel.{name}")]
        if not unused:
            return changed
        # another field may lose its effect with these: check again without them
        for name in unused:
            del remaining[name]


def accumulated(recipe: Recipe) -> int:
    """The number of micro-batches that a rank runs in a step at test size: 2, or as many as the
    schedule of a pipeline needs."""
    return next(n for n in itertools.count(2) if not micro_batches_fit(recipe.parallel, n))


def data_ranks(recipe: Recipe, ranks: int) -> int:
    """The number of data-parallel ranks, over which the batch is divided."""
    degrees = recipe.parallel.degrees(ranks)
    return math.prod(degrees[name] for name in ("dp_replicate", "dp_shard"))
