"""Converts OLMo, whose norms have no weights, and OLMo-3, whose positions depend on the window."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import pattern_fields, read_ropes, write_ropes
from colonnade.launcher.convert.huggingface.dense import (
    DENSE,
    NORMS_AFTER,
    NORMS_BEFORE,
    UNUSED_WINDOW,
    layer_types,
    layers,
    read_common,
    read_heads,
    windows_of,
    write_common,
    write_heads,
)
from colonnade.launcher.convert.huggingface.entry import Entry
from colonnade.launcher.convert.huggingface.family import Family
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.models.config import ModelConfig

EPS = 1e-5  # of OLMo's norms, which no field sets


def read_olmo(f: Fields) -> ModelConfig:
    """Reads an OLMo config: LayerNorms without weights, and queries, keys and values unclipped."""
    f.only("clip_qkv", None)
    f.only("rms_norm_eps", EPS)
    return ModelConfig(
        **pattern_fields("*-" * f.integer("num_hidden_layers")),
        ffn=f.integer("intermediate_size", least=1),
        norm="layer",
        norm_weight=False,
        **read_common(f, eps=EPS, biases="all"),
        **read_heads(f),
    )


def write_olmo(config: ModelConfig) -> dict[str, Any]:
    """Writes an OLMo config."""
    fields = write_common(config) | write_heads(config)
    del fields["rms_norm_eps"]
    return fields | {"intermediate_size": config.ffn, "clip_qkv": None}


def olmo(config: ModelConfig) -> list[Entry]:
    """Returns the entries of OLMo, without those of norms."""
    entries = layers(DENSE, NORMS_BEFORE, config)
    return [e for e in entries if not e.native_names[0].startswith(("norms.", "final."))]


THETA = 500000.0  # of OLMo-3


def read_olmo3(f: Fields) -> ModelConfig:
    """Reads an OLMo-3 config: OLMo-2 with a window in three of four layers."""
    count, window = f.integer("num_hidden_layers"), f.get("sliding_window", default=4096, null=None)
    kinds = f.entries("layer_types", of=str) or [
        "sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(count)
    ]
    return ModelConfig(
        **pattern_fields("*-" * count),
        ffn=f.integer("intermediate_size", least=1),
        qk_norm="full",
        norm_position="after",
        **read_common(f, eps=1e-5, biases="all", rope=read_ropes(f, THETA, THETA)),
        **read_heads(f),
        **windows_of(kinds, count, window),
    )


def write_olmo3(config: ModelConfig) -> dict[str, Any]:
    """Writes an OLMo-3 config."""
    return {
        **write_common(config),
        **write_heads(config),
        "intermediate_size": config.ffn,
        "sliding_window": config.window or UNUSED_WINDOW,
        "layer_types": layer_types(config),
        **write_ropes(config),
    }


FAMILIES = (
    Family("OlmoForCausalLM", "olmo", read_olmo, write_olmo, olmo),
    Family(
        "Olmo3ForCausalLM", "olmo3", read_olmo3, write_olmo3, partial(layers, DENSE, NORMS_AFTER)
    ),
)
