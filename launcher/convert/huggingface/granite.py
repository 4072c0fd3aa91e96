"""Converts Granite, dense, with mixtures, and hybrid: multipliers of embeddings, scores, outputs of
sub-blocks and logits."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import pattern_fields, symbols_of
from colonnade.launcher.convert.huggingface.dense import (
    DENSE,
    GATED,
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
from colonnade.launcher.convert.huggingface.family import Family, Unsupported
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.launcher.convert.huggingface.mamba import (
    HARMLESS,
    check_mixer,
    check_symbols,
    mamba2_mixer,
    read_mamba2_sizes,
    write_mamba2_sizes,
)
from colonnade.models.config import ModelConfig

HYBRID = {
    **dict.fromkeys(("linear_attention", "mamba"), "M"),
    **dict.fromkeys(("full_attention", "attention"), "*"),
}


def read_granite_common(f: Fields, activations: Mapping[str, str] = GATED) -> dict[str, Any]:
    """Reads the native fields that all Granites share."""
    return {
        **read_common(f, biases="all", activations=activations),
        **read_heads(f),
        "embedding_multiplier": f.number("embedding_multiplier", default=1.0),
        "residual_multiplier": f.number("residual_multiplier", default=1.0),
        "attention_multiplier": f.number("attention_multiplier", default=1.0),
        "logit_multiplier": 1 / f.number("logits_scaling", default=1.0),
    }


def write_granite_common(config: ModelConfig) -> dict[str, Any]:
    """Writes the Hugging Face fields that `read_granite_common` reads."""
    c = config
    return {
        **write_common(c),
        **write_heads(c),
        "embedding_multiplier": c.embedding_multiplier,
        "residual_multiplier": c.residual_multiplier,
        "attention_multiplier": c.attention_multiplier or c.head_dim**-0.5,
        "logits_scaling": 1 / c.logit_multiplier,
    }


def read_granite(f: Fields) -> ModelConfig:
    """Reads a dense Granite config."""
    return ModelConfig(
        **pattern_fields("*-" * f.integer("num_hidden_layers")),
        ffn=f.integer("intermediate_size", least=1),
        mlp_bias=f.truth("mlp_bias", default=False),
        **read_granite_common(f),
    )


def write_granite(config: ModelConfig) -> dict[str, Any]:
    """Writes a dense Granite config."""
    mlp_fields = {"intermediate_size": config.ffn, "mlp_bias": config.mlp_bias}
    return write_granite_common(config) | mlp_fields


def read_experts(f: Fields, shared: int, experts: int = 8, top_k: int = 2) -> dict[str, Any]:
    """Reads the native fields of mixtures; the weights of a token's experts sum to 1.

    `shared` is the width of the shared expert; 0: none. `experts` and `top_k` are defaults.
    """
    top_k = f.integer("num_experts_per_tok", default=top_k, least=1)
    if top_k == 1:
        remedy = "with one expert per token its router could not learn"
        raise Unsupported("num_experts_per_tok", top_k, remedy)
    return {
        "experts": f.integer("num_local_experts", "num_experts", default=experts, least=1),
        "top_k": top_k,
        "expert_ffn": f.integer("intermediate_size", least=1),
        "shared_ffn": shared,
    }


def write_experts(config: ModelConfig) -> dict[str, Any]:
    """Writes the Hugging Face fields that `read_experts` reads."""
    return {
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.top_k,
        "intermediate_size": config.expert_ffn,
    }


def read_granite_moe(with_shared: bool, f: Fields) -> ModelConfig:
    """Reads the config of a Granite with mixtures in all layers, some with a shared expert."""
    shared = f.integer("shared_intermediate_size", default=0) if with_shared else 0
    pattern = pattern_fields("*E" * f.integer("num_hidden_layers"))
    return ModelConfig(**pattern, **read_experts(f, shared), **read_granite_common(f))


def write_granite_moe(with_shared: bool, config: ModelConfig) -> dict[str, Any]:
    """Writes the config of a Granite with mixtures in all layers."""
    fields = write_granite_common(config) | write_experts(config)
    return fields | {"shared_intermediate_size": config.shared_ffn} if with_shared else fields


def read_granite_hybrid(f: Fields) -> ModelConfig:
    """Reads the config of a hybrid Granite: Mamba-2 or attention, then a mixture with a shared
    expert, or without experts an MLP; positions only where it says so."""
    check_mixer(f, "mamba_proj_bias", "mamba_conv_bias")
    count = f.integer("num_hidden_layers")
    kinds = f.entries("layer_types", "layers_block_type", of=str) or ["mamba"] * count
    mixers = symbols_of(kinds, HYBRID, "layer_types")
    if len(mixers) != count:
        raise Unsupported("layer_types", len(mixers), f"but num_hidden_layers = {count}")
    shared = f.integer("shared_intermediate_size", default=1024, least=1)
    if f.integer("num_local_experts", default=8):
        channel, widths = "E", read_experts(f, shared)
    else:
        channel, widths = "-", {"ffn": shared}
        f.read |= UNUSED_WITHOUT_EXPERTS
    rotated = f.only("position_embedding_type", None, "rope", "nope") == "rope"
    return ModelConfig(
        **pattern_fields("".join(mixer + channel for mixer in mixers)),
        **widths,
        **read_granite_common(f, {"silu": "swiglu"}),  # the convolutions', too
        positions="rope" if rotated else "none",
        **read_mamba2_sizes(f, f.integer("hidden_size", least=1)),
    )


UNUSED_WITHOUT_EXPERTS = {"intermediate_size", "num_experts_per_tok"}


def write_granite_hybrid(config: ModelConfig) -> dict[str, Any]:
    """Writes the config of a hybrid Granite."""
    c = config
    with_experts = c.has("E")
    check_symbols(c, "M*", "E" if with_experts else "-")
    kinds = {"M": "mamba", "*": "attention"}
    widths = {"num_local_experts": 0, "intermediate_size": c.ffn}
    if with_experts:
        widths = write_experts(c)
    return {
        **write_granite_common(c),
        **widths,
        "shared_intermediate_size": c.shared_ffn if with_experts else c.ffn,
        "layer_types": [kinds[symbol] for symbol in c.symbols[::2]],
        "position_embedding_type": "rope" if c.positions == "rope" else None,
        **write_mamba2_sizes(c),
    }


def mixture(packed: bool, hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of Granite's mixture: all experts are in one tensor, gate and up
    projection concatenated. Transformers 5 renames them on loading."""
    hf, gate_up = f"{hf}.block_sparse_moe", (f"{native}.gate", f"{native}.up")
    names = ("router.weight", "experts.gate_up_proj", "experts.down_proj")
    if not packed:
        names = ("router.layer.weight", "input_linear.weight", "output_linear.weight")
    return [
        entry(f"{hf}.{names[0]}", f"{native}.router"),
        entry(f"{hf}.{names[1]}", *gate_up, dim=1),
        entry(f"{hf}.{names[2]}", f"{native}.down"),
    ]


def shared_mlp(hf: str, native: str) -> list[Entry]:
    """Returns the entries of the MLP beside the experts; `native` ends before its names."""
    return [
        entry(f"{hf}.shared_mlp.input_linear.weight", f"{native}gate", f"{native}up"),
        entry(f"{hf}.shared_mlp.output_linear.weight", f"{native}down"),
    ]


def shared_mixture(packed: bool, hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of a mixture, and of its shared expert where it has one."""
    shared = shared_mlp(hf, f"{native}.shared_") if config.shared_ffn else []
    return [*mixture(packed, hf, native, config), *shared]


def granite_moe(packed: bool, config: ModelConfig) -> list[Entry]:
    """Returns the entries of all Granites with mixtures, or with an MLP in their place."""
    blocks: dict[str, Block] = {
        "M": lambda hf, native, _: mamba2_mixer(f"{hf}.mamba.", f"{native}."),
        "*": attention,
        "-": lambda hf, native, _: shared_mlp(hf, f"{native}."),
        "E": partial(shared_mixture, packed),
    }
    return layers(blocks, NORMS_BEFORE, config)


BOTH = partial(granite_moe, False), partial(granite_moe, True)
FAMILIES = (
    Family(
        "GraniteForCausalLM",
        "granite",
        read_granite,
        write_granite,
        partial(layers, DENSE, NORMS_BEFORE),
    ),
    Family(
        "GraniteMoeForCausalLM",
        "granitemoe",
        partial(read_granite_moe, False),
        partial(write_granite_moe, False),
        *BOTH,
    ),
    Family(
        "GraniteMoeSharedForCausalLM",
        "granitemoeshared",
        partial(read_granite_moe, True),
        partial(write_granite_moe, True),
        *BOTH,
    ),
    Family(
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        read_granite_hybrid,
        write_granite_hybrid,
        *BOTH,
        harmless=HARMLESS,
    ),
)
