"""Converts Nemotron-H: one sub-block per layer, no positions."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import (
    UNREAD_MTP,
    notify_unread_mtp,
    pattern_fields,
    symbols_of,
)
from colonnade.launcher.convert.huggingface.dense import UNGATED, write_heads
from colonnade.launcher.convert.huggingface.entry import Entry, entry, stacked
from colonnade.launcher.convert.huggingface.family import Family
from colonnade.launcher.convert.huggingface.fields import Fields, Unsupported
from colonnade.launcher.convert.huggingface.mamba import (
    HARMLESS,
    backbone,
    check_mixer,
    check_symbols,
    mamba2_mixer,
)
from colonnade.launcher.convert.huggingface.moe import (
    read_biased_router,
    read_top_k,
    write_biased_router,
)
from colonnade.models.config import ModelConfig

# Hugging Face names of the kinds of layers, new and old.
MAMBA = ("linear_attention", "mamba")
FULL = ("full_attention", "attention")
NEMOTRON = dict.fromkeys(MAMBA, "M") | dict.fromkeys(FULL, "*") | {"mlp": "-", "moe": "E"}
# Transformers 5 clamps dt to at least time_step_min. Nemotron-H's own code and Megatron, which
# trained it, only draw initial biases from that field. So it is not read, and is written so small
# that it clamps no dt. It is not 0 because transformers takes its logarithm for initial biases.
NO_FLOOR = 1e-30


def read_nemotron(f: Fields) -> ModelConfig:
    """Reads a Nemotron-H config."""
    check_mixer(f)
    for name in ("mamba_proj_bias", "attention_bias", "mlp_bias", "tie_word_embeddings"):
        f.only(name, False)
    for name in ("attention_dropout", "hidden_dropout"):
        f.only(name, 0.0, null=0.0)
    f.only("sliding_window", None)
    f.only("mamba_hidden_act", "silu")
    head_dim, eps = f.get("head_dim", default=128), f.get("layer_norm_epsilon", default=1e-5)
    f.only("attention_head_dim", head_dim)
    for name in ("rms_norm_eps", "norm_eps"):
        f.only(name, eps, remedy=f"but layer_norm_epsilon = {eps!r}; remove the wrong one")
    symbols, heads = nemotron_symbols(f), f.get("num_attention_heads", default=32)
    notify_dt_floor(f, symbols)
    notify_unread_mtp(f)
    f.only(
        "num_hidden_layers",
        len(symbols),
        null=len(symbols),
        remedy=f"but {len(symbols)} layers are listed",
    )
    return ModelConfig(
        **pattern_fields(symbols),
        hidden=f.get("hidden_size", default=4096),
        vocab=f.get("vocab_size", default=131072),
        norm_eps=eps,
        positions="none",
        heads=heads,
        kv_heads=f.get("num_key_value_heads", default=8, null=heads),
        head_dim=head_dim,
        ffn=f.get("intermediate_size", default=21504),
        activation=UNGATED[f.only("mlp_hidden_act", *UNGATED)],
        mamba_heads=f.get("mamba_num_heads", default=128),
        mamba_head_dim=f.get("mamba_head_dim", default=64),
        mamba_state=f.get("ssm_state_size", default=128),
        mamba_groups=f.get("n_groups", "mamba_n_groups", default=8),
        mamba_conv=f.get("conv_kernel", "mamba_d_conv", default=4),
        mamba_chunk=f.get("chunk_size", "mamba_chunk_size", default=128),
        **(nemotron_experts(f) if "E" in symbols else {}),
    )


def notify_dt_floor(f: Fields, symbols: str) -> None:
    """Notifies that transformers clamps dt of Mamba-2, and by how much logits differ for it."""
    floor = f.number("time_step_min", default=0.001)
    if "M" in symbols and floor > NO_FLOOR:
        f.notify(
            f"time_step_min = {floor!r} is not used: transformers' PyTorch path raises smaller dt "
            "to it, which Nemotron-H's own code and Megatron do not, so logits differ from "
            "transformers' wherever a dt is smaller (at 0.001 by about 5e-4 to 1e-3 of the largest)"
        )


def nemotron_symbols(f: Fields) -> str:
    """Reads the row of symbols, from a list of layers or from a pattern string."""
    kinds = f.entries("layers_block_type", "layer_types", of=str)
    pattern = f.get("hybrid_override_pattern", default=None)
    if pattern is not None and not isinstance(pattern, str):
        raise Unsupported("hybrid_override_pattern", pattern, "must be text of M, *, - and E")
    if kinds is None:
        if pattern is None:
            raise Unsupported("layers_block_type", None, "missing from config.json")
        return symbols_of(pattern, {symbol: symbol for symbol in "M*-E"}, "hybrid_override_pattern")
    symbols = symbols_of(kinds, NEMOTRON, "layers_block_type")
    if pattern not in (None, symbols):
        remedy = f"layers_block_type says {symbols!r}; remove one of both"
        raise Unsupported("hybrid_override_pattern", pattern, remedy)
    return symbols


def nemotron_experts(f: Fields) -> dict[str, Any]:
    """Reads the native fields of its mixtures.

    They have experts without gates, DeepSeek-V3's router and a shared expert.
    """
    f.only("n_shared_experts", 1)
    f.only("moe_latent_size", None)
    return {
        "expert_ffn": f.get("moe_intermediate_size", default=7688),
        "shared_ffn": f.get("moe_shared_expert_intermediate_size", default=7688),
        "experts": f.get("n_routed_experts", "num_local_experts", default=8),
        "router_scale": float(f.number("routed_scaling_factor", default=1.0)),
        **read_top_k(f, True, default=2),
        **read_biased_router(f, default=1),
        "balance": 0.0,
    }


def write_nemotron(config: ModelConfig) -> dict[str, Any]:
    """Writes a Nemotron-H config."""
    c = config
    check_symbols(c, "M*-E")
    hidden_acts = {native: hf for hf, native in UNGATED.items()}
    if c.has("-", "E") and c.activation not in hidden_acts:
        remedy = f"only {', '.join(hidden_acts)} can be represented"
        raise Unsupported("activation", c.activation, remedy)
    mamba = {
        "mamba_num_heads": c.mamba_heads,
        "mamba_head_dim": c.mamba_head_dim,
        "ssm_state_size": c.mamba_state,
        "n_groups": c.mamba_groups,
        "conv_kernel": c.mamba_conv,
        "chunk_size": c.mamba_chunk,
    }
    experts = {
        "moe_shared_expert_intermediate_size": c.shared_ffn,
        "n_shared_experts": 1,
        **write_biased_router(c),
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
        "mlp_hidden_act": hidden_acts.get(c.activation, "relu2"),
        "mlp_bias": False,
        **(mamba if c.mamba_heads else {}),  # 0: none, and no field of Hugging Face
        "mamba_hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "mamba_proj_bias": False,
        "time_step_min": NO_FLOOR,
        **(experts if c.has("E") else {}),
    }


def nemotron_mixer(packed: bool, count: int, symbol: str, hf: str, native: str) -> list[Entry]:
    """Returns the entries of one sub-block; both prefixes end in a dot."""
    if symbol == "M":
        return mamba2_mixer(hf, native)
    if symbol == "*":
        qkv = [entry(f"{hf}{n}_proj.weight", f"{native}{n}") for n in "qkv"]
        return [*qkv, entry(f"{hf}o_proj.weight", f"{native}out")]
    up_down = (("up_proj", "up"), ("down_proj", "down"))
    if symbol == "-":
        return [entry(f"{hf}{n}.weight", f"{native}{m}") for n, m in up_down]
    entries = [
        entry(f"{hf}gate.weight", f"{native}router"),
        entry(f"{hf}gate.e_score_correction_bias", f"{native}router_bias"),
    ]
    for n, m in up_down:
        entries.append(entry(f"{hf}shared_experts.{n}.weight", f"{native}shared_{m}"))
        if packed:
            entries.append(entry(f"{hf}experts.{n}", f"{native}{m}"))
        else:
            entries.append(stacked(f"{hf}experts.{{}}.{n}.weight", f"{native}{m}", count))
    return entries


def nemotron(packed: bool, config: ModelConfig) -> list[Entry]:
    """Returns the entries of Nemotron-H, whose root transformers 5 renames on loading."""
    mixer = partial(nemotron_mixer, packed, config.experts)
    return backbone(config, mixer, "model" if packed else "backbone")


# Given by mamba_num_heads (expand), or about execution or multi-token prediction.
NEMOTRON_HARMLESS = frozenset({
    "expand", "mamba_expand", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap",
    "mtp_hybrid_override_pattern", "mtp_layers_block_type", "num_logits_to_keep", "time_step_rank",
    "use_mamba_kernels",
})  # fmt: skip
# Read if the model has mixtures; without mixtures they have no effect.
NEMOTRON_EXPERTS = frozenset({
    "moe_intermediate_size", "moe_latent_size", "moe_shared_expert_intermediate_size", "n_group",
    "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts_per_tok",
    "num_local_experts", "routed_scaling_factor", "topk_group",
})  # fmt: skip

FAMILIES = (
    Family(
        "NemotronHForCausalLM",
        "nemotron_h",
        read_nemotron,
        write_nemotron,
        partial(nemotron, False),
        partial(nemotron, True),
        copies=lambda config: {},
        unread=(UNREAD_MTP,),
        harmless=HARMLESS | NEMOTRON_HARMLESS | NEMOTRON_EXPERTS,
        inert={
            "rope_theta": (),  # the model has no rotary positions
            "rope_scaling": (),
            "rope_parameters": (),
            "partial_rotary_factor": (),
        },
    ),
)
