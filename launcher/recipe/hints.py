"""Hints: what to write in place of a field that does not exist or of a value that is refused."""

import difflib
from collections.abc import Iterable
from typing import Any

from colonnade.launcher.recipe.tables import Recipe

Location = tuple[int | str, ...]


def dotted(location: Location) -> str:
    """Returns a location as overrides write it, such as `data.sources.0.path`."""
    return ".".join(map(str, location))


def schema_of(location: Location) -> dict[str, Any] | None:
    """Returns the JSON schema of a field, or None if the recipe has no such field."""
    node: dict[str, Any] | None = _SCHEMA
    for key in (*location, None):
        if node is None:
            return None
        node = next((n for n in node.get("anyOf", [node]) if n.get("type") != "null"), node)
        if "$ref" in node:
            node = _SCHEMA["$defs"][node["$ref"].rpartition("/")[2]]
        if isinstance(key, int):
            node = node.get("items")
        elif key is not None:
            node = node.get("properties", {}).get(key) or node.get("additionalProperties") or None
    return node


def _fields_of(location: Location) -> list[str]:
    """Returns the names of a table's fields; an empty list for anything that is not a table."""
    return list((schema_of(location) or {}).get("properties", ()))


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the name that is most similar to the given one, or None if none is similar."""
    return next(iter(difflib.get_close_matches(name, names, 1, cutoff)), None)


def unknown_field(location: Location) -> tuple[str, str | None]:
    """Returns the remedy for a field that does not exist, and the field that was probably meant.

    The second is None if no field has a similar name.
    """
    depth = next(n for n in range(len(location)) if schema_of(location[: n + 1]) is None)
    table, name, inner = location[:depth], str(location[depth]), location[depth + 1 :]
    names = _fields_of(table)
    if not names:
        return f"{dotted(table)} has no entry of that name; set it as a whole", None
    others: list[Location] = [t for t in _TABLES if t != table]
    if location[0] == "stage":  # the likeliest are the tables of the same training stage
        others += [(*location[:2], t) for t in _fields_of(location[:2])]
    in_other_tables = {f: dotted((*t, f)) for t in others for f in _fields_of(t)}
    # The same name in another table is likelier than a similar name in this one.
    if name in in_other_tables:
        meant = in_other_tables[name]
    elif near := nearest(name, names):
        meant = dotted((*table, near, *inner))
    elif near := nearest(name, in_other_tables, cutoff=0.75):
        meant = in_other_tables[near]
    else:
        title = f"[{dotted(table)}]" if table else "a recipe"
        return f"unknown; the fields of {title} are {', '.join(names)}", None
    return f"unknown; did you mean {meant}?", meant


def format_bound(value: float) -> str:
    """Writes a bound as people do: `1e+30` for large floats, `1,048,576` for large integers."""
    return f"{value:g}" if isinstance(value, float) or value < 10**6 else f"{value:,}"


def wrong_value(location: Location, value: object) -> str:
    """Returns the remedy for a value that has the wrong type or is out of bounds."""
    schema = schema_of(location) or {}
    kind, choices = schema.get("type"), schema.get("enum") or [schema.get("const")]
    if choices != [None]:
        near = nearest(str(value), map(str, choices))
        hint = f"; did you mean {near}?" if near else ""
        return f"give one of {', '.join(map(str, choices))}{hint}"
    if kind == "array" or isinstance(location[-1], int):
        array = location if kind == "array" else location[:-1]
        if (schema_of((*array, 0)) or {}).get("type") == "integer":
            return "give whole numbers in brackets, such as [0, 2]"
        return f"write each entry as a table, [[{dotted(array)}]]"
    if kind == "object":
        entries = ", a whole number for each name" if schema.get("additionalProperties") else ""
        return f"write it as a table, [{dotted(location)}]{entries}"
    if kind == "string":
        limit = f", at most {schema['maxLength']} characters" if "maxLength" in schema else ""
        return f"give text: {schema.get('description', 'in quotes')}{limit}"
    if kind == "boolean":
        return "give true or false, without quotes"
    limits = {key: schema[key] for key in _BOUNDS if key in schema}
    number = value if isinstance(value, int | float) else 0
    # A maximum from 2^20 on only guards against typing errors; a value below it is not at fault.
    if number <= limits.get("maximum", 0) >= 2**20:
        del limits["maximum"]
    bounds = [f"{_BOUNDS[key]} {format_bound(limit)}" for key, limit in limits.items()]
    wanted = " ".join(["a whole number" if kind == "integer" else "a finite number", *bounds[:1]])
    wanted = " and ".join([wanted, *bounds[1:]])
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        wanted += f", such as {int(value)}"
    return f"give {wanted}" + (", without quotes" if isinstance(value, str) else "")


_SCHEMA = Recipe.model_json_schema()
_TABLES: tuple[Location, ...] = (
    *((name,) for name in Recipe.model_fields if _fields_of((name,))),
    ("data", "validation_sources", 0),
    ("data", "sources", 0),  # its fields are likelier meant: the last of two tables is named
)
_BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "of at most",
    "exclusiveMaximum": "below",
}
