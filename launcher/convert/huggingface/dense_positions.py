"""Converts SmolLM3, some of whose layers have no positions, Ministral 3, whose queries grow with
their position, and Helium, whose rotary pairs are adjacent channels."""

from dataclasses import replace
from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import pattern_fields, read_rope
from colonnade.launcher.convert.huggingface.dense import (
    DENSE,
    NORMS_BEFORE,
    attention,
    layer_types,
    layers,
    mlp,
    read_common,
    read_heads,
    windows_of,
    write_common,
    write_heads,
)
from colonnade.launcher.convert.huggingface.entry import Entry, interleaved
from colonnade.launcher.convert.huggingface.family import Family, Unsupported
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.models.config import ModelConfig


def read_smollm3(f: Fields) -> ModelConfig:
    """Reads a SmolLM3 config: `no_rope_layers` has a 0 for each layer without positions."""
    count = f.integer("num_hidden_layers")
    every = f.integer("no_rope_layer_interval", default=4, least=1)
    rotated = f.entries("no_rope_layers", of=int) or [
        int((i + 1) % every != 0) for i in range(count)
    ]
    if len(rotated) < count:
        raise Unsupported("no_rope_layers", rotated, f"has fewer than {count} entries")
    switched = f.truth("use_sliding_window", default=False)
    window = f.get("sliding_window", default=None)
    with_window = switched and window is not None
    kinds = f.entries("layer_types", of=str) or [
        "sliding_attention" if with_window and not rotates else "full_attention"
        for rotates in rotated[:count]
    ]
    common = read_common(f, theta=2e6, biases="all")
    unrotated = tuple(i for i, rotates in enumerate(rotated[:count]) if not rotates)
    positions = {"unrotated": unrotated} if len(unrotated) < count else {"positions": "none"}
    return ModelConfig(
        **pattern_fields("*-" * count),
        ffn=f.integer("intermediate_size", least=1),
        mlp_bias=f.truth("mlp_bias", default=False),
        **common | {"tied": f.get("tie_word_embeddings", default=True)},
        **read_heads(f, kv_heads=4),
        **positions,
        **windows_of(kinds, count, window if switched else None),
    )


def write_smollm3(config: ModelConfig) -> dict[str, Any]:
    """Writes a SmolLM3 config."""
    c = config
    attentions = [t for t, symbol in enumerate(c.symbols) if symbol == "*"]
    return {
        **write_common(c),
        **write_heads(c),
        "intermediate_size": c.ffn,
        "mlp_bias": c.mlp_bias,
        "no_rope_layers": [int(c.rope_of(t) is not None) for t in attentions],
        "use_sliding_window": c.window is not None,
        "sliding_window": c.window,
        "layer_types": layer_types(c),
    }


BETA = "llama_4_scaling_beta"  # in the table of rotary positions


def read_ministral3(f: Fields) -> ModelConfig:
    """Reads a Ministral 3 config: queries grow with their position."""
    tables = {name: f.table(name) for name in ("rope_scaling", "rope_parameters")}
    table = dict(tables["rope_scaling"] or tables["rope_parameters"])
    if BETA not in table:
        raise Unsupported(f"rope_parameters.{BETA}", None, "missing from config.json")
    beta = table.pop(BETA)
    table.pop("max_position_embeddings", None)  # a copy that transformers does not read
    length = table.get("original_max_position_embeddings")
    if table.get("rope_type", "default") == "default":  # it is that of the queries alone then
        table.pop("original_max_position_embeddings", None)
    rope = Fields({**f.values, "rope_scaling": None, "rope_parameters": table}, notify=f.notify)
    native = read_rope(rope, theta=1e6)
    f.read |= rope.read
    if length is None and "rope_original" not in native:
        raise Unsupported("rope_parameters.original_max_position_embeddings", None, "missing")
    length = native["rope_original"] if length is None else length
    return ModelConfig(
        **pattern_fields("*-" * f.integer("num_hidden_layers")),
        ffn=f.integer("intermediate_size", least=1),
        window=f.get("sliding_window", default=None),
        query_temperature=beta,
        query_temperature_length=length,
        **read_common(f, eps=1e-5, rope=native),
        **read_heads(f, kv_heads=8, head_dim=128),
    )


def write_ministral3(config: ModelConfig) -> dict[str, Any]:
    """Writes a Ministral 3 config."""
    c, common = config, write_common(config)
    stretched = c.rope_scaling != "none"
    if c.query_temperature and stretched and c.query_temperature_length != c.rope_original:
        remedy = f"must be rope_original = {c.rope_original}"
        raise Unsupported("query_temperature_length", c.query_temperature_length, remedy)
    scaling = common["rope_scaling"] or {"rope_type": "default"}
    lengths = {"original_max_position_embeddings": c.query_temperature_length}
    table = {"rope_theta": c.rope_theta, **scaling, **lengths, BETA: c.query_temperature}
    return {
        **common,
        **write_heads(c),
        "intermediate_size": c.ffn,
        "sliding_window": c.window,
        "rope_scaling": table,
    }


def read_helium(f: Fields) -> ModelConfig:
    """Reads a Helium config; the width of all its heads is that of the stream."""
    common = read_common(f, eps=1e-8, theta=100000.0, biases="qkv")
    heads = read_heads(f, kv_heads=20, head_dim=128)
    if heads["head_dim"] * common["heads"] != common["hidden"]:
        remedy = f"times num_attention_heads it must be hidden_size = {common['hidden']}"
        raise Unsupported("head_dim", heads["head_dim"], remedy)
    return ModelConfig(
        **pattern_fields("*-" * f.integer("num_hidden_layers")),
        ffn=f.integer("intermediate_size", least=1),
        mlp_bias=f.truth("mlp_bias", default=False),
        **common,
        **heads,
    )


def write_helium(config: ModelConfig) -> dict[str, Any]:
    """Writes a Helium config."""
    fields = write_common(config) | write_heads(config)
    return fields | {"intermediate_size": config.ffn, "mlp_bias": config.mlp_bias}


def helium_attention(hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of attention whose rotary pairs are adjacent channels."""
    heads = {"q": config.heads, "k": config.kv_heads}
    order = interleaved(0, config.head_dim)

    def in_pairs(e: Entry) -> Entry:
        name = e.native_names[0].removeprefix(f"{native}.").removesuffix("_bias")
        return replace(e, groups=heads[name], order=order) if name in heads else e

    return [in_pairs(e) for e in attention(hf, native, config)]


FAMILIES = (
    Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        read_smollm3,
        write_smollm3,
        partial(layers, DENSE, NORMS_BEFORE),
        harmless=frozenset({"max_window_layers"}),
    ),
    Family(
        "Ministral3ForCausalLM",
        "ministral3",
        read_ministral3,
        write_ministral3,
        partial(layers, DENSE, NORMS_BEFORE),
    ),
    Family(
        "HeliumForCausalLM",
        "helium",
        read_helium,
        write_helium,
        partial(layers, {"*": helium_attention, "-": mlp}, NORMS_BEFORE),
    ),
)
