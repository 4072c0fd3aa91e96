"""A case of `verify`: a layout, with residual wiring, recomputation and offload under it."""

from collections.abc import Mapping
from dataclasses import dataclass

from colonnade.launcher.recipe.tables import Recipe, changed
from colonnade.launcher.recipe.unused import unused_setting, without_unused
from colonnade.launcher.verify.layouts import (
    TABLES,
    Layout,
    parse_fields,
    with_layout,
    write_layout,
)

# by field: the table that has it
OPTIONS = {"residual": "model", "recompute": "train", "offload": "optimizer"}


@dataclass(frozen=True)
class Case:
    """What is compared with one process; `str` gives its name, which `parse` reads.

    Attributes:
        layout: fields of the `[parallel]` table.
        residual: `model.residual`, also of the one process; None: the recipe's.
        recompute: `train.recompute`, of the ranks alone; None: the recipe's.
        offload: `optimizer.offload`, of the ranks alone; None: the recipe's.
    """

    layout: Layout
    residual: str | None = None
    recompute: str | None = None
    offload: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Parses a case, such as `tp=2,dp_shard=2,residual=ladder,recompute=block`.

        Raises:
            UserError: a field that is unknown or named twice, or a bad value.
        """
        fields = parse_fields(text, TABLES | OPTIONS, ", nor residual, recompute or offload")
        return cls.of(fields)

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> "Case":
        """The case of these fields, whose values have been checked."""
        layout = {name: value for name, value in fields.items() if name not in OPTIONS}
        options = {name: str(value) for name, value in fields.items() if name in OPTIONS}
        return cls(layout, **options)

    def __str__(self) -> str:
        options = {name: getattr(self, name) for name in OPTIONS}
        return write_layout(self.layout | {n: value for n, value in options.items() if value})


def with_case(recipe: Recipe, case: Case) -> Recipe:
    """The recipe under a case."""
    placed = rewired(with_layout(recipe, case.layout), case.residual)
    for name, value in (("recompute", case.recompute), ("offload", case.offload)):
        if value is not None:
            placed = with_option(placed, OPTIONS[name], name, value)
    return placed


def with_option(recipe: Recipe, table: str, name: str, value: object) -> Recipe:
    """The recipe with a field of a table, without those of its fields that lose their effect."""
    before = getattr(recipe, table)
    placed = recipe.model_copy(update={table: changed(before, {name: value})})
    unused = {
        field
        for field in before.model_fields_set
        if unused_setting(placed, f"{table}.{field}")
        and not unused_setting(recipe, f"{table}.{field}")
    }
    used = changed(getattr(placed, table), {}, remove=unused)
    return placed.model_copy(update={table: used})


def rewired(recipe: Recipe, residual: str | None) -> Recipe:
    """The recipe with this residual wiring, without fields that have no effect under it."""
    if residual in (None, recipe.model.residual):
        return recipe
    model = without_unused(recipe.model.changed(residual=residual))
    return recipe.model_copy(update={"model": model})
