"""Converts Phi-3 and Phi-4: q, k and v are in one tensor, gate and up projection in another."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import pattern_fields, read_rope
from colonnade.launcher.convert.huggingface.dense import (
    NORMS_BEFORE,
    Block,
    layers,
    read_common,
    read_heads,
    write_common,
    write_heads,
)
from colonnade.launcher.convert.huggingface.entry import Entry, entry
from colonnade.launcher.convert.huggingface.family import Family, Unsupported
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.launcher.convert.huggingface.mamba import check_rotated
from colonnade.models.config import ModelConfig


def read_phi3(f: Fields) -> ModelConfig:
    """Reads a Phi-3 config: a window in all layers or in none, some channels without positions."""
    for name in ("resid_pdrop", "embd_pdrop"):
        f.only(name, 0.0, null=0.0)
    rope = read_rope(f, fraction=1.0)
    if "rope_scaling" in rope:
        remedy = "only longrope exists in this family, and it is not supported"
        raise Unsupported("rope_scaling.rope_type", rope["rope_scaling"], remedy)
    heads = read_heads(f)
    check_rotated(rope["rope_fraction"], heads["head_dim"])
    return ModelConfig(
        **pattern_fields("*-" * f.integer("num_hidden_layers")),
        ffn=f.integer("intermediate_size", least=1),
        window=f.get("sliding_window", default=None),
        **read_common(f, eps=1e-5, rope=rope),
        **heads,
    )


def write_phi3(config: ModelConfig) -> dict[str, Any]:
    """Writes a Phi-3 config."""
    c = config
    check_rotated(c.rope_fraction, c.head_dim, "rope_fraction")
    return {
        **write_common(c),
        **write_heads(c),
        "intermediate_size": c.ffn,
        "sliding_window": c.window,
        "partial_rotary_factor": c.rope_fraction,
        "original_max_position_embeddings": c.rope_original,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }


def packed_attention(hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of attention whose q, k and v are in one tensor."""
    return [
        entry(f"{hf}.self_attn.qkv_proj.weight", *(f"{native}.{n}" for n in "qkv")),
        entry(f"{hf}.self_attn.o_proj.weight", f"{native}.out"),
    ]


def packed_mlp(hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of an MLP whose gate and up projection are in one tensor."""
    return [
        entry(f"{hf}.mlp.gate_up_proj.weight", f"{native}.gate", f"{native}.up"),
        entry(f"{hf}.mlp.down_proj.weight", f"{native}.down"),
    ]


BLOCKS: dict[str, Block] = {"*": packed_attention, "-": packed_mlp}
FAMILIES = (
    Family(
        "Phi3ForCausalLM",
        "phi3",
        read_phi3,
        write_phi3,
        partial(layers, BLOCKS, NORMS_BEFORE),
        harmless=frozenset({"original_max_position_embeddings"}),  # of longrope alone
    ),
)
