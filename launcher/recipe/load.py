"""Reads and writes recipes: TOML and overrides become a `Recipe`, or one error lists all faults."""

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
    schema_of,
    unknown_field,
    wrong_value,
)
from colonnade.launcher.recipe.stages import unused_in_run
from colonnade.launcher.recipe.tables import Recipe, StageTable
from colonnade.launcher.recipe.unused import explicit_fields
from colonnade.launcher.recipe.validate import findings
from colonnade.models.options import Formula


def load_recipe(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    notify: Callable[[str], object] | None = None,
    fields_of: Callable[[str], dict[str, dict[str, Any]]] | None = None,
    step: int = 0,
) -> Recipe:
    """Loads a recipe from a TOML file, or the shipped one of that name, and applies overrides.

    Args:
        name_or_path: of the recipe.
        overrides: each is `table.field=value`. The value is TOML, or text that is not valid TOML
            (`train.precision=bf16`). Entries of a list go by their index (`data.sources.0.path=…`).
            Without a value (`model.experts=`) the override removes the field, so that its default
            holds. Fields that are used in the file and unused with these overrides are removed: a
            file may set the heads of an attention that an override of the pattern removes. Warm-up,
            decay and batch ramp of the file are shortened in proportion where an override of
            `train.steps` makes the run too short for them.
        world_size: number of ranks, as in `validate`.
        notify: is called with one line about the fields that were removed, and with one about those
            that were shortened.
        fields_of: returns the tables of `train.init`, with which fields are filled that the recipe
            leaves open. None: they stay open, as in the recipe of a run, which was filled already.
        step: at which the run is; training stages that have ended need not fit the ranks any more.

    Raises:
        RecipeError: the recipe is invalid; lists all faults at once.
        UserError: there is no such recipe, or the file cannot be read as TOML.
    """
    document = _read(name_or_path)
    faulty_fields = _FaultyFields()
    # What the file itself uses has to be known before the overrides change the document.
    used_in_file = _used_fields(document) if overrides else set()
    steps_in_file = _integer(document, "train", "steps")
    overridden = [_override(document, text, faulty_fields) for text in overrides]
    shortened = _shorten_schedules(document, steps_in_file, {f for f in overridden if f})
    if fields_of is not None:
        used_in_file |= _fill(document, fields_of)
    # An override that is unused is a fault, also where the file set the same field.
    used_in_file -= {
        f for f in used_in_file for o in overridden if o and f"{f}.".startswith(f"{o}.")
    }
    recipe, unused = _without_unused(_parse(document, faulty_fields), document, used_in_file)
    # The default stands in for a field that was refused; rules that look at it prove nothing.
    faults = [
        fault
        for fault, involves in findings(recipe, world_size, step)
        if not faulty_fields.overlap(involves)
    ]
    if faulty_fields.faults or faults:
        raise RecipeError([*faulty_fields.faults, *faults])
    if notify is not None:
        if unused:
            notify(f"not used with these overrides: {', '.join(unused)}")
        if shortened:
            notify(f"in proportion to train.steps: {', '.join(shortened)}")
    return recipe


def recipe_names() -> list[str]:
    """Returns the names of the shipped recipes, sorted."""
    folder = resources.files("colonnade.launcher.recipes")
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def _read(name_or_path: str | Path) -> dict[str, Any]:
    """Reads the TOML document of a shipped recipe or of a file."""
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


class _FaultyFields:
    """Collects faults of single fields, and the names of those fields and of the ones meant."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.fields: set[str] = set()

    def add(self, field: str, value: object, remedy: str, meant: str | None = None) -> None:
        """Records a fault of `field`; `meant` is the field that a wrong name was meant to be."""
        self.faults.append(Fault(field, copy.deepcopy(value), remedy))
        self.fields.update([field, meant or field])

    def overlap(self, involves: Iterable[str]) -> bool:
        """Whether one of these fields, a table that holds it or a field inside it is faulty."""
        return any(
            f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")
            for a in involves
            for b in self.fields
        )


def _parse(document: dict[str, Any], faulty_fields: _FaultyFields) -> Recipe:
    """Parses the document; fields that pydantic refuses are recorded as faults and dropped."""
    while True:
        try:
            return Recipe.model_validate(document)
        except ValidationError as error:
            errors = error.errors(include_url=False)
        parents = {e["loc"][:n] for e in errors for n in range(len(e["loc"]))}
        for e in errors:
            location, value = e["loc"], e["input"]
            if location in parents or e["type"] == "default_factory_not_called":
                continue  # only repeats that a field inside, or one of a formula, is wrong
            if e["type"] == "extra_forbidden":
                faulty_fields.add(dotted(location), value, *unknown_field(location))
            else:
                faulty_fields.add(dotted(location), value, wrong_value(location, value))
            _drop(document, location)


def _drop(document: Any, location: Location) -> None:
    """Removes a field; for an entry of a list the entire list, so that no other index shifts."""
    while isinstance(location[-1], int):
        location = location[:-1]
    for key in location[:-1]:
        if key not in (document if isinstance(document, dict) else range(len(document))):
            return  # already removed with another fault
        document = document[key]
    document.pop(location[-1], None)


# Overrides


def _used_fields(document: dict[str, Any]) -> set[str]:
    """Returns the fields that a file sets and that are used in it."""
    recipe = _parse(copy.deepcopy(document), _FaultyFields())
    return {field for field, _ in explicit_fields(recipe) if not unused_in_run(recipe, field)}


def _without_unused(
    recipe: Recipe, document: dict[str, Any], fields: set[str]
) -> tuple[Recipe, list[str]]:
    """Removes those of `fields` that are unused; returns the recipe and the removed fields."""
    removed: list[str] = []
    # Removing one field may make another one unused, so repeat until nothing changes.
    while unused := [
        f for f, _ in explicit_fields(recipe) if f in fields and unused_in_run(recipe, f)
    ]:
        for field in unused:
            _drop(document, _location(field))
        removed += unused
        recipe = Recipe.model_validate(document)
    return recipe, removed


def _fill(
    document: dict[str, Any], fields_of: Callable[[str], dict[str, dict[str, Any]]]
) -> set[str]:
    """Fills the fields that a document leaves open from `train.init`; returns their names."""
    train = document.get("train")
    init = train.get("init") if isinstance(train, dict) else None
    if not isinstance(init, str):
        return set()
    filled = set()
    for table, fields in fields_of(init).items():
        known = document.setdefault(table, {})
        if isinstance(known, dict):
            missing = {name: value for name, value in fields.items() if name not in known}
            known.update(missing)
            filled |= {f"{table}.{name}" for name in missing}
    return filled


def _integer(document: dict[str, Any], table: str, name: str) -> int | None:
    """Returns the value that a document sets for a field; None if it is not an integer."""
    fields = document.get(table)
    value = fields.get(name) if isinstance(fields, dict) else None
    return value if type(value) is int else None


def _shorten_schedules(
    document: dict[str, Any], steps_in_file: int | None, overridden: set[str]
) -> list[str]:
    """Shortens warm-up, decay and batch ramp of a file where overridden `train.steps` are too few.

    They keep their share of the steps. Overridden fields stay as they are. Returns the fields that
    changed, with their new values.
    """
    steps = _integer(document, "train", "steps")
    if "train.steps" not in overridden or not steps or not steps_in_file:
        return []
    if not 0 < steps < steps_in_file:
        return []
    fields = (("optimizer", "warmup"), ("optimizer", "decay"), ("train", "ramp_steps"))
    lengths = {field: _integer(document, *field) or 0 for field in fields}
    warmup, decay, ramp = lengths.values()
    if warmup + decay <= steps and ramp <= steps:
        return []
    lengths = {f: n for f, n in lengths.items() if n and ".".join(f) not in overridden}
    for (table, name), length in lengths.items():
        document[table][name] = max(length * steps // steps_in_file, 1 if name == "decay" else 0)
    if document.get("train", {}).get("ramp_steps") == 0:  # a ramp of no steps has no first batch
        document["train"].pop("ramp_batch", None)
    return [f"{table}.{name} = {document[table][name]}" for table, name in lengths]


def _location(field: str) -> Location:
    """Parses a dotted field; parts that are digits become indices of a list."""
    return tuple(int(key) if key.isdecimal() else key for key in field.split("."))


def _override(document: dict[str, Any], text: str, faulty_fields: _FaultyFields) -> str | None:
    """Writes one override into the document; returns the field if it set one, else None."""
    field, equals, value = text.partition("=")
    location = _location(field.strip())
    if not equals or "" in location:
        faulty_fields.add("override", text, "write it as table.field=value, such as train.steps=20")
        return None
    if schema_of(location) is None:
        faulty_fields.add(dotted(location), _value(value, location), *unknown_field(location))
        return None
    node: Any = document
    for depth, key in enumerate(location, start=1):
        fits = isinstance(node, list) if isinstance(key, int) else isinstance(node, dict)
        if not fits:
            return None  # the file has a value of another type, which is a fault by itself
        if isinstance(key, int) and key > len(node):
            remedy = f"there are {len(node)} entries; {len(node)} would add the next"
            faulty_fields.add(dotted(location), value, remedy)
            return None
        exists = key < len(node) if isinstance(key, int) else key in node
        if not exists and not value:
            return None  # there is no field to remove
        if not exists and depth < len(location):
            _set_entry(node, key, _empty_container(location[: depth + 1]))
        if depth < len(location):
            node = node[key]
        elif value:
            _set_entry(node, key, _value(value, location))
        else:
            del node[key]
    return dotted(location) if value else None


def _set_entry(node: Any, key: int | str, value: Any) -> None:
    """Sets an entry of a table or a list; the index after the last appends to the list."""
    if isinstance(key, int) and key == len(node):
        node.append(value)
    else:
        node[key] = value


def _empty_container(location: Location) -> Any:
    """Returns what an unset entry at a location is set into: an empty table or a list.

    A list of tables (`data.sources`) starts with one empty table, which is its default.
    """
    if isinstance(location[-1], str):
        return {}
    return [{}] if (schema_of(location) or {}).get("type") == "object" else []


def _value(text: str, location: Location) -> Any:
    """Parses the value of an override as TOML; invalid TOML, or a text field's, stays text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:  # invalid TOML, or a number of thousands of digits
        return text
    is_text = (schema_of(location) or {}).get("type") == "string"
    if parsed.keys() != {"value"} or (is_text and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]


# Writing


def dump_recipe(recipe: Recipe) -> str:
    """Writes the recipe, defaults included, as TOML without unused settings.

    Fields that follow from others by default are left out, and follow from them again.

    `load_recipe` reads an equal recipe from it if `recipe` is valid.
    """
    return "\n".join(_lines(recipe, recipe, ())).lstrip("\n") + "\n"


def _lines(recipe: Recipe, table: BaseModel, location: Location) -> Iterator[str]:
    """Yields the TOML lines of a table at a location; its plain fields come before its tables."""
    names = [name for name in type(table).model_fields if not _is_derived(table, name)]
    if isinstance(table, StageTable):  # what it leaves out is not its default
        names = [name for name in names if name in table.model_fields_set]
    values = {name: getattr(table, name) for name in names}
    for name, value in values.items():
        field = dotted((*location, name))
        if value is None or _is_table(value) or unused_in_run(recipe, field):
            continue
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if not unused_in_run(recipe, f"{field}.{k}")}
        yield f"{name} = {_toml(value)}"
    for name, value in values.items():
        inner = (*location, name)
        header = dotted(tuple(key for key in inner if isinstance(key, str)))
        if isinstance(value, StageTable) and not value.model_fields_set:
            continue
        if isinstance(value, BaseModel):
            yield from ("", f"[{header}]", *_lines(recipe, value, inner))
        elif _is_table(value):
            for index, entry in enumerate(value):
                yield from ("", f"[[{header}]]", *_lines(recipe, entry, (*inner, index)))


def _is_derived(table: BaseModel, name: str) -> bool:
    """Whether a formula derives a field from others when the recipe is read.

    Such a field is not written, because muP's base model derives it from its own sizes.
    """
    has_formula = isinstance(type(table).model_fields[name].default_factory, Formula)
    return has_formula and name not in table.model_fields_set


def _is_table(value: object) -> bool:
    """Whether a value is written as a TOML table, or as an array of tables."""
    entries = value if isinstance(value, tuple) else (value,)
    return any(isinstance(entry, BaseModel) for entry in entries)


def _toml(value: object) -> str:
    """Writes a value on one line; JSON and TOML share scalars, but TOML wants DEL escaped."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml(k)} = {_toml(v)}' for k, v in value.items())}}}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
