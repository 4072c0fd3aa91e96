"""Converts Qwen2, Mistral, Ministral, Seed-OSS and Arcee: dense models with biases or windows."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import pattern_fields
from colonnade.launcher.convert.huggingface.dense import (
    DENSE,
    NORMS_BEFORE,
    UNGATED,
    UNUSED_WINDOW,
    layer_types,
    layers,
    leave_out_dropout,
    read_common,
    read_heads,
    read_windows,
    windows_of,
    write_common,
    write_heads,
    write_windows,
)
from colonnade.launcher.convert.huggingface.family import Family, Unsupported
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.models.config import ModelConfig


def read_dense(f: Fields) -> dict[str, Any]:
    """Reads the native fields of a row of attention and MLPs."""
    return {
        **pattern_fields("*-" * f.integer("num_hidden_layers")),
        "ffn": f.integer("intermediate_size", least=1),
    }


def without_attention_bias(hf_fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields without `attention_bias`, which the family does not have."""
    return {name: value for name, value in hf_fields.items() if name != "attention_bias"}


def read_qwen2(f: Fields) -> ModelConfig:
    """Reads a Qwen2 config: biases on q, k and v, and sliding windows in some layers."""
    fields = read_dense(f) | read_common(f) | {"attention_bias": "qkv"}
    windows = read_windows(f, f.integer("num_hidden_layers"))
    return ModelConfig(**fields, **read_heads(f, kv_heads=32), **windows)


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    """Writes a Qwen2 config."""
    fields = write_common(config) | write_heads(config) | write_windows(config)
    return without_attention_bias(fields) | {"intermediate_size": config.ffn}


WINDOW = 4096  # the default of Mistral's and Ministral's sliding_window


def read_mistral(f: Fields) -> ModelConfig:
    """Reads a Mistral config: a sliding window in all layers or in none."""
    window = f.get("sliding_window", default=WINDOW, null=None)
    return ModelConfig(
        **read_dense(f), **read_common(f), **read_heads(f, kv_heads=8), window=window
    )


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    """Writes a Mistral config."""
    fields = write_common(config) | write_heads(config)
    return fields | {"intermediate_size": config.ffn, "sliding_window": config.window}


def read_ministral(f: Fields) -> ModelConfig:
    """Reads a Ministral config: sliding windows in the layers that `layer_types` lists."""
    fields, count = read_dense(f), f.integer("num_hidden_layers")
    window = f.get("sliding_window", default=WINDOW, null=None)
    default = "full_attention" if window is None else "sliding_attention"
    kinds = f.entries("layer_types", of=str) or [default] * count
    fields |= windows_of(kinds, count, window)
    return ModelConfig(**fields, **read_common(f), **read_heads(f, kv_heads=8))


def write_ministral(config: ModelConfig) -> dict[str, Any]:
    """Writes a Ministral config."""
    window = {"sliding_window": config.window or UNUSED_WINDOW}
    return write_mistral(config) | window | {"layer_types": layer_types(config)}


def read_seed_oss(f: Fields) -> ModelConfig:
    """Reads a Seed-OSS config: biases on q, k and v, and separately on the output."""
    leave_out_dropout(f, "residual_dropout", 0.1)
    qkv, out = f.truth("attention_bias", default=True), f.truth("attention_out_bias", default=False)
    if out and not qkv:
        remedy = "a bias on the output alone, without those of attention_bias, is not supported"
        raise Unsupported("attention_out_bias", out, remedy)
    common = read_common(f, biases="all", dropout=0.1)
    common["attention_bias"] = "all" if out else "qkv" if qkv else "none"
    mlp_bias = f.truth("mlp_bias", default=False)
    heads = read_heads(f, kv_heads=8, head_dim=128)
    return ModelConfig(**read_dense(f), **common, **heads, mlp_bias=mlp_bias)


def write_seed_oss(config: ModelConfig) -> dict[str, Any]:
    """Writes a Seed-OSS config."""
    return {
        **write_common(config),
        **write_heads(config),
        "intermediate_size": config.ffn,
        "attention_out_bias": config.attention_bias == "all",
        "residual_dropout": 0.0,
        "mlp_bias": config.mlp_bias,
    }


def read_arcee(f: Fields) -> ModelConfig:
    """Reads an Arcee config: MLPs without a gate."""
    common = read_common(f, eps=1e-5, biases="all", activations=UNGATED)
    mlp_bias = f.truth("mlp_bias", default=False)
    return ModelConfig(**read_dense(f), **common, **read_heads(f), mlp_bias=mlp_bias)


def write_arcee(config: ModelConfig) -> dict[str, Any]:
    """Writes an Arcee config."""
    fields = write_common(config, UNGATED) | write_heads(config)
    return fields | {"intermediate_size": config.ffn, "mlp_bias": config.mlp_bias}


BEFORE = partial(layers, DENSE, NORMS_BEFORE)
FAMILIES = (
    Family("Qwen2ForCausalLM", "qwen2", read_qwen2, write_qwen2, BEFORE),
    Family("MistralForCausalLM", "mistral", read_mistral, write_mistral, BEFORE),
    Family("MinistralForCausalLM", "ministral", read_ministral, write_ministral, BEFORE),
    Family("SeedOssForCausalLM", "seed_oss", read_seed_oss, write_seed_oss, BEFORE),
    Family("ArceeForCausalLM", "arcee", read_arcee, write_arcee, BEFORE),
)
