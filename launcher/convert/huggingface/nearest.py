"""Finds the Hugging Face class that can represent a model, or names the nearest one."""

from dataclasses import dataclass
from typing import Any

from colonnade.launcher.convert.huggingface.config import function_fields
from colonnade.launcher.convert.huggingface.families import FAMILIES
from colonnade.launcher.convert.huggingface.family import Family, Unsupported
from colonnade.models.config import ModelConfig

# Names of `function_fields` that are derived from a field of the recipe.
FIELDS = {"symbols": "pattern", "windows": "window"}
OTHER_ROW, UNKNOWN = 100, 1000  # how far a class is whose sub-blocks are others; that is not known


@dataclass(frozen=True)
class Difference:
    """An option in which a class differs: the field, the model's value, and the class's, in words.

    Attributes:
        distance: how far the class is for it.
    """

    field: str
    value: Any
    other: str
    distance: int = 1


def family_for(config: ModelConfig) -> Family:
    """Returns the first family that can represent this model.

    Raises:
        Unsupported: none can; names the nearest, and all options in which it differs.
    """
    found = [(family, differences(family, config)) for family in FAMILIES.values()]
    family, least = min(found, key=lambda pair: sum(d.distance for d in pair[1]))
    if not least:
        return family
    first, *others = least
    also = "".join(f", and {d.field} = {d.other} where this is {d.value!r}" for d in others)
    raise Unsupported(
        first.field,
        first.value,
        f"no Hugging Face class can represent this model; the nearest, {family.architecture}, has "
        f"{first.other}{also}",
    )


def differences(family: Family, config: ModelConfig) -> list[Difference]:
    """Returns the options of a model that a family cannot represent; none: it can.

    What writing refuses is replaced by its default, to find what else differs.
    """
    refused: list[Difference] = []
    while True:
        try:
            actual = function_fields(family.config_from_hf(family.fields_of(config)))
        except Unsupported as error:
            if error.field not in config.model_fields_set or error.field == "pattern":
                return [*refused, Difference(error.field, error.value, error.remedy, UNKNOWN)]
            explicit = {n: getattr(config, n) for n in config.model_fields_set - {error.field}}
            config = ModelConfig(**explicit)
            other = repr(getattr(config, error.field))
            refused.append(Difference(error.field, error.value, other))
        else:
            return refused + compared(function_fields(config), actual)


def compared(expected: dict[str, Any], actual: dict[str, Any]) -> list[Difference]:
    """Returns the fields that differ: those that both have, because the others follow from these;
    where none does, those that one has."""
    same_row = expected["symbols"] == actual["symbols"]
    derived = set() if same_row else {"symbols", "windows"}
    both = [n for n in expected if n in actual and n not in derived and expected[n] != actual[n]]
    found = [Difference(FIELDS.get(n, n), expected[n], repr(actual[n])) for n in both]
    if not same_row:
        row, other = expected["symbols"], actual["symbols"]
        return [Difference("pattern", row, repr(other), OTHER_ROW + len({*row} ^ {*other})), *found]
    if not found:
        initial = ModelConfig()
        for name in expected.keys() ^ actual.keys():
            value, other = (side.get(name, getattr(initial, name)) for side in (expected, actual))
            found.append(Difference(name, value, repr(other)))
    return found
