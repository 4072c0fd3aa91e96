"""Mixtral, Qwen3-MoE and DeepSeek-V3."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import row
from colonnade.launcher.convert.huggingface.dense import (
    BEFORE,
    Block,
    attention,
    layer,
    layers,
    mlp,
    read_common,
    read_heads,
    write_common,
    write_heads,
)
from colonnade.launcher.convert.huggingface.family import (
    Entry,
    Family,
    Unsupported,
    entry,
    interleaved,
    stacked,
    tied_head,
)
from colonnade.launcher.convert.huggingface.fields import REQUIRED, Fields
from colonnade.models.config import ModelConfig

LLAMA_NAMES = ("gate_proj", "up_proj", "down_proj")


def experts(theirs: str, ours: str, count: int, names: tuple[str, str, str]) -> list[Entry]:
    """As in a checkpoint: a tensor per expert."""
    return [
        stacked(f"{theirs}.experts.{{}}.{name}.weight", f"{ours}.{n}", count)
        for name, n in zip(names, ("gate", "up", "down"), strict=True)
    ]


def packed_experts(theirs: str, ours: str) -> list[Entry]:
    """As in transformers 5's memory: all experts in one tensor, gate and up side by side."""
    return [
        entry(f"{theirs}.experts.gate_up_proj", f"{ours}.gate", f"{ours}.up", dim=1),
        entry(f"{theirs}.experts.down_proj", f"{ours}.down"),
    ]


def mixture(packed: bool, theirs: str, ours: str, config: ModelConfig) -> list[Entry]:
    """Qwen3-MoE's mixture."""
    theirs = f"{theirs}.mlp"
    router = entry(f"{theirs}.gate.weight", f"{ours}.router")
    if packed:
        return [router, *packed_experts(theirs, ours)]
    return [router, *experts(theirs, ours, config.experts, LLAMA_NAMES)]


def mixtral_mixture(packed: bool, theirs: str, ours: str, config: ModelConfig) -> list[Entry]:
    """Mixtral's mixture, which transformers 5 renames when it loads it."""
    if packed:
        return mixture(True, theirs, ours, config)
    theirs = f"{theirs}.block_sparse_moe"
    router = entry(f"{theirs}.gate.weight", f"{ours}.router")
    return [router, *experts(theirs, ours, config.experts, ("w1", "w3", "w2"))]


def normalised(f: Fields, name: str, default: bool, top_k: int) -> bool:
    """Whether a token's weights sum to 1. A single expert's would always be 1: ours never is."""
    given = f.get(name, default=default)
    if not isinstance(given, bool):
        raise Unsupported(name, given, "must be true or false")
    if given and top_k == 1:
        raise Unsupported(name, given, "with one expert per token its router could not learn")
    return given


def read_mixtral(f: Fields) -> ModelConfig:
    """Mixtral: every channel mixer is a mixture; a window in every layer or in none."""
    f.only("router_jitter_noise", 0.0)
    f.only("norm_topk_prob", True)  # transformers does not read it, and always normalises
    top_k = f.get("num_experts_per_tok", default=2)
    return ModelConfig(
        **row("*E" * f.integer("num_hidden_layers")),
        expert_ffn=f.get("intermediate_size"),
        experts=f.get("num_local_experts", "num_experts", default=8),
        top_k=top_k,
        router_normalise=normalised(f, "norm_topk_prob", True, top_k),
        window=f.get("sliding_window", default=None),
        **read_common(f, eps=1e-5, theta=1e6),
        **read_heads(f, kv_heads=8),
    )


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    """Theirs, of `read_mixtral`."""
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
    """Which of Qwen's layers are mixtures."""
    dense = f.entries("mlp_only_layers", of=int) or []
    step = f.integer("decoder_sparse_step", default=1, least=1)
    return [i not in dense and (i + 1) % step == 0 for i in range(count)]


def read_qwen3_moe(f: Fields) -> ModelConfig:
    """Qwen3-MoE: some layers may be dense; a window in every layer or in none."""
    count = f.integer("num_hidden_layers")
    sparse = sparse_layers(f, count)
    windowed = f.get("use_sliding_window", default=False)
    window = f.get("sliding_window", default=REQUIRED if windowed else None)
    top_k = f.get("num_experts_per_tok", default=8)
    return ModelConfig(
        **row("".join("*E" if is_sparse else "*-" for is_sparse in sparse)),
        ffn=f.get("intermediate_size"),
        expert_ffn=f.integer("moe_intermediate_size", default=768),
        experts=f.get("num_experts", "num_local_experts", default=128),
        top_k=top_k,
        router_normalise=normalised(f, "norm_topk_prob", False, top_k),
        qk_norm="head",
        window=window if windowed else None,
        **read_common(f),
        **read_heads(f, kv_heads=4),
    )


def write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    """Theirs, of `read_qwen3_moe`."""
    c = config
    return {
        **write_common(c),
        **write_heads(c),
        "intermediate_size": c.ffn,
        "moe_intermediate_size": c.expert_ffn,
        "num_experts": c.experts,
        "num_experts_per_tok": c.top_k,
        "norm_topk_prob": c.router_normalise and c.top_k > 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, symbol in enumerate(c.symbols[1::2]) if symbol == "-"],
        "use_sliding_window": c.window is not None,
        "sliding_window": c.window,
    }


def latent_attention(theirs: str, ours: str, config: ModelConfig) -> list[Entry]:
    """DeepSeek's, whose rotary pairs are neighbours and whose keys and values stand per head."""
    c, theirs = config, f"{theirs}.self_attn"
    own = c.head_dim
    query, latent = interleaved(own, c.rope_dim), interleaved(c.kv_rank, c.rope_dim)
    if c.q_rank:
        queries = [
            entry(f"{theirs}.q_a_proj.weight", f"{ours}.q_a"),
            entry(f"{theirs}.q_a_layernorm.weight", f"{ours}.q_norm"),
            entry(f"{theirs}.q_b_proj.weight", f"{ours}.q_b", groups=c.heads, order=query),
        ]
    else:
        queries = [entry(f"{theirs}.q_proj.weight", f"{ours}.q", groups=c.heads, order=query)]
    keys_values = f"{ours}.k_b", f"{ours}.v_b"
    return [
        *queries,
        entry(
            f"{theirs}.kv_a_proj_with_mqa.weight", f"{ours}.kv_a", f"{ours}.k_rope", order=latent
        ),
        entry(f"{theirs}.kv_a_layernorm.weight", f"{ours}.kv_norm"),
        entry(f"{theirs}.kv_b_proj.weight", *keys_values, groups=c.heads),
        entry(f"{theirs}.o_proj.weight", f"{ours}.out"),
    ]


def shared_expert(theirs: str, ours: str) -> list[Entry]:
    """The MLP that every token meets beside a mixture."""
    return [
        entry(f"{theirs}.gate_proj.weight", f"{ours}.shared_gate"),
        entry(f"{theirs}.up_proj.weight", f"{ours}.shared_up"),
        entry(f"{theirs}.down_proj.weight", f"{ours}.shared_down"),
    ]


def deepseek_mixture(packed: bool, theirs: str, ours: str, config: ModelConfig) -> list[Entry]:
    """A mixture beside a shared expert, with the bias that steers its choices."""
    return [
        *mixture(packed, theirs, ours, config),
        entry(f"{theirs}.mlp.gate.e_score_correction_bias", f"{ours}.router_bias"),
        *shared_expert(f"{theirs}.mlp.shared_experts", ours),
    ]


def deepseek(packed: bool, config: ModelConfig) -> list[Entry]:
    """The model, and behind its layers those that predict further tokens."""
    blocks: dict[str, Block] = {
        "*": latent_attention,
        "-": mlp,
        "E": partial(deepseek_mixture, packed),
    }
    tensors = layers(blocks, BEFORE, config)
    for depth in range(config.mtp):
        theirs, ours = f"model.layers.{len(config.symbols) // 2 + depth}", f"mtp.{depth}"
        tensors += [
            entry(f"{theirs}.enorm.weight", f"{ours}.norm_token.weight"),
            entry(f"{theirs}.hnorm.weight", f"{ours}.norm_stream.weight"),
            entry(f"{theirs}.eh_proj.weight", f"{ours}.join.token", f"{ours}.join.stream", dim=1),
            entry(f"{theirs}.shared_head.norm.weight", f"{ours}.final.weight"),
            *layer(theirs, f"{ours}.", 0, config.mtp_pattern, config, blocks, BEFORE),
        ]
    return tensors


def deepseek_copies(config: ModelConfig) -> dict[str, str]:
    """Embedding and head, which each module for a further token may have again."""
    copies = tied_head(config)
    head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    for depth in range(config.mtp):
        theirs = f"model.layers.{len(config.symbols) // 2 + depth}"
        copies[f"{theirs}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"{theirs}.shared_head.head.weight"] = head
    return copies


LATENT_EPS = 1e-6  # of their norms inside latent attention, whatever rms_norm_eps


def read_deepseek(f: Fields) -> ModelConfig:
    """DeepSeek-V3: latent attention, the first layers dense, grouped choice of experts."""
    f.only("scoring_func", "sigmoid")
    f.only("topk_method", "noaux_tc")
    f.only("moe_layer_freq", 1)
    f.only("rope_interleave", True)
    heads = f.get("num_attention_heads")
    if f.get("num_key_value_heads", default=128, null=heads) != heads:
        raise Unsupported("num_key_value_heads", f.get("num_key_value_heads"), f"must be {heads}")
    dense, count = f.integer("first_k_dense_replace"), f.integer("num_hidden_layers")
    groups, top_groups = f.get("n_group"), f.get("topk_group")
    width, top_k = f.integer("moe_intermediate_size"), f.get("num_experts_per_tok")
    return ModelConfig(
        **row("*-" * min(dense, count) + "*E" * (count - dense)),
        mtp=f.get("num_nextn_predict_layers", "num_mtp_layers", default=0),
        mtp_pattern="*E",
        attention="mla",
        head_dim=f.get("qk_nope_head_dim"),
        q_rank=f.get("q_lora_rank", null=None),
        latent_norm_eps=LATENT_EPS,
        kv_rank=f.get("kv_lora_rank"),
        rope_dim=f.get("qk_rope_head_dim"),
        value_dim=f.get("v_head_dim"),
        ffn=f.get("intermediate_size"),
        expert_ffn=width,
        shared_ffn=f.integer("n_shared_experts") * width,
        experts=f.get("n_routed_experts", "num_local_experts"),
        top_k=top_k,
        router_score="sigmoid",
        router_bias=True,
        router_normalise=normalised(f, "norm_topk_prob", True, top_k),
        router_scale=f.get("routed_scaling_factor", default=2.5),
        router_groups=groups,
        router_top_groups=None if groups == 1 else top_groups,
        **read_common(f),
    )


def write_deepseek(config: ModelConfig) -> dict[str, Any]:
    """Theirs, of `read_deepseek`."""
    c, width = config, config.expert_ffn
    shared, left = divmod(c.shared_ffn, width)
    if left or not shared:
        remedy = f"only a multiple of an expert's width {width} can be represented"
        raise Unsupported("shared_ffn", c.shared_ffn, remedy)
    own = c.head_dim
    return {
        **write_common(c),
        "num_key_value_heads": c.heads,
        "qk_nope_head_dim": own,
        "qk_rope_head_dim": c.rope_dim,
        "v_head_dim": c.value_dim,
        "q_lora_rank": c.q_rank,
        "kv_lora_rank": c.kv_rank,
        "rope_interleave": True,
        "first_k_dense_replace": c.symbols.count("-"),
        "num_nextn_predict_layers": c.mtp,
        "intermediate_size": c.ffn,
        "moe_intermediate_size": width,
        "n_shared_experts": shared,
        "n_routed_experts": c.experts,
        "num_experts_per_tok": c.top_k,
        "n_group": c.router_groups if c.router_top_groups else 1,
        "topk_group": c.router_top_groups or 1,
        "norm_topk_prob": c.router_normalise and c.top_k > 1,
        "routed_scaling_factor": c.router_scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }


def qwen3_moe(packed: bool, config: ModelConfig) -> list[Entry]:
    """Layers of attention and a mixture, or an MLP."""
    return layers({"*": attention, "-": mlp, "E": partial(mixture, packed)}, BEFORE, config)


def mixtral(packed: bool, config: ModelConfig) -> list[Entry]:
    """Layers of attention and a mixture."""
    return layers({"*": attention, "E": partial(mixtral_mixture, packed)}, BEFORE, config)


FAMILIES = {
    family.architecture: family
    for family in (
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
}
