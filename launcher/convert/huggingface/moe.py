"""Converts Mixtral, Qwen3-MoE and DeepSeek-V3."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import pattern_fields
from colonnade.launcher.convert.huggingface.dense import (
    NORMS_BEFORE,
    Block,
    attention,
    gated,
    layer,
    layers,
    mlp,
    read_common,
    read_heads,
    write_common,
    write_heads,
)
from colonnade.launcher.convert.huggingface.entry import Entry, entry, interleaved, stacked
from colonnade.launcher.convert.huggingface.family import Family, Unsupported, tied_head
from colonnade.launcher.convert.huggingface.fields import REQUIRED, Fields
from colonnade.models.config import ModelConfig

LLAMA_NAMES = ("gate_proj", "up_proj", "down_proj")


def separate_experts(hf: str, native: str, count: int, names: tuple[str, str, str]) -> list[Entry]:
    """Returns the entries of experts as in a checkpoint: a tensor per expert and weight.

    `names` are the Hugging Face names of gate, up and down projection.
    """
    return [
        stacked(f"{hf}.experts.{{}}.{name}.weight", f"{native}.{n}", count)
        for name, n in zip(names, ("gate", "up", "down"), strict=True)
    ]


def packed_experts(hf: str, native: str) -> list[Entry]:
    """Returns the entries of experts as in transformers 5's memory.

    All experts are in one tensor, gate and up projection concatenated.
    """
    return [
        entry(f"{hf}.experts.gate_up_proj", f"{native}.gate", f"{native}.up", dim=1),
        entry(f"{hf}.experts.down_proj", f"{native}.down"),
    ]


def mixture(packed: bool, hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of Qwen3-MoE's mixture."""
    hf = f"{hf}.mlp"
    router = entry(f"{hf}.gate.weight", f"{native}.router")
    if packed:
        return [router, *packed_experts(hf, native)]
    return [router, *separate_experts(hf, native, config.experts, LLAMA_NAMES)]


def mixtral_mixture(packed: bool, hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of Mixtral's mixture, whose tensors transformers 5 renames on loading."""
    if packed:
        return mixture(True, hf, native, config)
    hf = f"{hf}.block_sparse_moe"
    router = entry(f"{hf}.gate.weight", f"{native}.router")
    return [router, *separate_experts(hf, native, config.experts, ("w1", "w3", "w2"))]


def read_top_k(f: Fields, normalised: bool, default: Any = REQUIRED) -> dict[str, Any]:
    """Reads how many experts a token has, and whether their weights are normalised to sum to 1.

    Refuses normalisation for one expert per token, whose weight would be the constant 1. `default`
    is that of the number, `normalised` that of the normalisation.
    """
    top_k, name = f.get("num_experts_per_tok", default=default), "norm_topk_prob"
    given = f.truth(name, default=normalised)
    if given and top_k == 1:
        raise Unsupported(name, given, "with one expert per token its router could not learn")
    return {"top_k": top_k, "router_normalise": given}


def write_experts(config: ModelConfig) -> dict[str, Any]:
    """Writes the fields of `read_top_k`, and the width of an expert."""
    c = config
    return {
        "num_experts_per_tok": c.top_k,
        "norm_topk_prob": c.router_normalise and c.top_k > 1,
        "moe_intermediate_size": c.expert_ffn,
    }


def read_biased_router(f: Fields, default: Any = REQUIRED) -> dict[str, Any]:
    """Reads the native fields of DeepSeek-V3's router: sigmoids, groups, a bias for balancing.

    `default` is that of the number of groups, and of the number that a token chooses.
    """
    groups, top_groups = f.get("n_group", default=default), f.get("topk_group", default=default)
    return {
        "router_score": "sigmoid",
        "router_bias": True,
        "router_groups": groups,
        "router_top_groups": None if groups == 1 else top_groups,
    }


def write_biased_router(config: ModelConfig) -> dict[str, Any]:
    """Writes the fields of mixtures with DeepSeek-V3's router."""
    c = config
    return {
        **write_experts(c),
        "n_routed_experts": c.experts,
        "routed_scaling_factor": c.router_scale,
        "n_group": c.router_groups if c.router_top_groups else 1,
        "topk_group": c.router_top_groups or 1,
    }


def read_mixtral(f: Fields) -> ModelConfig:
    """Reads a Mixtral config: mixtures in all layers, sliding windows in all layers or in none."""
    f.only("router_jitter_noise", 0.0)
    f.only("norm_topk_prob", True)  # transformers does not read it, and always normalises
    return ModelConfig(
        **pattern_fields("*E" * f.integer("num_hidden_layers")),
        expert_ffn=f.get("intermediate_size"),
        experts=f.get("num_local_experts", "num_experts", default=8),
        **read_top_k(f, True, default=2),
        window=f.get("sliding_window", default=None),
        **read_common(f, eps=1e-5, theta=1e6),
        **read_heads(f, kv_heads=8),
    )


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    """Writes a Mixtral config."""
    c = config
    return {
        **write_common(c),
        **write_heads(c),
        "intermediate_size": c.expert_ffn,
        "num_local_experts": c.experts,
        "num_experts_per_tok": c.top_k,
        "sliding_window": c.window,
        "router_jitter_noise": 0.0,
    }


def sparse_layers(f: Fields, count: int) -> list[bool]:
    """Reads which layers of a Qwen config are mixtures of experts."""
    dense = f.entries("mlp_only_layers", of=int) or []
    step = f.integer("decoder_sparse_step", default=1, least=1)
    return [i not in dense and (i + 1) % step == 0 for i in range(count)]


def read_qwen3_moe(f: Fields) -> ModelConfig:
    """Reads a Qwen3-MoE config: some dense layers, sliding windows in all layers or in none."""
    count = f.integer("num_hidden_layers")
    sparse = sparse_layers(f, count)
    windowed = f.get("use_sliding_window", default=False)
    window = f.get("sliding_window", default=REQUIRED if windowed else None)
    return ModelConfig(
        **pattern_fields("".join("*E" if is_sparse else "*-" for is_sparse in sparse)),
        ffn=f.get("intermediate_size"),
        expert_ffn=f.integer("moe_intermediate_size", default=768),
        experts=f.get("num_experts", "num_local_experts", default=128),
        **read_top_k(f, False, default=8),
        qk_norm="head",
        window=window if windowed else None,
        **read_common(f, biases="all"),
        **read_heads(f, kv_heads=4),
    )


def write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    """Writes a Qwen3-MoE config."""
    c = config
    return {
        **write_common(c),
        **write_heads(c),
        "intermediate_size": c.ffn,
        **write_experts(c),
        "num_experts": c.experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, symbol in enumerate(c.symbols[1::2]) if symbol == "-"],
        "use_sliding_window": c.window is not None,
        "sliding_window": c.window,
    }


def latent_attention(hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of DeepSeek's multi-head latent attention.

    Its rotary pairs are adjacent channels, and `kv_b_proj` has keys and values head by head.
    """
    c, hf = config, f"{hf}.self_attn"
    query, latent = interleaved(c.head_dim, c.rope_dim), interleaved(c.kv_rank, c.rope_dim)
    if c.q_rank:
        queries = [
            entry(f"{hf}.q_a_proj.weight", f"{native}.q_a"),
            entry(f"{hf}.q_a_layernorm.weight", f"{native}.q_norm"),
            entry(f"{hf}.q_b_proj.weight", f"{native}.q_b", groups=c.heads, order=query),
        ]
    else:
        queries = [entry(f"{hf}.q_proj.weight", f"{native}.q", groups=c.heads, order=query)]
    keys_values = f"{native}.k_b", f"{native}.v_b"
    return [
        *queries,
        entry(
            f"{hf}.kv_a_proj_with_mqa.weight", f"{native}.kv_a", f"{native}.k_rope", order=latent
        ),
        entry(f"{hf}.kv_a_layernorm.weight", f"{native}.kv_norm"),
        entry(f"{hf}.kv_b_proj.weight", *keys_values, groups=c.heads),
        entry(f"{hf}.o_proj.weight", f"{native}.out"),
    ]


def deepseek_mixture(packed: bool, hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of a mixture with a shared expert and a router bias for balancing."""
    return [
        *mixture(packed, hf, native, config),
        entry(f"{hf}.mlp.gate.e_score_correction_bias", f"{native}.router_bias"),
        *gated(f"{hf}.mlp.shared_experts.", f"{native}.shared_"),
    ]


def deepseek(packed: bool, config: ModelConfig) -> list[Entry]:
    """Returns the entries of DeepSeek-V3."""
    mixture_of_it = partial(deepseek_mixture, packed)
    return layers_and_mtp({"*": latent_attention, "-": mlp, "E": mixture_of_it}, config)


def layers_and_mtp(blocks: dict[str, Block], config: ModelConfig) -> list[Entry]:
    """Returns the entries of layers, then of DeepSeek-V3's multi-token prediction modules."""
    entries = layers(blocks, NORMS_BEFORE, config)
    for depth in range(config.mtp):
        hf, native = f"model.layers.{len(config.symbols) // 2 + depth}", f"mtp.{depth}"
        entries += [
            entry(f"{hf}.enorm.weight", f"{native}.norm_token.weight"),
            entry(f"{hf}.hnorm.weight", f"{native}.norm_stream.weight"),
            entry(f"{hf}.eh_proj.weight", f"{native}.join.token", f"{native}.join.stream", dim=1),
            entry(f"{hf}.shared_head.norm.weight", f"{native}.final.weight"),
            *layer(hf, f"{native}.", 0, config.mtp_pattern, config, blocks, NORMS_BEFORE),
        ]
    return entries


def deepseek_copies(config: ModelConfig) -> dict[str, str]:
    """Returns the copies of embedding and head that multi-token prediction modules may have."""
    copies = tied_head(config)
    head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    for depth in range(config.mtp):
        hf = f"model.layers.{len(config.symbols) // 2 + depth}"
        copies[f"{hf}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"{hf}.shared_head.head.weight"] = head
    return copies


LATENT_EPS = 1e-6  # of the norms inside latent attention in transformers, whatever rms_norm_eps


def read_latent(f: Fields) -> dict[str, Any]:
    """Reads the native fields of latent attention."""
    heads = f.get("num_attention_heads")
    if f.get("num_key_value_heads", default=128, null=heads) != heads:
        raise Unsupported("num_key_value_heads", f.get("num_key_value_heads"), f"must be {heads}")
    return {
        "attention": "mla",
        "head_dim": f.get("qk_nope_head_dim"),
        "q_rank": f.get("q_lora_rank", null=None),
        "latent_norm_eps": LATENT_EPS,
        "kv_rank": f.get("kv_lora_rank"),
        "rope_dim": f.get("qk_rope_head_dim"),
        "value_dim": f.get("v_head_dim"),
    }


def write_latent(config: ModelConfig) -> dict[str, Any]:
    """Writes the fields of `read_latent`."""
    c = config
    return {
        "num_key_value_heads": c.heads,
        "qk_nope_head_dim": c.head_dim,
        "qk_rope_head_dim": c.rope_dim,
        "v_head_dim": c.value_dim,
        "q_lora_rank": c.q_rank,
        "kv_lora_rank": c.kv_rank,
    }


def dense_first(f: Fields, default: Any = REQUIRED) -> str:
    """Reads the row of layers of which the first ones have an MLP, and the others a mixture."""
    count = f.integer("num_hidden_layers")
    dense = f.integer("first_k_dense_replace", default=default)
    return "*-" * min(dense, count) + "*E" * (count - dense)


def read_shared(f: Fields, default: Any = REQUIRED) -> dict[str, Any]:
    """Reads the native widths of routed experts, and of the shared ones, which are one."""
    width = f.integer("moe_intermediate_size")
    return {
        "expert_ffn": width,
        "shared_ffn": f.integer("n_shared_experts", default=default) * width,
        "experts": f.get("n_routed_experts", "num_local_experts"),
    }


def write_shared(config: ModelConfig) -> dict[str, Any]:
    """Writes the number of shared experts; raises Unsupported if their width is no multiple."""
    c, width = config, config.expert_ffn
    shared, remainder = divmod(c.shared_ffn, width)
    if c.has("E") and (remainder or not shared):
        remedy = f"only a multiple of an expert's width {width} can be represented"
        raise Unsupported("shared_ffn", c.shared_ffn, remedy)
    return {"n_shared_experts": max(1, shared)}


def read_deepseek(f: Fields) -> ModelConfig:
    """Reads a DeepSeek-V3 config: latent attention, first layers dense, groups of experts."""
    f.only("scoring_func", "sigmoid")
    f.only("topk_method", "noaux_tc")
    f.only("moe_layer_freq", 1)
    f.only("rope_interleave", True)
    return ModelConfig(
        **pattern_fields(dense_first(f)),
        mtp=f.get("num_nextn_predict_layers", "num_mtp_layers", default=0),
        mtp_pattern="*E",
        **read_latent(f),
        ffn=f.get("intermediate_size"),
        **read_shared(f),
        router_scale=f.get("routed_scaling_factor", default=2.5),
        **read_top_k(f, True),
        **read_biased_router(f),
        **read_common(f),
    )


def write_deepseek(config: ModelConfig) -> dict[str, Any]:
    """Writes a DeepSeek-V3 config."""
    c = config
    return {
        **write_common(c),
        **write_latent(c),
        "rope_interleave": True,
        "first_k_dense_replace": c.symbols.count("-"),
        "num_nextn_predict_layers": c.mtp,
        "intermediate_size": c.ffn,
        **write_shared(c),
        **write_biased_router(c),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }


def qwen3_moe(packed: bool, config: ModelConfig) -> list[Entry]:
    """Returns the entries of Qwen3-MoE: layers of attention and a mixture or an MLP."""
    return layers({"*": attention, "-": mlp, "E": partial(mixture, packed)}, NORMS_BEFORE, config)


def mixtral(packed: bool, config: ModelConfig) -> list[Entry]:
    """Returns the entries of Mixtral: layers of attention and a mixture."""
    return layers({"*": attention, "E": partial(mixtral_mixture, packed)}, NORMS_BEFORE, config)


FAMILIES = (
    Family(
        "MixtralForCausalLM",
        "mixtral",
        read_mixtral,
        write_mixtral,
        partial(mixtral, False),
        partial(mixtral, True),
    ),
    Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        read_qwen3_moe,
        write_qwen3_moe,
        partial(qwen3_moe, False),
        partial(qwen3_moe, True),
        harmless=frozenset({"max_window_layers"}),
        inert={"use_qk_norm": (True,)},
    ),
    Family(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        read_deepseek,
        write_deepseek,
        partial(deepseek, False),
        partial(deepseek, True),
        copies=deepseek_copies,
        harmless=frozenset({"head_dim", "qk_head_dim", "ep_size"}),
    ),
)
