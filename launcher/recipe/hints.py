"""What to give in place of a field that does not exist or a value that is refused."""

import difflib
from collections.abc import Iterable
from typing import Any

from colonnade.launcher.recipe.tables import Recipe

Location = tuple[int | str, ...]


def dotted(location: Location) -> str:
    """A location as overrides write it."""
    return ".".join(map(str, location))


def schema_of(location: Location) -> dict[str, Any] | None:
    """JSON schema of a field, or None if there is no such field."""
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


def _fields(location: Location) -> list[str]:
    return list((schema_of(location) or {}).get("properties", ()))


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name most like a given one, if any is like it."""
    return next(iter(difflib.get_close_matches(name, names, 1, cutoff)), None)


def unknown(location: Location) -> tuple[str, str | None]:
    """Remedy for a field that does not exist, and the field that was meant, if one is near."""
    depth = next(n for n in range(len(location)) if schema_of(location[: n + 1]) is None)
    table, name, rest = location[:depth], str(location[depth]), location[depth + 1 :]
    here = _fields(table)
    if not here:
        return f"{dotted(table)} has no entry of that name; set it as a whole", None
    elsewhere = {f: dotted((*t, f)) for t in _TABLES if t != table for f in _fields(t)}
    if name in elsewhere:
        meant = elsewhere[name]
    elif near := nearest(name, here):
        meant = dotted((*table, near, *rest))
    elif near := nearest(name, elsewhere, cutoff=0.75):
        meant = elsewhere[near]
    else:
        place = f"[{dotted(table)}]" if table else "a recipe"
        return f"unknown; the fields of {place} are {', '.join(here)}", None
    return f"unknown; did you mean {meant}?", meant


def bound(value: float) -> str:
    """A bound as people write it: a power of ten only where digits say less."""
    return f"{value:g}" if isinstance(value, float) or value < 10**6 else f"{value:,}"


def remedy_for(location: Location, value: object) -> str:
    """What to give in place of a value of the wrong type or out of bounds."""
    schema = schema_of(location) or {}
    kind, names = schema.get("type"), schema.get("enum") or [schema.get("const")]
    if names != [None]:
        near = nearest(str(value), map(str, names))
        hint = f"; did you mean {near}?" if near else ""
        return f"give one of {', '.join(map(str, names))}{hint}"
    if kind == "array" or isinstance(location[-1], int):
        whole = location if kind == "array" else location[:-1]
        if (schema_of((*whole, 0)) or {}).get("type") == "integer":
            return "give whole numbers in brackets, such as [0, 2]"
        return f"write each entry as a table, [[{dotted(whole)}]]"
    if kind == "object":
        of = ", a whole number for each name" if schema.get("additionalProperties") else ""
        return f"write it as a table, [{dotted(location)}]{of}"
    if kind == "string":
        longest = f", at most {schema['maxLength']} characters" if "maxLength" in schema else ""
        return f"give text: {schema.get('description', 'in quotes')}{longest}"
    if kind == "boolean":
        return "give true or false, without quotes"
    limits = {key: schema[key] for key in _BOUNDS if key in schema}
    number = value if isinstance(value, int | float) else 0
    if number <= limits.get("maximum", 0) >= 2**20:  # one that guards against slips: no news
        del limits["maximum"]
    bounds = [f"{_BOUNDS[key]} {bound(limit)}" for key, limit in limits.items()]
    what = " ".join(["a whole number" if kind == "integer" else "a finite number", *bounds[:1]])
    what = " and ".join([what, *bounds[1:]])
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        what += f", such as {int(value)}"
    return f"give {what}" + (", without quotes" if isinstance(value, str) else "")


_SCHEMA = Recipe.model_json_schema()
_TABLES: tuple[Location, ...] = (
    *((name,) for name in Recipe.model_fields if _fields((name,))),
    ("data", "sources", 0),
)
_BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "of at most",
    "exclusiveMaximum": "below",
}
