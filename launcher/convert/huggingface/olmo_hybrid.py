"""Converts OLMo Hybrid: norms before in layers of gated DeltaNet, after in those of attention."""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from colonnade.launcher.convert.huggingface.config import pattern_fields, read_rope
from colonnade.launcher.convert.huggingface.dense import (
    NORMS_AFTER,
    NORMS_BEFORE,
    Block,
    Norms,
    attention,
    layers,
    mlp,
    read_common,
    read_heads,
    write_common,
    write_heads,
)
from colonnade.launcher.convert.huggingface.entry import Entry, entry
from colonnade.launcher.convert.huggingface.family import Family
from colonnade.launcher.convert.huggingface.fields import Fields, Unsupported
from colonnade.launcher.convert.huggingface.mamba import check_symbols
from colonnade.launcher.convert.huggingface.qwen3_next import mixers_of, write_mixers
from colonnade.models.config import ModelConfig

ACTIVATIONS = {"silu": "swiglu"}  # also that of the convolutions, which have no other
HEAD_EPS = 1e-5  # of DeltaNet's norms in transformers, whatever rms_norm_eps
NONE = {"rope_theta": None, "rope_type": "default"}  # rotary positions of a model that has none


def read_olmo_hybrid(f: Fields) -> ModelConfig:
    """Reads an OLMo Hybrid config, which has layers of both kinds."""
    count = f.integer("num_hidden_layers", default=32)
    kinds = f.entries("layer_types", of=str)
    if kinds is None:
        kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(count)]
        if count < 4:
            kinds[-1:] = ["full_attention"]
    mixers = mixers_of(kinds, count)
    if len(set(mixers)) < 2:
        raise Unsupported("layer_types", kinds, "must have both linear_attention, full_attention")
    return ModelConfig(
        **pattern_fields("".join(f"{mixer}-" for mixer in mixers)),
        ffn=f.integer("intermediate_size", least=1),
        qk_norm="full",
        norm_after="*",
        **read_common(f, biases="all", activations=ACTIVATIONS, rope=read_positions(f)),
        **read_heads(f),
        **read_delta(f),
    )


def read_positions(f: Fields) -> dict[str, Any]:
    """Reads the native fields of rotary positions; a null base means that there are none."""
    name = "rope_scaling" if f.table("rope_scaling") else "rope_parameters"
    table = f.table(name)
    if table.get("rope_theta", f.get("rope_theta", default=0.0, null=None)) is not None:
        return read_rope(f)
    rope = Fields(table, f"{name}.", f.notify)
    rope.only("rope_theta", None)
    rope.only("rope_type", "default", remedy="no positions, for rope_theta is null")
    rope.finish()
    f.get("max_position_embeddings", default=None)
    return {"positions": "none"}


def read_delta(f: Fields) -> dict[str, Any]:
    """Reads the native fields of gated DeltaNet."""
    heads = f.integer("num_attention_heads", least=1)
    key_heads = f.integer("linear_num_key_heads", default=heads, null=heads, least=1)
    width = 3 * f.integer("hidden_size", least=1) // (4 * key_heads)
    key_dim = f.integer("linear_key_head_dim", default=width, null=width, least=1)
    return {
        "delta_heads": f.integer("linear_num_value_heads", default=heads, null=heads, least=1),
        "delta_key_heads": key_heads,
        "delta_key_dim": key_dim,
        "delta_value_dim": f.integer(
            "linear_value_head_dim", default=2 * key_dim, null=2 * key_dim, least=1
        ),
        "delta_conv": f.integer("linear_conv_kernel_dim", default=4, least=1),
        "delta_negative": f.truth("linear_allow_neg_eigval", default=True),
        "delta_norm_eps": HEAD_EPS,
    }


def write_olmo_hybrid(config: ModelConfig) -> dict[str, Any]:
    """Writes an OLMo Hybrid config."""
    c = config
    check_symbols(c, "G*", "-")
    fields = {
        **write_common(c, ACTIVATIONS),
        **write_heads(c),
        **write_mixers(c),
        "intermediate_size": c.ffn,
        "linear_allow_neg_eigval": c.delta_negative,
    }
    if c.positions == "none":
        fields |= {"rope_theta": None, "rope_scaling": None, "rope_parameters": dict(NONE)}
    return fields


Convolutions = Literal["apart", "fused", "thirds"]


def delta_net(convolutions: Convolutions, hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of gated DeltaNet.

    Its convolutions are three tensors; one, of those of q, k and v; or the thirds of that one.
    """
    hf = f"{hf}.linear_attn"
    names = {"q": "q", "k": "k", "v": "v", "a": "dt", "b": "beta", "g": "z", "o": "out"}
    apart = [entry(f"{hf}.{n}_conv1d.weight", f"{native}.conv_{n}", squeeze=1) for n in "qkv"]
    fused = entry(f"{hf}.conv1d.weight", *(f"{native}.conv_{n}" for n in "qkv"), squeeze=1)
    thirds = replace(fused, hf_names=tuple(e.hf_names[0] for e in apart), chunked=True)
    return [
        *(entry(f"{hf}.{n}_proj.weight", f"{native}.{m}") for n, m in names.items()),
        *{"apart": apart, "fused": [fused], "thirds": [thirds]}[convolutions],
        entry(f"{hf}.A_log", f"{native}.A_log"),
        entry(f"{hf}.dt_bias", f"{native}.dt_bias"),
        entry(f"{hf}.o_norm.weight", f"{native}.norm"),
    ]


# Names of the two norms in a layer of DeltaNet: as published, and in transformers' memory.
NORMS_OF_DELTA = ("attention_layer_norm", "feedforward_layer_norm")


def olmo_hybrid(
    convolutions: Convolutions, norms: dict[str, Norms], config: ModelConfig
) -> list[Entry]:
    """Returns the entries of OLMo Hybrid, with the names of norms by the symbol of the mixer."""
    blocks: dict[str, Block] = {"G": partial(delta_net, convolutions), "*": attention, "-": mlp}
    return layers(blocks, norms, config)


PUBLISHED: dict[str, Norms] = {"G": NORMS_OF_DELTA, "*": NORMS_AFTER}
IN_MEMORY: dict[str, Norms] = {"G": NORMS_BEFORE, "*": NORMS_AFTER}
# As transformers saves: it renames attention's norm with that of DeltaNet's layers, and divides the
# convolutions into thirds, whatever the widths of q, k and v.
SAVED: dict[str, Norms] = {"G": NORMS_OF_DELTA, "*": (NORMS_OF_DELTA[1], NORMS_AFTER[1])}

INITIAL = frozenset({
    "linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max",
    "linear_dt_init_floor",
})  # fmt: skip

FAMILIES = (
    Family(
        "OlmoHybridForCausalLM",
        "olmo_hybrid",
        read_olmo_hybrid,
        write_olmo_hybrid,
        partial(olmo_hybrid, "apart", PUBLISHED),
        partial(olmo_hybrid, "fused", IN_MEMORY),
        also_read=(partial(olmo_hybrid, "thirds", SAVED),),
        harmless=INITIAL,
    ),
)
