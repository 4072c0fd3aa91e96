"""Converts MiniMax-M2: QK-norm over all heads, rotary positions on a part, a sigmoid router."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import pattern_fields
from colonnade.launcher.convert.huggingface.dense import (
    NORMS_BEFORE,
    Block,
    attention,
    layers,
    read_common,
    read_heads,
    write_common,
    write_heads,
)
from colonnade.launcher.convert.huggingface.entry import Entry, entry
from colonnade.launcher.convert.huggingface.family import Family
from colonnade.launcher.convert.huggingface.fields import Fields, Unsupported
from colonnade.launcher.convert.huggingface.mamba import check_rotated
from colonnade.launcher.convert.huggingface.moe import mixtral_mixture, read_top_k
from colonnade.models.config import ModelConfig

# Fields of features of the code in published folders, and the values that transformers has always.
ONLY: dict[str, Any] = {
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "norm_topk_prob": True,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "sliding_window": None,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_mlp_beta": 1.0,
}


def read_minimax(f: Fields) -> ModelConfig:
    """Reads a MiniMax-M2 config."""
    for name, value in ONLY.items():
        f.only(name, value)
    count = f.integer("num_hidden_layers")
    f.only("attn_type_list", None, [1] * count, remedy="only softmax attention in every layer")
    heads = read_heads(f, kv_heads=8, head_dim=128)
    width = heads["head_dim"]
    rotated = f.integer("rotary_dim", default=width, null=width)
    common = read_common(f, theta=5e6, fraction=rotated / width)
    fraction = common["rope_fraction"]
    if f.values.get("rotary_dim") is not None and rotated != round(fraction * width):
        remedy = f"but partial_rotary_factor = {fraction} of head_dim = {width}"
        raise Unsupported("rotary_dim", rotated, remedy)
    check_rotated(fraction, width)
    return ModelConfig(
        **pattern_fields("*E" * count),
        expert_ffn=f.get("intermediate_size"),
        experts=f.get("num_local_experts", "num_experts", default=256),
        **read_top_k(f, True, default=8),
        router_score="sigmoid",
        router_bias=True,
        qk_norm="full",
        **common,
        **heads,
    )


def write_minimax(config: ModelConfig) -> dict[str, Any]:
    """Writes a MiniMax-M2 config."""
    c = config
    check_rotated(c.rope_fraction, c.head_dim, "rope_fraction")
    return {
        **write_common(c),
        **write_heads(c),
        "partial_rotary_factor": c.rope_fraction,
        "rotary_dim": round(c.rope_fraction * c.head_dim),
        "intermediate_size": c.expert_ffn,
        "num_local_experts": c.experts,
        "num_experts_per_tok": c.top_k,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
    }


def minimax_mixture(packed: bool, hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of a mixture, whose tensors transformers 5 renames on loading."""
    name = "mlp" if packed else "block_sparse_moe"
    bias = entry(f"{hf}.{name}.e_score_correction_bias", f"{native}.router_bias")
    return [*mixtral_mixture(packed, hf, native, config), bias]


def minimax(packed: bool, config: ModelConfig) -> list[Entry]:
    """Returns the entries of MiniMax-M2."""
    blocks: dict[str, Block] = {"*": attention, "E": partial(minimax_mixture, packed)}
    return layers(blocks, NORMS_BEFORE, config)


FAMILIES = (
    Family(
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        read_minimax,
        write_minimax,
        partial(minimax, False),
        partial(minimax, True),
        inert={  # of linear attention, of a shared expert, and of modules that are not published
            "layernorm_linear_attention_beta": (),
            "mlp_intermediate_size": (),
            "shared_moe_mode": (),
            "use_mtp": (),
            "num_mtp_modules": (),
            "mtp_transformer_layers": (),
        },
    ),
)
