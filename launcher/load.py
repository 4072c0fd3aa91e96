"""Reads recipes: TOML and overrides become a `Recipe`, or one error with every mistake in it."""

import copy
import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from colonnade.launcher.effects import no_effect
from colonnade.launcher.errors import Fault, RecipeError, UserError
from colonnade.launcher.recipe import Recipe
from colonnade.launcher.validate import findings

Location = tuple[int | str, ...]


def load_recipe(
    name_or_path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None
) -> Recipe:
    """The recipe in a TOML file, or the shipped one of that name, with overrides applied.

    An override is `table.field=value`: a TOML value, or text that is none (`train.precision=bf16`);
    entries of a list by their number (`data.sources.0.path=…`); without a value (`model.experts=`)
    it takes the field out, so that its default holds. `world_size` as in `validate`.

    Raises RecipeError with all mistakes at once, UserError if there is nothing to read.
    """
    document = _read(name_or_path)
    mistakes = _Mistakes()
    for text in overrides:
        _override(document, text, mistakes)
    recipe = _parse(document, mistakes)
    # A rule that looks at a refused field, whose default is in its place now, has nothing to say.
    faults = [f for f, involves in findings(recipe, world_size) if not mistakes.touch(involves)]
    if mistakes.faults or faults:
        raise RecipeError([*mistakes.faults, *faults])
    return recipe


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    folder = resources.files("colonnade.launcher.recipes")
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def _read(name_or_path: str | Path) -> dict[str, Any]:
    path, names = Path(name_or_path), recipe_names()
    try:
        if str(name_or_path) in names:
            folder = resources.files("colonnade.launcher.recipes")
            data = folder.joinpath(f"{name_or_path}.toml").read_bytes()
        else:
            data = path.read_bytes()
        return tomllib.loads(data.decode("utf-8-sig"))
    except FileNotFoundError:
        near = _near(path.stem, names)
        hint = f"did you mean {near}? " if near else ""
        raise UserError(
            f"recipe {name_or_path}: there is no such file and no recipe of that name; {hint}"
            f"give the path of a TOML file or one of {', '.join(names)}"
        ) from None
    except IsADirectoryError:
        raise UserError(
            f"recipe {name_or_path} is a folder; give the TOML file in it, such as recipe.toml"
        ) from None
    except OSError as error:
        raise UserError(
            f"recipe {name_or_path} cannot be read ({error.strerror}); check the path and its "
            "permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"recipe {name_or_path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            f"recipe {name_or_path} is not valid TOML: {error}; mend that line "
            '(text stands in quotes: precision = "bf16")'
        ) from error


class _Mistakes:
    """The faults of single fields, and the fields that were refused or meant."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.fields: set[str] = set()

    def add(self, field: str, value: object, remedy: str, meant: str | None = None) -> None:
        self.faults.append(Fault(field, copy.deepcopy(value), remedy))
        self.fields.update([field, meant or field])

    def touch(self, involves: Iterable[str]) -> bool:
        """Whether one of the fields, the table around it or a field in it is among them."""
        return any(
            f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")
            for a in involves
            for b in self.fields
        )


def _parse(document: dict[str, Any], mistakes: _Mistakes) -> Recipe:
    """The recipe without the fields that pydantic refuses, which become mistakes."""
    while True:
        try:
            return Recipe.model_validate(document)
        except ValidationError as error:
            errors = error.errors(include_url=False)
        around = {e["loc"][:n] for e in errors for n in range(len(e["loc"]))}
        for e in errors:
            location = e["loc"]
            if location in around:  # only says that something inside was wrong
                continue
            if e["type"] == "extra_forbidden":
                mistakes.add(_dotted(location), e["input"], *_unknown(location))
            else:
                mistakes.add(_dotted(location), e["input"], _remedy(location, e["input"]))
            _drop(document, location)


def _drop(document: Any, location: Location) -> None:
    """Takes a field out; for an entry of a list the whole list, as others keep their number."""
    while isinstance(location[-1], int):
        location = location[:-1]
    for key in location[:-1]:
        if key not in (document if isinstance(document, dict) else range(len(document))):
            return  # gone with another mistake
        document = document[key]
    document.pop(location[-1], None)


def _dotted(location: Location) -> str:
    return ".".join(map(str, location))


# Overrides


def _override(document: dict[str, Any], text: str, mistakes: _Mistakes) -> None:
    """Writes one override into the document."""
    field, equals, value = text.partition("=")
    keys = field.strip().split(".")
    if not equals or not all(keys):
        mistakes.add("override", text, "write it as table.field=value, such as train.steps=20")
        return
    location = tuple(int(key) if key.isdecimal() else key for key in keys)
    if _schema(location) is None:
        mistakes.add(_dotted(location), _value(value, location), *_unknown(location))
        return
    node: Any = document
    for key, after in pairwise((*location, "")):
        fits = isinstance(node, list) if isinstance(key, int) else isinstance(node, dict)
        if not fits:
            return  # the file has something else there, which is a mistake by itself
        if isinstance(key, int) and key >= len(node):
            if key > len(node):
                remedy = f"there are {len(node)} entries; {len(node)} would add the next"
                mistakes.add(_dotted(location), value, remedy)
                return
            node.append({})
        if after != "":
            default: Any = [{}] if isinstance(after, int) else {}
            node = node[key] if isinstance(key, int) else node.setdefault(key, default)
        elif value:
            node[key] = _value(value, location)
        elif isinstance(key, int) or key in node:
            del node[key]


def _value(text: str, location: Location) -> Any:
    """The value of an override: TOML, or the text itself if it is none or the field holds text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    is_text = (_schema(location) or {}).get("type") == "string"
    if parsed.keys() != {"value"} or (is_text and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]


# Remedies


def _schema(location: Location) -> dict[str, Any] | None:
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
            node = node.get("properties", {}).get(key)
    return node


def _fields(location: Location) -> list[str]:
    return list((_schema(location) or {}).get("properties", ()))


def _near(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, 1, cutoff)), None)


def _unknown(location: Location) -> tuple[str, str | None]:
    """Remedy for a field that does not exist, and the field that was meant, if one is near."""
    depth = next(n for n in range(len(location)) if _schema(location[: n + 1]) is None)
    table, name, rest = location[:depth], str(location[depth]), location[depth + 1 :]
    here = _fields(table)
    if not here:
        return f"{_dotted(table)} has no entry of that name; set it as a whole", None
    elsewhere = {f: _dotted((*t, f)) for t in _TABLES if t != table for f in _fields(t)}
    if name in elsewhere:
        meant = elsewhere[name]
    elif near := _near(name, here):
        meant = _dotted((*table, near, *rest))
    elif near := _near(name, elsewhere, cutoff=0.75):
        meant = elsewhere[near]
    else:
        place = f"[{_dotted(table)}]" if table else "a recipe"
        return f"unknown; the fields of {place} are {', '.join(here)}", None
    return f"unknown; did you mean {meant}?", meant


def _remedy(location: Location, value: object) -> str:
    """What to give in place of a value of the wrong type or out of bounds."""
    schema = _schema(location) or {}
    kind, names = schema.get("type"), schema.get("enum") or [schema.get("const")]
    if names != [None]:
        near = _near(str(value), map(str, names))
        hint = f"; did you mean {near}?" if near else ""
        return f"give one of {', '.join(map(str, names))}{hint}"
    if kind == "array" or isinstance(location[-1], int):
        name = _dotted(location if kind == "array" else location[:-1])
        return f"write each entry as a table, [[{name}]]"
    if kind == "object":
        return f"write it as a table, [{_dotted(location)}]"
    if kind == "string":
        return f"give text: {schema.get('description', 'in quotes')}"
    if kind == "boolean":
        return "give true or false, without quotes"
    bounds = [f"{word} {schema[key]:g}" for key, word in _BOUNDS.items() if key in schema]
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


# Writing


def dump_recipe(recipe: Recipe) -> str:
    """The recipe in full as TOML, without fields that have no effect in it.

    `load_recipe` reads an equal recipe from it, if `recipe` is valid.
    """
    return "\n".join(_lines(recipe, recipe, ())).lstrip("\n") + "\n"


def _lines(recipe: Recipe, table: BaseModel, location: Location) -> Iterator[str]:
    values = {name: getattr(table, name) for name in type(table).model_fields}
    for name, value in values.items():
        field = _dotted((*location, name))
        if isinstance(value, BaseModel | tuple) or value is None or no_effect(recipe, field):
            continue
        yield f"{name} = {_toml(value)}"
    for name, value in values.items():
        inner = (*location, name)
        if isinstance(value, BaseModel):
            yield from ("", f"[{_dotted(inner)}]", *_lines(recipe, value, inner))
        elif isinstance(value, tuple):
            for index, entry in enumerate(value):
                yield from ("", f"[[{_dotted(inner)}]]", *_lines(recipe, entry, (*inner, index)))


def _toml(value: str | int | float | bool) -> str:
    """A scalar; JSON and TOML write them alike, but TOML wants DEL escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
