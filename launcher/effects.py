"""Settings without effect: one table of which field matters under which condition.

A setting that changes nothing is a fault where it was given, and is left out when a recipe is
written.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from pydantic import BaseModel

from colonnade.launcher.recipe import DataConfig, Recipe
from colonnade.models.config import SYMBOLS


class Effect(NamedTuple):
    """`fields` have an effect only where `when` holds; `involves` are the fields it looks at.

    `when` gets the recipe; for `data.sources.N.…` (written `source.…`) the table and the source.
    """

    fields: str
    when: Callable[..., bool]
    otherwise: str
    involves: str


def _with(*symbols: str) -> Callable[[Recipe], bool]:
    """Whether one of the symbols is in the pattern; true as well while the pattern is faulty."""
    return lambda r: r.model.has(*symbols) or not set(r.model.pattern) <= set(SYMBOLS)


def _indexed(data: DataConfig) -> bool:
    return any(s.format != "tokens" and not s.stream for s in data.sources)


# fmt: off
EFFECTS = (
    Effect("model.heads model.kv_heads model.head_dim model.positions model.rope_theta",
           _with("*"), "without attention (`*` in model.pattern)", "model.pattern"),
    Effect("model.rope_theta", lambda r: r.model.positions == "rope",
           "with model.positions = none", "model.positions"),
    Effect("model.mamba_heads model.mamba_head_dim model.mamba_state model.mamba_groups "
           "model.mamba_conv model.mamba_chunk",
           _with("M"), "without Mamba-2 (`M` in model.pattern)", "model.pattern"),
    Effect("model.activation", _with("-", "E"),
           "without an MLP or experts (`-` or `E` in model.pattern)", "model.pattern"),
    Effect("model.ffn", lambda r: _with("-")(r) or (_with("E")(r) and r.model.expert_ffn is None),
           "without an MLP (`-` in model.pattern) or experts (`E`) that take their width from it",
           "model.pattern model.expert_ffn"),
    Effect("model.experts model.top_k model.expert_ffn model.balance model.router_z "
           "model.balance_samples",
           _with("E"), "without a mixture of experts (`E` in model.pattern)", "model.pattern"),
    Effect("model.balance_samples", lambda r: r.model.balance > 0,
           "with model.balance = 0", "model.balance"),
    Effect("optimizer.decay", lambda r: r.optimizer.schedule == "wsd",
           "unless optimizer.schedule = wsd", "optimizer.schedule"),
    Effect("optimizer.min_lr", lambda r: r.optimizer.schedule != "constant",
           "with optimizer.schedule = constant", "optimizer.schedule"),
    Effect("data.cache", lambda r: _indexed(r.data),
           "where every source holds tokens already or is streamed", "data.sources"),
    Effect("data.validation train.validate_rows train.validate_every",
           lambda r: not all(s.stream for s in r.data.sources),
           "where every source is streamed: nothing is held out of a stream", "data.sources"),
    Effect("train.validate_rows train.validate_every", lambda r: r.data.validation > 0,
           "with data.validation = 0", "data.validation"),
    Effect("train.validate_every", lambda r: r.train.validate_rows > 0,
           "with train.validate_rows = 0", "train.validate_rows"),
    Effect("source.path", lambda data, s: s.format != "stdlib",
           "with format = stdlib, which reads Python's own library", "source.format"),
    Effect("source.column source.prompt", lambda data, s: s.format in ("jsonl", "parquet", "hub"),
           "unless format is jsonl, parquet or hub: other formats have no columns",
           "source.format"),
    Effect("source.subset source.split", lambda data, s: s.format == "hub",
           "unless format = hub", "source.format"),
    Effect("source.stream", lambda data, s: s.format in ("text", "jsonl", "parquet", "hub"),
           "unless format is text, jsonl, parquet or hub", "source.format"),
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
    return next((e for e in EFFECTS if field in e.fields.split() and not e.when(*owner)), None)


def involved(effect: Effect, field: str) -> Iterator[str]:
    """The fields that decide whether `field` has an effect, in full."""
    table = field.rpartition(".")[0]
    for name in effect.involves.split():
        yield name.replace("source.", f"{table}.") if name.startswith("source.") else name


def given(table: BaseModel, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted name and value of every field that was set explicitly, in the order of the tables."""
    for name in type(table).model_fields:
        value = getattr(table, name)
        if name not in table.model_fields_set:
            continue
        if isinstance(value, BaseModel):
            yield from given(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            for index, entry in enumerate(value):
                yield from given(entry, f"{prefix}{name}.{index}.")
        else:
            yield f"{prefix}{name}", value
