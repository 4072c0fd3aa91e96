"""Settings without effect: one table of which field matters under which condition.

A setting that changes nothing is a fault where it was given, and is left out when a recipe is
written.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from pydantic import BaseModel

from colonnade.launcher.recipe.tables import DataConfig, Recipe
from colonnade.models.config import CHANNEL_MIXERS, SYMBOLS, ModelConfig


class Effect(NamedTuple):
    """`fields` have an effect only where `when` holds; `involves` are the fields it looks at.

    `when` gets the recipe; for `data.sources.N.…` (written `source.…`) the table and the source.
    """

    fields: str
    when: Callable[..., bool]
    otherwise: str
    involves: str


def _rows(model: ModelConfig) -> list[str]:
    """The rows of sub-blocks of a model, as far as they hold every pair of neighbours."""
    row = model.pattern * min(model.repeat, 2)
    return [row, model.mtp_pattern] if model.mtp else [row]


def unclear(model: ModelConfig) -> bool:
    """Whether a pattern is faulty: while it is, whatever hangs on it counts as having effect."""
    return not set("".join(_rows(model))) <= set(SYMBOLS)


def _with(*symbols: str) -> Callable[[Recipe], bool]:
    """Whether one of the symbols stands in the model."""
    return lambda r: r.model.has(*symbols) or unclear(r.model)


def _side_by_side(model: ModelConfig) -> bool:
    """Whether a channel mixer stands right behind a sequence mixer."""
    pairs = [pair for row in _rows(model) for pair in pairwise(row)]
    return any(a not in CHANNEL_MIXERS and b in CHANNEL_MIXERS for a, b in pairs)


def in_balance_groups(model: ModelConfig) -> bool:
    """Whether anything is computed by balance groups (a mean over all groups is not)."""
    grouped = model.balance > 0 or model.capacity is not None
    return model.has("T") or (model.has("E") and grouped)


def _rope_mscale_all(model: ModelConfig) -> bool:
    """It scales latent attention's scores, and is part of the factor of cosine and sine."""
    computed = model.rope_attention_factor is None and model.rope_mscale > 0
    return model.attention == "mla" or computed


def _text(data: DataConfig) -> bool:
    return any(s.format != "tokens" for s in data.sources)


def _indexed(data: DataConfig) -> bool:
    return any(s.format != "tokens" and not s.stream for s in data.sources)


_ROW = "model.pattern model.mtp model.mtp_pattern"

# fmt: off
STREAM = (
    Effect("model.share", lambda r: r.model.repeat > 1, "with model.repeat = 1", "model.repeat"),
    Effect("model.residual",
           lambda r: r.model.residual != "parallel" or _side_by_side(r.model) or unclear(r.model),
           "as parallel unless `-`, `E` or `T` stands right behind a sequence mixer "
           "in model.pattern", f"{_ROW} model.repeat"),
    Effect("model.ladder_last", lambda r: r.model.residual == "ladder",
           "unless model.residual = ladder", "model.residual"),
    Effect("model.norm_bias", lambda r: r.model.norm in ("layer", "pre_rms", "crms"),
           "unless model.norm is layer or pre_rms", "model.norm"),  # crms: a rule refuses it
    Effect("model.mtp_pattern model.mtp_weight", lambda r: r.model.mtp > 0,
           "with model.mtp = 0", "model.mtp"),
    Effect("model.mup_zero_init", lambda r: r.model.mup_base is not None,
           "without model.mup_base", "model.mup_base"),
    Effect("model.mup_zero_init", lambda r: _with("*")(r) or not r.model.tied,
           "without attention (`*` in model.pattern) and with a tied head", f"{_ROW} model.tied"),
)
ATTENTION = (
    Effect("model.attention model.heads model.kv_heads model.head_dim model.q_rank model.kv_rank "
           "model.rope_dim model.value_dim model.latent_norm_eps model.positions model.rope_theta "
           "model.rope_fraction "
           "model.rope_scaling model.rope_factor model.rope_original model.rope_low "
           "model.rope_high model.rope_fast model.rope_slow model.rope_mscale "
           "model.rope_mscale_all model.rope_attention_factor model.rope_truncate model.qk_norm "
           "model.window model.full_attention model.sinks model.attention_gate "
           "model.attention_cap model.clip_low model.clip_high model.position_temperature "
           "model.attention_conv",
           _with("*"), "without attention (`*` in model.pattern)", _ROW),
    Effect("model.q_rank model.kv_rank model.rope_dim model.value_dim model.latent_norm_eps",
           lambda r: r.model.attention == "mla", "unless model.attention = mla", "model.attention"),
    Effect("model.kv_heads model.rope_fraction model.qk_norm model.attention_gate "
           "model.attention_conv",
           lambda r: r.model.attention == "gqa", "with model.attention = mla", "model.attention"),
    Effect("model.rope_theta model.rope_fraction model.rope_scaling model.rope_factor "
           "model.rope_original model.rope_low model.rope_high model.rope_fast model.rope_slow "
           "model.rope_mscale model.rope_mscale_all model.rope_attention_factor "
           "model.rope_truncate",
           lambda r: r.model.positions == "rope", "with model.positions = none", "model.positions"),
    Effect("model.rope_factor", lambda r: r.model.rope_scaling != "none",
           "with model.rope_scaling = none", "model.rope_scaling"),
    Effect("model.rope_original", lambda r: r.model.rope_scaling in ("yarn", "llama3"),
           "unless model.rope_scaling is yarn or llama3", "model.rope_scaling"),
    Effect("model.rope_low model.rope_high", lambda r: r.model.rope_scaling == "llama3",
           "unless model.rope_scaling = llama3", "model.rope_scaling"),
    Effect("model.rope_fast model.rope_slow model.rope_mscale model.rope_mscale_all "
           "model.rope_attention_factor model.rope_truncate",
           lambda r: r.model.rope_scaling == "yarn",
           "unless model.rope_scaling = yarn", "model.rope_scaling"),
    Effect("model.rope_mscale", lambda r: r.model.rope_attention_factor is None,
           "with model.rope_attention_factor given", "model.rope_attention_factor"),
    Effect("model.rope_mscale", lambda r: r.model.rope_mscale_all > 0,
           "with model.rope_mscale_all = 0", "model.rope_mscale_all"),
    Effect("model.rope_mscale_all", lambda r: _rope_mscale_all(r.model),
           "unless model.attention = mla, or model.rope_mscale is above 0 and "
           "model.rope_attention_factor not given",
           "model.attention model.rope_mscale model.rope_attention_factor"),
    Effect("model.full_attention", lambda r: r.model.window is not None,
           "without model.window", "model.window"),
)
MIXERS = (
    Effect("model.mamba_heads model.mamba_head_dim model.mamba_state model.mamba_groups "
           "model.mamba_conv model.mamba_chunk",
           _with("M"), "without Mamba-2 (`M` in model.pattern)", _ROW),
    Effect("model.mamba1_inner model.mamba1_state model.mamba1_rank model.mamba1_conv "
           "model.mamba1_chunk",
           _with("m"), "without Mamba-1 (`m` in model.pattern)", _ROW),
    Effect("model.delta_heads model.delta_key_heads model.delta_key_dim model.delta_value_dim "
           "model.delta_conv model.delta_chunk model.delta_negative",
           _with("D", "G"), "without DeltaNet (`D` or `G` in model.pattern)", _ROW),
)
EXPERTS = (
    Effect("model.activation", _with("-", "E", "T"),
           "without an MLP or experts (`-`, `E` or `T` in model.pattern)", _ROW),
    Effect("model.ffn",
           lambda r: _with("-")(r) or (_with("E", "T")(r) and r.model.expert_ffn is None),
           "without an MLP (`-` in model.pattern) or experts (`E`, `T`) that take their width "
           "from it", f"{_ROW} model.expert_ffn"),
    Effect("model.experts model.expert_ffn model.balance_samples", _with("E", "T"),
           "without experts (`E` or `T` in model.pattern)", _ROW),
    Effect("model.top_k model.shared_ffn model.shared_gate model.router_score "
           "model.router_normalise model.router_scale model.router_groups "
           "model.router_top_groups model.router_bias model.router_bias_rate model.router_noise "
           "model.capacity model.balance model.balance_sequence model.router_z",
           _with("E"), "without a mixture of experts (`E` in model.pattern)", _ROW),
    Effect("model.thor_alpha", _with("T"), "without THOR (`T` in model.pattern)", _ROW),
    Effect("model.shared_gate", lambda r: r.model.shared_ffn > 0,
           "with model.shared_ffn = 0", "model.shared_ffn"),
    Effect("model.router_normalise", lambda r: r.model.top_k > 1,
           "with model.top_k = 1: the weight of a single expert is never normalised",
           "model.top_k"),
    Effect("model.router_groups", lambda r: r.model.router_top_groups is not None,
           "without model.router_top_groups", "model.router_top_groups"),
    Effect("model.router_top_groups", lambda r: r.model.router_groups > 1,
           "with model.router_groups = 1", "model.router_groups"),
    Effect("model.router_bias_rate", lambda r: r.model.router_bias,
           "without model.router_bias", "model.router_bias"),
    Effect("model.balance_samples", lambda r: in_balance_groups(r.model) or unclear(r.model),
           "without THOR (`T` in model.pattern), with model.balance = 0 and no model.capacity",
           f"{_ROW} model.balance model.capacity"),
)
RUN = (
    Effect("parallel.sequence", lambda r: r.parallel.tp > 1,
           "with parallel.tp = 1", "parallel.tp"),
    Effect("parallel.zigzag parallel.context parallel.ulysses parallel.recurrence",
           lambda r: r.parallel.cp > 1, "with parallel.cp = 1", "parallel.cp"),
    Effect("parallel.context parallel.ulysses", _with("*"),
           "without attention (`*` in model.pattern)", _ROW),
    Effect("parallel.ulysses", lambda r: r.parallel.context == "ring+ulysses",
           "unless parallel.context = ring+ulysses", "parallel.context"),
    Effect("parallel.recurrence", _with("M", "m", "D", "G"),
           "without Mamba or DeltaNet (`M`, `m`, `D` or `G` in model.pattern)", _ROW),
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
EFFECTS = (*STREAM, *ATTENTION, *MIXERS, *EXPERTS, *RUN)


def no_effect(recipe: Recipe, field: str) -> Effect | None:
    """Why a dotted field changes nothing in this recipe, or None if it has an effect."""
    owner: tuple[object, ...] = (recipe,)
    match field.split("."):
        case ["data", "sources", index, name]:
            owner, field = (recipe.data, recipe.data.sources[int(index)]), f"source.{name}"
        case ["model", "mup_base", name]:  # a size has no effect on the base where it has none
            field = f"model.{name}"
    return next((e for e in EFFECTS if field in e.fields.split() and not e.when(*owner)), None)


def involved(effect: Effect, field: str) -> Iterator[str]:
    """The fields that decide whether `field` has an effect, in full."""
    table = field.rpartition(".")[0]
    for name in effect.involves.split():
        yield name.replace("source.", f"{table}.") if name.startswith("source.") else name


def used_alone(model: ModelConfig) -> ModelConfig:
    """The same model, given by the fields that have an effect in it alone."""
    while unused := {
        f for f in model.model_fields_set if no_effect(Recipe(model=model), f"model.{f}")
    }:
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
