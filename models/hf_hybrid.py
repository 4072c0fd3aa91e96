"""Hugging Face's hybrids: Nemotron-H, of Mamba-2, and Qwen3-Next, of gated DeltaNet."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from colonnade.models.config import ModelConfig
from colonnade.models.hf_base import Entry, Family, Unsupported, entry, stacked
from colonnade.models.hf_config import Fields, row
from colonnade.models.hf_dense import (
    BEFORE,
    Block,
    attention,
    layers,
    mlp,
    read_heads,
    write_common,
    write_heads,
)
from colonnade.models.hf_mamba import (
    HARMLESS,
    backbone,
    check_rotated,
    mamba2_mixer,
    only_symbols,
    plain_ssm,
    read_partial_rope,
)
from colonnade.models.hf_moe import mixture, normalised, shared_expert

# Their names of sequence mixers in lists of layers, old and new.
MAMBA = ("linear_attention", "mamba")
FULL = ("full_attention", "attention")


def symbols_of(kinds: Iterable[str], names: Mapping[str, str], field: str) -> str:
    """Our symbols, from theirs of each layer."""
    symbols = ""
    for kind in kinds:
        if kind not in names:
            raise Unsupported(field, kind, f"only {', '.join(names)} can be represented")
        symbols += names[kind]
    return symbols


# Nemotron-H: one sub-block per layer, no positions.

NEMOTRON = dict.fromkeys(MAMBA, "M") | dict.fromkeys(FULL, "*") | {"mlp": "-", "moe": "E"}
ACTIVATIONS: dict[str, Any] = {
    "relu2": "relu2",
    "relu": "relu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Transformers 5 holds dt above this field, which Nemotron-H's own code and Megatron, with which it
# was trained, only draw first biases from. So it is not read, and written so small that no dt meets
# it (their first biases take its logarithm).
NO_FLOOR = 1e-30


def read_nemotron(f: Fields) -> ModelConfig:
    """Nemotron-H's fields."""
    plain_ssm(f)
    for name in ("mamba_proj_bias", "attention_bias", "mlp_bias", "tie_word_embeddings"):
        f.only(name, False)
    for name in ("attention_dropout", "hidden_dropout"):
        f.only(name, 0.0)
    f.only("sliding_window", None)
    f.only("mamba_hidden_act", "silu")
    f.only("num_nextn_predict_layers", 0)
    head_dim, eps = f.get("head_dim", default=128), f.get("layer_norm_epsilon", default=1e-5)
    f.only("attention_head_dim", head_dim)
    f.only("rms_norm_eps", eps)
    symbols = nemotron_symbols(f)
    f.only("num_hidden_layers", len(symbols), remedy=f"but {len(symbols)} layers are listed")
    return ModelConfig(
        **row(symbols),
        hidden=f.get("hidden_size", default=4096),
        vocab=f.get("vocab_size", default=131072),
        norm_eps=eps,
        positions="none",
        heads=f.get("num_attention_heads", default=32),
        kv_heads=f.get("num_key_value_heads", default=f.get("num_attention_heads", default=32)),
        head_dim=head_dim,
        ffn=f.get("intermediate_size", default=21504),
        activation=ACTIVATIONS[f.only("mlp_hidden_act", *ACTIVATIONS)],
        mamba_heads=f.get("mamba_num_heads", default=128),
        mamba_head_dim=f.get("mamba_head_dim", default=64),
        mamba_state=f.get("ssm_state_size", default=128),
        mamba_groups=f.get("n_groups", "mamba_n_groups", default=8),
        mamba_conv=f.get("conv_kernel", "mamba_d_conv", default=4),
        mamba_chunk=f.get("chunk_size", "mamba_chunk_size", default=128),
        **(nemotron_experts(f) if "E" in symbols else {}),
    )


def nemotron_symbols(f: Fields) -> str:
    """The row, from either of its spellings."""
    kinds = f.get("layers_block_type", "layer_types", default=None)
    pattern = f.get("hybrid_override_pattern", default=None)
    if kinds is None and pattern is None:
        raise Unsupported("layers_block_type", None, "missing from config.json")
    if kinds is None:
        return symbols_of(pattern, {symbol: symbol for symbol in "M*-E"}, "hybrid_override_pattern")
    symbols = symbols_of(kinds, NEMOTRON, "layers_block_type")
    if pattern not in (None, symbols):
        remedy = f"layers_block_type says {symbols!r}; remove one of both"
        raise Unsupported("hybrid_override_pattern", pattern, remedy)
    return symbols


def nemotron_experts(f: Fields) -> dict[str, Any]:
    """Our fields of its mixtures: no gate in an expert, DeepSeek-V3's router, a shared expert."""
    f.only("n_shared_experts", 1)
    f.only("moe_latent_size", None)
    groups, top_groups = f.get("n_group", default=1), f.get("topk_group", default=1)
    top_k = f.get("num_experts_per_tok", default=2)
    return {
        "expert_ffn": f.get("moe_intermediate_size", default=7688),
        "shared_ffn": f.get("moe_shared_expert_intermediate_size", default=7688),
        "experts": f.get("n_routed_experts", "num_local_experts", default=8),
        "top_k": top_k,
        "router_score": "sigmoid",
        "router_bias": True,
        "router_normalise": normalised(f, "norm_topk_prob", True, top_k),
        "router_scale": float(f.get("routed_scaling_factor", default=1.0)),
        "router_groups": groups,
        "router_top_groups": None if groups == 1 else top_groups,
        "balance": 0.0,
    }


def write_nemotron(config: ModelConfig) -> dict[str, Any]:
    """Theirs, of `read_nemotron`."""
    c = config
    only_symbols(c, "M*-E")
    acts = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    if c.has("-", "E") and c.activation not in acts:
        remedy = f"only {', '.join(acts)} can be represented"
        raise Unsupported("activation", c.activation, remedy)
    experts = {
        "n_routed_experts": c.experts,
        "num_experts_per_tok": c.top_k,
        "moe_intermediate_size": c.expert_ffn or c.ffn,
        "moe_shared_expert_intermediate_size": c.shared_ffn,
        "n_shared_experts": 1,
        "norm_topk_prob": c.router_normalise,
        "routed_scaling_factor": c.router_scale,
        "n_group": c.router_groups if c.router_top_groups else 1,
        "topk_group": c.router_top_groups or 1,
    }
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "hybrid_override_pattern": c.symbols,
        "num_hidden_layers": len(c.symbols),
        "layer_norm_epsilon": c.norm_eps,
        "tie_word_embeddings": False,
        "num_attention_heads": c.heads,
        **write_heads(c),
        "attention_bias": False,
        "intermediate_size": c.ffn,
        "mlp_hidden_act": acts.get(c.activation, "relu2"),
        "mlp_bias": False,
        "mamba_num_heads": c.mamba_heads or 2 * c.hidden // c.mamba_head_dim,
        "mamba_head_dim": c.mamba_head_dim,
        "ssm_state_size": c.mamba_state,
        "n_groups": c.mamba_groups,
        "conv_kernel": c.mamba_conv,
        "chunk_size": c.mamba_chunk,
        "mamba_hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "mamba_proj_bias": False,
        "time_step_min": NO_FLOOR,
        **(experts if c.has("E") else {}),
    }


def nemotron_mixer(packed: bool, count: int, symbol: str, theirs: str, ours: str) -> list[Entry]:
    """One sub-block: `theirs` and `ours` are prefixes that end in a dot."""
    if symbol == "M":
        return mamba2_mixer(theirs, ours)
    if symbol == "*":
        qkv = [entry(f"{theirs}{n}_proj.weight", f"{ours}first.{n}") for n in "qkv"]
        return [*qkv, entry(f"{theirs}o_proj.weight", f"{ours}second.out")]
    up_down = (("up_proj", "first", "up"), ("down_proj", "second", "down"))
    if symbol == "-":
        return [entry(f"{theirs}{n}.weight", f"{ours}{half}.{m}") for n, half, m in up_down]
    tensors = [
        entry(f"{theirs}gate.weight", f"{ours}small.weight"),
        entry(f"{theirs}gate.e_score_correction_bias", f"{ours}small.bias"),
    ]
    for n, half, m in up_down:
        tensors.append(entry(f"{theirs}shared_experts.{n}.weight", f"{ours}{half}.shared_{m}"))
        if packed:
            tensors.append(entry(f"{theirs}experts.{n}", f"{ours}second.{m}"))
        else:
            tensors.append(stacked(f"{theirs}experts.{{}}.{n}.weight", f"{ours}second.{m}", count))
    return tensors


def nemotron(packed: bool, config: ModelConfig) -> list[Entry]:
    """Nemotron-H's tensors, whose root transformers 5 renames when it loads them."""
    mixer = partial(nemotron_mixer, packed, config.experts)
    return backbone(config, mixer, "model" if packed else "backbone")


# Qwen3-Next: pairs of a sequence mixer and a channel mixer.

QWEN3_NEXT = {"linear_attention": "G", "full_attention": "*"}


def read_qwen3_next(f: Fields) -> ModelConfig:
    """Qwen3-Next's fields."""
    f.only("attention_bias", False)
    f.only("attention_dropout", 0.0)
    f.only("hidden_act", "silu")
    count = f.get("num_hidden_layers", default=48)
    every = f.get("full_attention_interval", default=4)
    kinds = f.get("layer_types", default=None) or [
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(count)
    ]
    mixers = symbols_of(kinds, QWEN3_NEXT, "layer_types")
    if len(mixers) != count:
        raise Unsupported("layer_types", len(mixers), f"but num_hidden_layers = {count}")
    dense, step = f.get("mlp_only_layers", default=[]), f.get("decoder_sparse_step", default=1)
    experts = f.get("num_experts", "num_local_experts", default=512)
    sparse = [experts > 0 and i not in dense and (i + 1) % step == 0 for i in range(count)]
    heads, rope = read_heads(f, head_dim=256), read_partial_rope(f, 0.25)
    if "*" in mixers:
        check_rotated(rope["rope_fraction"], heads["head_dim"])
    return ModelConfig(
        **row("".join(m + ("E" if s else "-") for m, s in zip(mixers, sparse, strict=True))),
        hidden=f.get("hidden_size", default=2048),
        vocab=f.get("vocab_size", default=151936),
        tied=f.get("tie_word_embeddings", default=False),
        norm="rms_offset",
        norm_eps=f.get("rms_norm_eps", default=1e-6),
        init_std=f.get("initializer_range", default=0.02),
        heads=f.get("num_attention_heads", default=16),
        **heads,
        **rope,
        qk_norm="head",
        attention_gate="channel",
        delta_heads=f.get("linear_num_value_heads", default=32),
        delta_key_heads=f.get("linear_num_key_heads", default=16),
        delta_key_dim=f.get("linear_key_head_dim", default=128),
        delta_value_dim=f.get("linear_value_head_dim", default=128),
        delta_conv=f.get("linear_conv_kernel_dim", default=4),
        ffn=f.get("intermediate_size", default=5632),
        **(qwen3_next_experts(f, experts) if any(sparse) else {}),
    )


def qwen3_next_experts(f: Fields, experts: int) -> dict[str, Any]:
    """Our fields of its mixtures: a shared expert behind a gate of its own."""
    shared = f.get("shared_expert_intermediate_size", default=512)
    if shared < 1:
        raise Unsupported("shared_expert_intermediate_size", shared, "at least 1, or no experts")
    top_k = f.get("num_experts_per_tok", default=10)
    return {
        "experts": experts,
        "top_k": top_k,
        "expert_ffn": f.get("moe_intermediate_size", default=512),
        "shared_ffn": shared,
        "shared_gate": True,
        "router_normalise": normalised(f, "norm_topk_prob", True, top_k),
        "balance": 0.0,
    }


def write_qwen3_next(config: ModelConfig) -> dict[str, Any]:
    """Theirs, of `read_qwen3_next`."""
    c = config
    only_symbols(c, "G*", "-E")
    if c.has("*"):
        check_rotated(c.rope_fraction, c.head_dim or c.hidden // c.heads, "rope_fraction")
    kinds = {ours: theirs for theirs, ours in QWEN3_NEXT.items()}
    heads = c.delta_heads or c.hidden // c.delta_key_dim
    experts = {
        "num_experts_per_tok": c.top_k,
        "moe_intermediate_size": c.expert_ffn or c.ffn,
        "shared_expert_intermediate_size": c.shared_ffn,
        "norm_topk_prob": c.router_normalise,
    }
    return {
        **write_common(c),
        **write_heads(c),
        "partial_rotary_factor": c.rope_fraction,
        "layer_types": [kinds[symbol] for symbol in c.symbols[::2]],
        "linear_num_value_heads": heads,
        "linear_num_key_heads": c.delta_key_heads or heads,
        "linear_key_head_dim": c.delta_key_dim,
        "linear_value_head_dim": c.delta_value_dim or c.delta_key_dim,
        "linear_conv_kernel_dim": c.delta_conv,
        "intermediate_size": c.ffn,
        "num_experts": c.experts if c.has("E") else 0,
        "mlp_only_layers": [i for i, symbol in enumerate(c.symbols[1::2]) if symbol == "-"],
        "decoder_sparse_step": 1,
        **(experts if c.has("E") else {}),
    }


def gated_attention(theirs: str, ours: str, config: ModelConfig) -> list[Entry]:
    """Attention whose queries stand, head by head, beside the gates of their outputs."""
    q, first = f"{theirs}.self_attn.q_proj.weight", f"{ours}.first"
    others = [e for e in attention(theirs, ours, config) if e.theirs != (q,)]
    return [entry(q, f"{first}.q", f"{first}.gate_z", groups=config.heads), *others]


def delta_net(theirs: str, ours: str, config: ModelConfig) -> list[Entry]:
    """Gated DeltaNet, whose projections stand key head by key head, its filters role by role."""
    theirs, first, second = f"{theirs}.linear_attn", f"{ours}.first", f"{ours}.second"
    heads = config.delta_heads or config.hidden // config.delta_key_dim
    groups = config.delta_key_heads or heads
    qkvz = (f"{first}.{n}" for n in ("q", "k", "v", "z"))
    return [
        entry(f"{theirs}.in_proj_qkvz.weight", *qkvz, groups=groups),
        entry(f"{theirs}.in_proj_ba.weight", f"{first}.beta", f"{first}.dt", groups=groups),
        entry(f"{theirs}.conv1d.weight", *(f"{first}.conv_{n}" for n in "qkv"), squeeze=1),
        entry(f"{theirs}.dt_bias", f"{ours}.small.dt_bias"),
        entry(f"{theirs}.A_log", f"{ours}.small.A_log"),
        entry(f"{theirs}.norm.weight", f"{second}.norm"),
        entry(f"{theirs}.out_proj.weight", f"{second}.out"),
    ]


def qwen3_next_mixture(packed: bool, theirs: str, ours: str, config: ModelConfig) -> list[Entry]:
    """A mixture beside a shared expert with a gate."""
    return [
        *mixture(packed, theirs, ours, config),
        *shared_expert(f"{theirs}.mlp.shared_expert", ours),
        entry(f"{theirs}.mlp.shared_expert_gate.weight", f"{ours}.first.shared_open"),
    ]


def qwen3_next(packed: bool, config: ModelConfig) -> list[Entry]:
    """Qwen3-Next's tensors."""
    blocks: dict[str, Block] = {
        "G": delta_net,
        "*": gated_attention,
        "-": mlp,
        "E": partial(qwen3_next_mixture, packed),
    }
    return layers(blocks, BEFORE, config)


# mamba_num_heads says what expand would; the rest is of how it runs, or of further tokens.
NEMOTRON_HARMLESS = frozenset({
    "expand", "mamba_expand", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap",
    "mtp_hybrid_override_pattern", "mtp_layers_block_type", "num_logits_to_keep", "time_step_rank",
    "use_mamba_kernels",
})  # fmt: skip
# Read where there are mixtures, of no effect where there are none.
NEMOTRON_EXPERTS = frozenset({
    "moe_intermediate_size", "moe_latent_size", "moe_shared_expert_intermediate_size", "n_group",
    "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts_per_tok",
    "num_local_experts", "routed_scaling_factor", "topk_group",
})  # fmt: skip
QWEN3_NEXT_EXPERTS = frozenset({
    "moe_intermediate_size", "norm_topk_prob", "num_experts_per_tok",
    "shared_expert_intermediate_size",
})  # fmt: skip

FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            "NemotronHForCausalLM",
            "nemotron_h",
            read_nemotron,
            write_nemotron,
            partial(nemotron, False),
            partial(nemotron, True),
            copies=lambda config: {},
            harmless=HARMLESS | NEMOTRON_HARMLESS | NEMOTRON_EXPERTS,
        ),
        Family(
            "Qwen3NextForCausalLM",
            "qwen3_next",
            read_qwen3_next,
            write_qwen3_next,
            partial(qwen3_next, False),
            partial(qwen3_next, True),
            harmless=QWEN3_NEXT_EXPERTS,
        ),
    )
}
