"""Generates docs/recipe.md, the reference of all fields, from the tables of a recipe.

python tests/fields.py          # prints the reference; --write writes the file
"""

import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from colonnade.launcher.recipe.hints import schema_of
from colonnade.launcher.recipe.tables import Recipe, SourceConfig, StageConfig
from colonnade.launcher.recipe.unused import conditions
from colonnade.models.config import ModelConfig, Options

REFERENCE = Path(__file__).parents[1] / "docs" / "recipe.md"
HEAD = """# Every field of a recipe

Made by `python tests/fields.py --write` of the tables themselves. A recipe is TOML; any field can
be set on the command line as `table.field=value`. A field without effect in a recipe is refused
where it is given; the last column says when that is.
"""


def kind(location: tuple[str | int, ...]) -> str:
    """Describes the type and the bounds of a field."""
    schema: dict[str, Any] = schema_of(location) or {}
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else None):
        return ", ".join(f"`{value}`" for value in values)
    words = {"integer": "whole number", "number": "number", "boolean": "true, false",
             "string": "text", "array": "list", "object": "table"}[schema["type"]]  # fmt: skip
    if (low := schema.get("minimum")) is not None:
        words += f" from {low:g}"
    if (low := schema.get("exclusiveMinimum")) is not None:
        words += f" above {low:g}"
    if (high := schema.get("exclusiveMaximum")) is not None:
        words += f" below {high:g}"
    high = schema.get("maximum")
    return words if high is None or high >= 2**20 else f"{words} to {high:g}"


def default(info: Any) -> str:
    """Returns the default of a field; empty if there is none or only the description gives it."""
    value = info.default
    if value is None or value is PydanticUndefined or isinstance(value, BaseModel | tuple):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def unused(field: str) -> str:
    """Returns the conditions under which a field is unused."""
    return "; ".join(reason for name, reason in conditions() if name == field)


def lines(table: type[BaseModel], name: str, fields: list[str], prefix: str) -> str:
    """Returns the Markdown table of some fields."""
    locations = {"source": ("data", "sources", 0), "stage": ("stage", 0)}
    location = locations.get(prefix, (name,))
    text = "| field | takes | default | what it is | no effect |\n|---|---|---|---|---|\n"
    for field in fields:
        info = table.model_fields[field]
        assert info.description, f"{name}.{field} has no description"
        cells = [f"`{field}`", kind((*location, field)), default(info), info.description]
        cells.append(unused(f"{prefix}.{field}"))
        text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return text


def reference() -> str:
    """Returns the text of the reference."""
    text = HEAD
    for name, info in Recipe.model_fields.items():
        table = info.annotation
        if name == "stage":
            text += stages()
        elif not (isinstance(table, type) and issubclass(table, BaseModel)):
            text += f"\n`{name}`, above all tables: {info.description}.\n"
        elif table is ModelConfig:
            text += "\n## `[model]`\n\nThe whole model; widths of sub-blocks in their groups.\n"
            for options in reversed([c for c in ModelConfig.__bases__ if issubclass(c, Options)]):
                names = [field for field in table.model_fields if field in options.model_fields]
                text += f"\n### {(options.__doc__ or '').rstrip('.')}\n\n"
                text += lines(table, name, names, "model")
        else:
            names = [f for f in table.model_fields if SourceConfig not in types_inside(table, f)]
            text += f"\n## `[{name}]`\n\n" + lines(table, name, names, name)
            if names != list(table.model_fields):
                text += "\n## `[[data.sources]]` and `[[data.validation_sources]]`\n\n"
                text += lines(
                    SourceConfig, "data.sources", list(SourceConfig.model_fields), "source"
                )
    return text


STAGES = """
## `[[stage]]`

Training stages, one after the other, in place of `train.steps`. What a stage does not set goes on
as in the one before; the first goes on with the recipe's tables. One that sets `lr`, `schedule`,
`warmup`, `decay` or `min_lr` begins a schedule; one that sets `seq_len`, `sources`, `packing`, or a
share or sources of validation to another value reads its data from the beginning, in another order.

"""
SETTABLE = "\nIn tables of its own, and in overrides as `stage.N.table.field`, a stage may set:\n\n"


def stages() -> str:
    """Returns the part on training stages."""
    tables = StageConfig().tables()
    own = [name for name in StageConfig.model_fields if name not in tables]
    text = STAGES + lines(StageConfig, "stage", own, "stage") + SETTABLE
    for name, table in tables.items():
        fields = ", ".join(f"`{field}`" for field in type(table).model_fields)
        text += f"- `[stage.{name}]`: {fields}\n"
    return text


def types_inside(table: type[BaseModel], field: str) -> tuple[Any, ...]:
    """Returns the type arguments of a field's type."""
    return get_args(table.model_fields[field].annotation)


if __name__ == "__main__":
    if "--write" in sys.argv:
        REFERENCE.write_text(reference(), encoding="utf-8")
    else:
        print(reference(), end="")
