"""Converts the text models of Qwen3.5: Qwen3-Next's layers, with other projections of DeltaNet."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import UNREAD_MTP, pattern_fields
from colonnade.launcher.convert.huggingface.dense import NORMS_BEFORE, Block, layers, mlp
from colonnade.launcher.convert.huggingface.entry import Entry, entry
from colonnade.launcher.convert.huggingface.family import Family
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.launcher.convert.huggingface.mamba import check_symbols
from colonnade.launcher.convert.huggingface.qwen3_next import (
    delta_net,
    gated_attention,
    qwen3_next_experts,
    qwen3_next_mixture,
    read_hybrid,
    read_mixers,
    write_hybrid,
)
from colonnade.models.config import ModelConfig

# Of positions in images, which text does not have: its three coordinates are equal.
SECTIONS = frozenset({"mrope_section", "mrope_interleaved"})


def without_sections(f: Fields) -> Fields:
    """Returns the fields without those of positions in images."""

    def cleaned(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: v for name, v in value.items() if name not in SECTIONS}

    f.read.update(SECTIONS)
    tables = {n: cleaned(f.values[n]) for n in ("rope_parameters", "rope_scaling") if n in f.values}
    cleaned_fields = Fields({**f.values, **tables}, f.prefix, f.notify)
    cleaned_fields.read = f.read
    return cleaned_fields


def read_qwen3_5(f: Fields) -> ModelConfig:
    """Reads the config of a dense Qwen3.5."""
    f = without_sections(f)
    mixers = read_mixers(f, count=32)
    return ModelConfig(
        **pattern_fields("".join(f"{mixer}-" for mixer in mixers)),
        **read_hybrid(f, mixers, hidden=4096, kv_heads=4, vocab=248320),
        ffn=f.get("intermediate_size", default=12288),
    )


def write_qwen3_5(config: ModelConfig) -> dict[str, Any]:
    """Writes the config of a dense Qwen3.5."""
    check_symbols(config, "G*", "-")
    return {**write_hybrid(config), "intermediate_size": config.ffn}


def read_qwen3_5_moe(f: Fields) -> ModelConfig:
    """Reads the config of a Qwen3.5 with mixtures, which are in all layers."""
    f = without_sections(f)
    f.only("norm_topk_prob", True)  # transformers does not read it, and always normalises
    mixers = read_mixers(f, count=40)
    experts = f.integer("num_experts", "num_local_experts", default=256, least=1)
    return ModelConfig(
        **pattern_fields("".join(f"{mixer}E" for mixer in mixers)),
        **read_hybrid(f, mixers, hidden=2048, kv_heads=2, vocab=248320),
        **qwen3_next_experts(f, experts, top_k=8),
    )


def write_qwen3_5_moe(config: ModelConfig) -> dict[str, Any]:
    """Writes the config of a Qwen3.5 with mixtures."""
    c = config
    check_symbols(c, "G*", "E")
    return {
        **write_hybrid(c),
        "num_experts": c.experts,
        "num_experts_per_tok": c.top_k,
        "moe_intermediate_size": c.expert_ffn,
        "shared_expert_intermediate_size": c.shared_ffn,
    }


def separate_delta_net(hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of gated DeltaNet: q, k and v one behind the other, the others apart."""
    prefix = f"{hf}.linear_attn"
    packed = (f"{prefix}.in_proj_qkvz.weight", f"{prefix}.in_proj_ba.weight")
    others = [e for e in delta_net(hf, native, config) if e.hf_names[0] not in packed]
    names = {"z": "z", "b": "beta", "a": "dt"}
    return [
        entry(f"{prefix}.in_proj_qkv.weight", *(f"{native}.{n}" for n in "qkv")),
        *(entry(f"{prefix}.in_proj_{n}.weight", f"{native}.{m}") for n, m in names.items()),
        *others,
    ]


def qwen3_5(packed: bool, config: ModelConfig) -> list[Entry]:
    """Returns the entries of Qwen3.5, dense or with mixtures."""
    blocks: dict[str, Block] = {
        "G": separate_delta_net,
        "*": gated_attention,
        "-": mlp,
        "E": partial(qwen3_next_mixture, packed),
    }
    return layers(blocks, NORMS_BEFORE, config)


# About multi-token prediction, whose tensors are not read.
MTP = frozenset({"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"})
VISION = ("model.visual.", "the encoder of images")

FAMILIES = (
    Family(
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        read_qwen3_5,
        write_qwen3_5,
        partial(qwen3_5, False),
        unread=(UNREAD_MTP, VISION),
        harmless=MTP | {"mamba_ssm_dtype"},
        inert={"attn_output_gate": (True,)},
    ),
    Family(
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        read_qwen3_5_moe,
        write_qwen3_5_moe,
        partial(qwen3_5, False),
        partial(qwen3_5, True),
        unread=(UNREAD_MTP, VISION),
        harmless=MTP | {"mamba_ssm_dtype", "intermediate_size"},
        inert={"attn_output_gate": (True,)},
    ),
)
