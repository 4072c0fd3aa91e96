"""Converts DeepSeek-V2 and GLM-4.7-Flash: latent attention, some layers dense."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import (
    UNREAD_MTP,
    notify_unread_mtp,
    pattern_fields,
    symbols_of,
)
from colonnade.launcher.convert.huggingface.dense import (
    NORMS_BEFORE,
    Block,
    gated,
    layers,
    mlp,
    read_common,
    write_common,
)
from colonnade.launcher.convert.huggingface.entry import Entry
from colonnade.launcher.convert.huggingface.family import Family, Unsupported
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.launcher.convert.huggingface.moe import (
    deepseek_mixture,
    latent_attention,
    mixture,
    read_biased_router,
    read_latent,
    read_top_k,
    shared_experts,
    write_biased_router,
    write_experts,
    write_latent,
)
from colonnade.models.config import ModelConfig


def read_deepseek_v2(f: Fields) -> ModelConfig:
    """Reads a DeepSeek-V2 config: experts are chosen by their softmax, from all or some groups."""
    f.only("scoring_func", "softmax")
    f.only("moe_layer_freq", 1)
    f.only("mlp_bias", False)
    f.only("norm_topk_prob", False)
    groups = {name: f.get(name, default=None) for name in ("n_group", "topk_group")}
    limited = f.only("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    if limited and None in groups.values():
        raise Unsupported("n_group", groups["n_group"], "give n_group and topk_group")
    dense, count = f.integer("first_k_dense_replace", default=0), f.integer("num_hidden_layers")
    width = f.integer("moe_intermediate_size", least=1)
    return ModelConfig(
        **pattern_fields("*-" * min(dense, count) + "*E" * (count - dense)),
        **read_latent(f, kv_heads=None),
        ffn=f.integer("intermediate_size", least=1),
        expert_ffn=width,
        shared_ffn=f.integer("n_shared_experts", default=2, least=1) * width,
        experts=f.get("n_routed_experts", "num_experts", default=64),
        top_k=f.integer("num_experts_per_tok", least=1),
        router_normalise=False,
        router_scale=f.number("routed_scaling_factor", default=1.0),
        router_groups=groups["n_group"] if limited else 1,
        router_top_groups=groups["topk_group"] if limited else None,
        **read_common(f),
    )


def write_deepseek_v2(config: ModelConfig) -> dict[str, Any]:
    """Writes a DeepSeek-V2 config."""
    c = config
    limited = c.router_top_groups is not None
    return {
        **write_common(c),
        **write_latent(c),
        **write_experts(c),
        "first_k_dense_replace": c.symbols.count("-"),
        "intermediate_size": c.ffn,
        "n_routed_experts": c.experts,
        "n_shared_experts": shared_experts(c),
        "routed_scaling_factor": c.router_scale,
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "n_group": c.router_groups if limited else None,
        "topk_group": c.router_top_groups,
        "mlp_bias": False,
    }


KINDS = {"dense": "-", "sparse": "E"}


def read_glm_lite(f: Fields) -> ModelConfig:
    """Reads a GLM-4.7-Flash config: `mlp_layer_types` lists dense layers and mixtures."""
    notify_unread_mtp(f)
    f.only("rope_interleave", True)
    f.only("first_k_dense_replace", 1)  # transformers reads mlp_layer_types alone
    count = f.integer("num_hidden_layers")
    kinds = f.entries("mlp_layer_types", of=str) or ["dense"] + ["sparse"] * (count - 1)
    channels = symbols_of(kinds, KINDS, "mlp_layer_types")
    if len(channels) != count:
        raise Unsupported("mlp_layer_types", len(channels), f"but num_hidden_layers = {count}")
    width = f.integer("moe_intermediate_size", default=1536, least=1)
    return ModelConfig(
        **pattern_fields("".join(f"*{channel}" for channel in channels)),
        **read_latent(f, kv_heads=20, rope_dim="head_dim"),
        ffn=f.integer("intermediate_size", least=1),
        expert_ffn=width,
        shared_ffn=f.integer("n_shared_experts", default=1, least=1) * width,
        experts=f.get("n_routed_experts", "num_local_experts", default=64),
        router_scale=f.number("routed_scaling_factor", default=1.8),
        **read_top_k(f, True, default=4),
        **read_biased_router(f, default=1),
        **read_common(f, eps=1e-5),
    )


def write_glm_lite(config: ModelConfig) -> dict[str, Any]:
    """Writes a GLM-4.7-Flash config."""
    c, kinds = config, {symbol: kind for kind, symbol in KINDS.items()}
    return {
        **write_common(c),
        **write_latent(c),
        **write_biased_router(c),
        "rope_interleave": True,
        "intermediate_size": c.ffn,
        "n_shared_experts": shared_experts(c),
        "mlp_layer_types": [kinds.get(symbol, symbol) for symbol in c.symbols[1::2]],
    }


def v2_mixture(packed: bool, hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of DeepSeek-V2's mixture with a shared expert."""
    shared = gated(f"{hf}.mlp.shared_experts.", f"{native}.shared_")
    return [*mixture(packed, hf, native, config), *shared]


def entries(mixture: Any, packed: bool, config: ModelConfig) -> list[Entry]:
    """Returns the entries of layers of latent attention and a mixture or an MLP."""
    blocks: dict[str, Block] = {"*": latent_attention, "-": mlp, "E": partial(mixture, packed)}
    return layers(blocks, NORMS_BEFORE, config)


WIDTHS = frozenset({"head_dim", "qk_head_dim", "ep_size"})
FAMILIES = (
    Family(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        read_deepseek_v2,
        write_deepseek_v2,
        partial(entries, v2_mixture, False),
        partial(entries, v2_mixture, True),
        harmless=WIDTHS,
    ),
    Family(
        "Glm4MoeLiteForCausalLM",
        "glm4_moe_lite",
        read_glm_lite,
        write_glm_lite,
        partial(entries, deepseek_mixture, False),
        partial(entries, deepseek_mixture, True),
        unread=(("model.layers.47.", UNREAD_MTP[1]),),
        harmless=WIDTHS - {"head_dim"},
    ),
)
