"""Layouts by name, as `tp=2,dp_shard=2`, and a set that covers all there are for some ranks."""

import math
import tomllib
from collections.abc import Iterator

from pydantic import ValidationError

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.hints import wrong_value
from colonnade.launcher.recipe.rules.base import divisors
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import explicit_fields, unused_setting
from colonnade.parallel.config import ParallelConfig

Layout = dict[str, object]  # fields of the `[parallel]` table
FIELDS = ParallelConfig.model_fields
NUMBERS = {name for name, field in FIELDS.items() if field.annotation in (int, int | None)}
DEGREES = NUMBERS - {"ulysses"}  # which is a way to use the ranks of cp


def parse_layout(text: str) -> Layout:
    """The layout that `field=value,field=value` names.

    Raises:
        UserError: a field that `[parallel]` does not have or that is named twice, or a bad value.
    """
    layout: Layout = {}
    for entry in text.split(","):
        name, _, value = (word.strip() for word in entry.partition("="))
        if name not in FIELDS:
            raise UserError(
                f"--layout {text}: {name or 'an empty entry'} is no field of [parallel]; write "
                f"field=value,field=value with fields of {', '.join(FIELDS)}"
            )
        if name in layout:
            raise UserError(f"--layout {text}: {name} stands in it twice; leave one out")
        try:
            layout[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            layout[name] = value
    try:
        ParallelConfig.model_validate(layout)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        remedy = wrong_value(("parallel", name), layout[name])
        raise UserError(f"--layout {text}: {name} = {layout[name]!r}: {remedy}") from None
    return layout


def write_layout(layout: Layout) -> str:
    """A layout as `parse_layout` reads it."""
    values = {k: str(v).lower() if isinstance(v, bool) else v for k, v in layout.items()}
    return ",".join(f"{name}={value}" for name, value in values.items())


def laid_out(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe under a layout: its degrees are those named, all others 1 or their default.

    Of the recipe's own `[parallel]` table there remains what is no degree and has an effect.
    """
    own = {n: v for n, v in explicit_fields(recipe.parallel) if n not in DEGREES | {*layout}}
    while True:
        parallel = ParallelConfig.model_validate(own | layout)
        made = recipe.model_copy(update={"parallel": parallel})
        idle = [name for name in own if unused_setting(made, f"parallel.{name}")]
        if not idle:
            return made
        for name in idle:
            del own[name]


def covering(ranks: int) -> Iterator[Layout]:
    """Every way to factor the ranks into data, sharded-data, context and tensor parallelism.

    Those with tensor parallelism with and without sequence parallelism; with context parallelism
    beside it, only with.
    """
    for tp in reversed(divisors(ranks)):
        for cp in reversed(divisors(ranks // tp)):
            sequence = () if tp == 1 else (True,) if cp > 1 else (True, False)
            for shard in reversed(divisors(ranks // tp // cp)):
                replicate = ranks // tp // cp // shard
                degrees = {"tp": tp, "cp": cp, "dp_shard": shard, "dp_replicate": replicate}
                named: Layout = {n: d for n, d in degrees.items() if d > 1 or n == "dp_shard"}
                yield from ([named | {"sequence": cut} for cut in sequence] or [named])


def data_ranks(recipe: Recipe, ranks: int) -> int:
    """How many ranks divide the batch."""
    degrees = recipe.parallel.degrees(ranks)
    return math.prod(degrees[name] for name in ("dp_replicate", "dp_shard"))
