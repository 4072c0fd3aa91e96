"""Converts Qwen2-MoE: biases on q, k and v, and mixtures with a gated shared expert."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import pattern_fields
from colonnade.launcher.convert.huggingface.dense import (
    NORMS_BEFORE,
    Block,
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
from colonnade.launcher.convert.huggingface.dense_biased import without_attention_bias
from colonnade.launcher.convert.huggingface.entry import Entry
from colonnade.launcher.convert.huggingface.family import Family
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.launcher.convert.huggingface.moe import read_top_k, sparse_layers, write_experts
from colonnade.launcher.convert.huggingface.qwen3_next import qwen3_next_mixture
from colonnade.models.config import ModelConfig


def read_windows(f: Fields, count: int) -> dict[str, Any]:
    """Reads the native fields of the sliding windows, by default in every other layer."""
    switched = f.truth("use_sliding_window", default=False)
    window = f.get("sliding_window", default=4096, null=None)
    last = f.integer("max_window_layers", default=28)
    kinds = f.entries("layer_types", of=str) or [
        "sliding_attention" if switched and i % 2 == 0 and i < last else "full_attention"
        for i in range(count)
    ]
    return windows_of(kinds, count, window if switched else None)


def read_qwen2_moe(f: Fields) -> ModelConfig:
    """Reads a Qwen2-MoE config."""
    count = f.integer("num_hidden_layers", default=24)
    sparse = sparse_layers(f, count)
    return ModelConfig(
        **pattern_fields("".join("*E" if is_sparse else "*-" for is_sparse in sparse)),
        ffn=f.integer("intermediate_size", default=5632, least=1),
        expert_ffn=f.integer("moe_intermediate_size", default=1408, least=1),
        shared_ffn=f.integer("shared_expert_intermediate_size", default=5632, least=1),
        shared_gate=True,
        experts=f.get("num_experts", "num_local_experts", default=60),
        **read_top_k(f, False, default=4),
        **read_common(f)
        | {"attention_bias": "qkv" if f.truth("qkv_bias", default=True) else "none"},
        **read_heads(f, kv_heads=16),
        **read_windows(f, count),
    )


def write_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    """Writes a Qwen2-MoE config."""
    c = config
    return {
        **without_attention_bias(write_common(c) | write_heads(c)),
        "intermediate_size": c.ffn,
        **write_experts(c),
        "shared_expert_intermediate_size": c.shared_ffn,
        "num_experts": c.experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, symbol in enumerate(c.symbols[1::2]) if symbol == "-"],
        "qkv_bias": c.attention_bias == "qkv",
        "use_sliding_window": c.window is not None,
        "sliding_window": c.window,
        "layer_types": layer_types(c),
    }


def qwen2_moe(packed: bool, config: ModelConfig) -> list[Entry]:
    """Returns the entries of Qwen2-MoE: layers of attention and a mixture or an MLP."""
    blocks: dict[str, Block] = {
        "*": attention,
        "-": mlp,
        "E": partial(qwen3_next_mixture, packed),
    }
    return layers(blocks, NORMS_BEFORE, config)


FAMILIES = (
    Family(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        read_qwen2_moe,
        write_qwen2_moe,
        partial(qwen2_moe, False),
        partial(qwen2_moe, True),
    ),
)
