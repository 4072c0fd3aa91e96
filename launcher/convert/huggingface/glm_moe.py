"""Converts GLM-4.5, GLM-4.7-Flash and dots.llm1: first layers dense, then DeepSeek's mixtures."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import pattern_fields
from colonnade.launcher.convert.huggingface.dense import (
    attention,
    mlp,
    read_common,
    read_heads,
    windows_of,
    write_common,
    write_heads,
)
from colonnade.launcher.convert.huggingface.entry import Entry
from colonnade.launcher.convert.huggingface.family import Family, tied_head
from colonnade.launcher.convert.huggingface.fields import REQUIRED, Fields, Unsupported
from colonnade.launcher.convert.huggingface.mamba import check_rotated
from colonnade.launcher.convert.huggingface.moe import (
    deepseek,
    deepseek_copies,
    deepseek_mixture,
    dense_first,
    layers_and_mtp,
    read_biased_router,
    read_latent,
    read_shared,
    read_top_k,
    write_biased_router,
    write_latent,
    write_shared,
)
from colonnade.models.config import ModelConfig


def read_mixtures(
    f: Fields, scale: float, normalised: bool, shared: Any = REQUIRED
) -> dict[str, Any]:
    """Reads the native fields of the mixtures; the arguments are defaults of transformers."""
    return {
        "ffn": f.get("intermediate_size"),
        **read_shared(f, default=shared),
        "router_scale": f.get("routed_scaling_factor", default=scale),
        **read_top_k(f, normalised),
        **read_biased_router(f, default=1),
    }


def write_mixtures(config: ModelConfig) -> dict[str, Any]:
    """Writes the fields of `read_mixtures`."""
    fields = write_shared(config) | write_biased_router(config)
    return fields | {"intermediate_size": config.ffn}


def read_glm4_moe(f: Fields) -> ModelConfig:
    """Reads a GLM-4.5 config: rotary positions on a part of each head."""
    heads = read_heads(f, kv_heads=8)
    common = read_common(f, eps=1e-5, fraction=0.5, biases="qkv")
    check_rotated(common["rope_fraction"], heads["head_dim"])
    return ModelConfig(
        **pattern_fields(dense_first(f, default=1)),
        mtp=f.get("num_nextn_predict_layers", "num_mtp_layers", default=1),
        mtp_pattern="*E",
        qk_norm="head" if f.only("use_qk_norm", False, True) else "none",
        **read_mixtures(f, 1.0, True, shared=1),
        **common,
        **heads,
    )


def write_glm4_moe(config: ModelConfig) -> dict[str, Any]:
    """Writes a GLM-4.5 config."""
    c = config
    check_rotated(c.rope_fraction, c.head_dim, "rope_fraction")
    return {
        **write_common(c),
        **write_heads(c),
        "partial_rotary_factor": c.rope_fraction,
        "use_qk_norm": c.qk_norm == "head",
        "first_k_dense_replace": c.symbols.count("-"),
        "num_nextn_predict_layers": c.mtp,
        **write_mixtures(c),
    }


def read_dots1(f: Fields) -> ModelConfig:
    """Reads a dots.llm1 config: QK-norm in each head, sliding windows in some layers."""
    f.only("scoring_func", "noaux_tc", "sigmoid")
    f.only("topk_method", "noaux_tc")
    f.only("moe_layer_freq", 1)
    symbols = dense_first(f, default=0)
    count, width = len(symbols) // 2, f.get("sliding_window", default=4096, null=None)
    first = f.integer("max_window_layers", default=62)
    kinds = f.entries("layer_types", of=str) or [
        "full_attention" if width is None or i < first else "sliding_attention"
        for i in range(count)
    ]
    return ModelConfig(
        **pattern_fields(symbols),
        qk_norm="head",
        **read_mixtures(f, 1.0, False),
        **read_common(f, biases="all"),
        **read_heads(f, kv_heads=32),
        **windows_of(kinds, count, width),
    )


def write_dots1(config: ModelConfig) -> dict[str, Any]:
    """Writes a dots.llm1 config."""
    c = config
    windows = [c.window_of(t) for t, symbol in enumerate(c.symbols) if symbol == "*"]
    full = [window is None for window in windows]
    return {
        **write_common(c),
        **write_heads(c),
        "first_k_dense_replace": c.symbols.count("-"),
        "sliding_window": None if all(full) else c.window,
        "max_window_layers": full.index(False) if not all(full) else len(full),
        "layer_types": ["full_attention" if f else "sliding_attention" for f in full],
        **write_mixtures(c),
    }


def grouped(packed: bool, config: ModelConfig) -> list[Entry]:
    """Returns the entries of GLM-4.5 and dots.llm1: attention over grouped queries."""
    mixture = partial(deepseek_mixture, packed)
    return layers_and_mtp({"*": attention, "-": mlp, "E": mixture}, config)


def read_glm4_lite(f: Fields) -> ModelConfig:
    """Reads a GLM-4.7-Flash config: latent attention; a list says which layers are dense."""
    f.only("rope_interleave", True)
    f.only("topk_method", "noaux_tc")
    count = f.integer("num_hidden_layers")
    kinds = f.entries("mlp_layer_types", of=str) or ["dense", *["sparse"] * (count - 1)]
    if not set(kinds) <= {"dense", "sparse"} or len(kinds) != count:
        raise Unsupported("mlp_layer_types", kinds, f"must be {count} of dense and sparse")
    remedy = f"mlp_layer_types has {kinds.count('dense')}; transformers reads that alone"
    f.only("first_k_dense_replace", kinds.count("dense"), remedy=remedy)
    return ModelConfig(
        **pattern_fields("".join("*-" if kind == "dense" else "*E" for kind in kinds)),
        mtp=f.get("num_nextn_predict_layers", default=0),
        mtp_pattern="*E",
        **read_latent(f),
        **read_mixtures(f, 1.8, True, shared=1),
        **read_common(f, eps=1e-5),
    )


def write_glm4_lite(config: ModelConfig) -> dict[str, Any]:
    """Writes a GLM-4.7-Flash config."""
    c = config
    return {
        **write_common(c),
        **write_latent(c),
        "rope_interleave": True,
        "mlp_layer_types": ["dense" if s == "-" else "sparse" for s in c.symbols[1::2]],
        "num_nextn_predict_layers": c.mtp,
        **write_mixtures(c),
    }


FAMILIES = (
    Family(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        read_glm4_moe,
        write_glm4_moe,
        partial(grouped, False),
        partial(grouped, True),
        copies=deepseek_copies,
    ),
    Family(
        "Dots1ForCausalLM",
        "dots1",
        read_dots1,
        write_dots1,
        partial(grouped, False),
        partial(grouped, True),
        copies=tied_head,
    ),
    Family(
        "Glm4MoeLiteForCausalLM",
        "glm4_moe_lite",
        read_glm4_lite,
        write_glm4_lite,
        partial(deepseek, False),
        partial(deepseek, True),
        copies=deepseek_copies,
        harmless=frozenset({"head_dim", "qk_head_dim", "ep_size"}),
    ),
)
