"""Reads layouts by name, such as `tp=2,dp_shard=2`; lists the layouts of a number of ranks."""

import itertools
import math
import re
import tomllib
from collections.abc import Iterator

from pydantic import ValidationError

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.hints import wrong_value
from colonnade.launcher.recipe.rules.base import divisors
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import explicit_fields, unused_setting
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.pipeline.placement import micro_batches_fit

Layout = dict[str, object]  # fields of the `[parallel]` table
FIELDS = ParallelConfig.model_fields
NUMBERS = {name for name, field in FIELDS.items() if field.annotation in (int, int | None)}
DEGREES = NUMBERS - {"ulysses"}  # `ulysses` says how the ranks of cp are used


def parse_layout(text: str) -> Layout:
    """Parses a layout, `field=value,field=value`.

    Raises:
        UserError: a field that `[parallel]` does not have or that is named twice, or a bad value.
    """
    layout: Layout = {}
    for entry in re.split(r",(?![^\[]*\])", text):  # commas in brackets separate numbers
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


def covering_layouts(ranks: int, experts: int = 0) -> Iterator[Layout]:
    """All factorisations of `ranks` into dp_replicate, dp_shard, cp and tp.

    With tensor parallelism, each comes with and without sequence parallelism; with context
    parallelism as well, only with it. Where there are `experts`, each comes also with these on as
    many ranks as they divide over, each expert sharded over tp ranks, and on one rank.
    """
    for tp in reversed(divisors(ranks)):
        for cp in reversed(divisors(ranks // tp)):
            sequence = () if tp == 1 else (True,) if cp > 1 else (True, False)
            for shard in reversed(divisors(ranks // tp // cp)):
                replicate = ranks // tp // cp // shard
                degrees = {"tp": tp, "cp": cp, "dp_shard": shard, "dp_replicate": replicate}
                layout: Layout = {n: d for n, d in degrees.items() if d > 1 or n == "dp_shard"}
                yield from ([layout | {"sequence": value} for value in sequence] or [layout])
                if (ep := math.gcd(experts, cp * shard)) > 1 and experts:
                    yield layout | {"ep": ep}
                if experts and tp > 1:
                    yield layout | {"ep": math.gcd(experts, tp * cp * shard), "etp": 1}


def accumulated(recipe: Recipe) -> int:
    """The number of micro-batches that a rank runs in a step at test size: 2, or as many as the
    schedule of a pipeline needs."""
    return next(n for n in itertools.count(2) if not micro_batches_fit(recipe.parallel, n))


def data_ranks(recipe: Recipe, ranks: int) -> int:
    """The number of data-parallel ranks, over which the batch is divided."""
    degrees = recipe.parallel.degrees(ranks)
    return math.prod(degrees[name] for name in ("dp_replicate", "dp_shard"))
