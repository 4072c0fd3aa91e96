"""Converts gpt-oss: biases on all projections, sinks, windows, experts with a clamped SwiGLU."""

from functools import partial
from typing import Any

from colonnade.kernels.activation import ALPHA, LIMIT
from colonnade.launcher.convert.huggingface.config import pattern_fields
from colonnade.launcher.convert.huggingface.dense import (
    NORMS_BEFORE,
    UNUSED_WINDOW,
    Block,
    attention,
    layer_types,
    layers,
    read_common,
    read_heads,
    windows_of,
    write_common,
    write_heads,
)
from colonnade.launcher.convert.huggingface.entry import Entry, entry
from colonnade.launcher.convert.huggingface.family import Family, Unsupported
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.launcher.convert.huggingface.granite import read_experts, write_experts
from colonnade.models.config import ModelConfig

CLAMPED = {"silu": "swiglu_clamped"}


def read_gpt_oss(f: Fields) -> ModelConfig:
    """Reads a gpt-oss config: every other layer has a window."""
    if not f.values.get("rope_scaling") and not f.values.get("rope_parameters"):
        raise Unsupported("rope_scaling", None, "missing from config.json")  # yarn in transformers
    f.only("swiglu_alpha", ALPHA)
    f.only("swiglu_limit", LIMIT)
    count = f.integer("num_hidden_layers", default=36)
    window = f.integer("sliding_window", default=128, least=1)
    kinds = f.entries("layer_types", of=str) or [
        "full_attention" if i % 2 else "sliding_attention" for i in range(count)
    ]
    biased = f.truth("attention_bias", default=True)
    common = read_common(f, eps=1e-5, theta=150000.0, biases="all", activations=CLAMPED)
    return ModelConfig(
        **pattern_fields("*E" * count),
        **common | {"attention_bias": "all" if biased else "none"},
        **read_heads(f, kv_heads=8, head_dim=64),
        **read_experts(f, 0, experts=128, top_k=4),
        expert_bias=True,
        router_offset=True,
        sinks=True,
        **windows_of(kinds, count, window),
    )


def write_gpt_oss(config: ModelConfig) -> dict[str, Any]:
    """Writes a gpt-oss config."""
    return {
        **write_common(config, CLAMPED),
        **write_heads(config),
        **write_experts(config),
        "swiglu_alpha": ALPHA,
        "swiglu_limit": LIMIT,
        "sliding_window": config.window or UNUSED_WINDOW,
        "layer_types": layer_types(config),
    }


def sink_attention(hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of attention with sinks."""
    return [*attention(hf, native, config), entry(f"{hf}.self_attn.sinks", f"{native}.sinks")]


def mixture(hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of the mixture: all experts are in one tensor, whose matrices are
    transposed, and in which channels of gate and up projection alternate."""
    hf, both = f"{hf}.mlp", (f"{native}.gate", f"{native}.up")
    biases = tuple(f"{name}_bias" for name in both)
    experts, pairs = f"{hf}.experts", config.expert_ffn
    return [
        entry(f"{hf}.router.weight", f"{native}.router"),
        entry(f"{hf}.router.bias", f"{native}.router_offset"),
        entry(f"{experts}.gate_up_proj", *both, dim=1, groups=pairs, transposed=True),
        entry(f"{experts}.gate_up_proj_bias", *biases, dim=1, groups=pairs),
        entry(f"{experts}.down_proj", f"{native}.down", transposed=True),
        entry(f"{experts}.down_proj_bias", f"{native}.down_bias"),
    ]


BLOCKS: dict[str, Block] = {"*": sink_attention, "E": mixture}
FAMILIES = (
    Family(
        "GptOssForCausalLM",
        "gpt_oss",
        read_gpt_oss,
        write_gpt_oss,
        partial(layers, BLOCKS, NORMS_BEFORE),
        harmless=frozenset({"initial_context_length", "experts_per_token"}),
    ),
)
