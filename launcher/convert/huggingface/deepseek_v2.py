"""Converts DeepSeek-V2: latent attention, softmax routers, weights of experts as they are."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import pattern_fields
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
from colonnade.launcher.convert.huggingface.family import Family
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.launcher.convert.huggingface.moe import (
    dense_first,
    latent_attention,
    mixture,
    read_latent,
    read_shared,
    write_latent,
    write_shared,
)
from colonnade.models.config import ModelConfig


def read_deepseek_v2(f: Fields) -> ModelConfig:
    """Reads a DeepSeek-V2 config."""
    f.only("scoring_func", "softmax")
    f.only("moe_layer_freq", 1)
    f.only("mlp_bias", False)
    f.only("norm_topk_prob", False)  # transformers does not read it, and never normalises
    groups = {}
    if f.only("topk_method", "greedy", "group_limited_greedy") != "greedy":
        groups = {"router_groups": f.get("n_group"), "router_top_groups": f.get("topk_group")}
    f.get("n_group", default=None, null=None)
    f.get("topk_group", default=None, null=None)
    return ModelConfig(
        **pattern_fields(dense_first(f, default=0)),
        **read_latent(f),
        ffn=f.get("intermediate_size"),
        **read_shared(f, default=2),
        top_k=f.get("num_experts_per_tok"),
        router_normalise=False,
        router_scale=f.get("routed_scaling_factor", default=1.0),
        **groups,
        **read_common(f),
    )


def write_deepseek_v2(config: ModelConfig) -> dict[str, Any]:
    """Writes a DeepSeek-V2 config."""
    c = config
    limited = c.router_top_groups is not None
    return {
        **write_common(c),
        **write_latent(c),
        "first_k_dense_replace": c.symbols.count("-"),
        "intermediate_size": c.ffn,
        "moe_intermediate_size": c.expert_ffn,
        "n_routed_experts": c.experts,
        **write_shared(c),
        "num_experts_per_tok": c.top_k,
        "norm_topk_prob": False,
        "routed_scaling_factor": c.router_scale,
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "n_group": c.router_groups if limited else None,
        "topk_group": c.router_top_groups,
        "moe_layer_freq": 1,
        "mlp_bias": False,
    }


def shared_mixture(packed: bool, hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of a mixture with shared experts."""
    shared = gated(f"{hf}.mlp.shared_experts.", f"{native}.shared_")
    return [*mixture(packed, hf, native, config), *shared]


def deepseek_v2(packed: bool, config: ModelConfig) -> list[Entry]:
    """Returns the entries of DeepSeek-V2."""
    blocks: dict[str, Block] = {
        "*": latent_attention,
        "-": mlp,
        "E": partial(shared_mixture, packed),
    }
    return layers(blocks, NORMS_BEFORE, config)


FAMILIES = (
    Family(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        read_deepseek_v2,
        write_deepseek_v2,
        partial(deepseek_v2, False),
        partial(deepseek_v2, True),
        harmless=frozenset({"head_dim", "qk_head_dim", "ep_size"}),
    ),
)
