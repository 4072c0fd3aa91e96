"""Reads recipes: TOML and overrides become a `Recipe`, or one error with every mistake in it."""

import copy
import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from colonnade.launcher.errors import Fault, RecipeError, UserError
from colonnade.launcher.recipe.hints import (
    Location,
    dotted,
    nearest,
    remedy_for,
    schema_of,
    unknown,
)
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import given, no_effect
from colonnade.launcher.recipe.validate import findings
from colonnade.models.options import Formula


def load_recipe(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    tell: Callable[[str], object] | None = None,
) -> Recipe:
    """The recipe in a TOML file, or the shipped one of that name, with overrides applied.

    An override is `table.field=value`: a TOML value, or text that is none (`train.precision=bf16`);
    entries of a list by their number (`data.sources.0.path=…`); without a value (`model.experts=`)
    it takes the field out, so that its default holds. `world_size` as in `validate`.

    What has an effect in the file, and none with these overrides, is taken out: a file may set the
    heads of an attention that an override of the pattern removes. `tell` gets a line that names it.

    Raises RecipeError with all mistakes at once, UserError if there is nothing to read.
    """
    document = _read(name_or_path)
    mistakes = _Mistakes()
    at_rest = _effective(document) if overrides else set()
    steps_at_rest = _integer(document, "train", "steps")
    typed = [_override(document, text, mistakes) for text in overrides]
    shortened = _in_proportion(document, steps_at_rest, {field for field in typed if field})
    at_rest -= {f for f in at_rest for t in typed if t and f"{f}.".startswith(f"{t}.")}
    recipe, unused = _without_unused(_parse(document, mistakes), document, at_rest)
    # A rule that looks at a refused field, whose default is in its place now, has nothing to say.
    faults = [f for f, involves in findings(recipe, world_size) if not mistakes.touch(involves)]
    if mistakes.faults or faults:
        raise RecipeError([*mistakes.faults, *faults])
    if tell is not None:
        if unused:
            tell(f"not used with these overrides: {', '.join(unused)}")
        if shortened:
            tell(f"in proportion to train.steps: {', '.join(shortened)}")
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
        near = nearest(path.stem, names)
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
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
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
            if location in around or e["type"] == "default_factory_not_called":
                continue  # only says that something inside, or in a formula, was wrong
            if e["type"] == "extra_forbidden":
                mistakes.add(dotted(location), e["input"], *unknown(location))
            else:
                mistakes.add(dotted(location), e["input"], remedy_for(location, e["input"]))
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


# Overrides


def _effective(document: dict[str, Any]) -> set[str]:
    """The fields that a file sets and that have an effect in it."""
    recipe = _parse(copy.deepcopy(document), _Mistakes())
    return {field for field, _ in given(recipe) if not no_effect(recipe, field)}


def _without_unused(
    recipe: Recipe, document: dict[str, Any], fields: set[str]
) -> tuple[Recipe, list[str]]:
    """The recipe without those of the fields that have no effect in it, and their names."""
    out: list[str] = []
    while unused := [f for f, _ in given(recipe) if f in fields and no_effect(recipe, f)]:
        for field in unused:
            _drop(document, _location(field))
        out += unused
        recipe = Recipe.model_validate(document)
    return recipe, out


def _integer(document: dict[str, Any], table: str, name: str) -> int | None:
    """The whole number that a document sets for a field, if it is one."""
    fields = document.get(table)
    value = fields.get(name) if isinstance(fields, dict) else None
    return value if type(value) is int else None


def _in_proportion(document: dict[str, Any], before: int | None, typed: set[str]) -> list[str]:
    """Shortens what a file sets for a number of steps, where an override makes them too few.

    Returns the fields, with their new values. A field that was typed stays as it is.
    """
    steps = _integer(document, "train", "steps")
    if "train.steps" not in typed or not steps or not before or not 0 < steps < before:
        return []
    fields = (("optimizer", "warmup"), ("optimizer", "decay"), ("train", "ramp_steps"))
    lengths = {field: _integer(document, *field) or 0 for field in fields}
    warmup, decay, ramp = lengths.values()
    if warmup + decay <= steps and ramp <= steps:
        return []
    lengths = {f: length for f, length in lengths.items() if length and ".".join(f) not in typed}
    for (table, name), length in lengths.items():
        document[table][name] = max(length * steps // before, 1 if name == "decay" else 0)
    if document.get("train", {}).get("ramp_steps") == 0:  # no ramp is left of it
        document["train"].pop("ramp_batch", None)
    return [f"{table}.{name} = {document[table][name]}" for table, name in lengths]


def _location(field: str) -> Location:
    return tuple(int(key) if key.isdecimal() else key for key in field.split("."))


def _override(document: dict[str, Any], text: str, mistakes: _Mistakes) -> str | None:
    """Writes one override into the document; returns the field, if it set one."""
    field, equals, value = text.partition("=")
    location = _location(field.strip())
    if not equals or "" in location:
        mistakes.add("override", text, "write it as table.field=value, such as train.steps=20")
        return None
    if schema_of(location) is None:
        mistakes.add(dotted(location), _value(value, location), *unknown(location))
        return None
    node: Any = document
    for depth, key in enumerate(location, start=1):
        fits = isinstance(node, list) if isinstance(key, int) else isinstance(node, dict)
        if not fits:
            return None  # the file has something else there, which is a mistake by itself
        if isinstance(key, int) and key > len(node):
            remedy = f"there are {len(node)} entries; {len(node)} would add the next"
            mistakes.add(dotted(location), value, remedy)
            return None
        there = key < len(node) if isinstance(key, int) else key in node
        if not there and not value:
            return None  # nothing to take out
        if not there and depth < len(location):
            _put(node, key, _default(location[: depth + 1]))
        if depth < len(location):
            node = node[key]
        elif value:
            _put(node, key, _value(value, location))
        else:
            del node[key]
    return dotted(location) if value else None


def _put(node: Any, key: int | str, value: Any) -> None:
    """Sets an entry of a table or a list, or adds the next of a list."""
    if isinstance(key, int) and key == len(node):
        node.append(value)
    else:
        node[key] = value


def _default(location: Location) -> Any:
    """What holds the entry at a location before anything is set: an empty table, or a list."""
    if isinstance(location[-1], str):
        return {}
    return [{}] if (schema_of(location) or {}).get("type") == "object" else []


def _value(text: str, location: Location) -> Any:
    """The value of an override: TOML, or the text itself if it is none or the field holds text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:  # no TOML, or a number of thousands of digits
        return text
    is_text = (schema_of(location) or {}).get("type") == "string"
    if parsed.keys() != {"value"} or (is_text and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]


# Writing


def dump_recipe(recipe: Recipe) -> str:
    """The recipe in full as TOML, without fields that have no effect in it.

    `load_recipe` reads an equal recipe from it, if `recipe` is valid.
    """
    return "\n".join(_lines(recipe, recipe, ())).lstrip("\n") + "\n"


def _lines(recipe: Recipe, table: BaseModel, location: Location) -> Iterator[str]:
    names = (name for name in type(table).model_fields if not _follows(table, name))
    values = {name: getattr(table, name) for name in names}
    for name, value in values.items():
        field = dotted((*location, name))
        if value is None or _tables(value) or no_effect(recipe, field):
            continue
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if not no_effect(recipe, f"{field}.{k}")}
        yield f"{name} = {_toml(value)}"
    for name, value in values.items():
        inner = (*location, name)
        if isinstance(value, BaseModel):
            yield from ("", f"[{dotted(inner)}]", *_lines(recipe, value, inner))
        elif _tables(value):
            for index, entry in enumerate(value):
                yield from ("", f"[[{dotted(inner)}]]", *_lines(recipe, entry, (*inner, index)))


def _follows(table: BaseModel, name: str) -> bool:
    """Whether a field follows from others again when it is read, in a base of muP from its own."""
    formula = isinstance(type(table).model_fields[name].default_factory, Formula)
    return formula and name not in table.model_fields_set


def _tables(value: object) -> bool:
    """Whether a value is written as tables of its own."""
    entries = value if isinstance(value, tuple) else (value,)
    return any(isinstance(entry, BaseModel) for entry in entries)


def _toml(value: object) -> str:
    """A value on one line; JSON and TOML write scalars alike, but TOML wants DEL escaped."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml(k)} = {_toml(v)}' for k, v in value.items())}}}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
