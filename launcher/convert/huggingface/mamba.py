"""Converts Mamba (`m`), Mamba2 (`M`) and Bamba (Mamba-2 and attention)."""

import math
from collections.abc import Callable
from typing import Any

import torch

from colonnade.launcher.convert.huggingface.config import pattern_fields, read_rope
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
from colonnade.models.config import ModelConfig

LARGEST = torch.finfo(torch.float32).max
# Fields of initial weights, the choice of kernels and the precision of the residual stream.
HARMLESS = frozenset({
    "initializer_range", "residual_in_fp32", "time_step_init_scheme", "time_step_scale",
    "time_step_min", "time_step_max", "time_step_floor", "use_mambapy", "use_associative_scan",
})  # fmt: skip


def check_mixer(fields: Fields, bias: str = "use_bias", conv: str = "use_conv_bias") -> None:
    """Raises Unsupported for Mamba mixers with options that the native ones do not have.

    These are limits on dt, biases of projections, and convolutions without biases. `bias` and
    `conv` are the names of the fields.
    """
    fields.only(bias, False)
    fields.only(conv, True)
    limit = fields.get("time_step_limit", default=(0.0, math.inf))
    bounds = [json_float(bound) for bound in limit] if isinstance(limit, list | tuple) else []
    if len(bounds) != 2 or not bounds[0] <= 0 or not bounds[1] >= LARGEST:
        raise Unsupported("time_step_limit", limit, "only no limit, [0, inf], can be represented")
    if bounds[1] < math.inf:
        fields.notify(f"time_step_limit = {limit!r} is read as no limit: no dt in fp32 is above it")


def json_float(value: Any) -> float:
    """Returns a JSON number, or infinity as transformers 5 writes it; NaN for any other value."""
    value = value.get("__float__") if isinstance(value, dict) else value
    if value == "Infinity" or (isinstance(value, int | float) and not isinstance(value, bool)):
        return float(value)
    return math.nan


def tied_backbone(config: ModelConfig) -> dict[str, str]:
    """Returns the copies of a tied model: the head has the weights of the embedding."""
    return {"lm_head.weight": "backbone.embeddings.weight"} if config.tied else {}


def backbone(
    config: ModelConfig, mixer: Callable[[str, str, str], list[Entry]], root: str = "backbone"
) -> list[Entry]:
    """Returns the entries of a model whose layers have one norm and one mixer each.

    Args:
        config: of the model.
        mixer: returns the entries of one mixer for its symbol, its Hugging Face prefix and its
            native prefix; both prefixes end in a dot.
        root: prefix of the Hugging Face names.
    """
    entries = [
        entry(f"{root}.embeddings.weight", "embedding.weight"),
        entry(f"{root}.norm_f.weight", "final.weight"),
    ]
    for t, symbol in enumerate(config.symbols):
        hf = f"{root}.layers.{t}."
        entries.append(entry(f"{hf}norm.weight", f"norms.{t}.weight"))
        entries += mixer(symbol, f"{hf}mixer.", f"blocks.{t}.")
    return entries if config.tied else [*entries, entry("lm_head.weight", "head.weight")]


def mamba2_mixer(hf: str, native: str) -> list[Entry]:
    """Returns the entries of a Mamba-2 sub-block; both prefixes end in a dot."""
    return [
        entry(f"{hf}in_proj.weight", *(f"{native}{n}" for n in ("z", "x", "B", "C", "dt"))),
        entry(f"{hf}conv1d.weight", *(f"{native}conv_{n}" for n in "xBC"), squeeze=1),
        entry(f"{hf}conv1d.bias", *(f"{native}conv_{n}_bias" for n in "xBC")),
        *(entry(f"{hf}{n}", f"{native}{n}") for n in ("A_log", "dt_bias", "D")),
        entry(f"{hf}norm.weight", f"{native}norm"),
        entry(f"{hf}out_proj.weight", f"{native}out"),
    ]


def mamba1_mixer(hf: str, native: str) -> list[Entry]:
    """Returns the entries of a Mamba-1 sub-block; both prefixes end in a dot."""
    return [
        entry(f"{hf}in_proj.weight", f"{native}x", f"{native}z"),
        entry(f"{hf}conv1d.weight", f"{native}conv_x", squeeze=1),
        entry(f"{hf}conv1d.bias", f"{native}conv_x_bias"),
        entry(f"{hf}x_proj.weight", *(f"{native}{n}" for n in ("dt_a", "B", "C"))),
        entry(f"{hf}dt_proj.weight", f"{native}dt_b"),
        entry(f"{hf}dt_proj.bias", f"{native}dt_bias"),
        entry(f"{hf}A_log", f"{native}A_log"),
        entry(f"{hf}D", f"{native}D"),
        entry(f"{hf}out_proj.weight", f"{native}out"),
    ]


def expansion(config: ModelConfig, name: str, inner: int) -> int:
    """Returns `expand`, the inner width of a mixer divided by the hidden width.

    Raises Unsupported, naming the field `name`, if it is not an integer.
    """
    if inner % config.hidden:
        raise Unsupported(
            name, inner, f"the inner width must be a multiple of hidden = {config.hidden}"
        )
    return inner // config.hidden


def write_mamba_common(config: ModelConfig) -> dict[str, Any]:
    """Writes the Hugging Face fields that Mamba and Mamba2 share."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": len(config.symbols),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
    }


def read_mamba1(fields: Fields, **more: Any) -> ModelConfig:
    """Reads a Mamba config; `more` are further native fields."""
    check_mixer(fields)
    fields.only("hidden_act", "silu")
    fields.only("rms_norm", True)
    fields.only("ssm_cfg", {})
    hidden = fields.integer("hidden_size", "d_model", default=768, least=1)
    inner = int(fields.number("expand", default=2) * hidden)
    for name in ("intermediate_size", "d_inner"):
        fields.only(name, inner, remedy="is expand · hidden_size; leave it out")
    rank = fields.get("time_step_rank", default="auto")
    return ModelConfig(
        pattern="m",
        repeat=fields.get("num_hidden_layers", "n_layer", default=32),
        hidden=hidden,
        vocab=fields.get("vocab_size", default=50280),
        tied=fields.get("tie_word_embeddings", default=True),
        norm_eps=fields.get("layer_norm_epsilon", default=1e-5),
        mamba1_inner=inner,
        mamba1_state=fields.get("state_size", default=16),
        mamba1_rank=-(-hidden // 16) if rank == "auto" else rank,
        mamba1_conv=fields.get("conv_kernel", default=4),
        **more,
    )


def read_falcon_mamba(fields: Fields) -> ModelConfig:
    """Reads a Falcon Mamba config: Mamba with norms of dt, B and C."""
    eps = fields.number("mixer_rms_eps", default=1e-6)
    return read_mamba1(fields, mamba1_norm="plain", mamba1_norm_eps=eps)


def write_falcon_mamba(config: ModelConfig) -> dict[str, Any]:
    """Writes a Falcon Mamba config."""
    return write_mamba1(config) | {"mixer_rms_eps": config.mamba1_norm_eps}


def write_mamba1(config: ModelConfig) -> dict[str, Any]:
    """Writes a Mamba config."""
    check_symbols(config, "m")
    inner = config.mamba1_inner
    return write_mamba_common(config) | {
        "expand": expansion(config, "mamba1_inner", inner),
        "intermediate_size": inner,
        "state_size": config.mamba1_state,
        "time_step_rank": config.mamba1_rank,
        "conv_kernel": config.mamba1_conv,
    }


def mamba1_entries(config: ModelConfig) -> list[Entry]:
    """Returns the entries of Mamba."""
    return backbone(config, lambda _, hf, native: mamba1_mixer(hf, native))


def read_mamba2(fields: Fields) -> ModelConfig:
    """Reads a Mamba2 config."""
    check_mixer(fields)
    fields.only("hidden_act", "silu")
    fields.only("rms_norm", True)
    hidden = fields.integer("hidden_size", default=4096)
    heads, width = fields.integer("num_heads", default=128), fields.integer("head_dim", default=64)
    inner = fields.number("expand", default=2) * hidden
    if inner != heads * width:
        remedy = f"expand · hidden_size is {inner}, num_heads · head_dim {heads * width}"
        raise Unsupported("num_heads", heads, remedy)
    return ModelConfig(
        pattern="M",
        repeat=fields.get("num_hidden_layers", default=64),
        hidden=hidden,
        vocab=fields.get("vocab_size", default=32768),
        tied=fields.get("tie_word_embeddings", default=False),
        norm_eps=fields.get("layer_norm_epsilon", default=1e-5),
        mamba_heads=heads,
        mamba_head_dim=width,
        mamba_state=fields.get("state_size", default=128),
        mamba_groups=fields.get("n_groups", default=8),
        mamba_conv=fields.get("conv_kernel", default=4),
        mamba_chunk=fields.get("chunk_size", default=256),
    )


def write_mamba2(config: ModelConfig) -> dict[str, Any]:
    """Writes a Mamba2 config."""
    check_symbols(config, "M")
    heads = config.mamba_heads
    return write_mamba_common(config) | {
        "expand": expansion(config, "mamba_heads", heads * config.mamba_head_dim),
        "num_heads": heads,
        "head_dim": config.mamba_head_dim,
        "state_size": config.mamba_state,
        "n_groups": config.mamba_groups,
        "conv_kernel": config.mamba_conv,
        "chunk_size": config.mamba_chunk,
    }


def mamba2_entries(config: ModelConfig) -> list[Entry]:
    """Returns the entries of Mamba2."""
    return backbone(config, lambda _, hf, native: mamba2_mixer(hf, native))


def check_symbols(config: ModelConfig, *allowed: str) -> None:
    """Raises Unsupported unless the row repeats layers of sub-blocks from `allowed`, in turn.

    Each entry of `allowed` has the symbols that one sub-block of a layer may have.
    """
    for t, symbol in enumerate(config.symbols):
        choices = allowed[t % len(allowed)]
        if symbol not in choices:
            remedy = f"sub-block {t} is {symbol!r}, and must be one of {choices!r}"
            raise Unsupported("pattern", config.symbols, remedy)
    if len(config.symbols) % len(allowed):
        raise Unsupported(
            "pattern", config.symbols, "layers of this family are pairs of sub-blocks"
        )


def check_rotated(fraction: float, head_dim: int, name: str = "partial_rotary_factor") -> None:
    """Raises Unsupported unless a fraction of head_dim is an even number of channels.

    Transformers truncates the product and the native attention rounds it: both must agree.
    """
    width = int(head_dim * fraction)
    if width % 2 or not width or round(head_dim * fraction) != width:
        remedy = f"of head_dim = {head_dim} this must be a whole, even number of channels"
        raise Unsupported(name, fraction, remedy)


# Bamba: layers of Mamba-2 or attention, and an MLP.


def read_bamba(f: Fields) -> ModelConfig:
    """Reads a Bamba config."""
    check_mixer(f, "mamba_proj_bias", "mamba_conv_bias")
    f.only("mlp_bias", False)
    f.only("attention_bias", False)
    f.only("attention_dropout", 0.0, null=0.0)
    f.only("hidden_act", "silu")
    hidden = f.integer("hidden_size", default=4096, least=1)
    heads = f.integer("num_attention_heads", default=32, least=1)
    head_dim = f.integer("head_dim", default=hidden // heads)
    count = f.integer("num_hidden_layers", default=32)
    attention_layers = f.entries("attn_layer_indices", of=int) or []
    rope = read_rope(f, fraction=0.5)
    if rope["rope_fraction"] != 0.5:
        raise Unsupported("partial_rotary_factor", rope["rope_fraction"], "Bamba's is always 0.5")
    if attention_layers:
        check_rotated(0.5, head_dim)
    f.only("attn_rotary_emb", head_dim // 2)
    return ModelConfig(
        **pattern_fields("".join("*-" if i in attention_layers else "M-" for i in range(count))),
        hidden=hidden,
        vocab=f.get("vocab_size", default=128000),
        tied=f.get("tie_word_embeddings", default=False),
        norm_eps=f.get("rms_norm_eps", default=1e-5),
        init_std=f.get("initializer_range", default=0.02),
        balance=0.0,
        heads=heads,
        kv_heads=f.get("num_key_value_heads", default=8, null=heads),
        head_dim=head_dim,
        **rope,
        ffn=f.get("intermediate_size", default=14336),
        **read_mamba2_sizes(f, hidden),
    )


def read_mamba2_sizes(f: Fields, hidden: int) -> dict[str, Any]:
    """Reads the native fields of the Mamba-2 of Bamba and Granite."""
    inner = f.integer("mamba_expand", default=2, least=1) * hidden
    heads = f.integer("mamba_n_heads", default=128, least=1)
    automatic = f.get("mamba_d_head", default="auto") == "auto"
    width = inner // heads if automatic else f.integer("mamba_d_head")
    if width * heads != inner:
        remedy = f"mamba_d_head is {width}, mamba_expand · hidden_size {inner}"
        raise Unsupported("mamba_n_heads", heads, remedy)
    return {
        "mamba_heads": heads,
        "mamba_head_dim": width,
        "mamba_state": f.get("mamba_d_state", default=256),
        "mamba_groups": f.get("mamba_n_groups", default=1),
        "mamba_conv": f.get("mamba_d_conv", default=4),
        "mamba_chunk": f.get("mamba_chunk_size", default=256),
    }


def write_mamba2_sizes(config: ModelConfig) -> dict[str, Any]:
    """Writes the Hugging Face fields that `read_mamba2_sizes` reads, and the biases' switches."""
    c = config
    return {
        "mamba_expand": expansion(c, "mamba_heads", c.mamba_heads * c.mamba_head_dim),
        "mamba_n_heads": c.mamba_heads,
        "mamba_d_head": c.mamba_head_dim,
        "mamba_d_state": c.mamba_state,
        "mamba_n_groups": c.mamba_groups,
        "mamba_d_conv": c.mamba_conv,
        "mamba_chunk_size": c.mamba_chunk,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }


def write_bamba(config: ModelConfig) -> dict[str, Any]:
    """Writes a Bamba config."""
    c = config
    check_symbols(c, "M*", "-")
    return {
        **write_common(c),
        **write_heads(c),
        "partial_rotary_factor": 0.5,
        "attn_layer_indices": [i for i, symbol in enumerate(c.symbols[::2]) if symbol == "*"],
        "intermediate_size": c.ffn,
        "mlp_bias": False,
        **write_mamba2_sizes(c),
    }


def bamba_entries(config: ModelConfig) -> list[Entry]:
    """Returns the entries of Bamba."""
    blocks: dict[str, Block] = {
        "M": lambda hf, native, _: mamba2_mixer(f"{hf}.mamba.", f"{native}."),
        "*": attention,
        "-": lambda hf, native, _: gated(f"{hf}.feed_forward.", f"{native}."),
    }
    norms = ("input_layernorm", "pre_ff_layernorm")
    return layers(blocks, norms, config, last_norm="final_layernorm")


FAMILIES = (
    Family(
        "MambaForCausalLM",
        "mamba",
        read_mamba1,
        write_mamba1,
        mamba1_entries,
        copies=tied_backbone,
        harmless=HARMLESS | {"fused_add_norm", "pad_vocab_size_multiple"},
    ),
    Family(
        "FalconMambaForCausalLM",
        "falcon_mamba",
        read_falcon_mamba,
        write_falcon_mamba,
        mamba1_entries,
        copies=tied_backbone,
        harmless=HARMLESS | {"use_falcon_mambapy"},
    ),
    Family(
        "Mamba2ForCausalLM",
        "mamba2",
        read_mamba2,
        write_mamba2,
        mamba2_entries,
        copies=tied_backbone,
        harmless=HARMLESS | {"time_step_rank"},  # no tensor has this size
        inert={"norm_before_gate": ()},  # the gate is always applied before the norm
    ),
    Family(
        "BambaForCausalLM",
        "bamba",
        read_bamba,
        write_bamba,
        bamba_entries,
        harmless=HARMLESS | {"num_logits_to_keep", "z_loss_coefficient"},
    ),
)
