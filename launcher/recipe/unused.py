"""Unused settings: fields of a recipe that change nothing because of the values of others.

The cards of the sub-blocks define when a field of `[model]` is unused, the list `CONDITIONS` when
one of the other tables is. An unused setting is a fault where it was given explicitly, and is left
out when a recipe is written.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from pydantic import BaseModel

from colonnade.launcher.recipe.tables import WITH_COLUMNS, DataConfig, Recipe, SourceConfig
from colonnade.models.cards.base import Card
from colonnade.models.config import NEEDS, ModelConfig
from colonnade.models.options import ROW
from colonnade.parallel.config import LOOPED


class UsedIf(NamedTuple):
    """A condition under which some fields are used; otherwise they have no effect.

    Attributes:
        fields: their dotted names, separated by spaces; those of `data.sources.N` are written
            `source.…`.
        used_when: returns whether the fields are used. It gets the recipe; for fields of a data
            source the `[data]` table and the source.
        otherwise: why they are unused, the end of the sentence «has no effect …».
        involves: the fields that `used_when` looks at, separated by spaces.
    """

    fields: str
    used_when: Callable[..., bool]
    otherwise: str
    involves: str


def is_recurrent(card: Card) -> bool:
    """Whether a sub-block carries a recurrent state along the sequence."""
    return card.mixing is not None and card.mixing.state is not None


def _reads_text(data: DataConfig) -> bool:
    """Whether any source is text, which has to be tokenised."""
    return any(s.format != "tokens" for s in data.all_sources)


def _indexes_text(data: DataConfig) -> bool:
    """Whether any source is tokenised before training, into the cache."""
    return any(s.format != "tokens" and not s.stream for s in data.all_sources)


def _validates(data: DataConfig, source: SourceConfig) -> bool:
    """Whether a source is one of validation; an equal one may be one of training."""
    return any(source is other for other in data.validation_sources)


_ROW_FIELDS = " ".join(f"model.{name}" for name in ROW)

# fmt: off
CONDITIONS = (
    UsedIf("parallel.sequence", lambda r: r.parallel.tp > 1,
           "with parallel.tp = 1", "parallel.tp"),
    UsedIf("parallel.schedule parallel.stages_per_rank parallel.stages",
           lambda r: r.parallel.pp > 1, "with parallel.pp = 1", "parallel.pp"),
    UsedIf("train.init_only train.init_skip", lambda r: r.train.init is not None,
           "without train.init", "train.init"),
    UsedIf("train.offload_inputs", lambda r: r.train.recompute != "none",
           "with train.recompute = none, which keeps more than inputs", "train.recompute"),
    UsedIf("train.timeline", lambda r: r.parallel.pp > 1, "with parallel.pp = 1", "parallel.pp"),
    UsedIf("train.timeline", lambda r: r.stage or (r.train.timeline or 0) <= r.train.steps,
           "beyond train.steps: the run ends before that step", "train.steps"),
    UsedIf("train.steps train.ramp_batch train.ramp_steps", lambda r: not r.stage,
           "with [[stage]] tables, each of which has a length and a batch of its own", "stage"),
    UsedIf("parallel.stages_per_rank",
           lambda r: r.parallel.schedule in LOOPED,
           "unless parallel.schedule is interleaved, bfs or zb1p", "parallel.schedule"),
    UsedIf("parallel.zigzag parallel.context parallel.ulysses parallel.recurrence",
           lambda r: r.parallel.cp > 1, "with parallel.cp = 1", "parallel.cp"),
    UsedIf("parallel.context parallel.ulysses",
           lambda r: r.model.has_unknown_symbols or r.model.has("*"),
           "without attention (`*` in model.pattern)", _ROW_FIELDS),
    UsedIf("parallel.ulysses", lambda r: r.parallel.context == "ring+ulysses",
           "unless parallel.context = ring+ulysses", "parallel.context"),
    UsedIf("parallel.recurrence",
           lambda r: r.model.has_unknown_symbols or any(map(is_recurrent, r.model.sub_blocks())),
           "unless a sub-block with a state, such as Mamba or DeltaNet, stands in model.pattern",
           _ROW_FIELDS),
    UsedIf("parallel.ep parallel.etp",
           lambda r: r.model.has_unknown_symbols or r.model.has("E", "T"),
           "without experts (`E` or `T` in model.pattern)", _ROW_FIELDS),
    UsedIf("optimizer.momentum", lambda r: r.optimizer.name == "muon",
           "unless optimizer.name = muon", "optimizer.name"),
    UsedIf("optimizer.decay", lambda r: r.optimizer.schedule == "wsd",
           "unless optimizer.schedule = wsd", "optimizer.schedule"),
    UsedIf("optimizer.min_lr", lambda r: r.optimizer.schedule != "constant",
           "with optimizer.schedule = constant", "optimizer.schedule"),
    UsedIf("optimizer.host_kernel optimizer.pinned optimizer.offload_gradients "
           "optimizer.offload_moments",
           lambda r: r.optimizer.offload != "none",
           "with optimizer.offload = none", "optimizer.offload"),
    UsedIf("optimizer.margin", lambda r: r.optimizer.offload == "interleaved",
           "unless optimizer.offload = interleaved", "optimizer.offload"),
    UsedIf("optimizer.offload_gradients optimizer.offload_moments",
           lambda r: r.train.precision != "fp64",
           "with train.precision = fp64, which nothing rounds", "train.precision"),
    UsedIf("data.cache", lambda r: _indexes_text(r.data),
           "where every source holds tokens already or is streamed", "data.sources"),
    UsedIf("data.eod data.special_tokens",
           lambda r: r.data.tokenizer_name not in (None, "bytes"),
           "unless data.tokenizer is a tokenizer.json", "data.tokenizer data.sources"),
    UsedIf("data.bos",
           lambda r: r.data.tokenizer_name not in (None, "bytes") and _reads_text(r.data),
           "unless text is read and data.tokenizer is a tokenizer.json",
           "data.tokenizer data.sources"),
    UsedIf("data.validation", lambda r: not r.data.validation_sources,
           "with data.validation_sources", "data.validation_sources"),
    UsedIf("data.validation train.validate_rows train.validate_every",
           lambda r: r.data.validation_sources or not all(s.stream for s in r.data.sources),
           "where every source is streamed: nothing is held out of a stream",
           "data.sources data.validation_sources"),
    UsedIf("train.validate_rows train.validate_every",
           lambda r: r.data.validation_sources or r.data.validation > 0,
           "with data.validation = 0", "data.validation data.validation_sources"),
    UsedIf("train.validate_every", lambda r: r.train.validate_rows > 0,
           "with train.validate_rows = 0", "train.validate_rows"),
    UsedIf("guard.window guard.skip guard.limit", lambda r: r.guard.spike > 0,
           "with guard.spike = 0, which looks for no spikes", "guard.spike"),
    UsedIf("train.bad_steps", lambda r: not r.guard.spike,
           "with guard.spike, which goes back after the first step that is not finite",
           "guard.spike"),
    UsedIf("train.loads_every train.collapse_share train.collapse_steps",
           lambda r: r.model.has_unknown_symbols or r.model.has("E"),
           "without a mixture of experts (`E` in model.pattern)", _ROW_FIELDS),
    UsedIf("train.collapse_share train.collapse_steps",
           lambda r: r.model.top_k / r.model.experts < r.train.collapse_share,
           "where an even load, model.top_k / model.experts, is no less than train.collapse_share",
           "model.top_k model.experts train.collapse_share"),
    UsedIf("train.collapse_share", lambda r: r.train.collapse_steps > 0,
           "with train.collapse_steps = 0", "train.collapse_steps"),
    UsedIf("monitor.metrics_host", lambda r: r.monitor.metrics_port is not None,
           "without monitor.metrics_port", "monitor.metrics_port"),
    UsedIf("monitor.slow_rank", lambda r: r.monitor.ranks_every > 0,
           "with monitor.ranks_every = 0", "monitor.ranks_every"),
    UsedIf("source.path", lambda data, s: s.format != "stdlib",
           "with format = stdlib, which reads Python's own library", "source.format"),
    UsedIf("source.column source.prompt",
           lambda data, s: s.format in ("auto", *WITH_COLUMNS),
           "unless format is jsonl, parquet or hub: other formats have no columns",
           "source.format source.path"),
    UsedIf("source.subset source.split", lambda data, s: s.format == "hub",
           "unless format = hub", "source.format source.path"),
    UsedIf("source.stream",
           lambda data, s: s.format in ("auto", "text", "jsonl", "parquet", "hub"),
           "unless format is text, jsonl, parquet or hub", "source.format source.path"),
    UsedIf("source.weight", lambda data, s: len(data.sources) > 1,
           "with one source", "data.sources"),
    UsedIf("source.weight source.stream", lambda data, s: not _validates(data, s),
           "on a source of validation, all of whose documents are read in order",
           "data.validation_sources"),
)
# fmt: on


def unused_setting(recipe: Recipe, field: str) -> UsedIf | None:
    """Returns the first condition that leaves a dotted field unused; None: the field is used."""
    arguments: tuple[object, ...] = (recipe,)
    match field.split("."):
        case ["data", ("sources" | "validation_sources") as table, index, name]:
            source = getattr(recipe.data, table)[int(index)]
            arguments, field = (recipe.data, source), f"source.{name}"
        case ["model", "mup_base", name]:  # unused in the base where it is unused in the model
            return unused_model_setting(recipe.model, name)
        case ["model", name]:
            return unused_model_setting(recipe.model, name)
    return next(
        (c for c in CONDITIONS if field in c.fields.split() and not c.used_when(*arguments)), None
    )


def conditions() -> Iterator[tuple[str, str]]:
    """Yields every field that may be unused, with the words that say when, once per condition."""
    for name, needs in NEEDS.items():
        yield from ((f"model.{name}", need.reason) for need in needs)
    for condition in CONDITIONS:
        yield from ((field, condition.otherwise) for field in condition.fields.split())


def unused_model_setting(model: ModelConfig, name: str) -> UsedIf | None:
    """As `unused_setting`, for a field of `[model]`: its card defines the conditions."""
    need = model.unused(name) if name in NEEDS else None
    if need is None:
        return None
    involves = " ".join(f"model.{field}" for field in need.involves)
    return UsedIf(f"model.{name}", lambda r: need.holds(r.model), need.reason, involves)


def involved_fields(condition: UsedIf, field: str) -> Iterator[str]:
    """Yields the full dotted names of the fields that decide whether `field` is used."""
    table = field.rpartition(".")[0]
    for name in condition.involves.split():
        yield name.replace("source.", f"{table}.") if name.startswith("source.") else name


def without_unused(model: ModelConfig) -> ModelConfig:
    """Returns the same model without the explicitly given fields, of it and of muP's base model,
    that are unused in it."""
    # Leaving out one field may make another one unused, so repeat until nothing changes.
    while unused := {
        name
        for name in (*model.model_fields_set, *(model.mup_base or ()))
        if unused_model_setting(model, name)
    }:
        used = {name: getattr(model, name) for name in model.model_fields_set - unused}
        if model.mup_base:
            used["mup_base"] = {n: v for n, v in model.mup_base.items() if n not in unused}
        model = type(model).model_validate(used)
    return model


def explicit_fields(table: BaseModel, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields dotted name and value of every field that was set explicitly, in table order."""
    for name in type(table).model_fields:
        value = getattr(table, name)
        if name not in table.model_fields_set:
            continue
        if isinstance(value, BaseModel):
            yield from explicit_fields(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and any(isinstance(entry, BaseModel) for entry in value):
            for index, entry in enumerate(value):
                yield from explicit_fields(entry, f"{prefix}{name}.{index}.")
        elif isinstance(value, dict) and value:
            yield from ((f"{prefix}{name}.{key}", entry) for key, entry in value.items())
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value
