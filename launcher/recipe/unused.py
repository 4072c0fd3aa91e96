"""Settings without effect: of the model as its cards say, of other tables by the list `RUN`.

A setting that changes nothing is a fault where it was given, and is left out when a recipe is
written.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from pydantic import BaseModel

from colonnade.launcher.recipe.tables import DataConfig, Recipe
from colonnade.models.cards.base import Card
from colonnade.models.config import NEEDS, ModelConfig


class Effect(NamedTuple):
    """`fields` have an effect only where `when` holds; `involves` are the fields it looks at.

    `when` gets the recipe; for `data.sources.N.…` (written `source.…`) the table and the source.
    """

    fields: str
    when: Callable[..., bool]
    otherwise: str
    involves: str


def recurrent(card: Card) -> bool:
    """Whether a sub-block carries a state along the sequence."""
    return card.mixing is not None and card.mixing.state is not None


def _text(data: DataConfig) -> bool:
    return any(s.format != "tokens" for s in data.sources)


def _indexed(data: DataConfig) -> bool:
    return any(s.format != "tokens" and not s.stream for s in data.sources)


_ROW = "model.pattern model.mtp model.mtp_pattern"

# fmt: off
RUN = (
    Effect("parallel.sequence", lambda r: r.parallel.tp > 1,
           "with parallel.tp = 1", "parallel.tp"),
    Effect("parallel.zigzag parallel.context parallel.ulysses parallel.recurrence",
           lambda r: r.parallel.cp > 1, "with parallel.cp = 1", "parallel.cp"),
    Effect("parallel.context parallel.ulysses", lambda r: r.model.unclear or r.model.has("*"),
           "without attention (`*` in model.pattern)", _ROW),
    Effect("parallel.ulysses", lambda r: r.parallel.context == "ring+ulysses",
           "unless parallel.context = ring+ulysses", "parallel.context"),
    Effect("parallel.recurrence",
           lambda r: r.model.unclear or any(map(recurrent, r.model.sub_blocks())),
           "unless a sub-block with a state, such as Mamba or DeltaNet, stands in model.pattern",
           _ROW),
    Effect("parallel.etp", lambda r: r.parallel.tp > 1 and r.model.has("E", "T"),
           "without experts or with parallel.tp = 1", "parallel.tp model.pattern"),
    Effect("optimizer.momentum", lambda r: r.optimizer.name == "muon",
           "unless optimizer.name = muon", "optimizer.name"),
    Effect("optimizer.decay", lambda r: r.optimizer.schedule == "wsd",
           "unless optimizer.schedule = wsd", "optimizer.schedule"),
    Effect("optimizer.min_lr", lambda r: r.optimizer.schedule != "constant",
           "with optimizer.schedule = constant", "optimizer.schedule"),
    Effect("data.cache", lambda r: _indexed(r.data),
           "where every source holds tokens already or is streamed", "data.sources"),
    Effect("data.eod data.special_tokens",
           lambda r: r.data.tokenizer_name not in (None, "bytes"),
           "unless data.tokenizer is a tokenizer.json", "data.tokenizer data.sources"),
    Effect("data.bos",
           lambda r: r.data.tokenizer_name not in (None, "bytes") and _text(r.data),
           "unless text is read and data.tokenizer is a tokenizer.json",
           "data.tokenizer data.sources"),
    Effect("data.validation train.validate_rows train.validate_every",
           lambda r: not all(s.stream for s in r.data.sources),
           "where every source is streamed: nothing is held out of a stream", "data.sources"),
    Effect("train.validate_rows train.validate_every", lambda r: r.data.validation > 0,
           "with data.validation = 0", "data.validation"),
    Effect("train.validate_every", lambda r: r.train.validate_rows > 0,
           "with train.validate_rows = 0", "train.validate_rows"),
    Effect("source.path", lambda data, s: s.format != "stdlib",
           "with format = stdlib, which reads Python's own library", "source.format"),
    Effect("source.column source.prompt",
           lambda data, s: s.format in ("auto", "jsonl", "parquet", "hub"),
           "unless format is jsonl, parquet or hub: other formats have no columns",
           "source.format source.path"),
    Effect("source.subset source.split", lambda data, s: s.format == "hub",
           "unless format = hub", "source.format source.path"),
    Effect("source.stream",
           lambda data, s: s.format in ("auto", "text", "jsonl", "parquet", "hub"),
           "unless format is text, jsonl, parquet or hub", "source.format source.path"),
    Effect("source.weight", lambda data, s: len(data.sources) > 1,
           "with one source", "data.sources"),
)
# fmt: on


def no_effect(recipe: Recipe, field: str) -> Effect | None:
    """Why a dotted field changes nothing in this recipe, or None if it has an effect."""
    owner: tuple[object, ...] = (recipe,)
    match field.split("."):
        case ["data", "sources", index, name]:
            owner, field = (recipe.data, recipe.data.sources[int(index)]), f"source.{name}"
        case ["model", "mup_base", name]:  # a size has no effect on the base where it has none
            return of_model(recipe.model, name)
        case ["model", name]:
            return of_model(recipe.model, name)
    return next((e for e in RUN if field in e.fields.split() and not e.when(*owner)), None)


def conditions() -> Iterator[tuple[str, str]]:
    """Every field that may have no effect, with the words that say when."""
    for name, needs in NEEDS.items():
        yield from ((f"model.{name}", need.otherwise) for need in needs)
    for effect in RUN:
        yield from ((field, effect.otherwise) for field in effect.fields.split())


def of_model(model: ModelConfig, name: str) -> Effect | None:
    """The same of a field of the model, whose card says what it needs."""
    need = model.unused(name) if name in NEEDS else None
    if need is None:
        return None
    involves = " ".join(f"model.{field}" for field in need.involves)
    return Effect(f"model.{name}", lambda r: need.holds(r.model), need.otherwise, involves)


def involved(effect: Effect, field: str) -> Iterator[str]:
    """The fields that decide whether `field` has an effect, in full."""
    table = field.rpartition(".")[0]
    for name in effect.involves.split():
        yield name.replace("source.", f"{table}.") if name.startswith("source.") else name


def used_alone(model: ModelConfig) -> ModelConfig:
    """The same model, given by the fields that have an effect in it alone."""
    while unused := {field for field in model.model_fields_set if model.unused(field)}:
        kept = model.model_fields_set - unused
        model = ModelConfig(**{name: getattr(model, name) for name in kept})
    return model


def given(table: BaseModel, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted name and value of every field that was set explicitly, in the order of the tables."""
    for name in type(table).model_fields:
        value = getattr(table, name)
        if name not in table.model_fields_set:
            continue
        if isinstance(value, BaseModel):
            yield from given(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and any(isinstance(entry, BaseModel) for entry in value):
            for index, entry in enumerate(value):
                yield from given(entry, f"{prefix}{name}.{index}.")
        elif isinstance(value, dict) and value:
            yield from ((f"{prefix}{name}.{key}", entry) for key, entry in value.items())
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value
