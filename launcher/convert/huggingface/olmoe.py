"""Converts OLMoE and FlexOlmo: mixtures in all layers, QK-norm over all heads together."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import pattern_fields
from colonnade.launcher.convert.huggingface.dense import (
    NORMS_AFTER,
    NORMS_BEFORE,
    attention,
    layers,
    read_common,
    read_heads,
    write_common,
    write_heads,
)
from colonnade.launcher.convert.huggingface.entry import Entry
from colonnade.launcher.convert.huggingface.family import Family
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.launcher.convert.huggingface.moe import mixture, read_top_k
from colonnade.models.config import ModelConfig


def read_mixtures(f: Fields, experts: int, top_k: int, eps: float, theta: float) -> dict[str, Any]:
    """Reads the native fields that both share; the arguments are defaults."""
    return {
        **pattern_fields("*E" * f.integer("num_hidden_layers")),
        "expert_ffn": f.get("intermediate_size"),
        "experts": f.get("num_experts", "num_local_experts", default=experts),
        **read_top_k(f, False, default=top_k),
        "qk_norm": "full",
        **read_common(f, eps, theta, biases="all"),
        **read_heads(f),
    }


def write_mixtures(config: ModelConfig) -> dict[str, Any]:
    """Writes the fields of `read_mixtures`."""
    c = config
    return {
        **write_common(c),
        **write_heads(c),
        "intermediate_size": c.expert_ffn,
        "num_experts": c.experts,
        "num_experts_per_tok": c.top_k,
        "norm_topk_prob": c.router_normalise and c.top_k > 1,
    }


def read_olmoe(f: Fields) -> ModelConfig:
    """Reads an OLMoE config: norms before sub-blocks, heads as wide as the stream."""
    f.only("clip_qkv", None)
    width = f.integer("hidden_size", least=1) // f.integer("num_attention_heads", least=1)
    remedy = f"heads of OLMoE have hidden_size / num_attention_heads = {width} channels"
    f.only("head_dim", width, null=width, remedy=remedy)
    return ModelConfig(**read_mixtures(f, 64, 8, eps=1e-5, theta=10000.0))


def write_olmoe(config: ModelConfig) -> dict[str, Any]:
    """Writes an OLMoE config."""
    return write_mixtures(config) | {"clip_qkv": None}


def read_flex_olmo(f: Fields) -> ModelConfig:
    """Reads a FlexOlmo config: norms behind sub-blocks."""
    fields = read_mixtures(f, 7, 5, eps=1e-6, theta=500000.0)
    return ModelConfig(norm_position="after", **fields)


def entries(norms: tuple[str, str], packed: bool, config: ModelConfig) -> list[Entry]:
    """Returns the entries of layers of attention and a mixture."""
    return layers({"*": attention, "E": partial(mixture, packed)}, norms, config)


FAMILIES = (
    Family(
        "OlmoeForCausalLM",
        "olmoe",
        read_olmoe,
        write_olmoe,
        partial(entries, NORMS_BEFORE, False),
        partial(entries, NORMS_BEFORE, True),
    ),
    Family(
        "FlexOlmoForCausalLM",
        "flex_olmo",
        read_flex_olmo,
        write_mixtures,
        partial(entries, NORMS_AFTER, False),
        partial(entries, NORMS_AFTER, True),
    ),
)
