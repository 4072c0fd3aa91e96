"""Converts Jamba: layers of Mamba-1, whose dt, B and C are normed, or of attention without
positions, and a mixture or an MLP."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import pattern_fields
from colonnade.launcher.convert.huggingface.dense import (
    Block,
    attention,
    gated,
    layers,
    write_common,
    write_heads,
)
from colonnade.launcher.convert.huggingface.entry import Entry, entry
from colonnade.launcher.convert.huggingface.family import Family, Unsupported
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.launcher.convert.huggingface.mamba import (
    HARMLESS,
    check_mixer,
    check_symbols,
    expansion,
    mamba1_mixer,
)
from colonnade.launcher.convert.huggingface.moe import (
    LLAMA_NAMES,
    packed_experts,
    separate_experts,
)
from colonnade.models.config import ModelConfig

ATTENTION, EXPERTS = "attn_layer", "expert_layer"


def read_jamba(f: Fields) -> ModelConfig:
    """Reads a Jamba config: every so many layers have attention, and every so many a mixture."""
    check_mixer(f, "mamba_proj_bias", "mamba_conv_bias")
    f.only("attention_dropout", 0.0, null=0.0)
    f.only("hidden_act", "silu")
    hidden, count = f.integer("hidden_size", default=4096, least=1), f.integer("num_hidden_layers")
    heads = f.integer("num_attention_heads", default=32, least=1)
    experts = f.integer("num_experts", "num_local_experts", default=16, least=1)
    with_attention = layers_of(f, ATTENTION, count, (8, 4))
    with_experts = layers_of(f, EXPERTS, count, (2, 1)) if experts > 1 else set()
    if experts == 1:
        f.read |= {f"{EXPERTS}_period", f"{EXPERTS}_offset"}
    rank = f.get("mamba_dt_rank", default="auto")
    eps = f.number("rms_norm_eps", default=1e-6)
    return ModelConfig(
        **pattern_fields(
            "".join(
                ("*" if i in with_attention else "m") + ("E" if i in with_experts else "-")
                for i in range(count)
            )
        ),
        hidden=hidden,
        vocab=f.get("vocab_size", default=65536),
        tied=f.get("tie_word_embeddings", default=False),
        norm_eps=eps,
        init_std=f.get("initializer_range", default=0.02),
        balance=0.0,
        heads=heads,
        kv_heads=f.get("num_key_value_heads", default=8, null=heads),
        head_dim=f.integer("head_dim", default=hidden // heads, least=1, null=hidden // heads),
        positions="none",
        ffn=f.integer("intermediate_size", default=14336, least=1),
        expert_ffn=f.integer("intermediate_size", default=14336, least=1),
        experts=experts,
        top_k=f.integer("num_experts_per_tok", default=2, least=1),
        router_normalise=False,
        mamba1_inner=f.integer("mamba_expand", default=2, least=1) * hidden,
        mamba1_state=f.get("mamba_d_state", default=16),
        mamba1_conv=f.get("mamba_d_conv", default=4),
        mamba1_rank=-(-hidden // 16) if rank == "auto" else rank,
        mamba1_norm="weighted",
        mamba1_norm_eps=eps,
    )


def layers_of(f: Fields, name: str, count: int, default: tuple[int, int]) -> set[int]:
    """Reads the indices of layers that come every so many: `name` with _period and _offset."""
    period = f.integer(f"{name}_period", default=default[0], least=1)
    offset = f.integer(f"{name}_offset", default=default[1])
    if offset >= period:
        raise Unsupported(f"{name}_offset", offset, f"must be below {name}_period = {period}")
    return {i for i in range(count) if i % period == offset}


def write_layers_of(name: str, indices: list[int], count: int) -> dict[str, Any]:
    """Writes the fields that `layers_of` reads.

    Raises Unsupported if the layers do not come at equal distances, from the first or from within
    one distance.
    """
    offset = indices[0] if indices else count
    period = indices[1] - offset if len(indices) > 1 else max(offset + 1, count)
    if indices != [i for i in range(count) if i % period == offset]:
        raise Unsupported("pattern", indices, f"{name}: these layers must come every so many")
    return {f"{name}_period": period if indices else count + 1, f"{name}_offset": offset}


def write_jamba(config: ModelConfig) -> dict[str, Any]:
    """Writes a Jamba config."""
    c = config
    check_symbols(c, "m*", "-E")
    if c.has("-") and c.has("E") and c.ffn != c.expert_ffn:
        raise Unsupported("expert_ffn", c.expert_ffn, f"must be ffn = {c.ffn}")
    common = write_common(c)
    for name in ("rope_theta", "rope_scaling", "attention_bias"):
        del common[name]
    count = len(c.symbols) // 2
    mixers, channels = c.symbols[::2], c.symbols[1::2]
    return {
        **common,
        **write_heads(c),
        "intermediate_size": c.expert_ffn if c.has("E") else c.ffn,
        **write_layers_of(ATTENTION, [i for i, s in enumerate(mixers) if s == "*"], count),
        **write_layers_of(EXPERTS, [i for i, s in enumerate(channels) if s == "E"], count),
        "num_experts": c.experts if c.has("E") else 1,
        "num_experts_per_tok": c.top_k,
        "mamba_expand": expansion(c, "mamba1_inner", c.mamba1_inner),
        "mamba_d_state": c.mamba1_state,
        "mamba_d_conv": c.mamba1_conv,
        "mamba_dt_rank": c.mamba1_rank,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }


def normed_mamba(hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of Mamba-1 with norms of dt, B and C."""
    names = {"dt": "dt_a", "b": "B", "c": "C"}
    return [
        *mamba1_mixer(f"{hf}.mamba.", f"{native}."),
        *(
            entry(f"{hf}.mamba.{n}_layernorm.weight", f"{native}.{m}_norm")
            for n, m in names.items()
        ),
    ]


def mixture(packed: bool, hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of Jamba's mixture."""
    hf = f"{hf}.feed_forward"
    router = entry(f"{hf}.router.weight", f"{native}.router")
    if packed:
        return [router, *packed_experts(hf, native)]
    return [router, *separate_experts(hf, native, config.experts, LLAMA_NAMES)]


def jamba(packed: bool, config: ModelConfig) -> list[Entry]:
    """Returns the entries of Jamba."""
    blocks: dict[str, Block] = {
        "m": normed_mamba,
        "*": attention,
        "-": lambda hf, native, _: gated(f"{hf}.feed_forward.", f"{native}."),
        "E": partial(mixture, packed),
    }
    norms = ("input_layernorm", "pre_ff_layernorm")
    return layers(blocks, norms, config, last_norm="final_layernorm")


FAMILIES = (
    Family(
        "JambaForCausalLM",
        "jamba",
        read_jamba,
        write_jamba,
        partial(jamba, False),
        partial(jamba, True),
        harmless=HARMLESS | {"use_mamba_kernels", "num_logits_to_keep"},
    ),
)
