"""Converts Qwen3-Next: layers of gated DeltaNet or gated attention, and a mixture or an MLP."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import (
    UNREAD_MTP,
    notify_unread_mtp,
    pattern_fields,
    read_rope,
    symbols_of,
)
from colonnade.launcher.convert.huggingface.dense import (
    NORMS_BEFORE,
    Block,
    attention,
    gated,
    layers,
    mlp,
    read_heads,
    write_common,
    write_heads,
)
from colonnade.launcher.convert.huggingface.entry import Entry, entry
from colonnade.launcher.convert.huggingface.family import Family
from colonnade.launcher.convert.huggingface.fields import Fields, Unsupported
from colonnade.launcher.convert.huggingface.mamba import check_rotated, check_symbols
from colonnade.launcher.convert.huggingface.moe import (
    mixture,
    read_top_k,
    sparse_layers,
    write_experts,
)
from colonnade.models.config import ModelConfig

QWEN3_NEXT = {"linear_attention": "G", "full_attention": "*"}


def read_qwen3_next(f: Fields) -> ModelConfig:
    """Reads a Qwen3-Next config."""
    notify_unread_mtp(f)
    mixers = read_mixers(f, count=48)
    experts = f.integer("num_experts", "num_local_experts", default=512)
    sparse = [experts > 0 and is_sparse for is_sparse in sparse_layers(f, len(mixers))]
    layers_of = zip(mixers, sparse, strict=True)
    symbols = "".join(mixer + ("E" if is_sparse else "-") for mixer, is_sparse in layers_of)
    return ModelConfig(
        **pattern_fields(symbols),
        **read_hybrid(f, mixers, hidden=2048, kv_heads=2, vocab=151936),
        ffn=f.get("intermediate_size", default=5632),
        **(qwen3_next_experts(f, experts) if any(sparse) else {}),
    )


def read_mixers(f: Fields, count: int) -> str:
    """Reads the symbols of the sequence mixers; `count` is the default of how many there are."""
    count = f.integer("num_hidden_layers", default=count)
    every = f.integer("full_attention_interval", default=4, least=1)
    kinds = f.entries("layer_types", of=str) or [
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(count)
    ]
    return mixers_of(kinds, count)


def mixers_of(kinds: list[str], count: int) -> str:
    """Returns the symbols of the sequence mixers of so many layers of these kinds."""
    mixers = symbols_of(kinds, QWEN3_NEXT, "layer_types")
    if len(mixers) != count:
        raise Unsupported("layer_types", len(mixers), f"but num_hidden_layers = {count}")
    return mixers


def read_hybrid(f: Fields, mixers: str, hidden: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    """Reads the native fields of the stream and of the mixers; the numbers are defaults."""
    f.only("attention_bias", False)
    f.only("attention_dropout", 0.0)
    f.only("hidden_act", "silu")
    heads, rope = read_heads(f, kv_heads=kv_heads, head_dim=256), read_rope(f, fraction=0.25)
    if "*" in mixers:
        check_rotated(rope["rope_fraction"], heads["head_dim"])
    return {
        "hidden": f.get("hidden_size", default=hidden),
        "vocab": f.get("vocab_size", default=vocab),
        "tied": f.get("tie_word_embeddings", default=False),
        "norm": "rms_offset",
        "norm_eps": f.get("rms_norm_eps", default=1e-6),
        "init_std": f.get("initializer_range", default=0.02),
        "heads": f.get("num_attention_heads", default=16),
        **heads,
        **rope,
        "qk_norm": "head",
        "attention_gate": "channel",
        "delta_heads": f.get("linear_num_value_heads", default=32),
        "delta_key_heads": f.get("linear_num_key_heads", default=16),
        "delta_key_dim": f.get("linear_key_head_dim", default=128),
        "delta_value_dim": f.get("linear_value_head_dim", default=128),
        "delta_conv": f.get("linear_conv_kernel_dim", default=4),
    }


def qwen3_next_experts(f: Fields, experts: int, top_k: int = 10) -> dict[str, Any]:
    """Reads the native fields of its mixtures, which have a gated shared expert; `top_k` is the
    default of the experts of a token."""
    shared = f.integer("shared_expert_intermediate_size", default=512, least=1)
    return {
        "experts": experts,
        **read_top_k(f, True, default=top_k),
        "expert_ffn": f.get("moe_intermediate_size", default=512),
        "shared_ffn": shared,
        "shared_gate": True,
        "balance": 0.0,
    }


def write_qwen3_next(config: ModelConfig) -> dict[str, Any]:
    """Writes a Qwen3-Next config."""
    c = config
    check_symbols(c, "G*", "-E")
    experts = {**write_experts(c), "shared_expert_intermediate_size": c.shared_ffn}
    return {
        **write_hybrid(c),
        "intermediate_size": c.ffn,
        "num_experts": c.experts if c.has("E") else 0,
        "mlp_only_layers": [i for i, symbol in enumerate(c.symbols[1::2]) if symbol == "-"],
        "decoder_sparse_step": 1,
        **(experts if c.has("E") else {}),
    }


def write_hybrid(config: ModelConfig) -> dict[str, Any]:
    """Writes the fields of `read_hybrid`, and the kinds of layers."""
    c = config
    if c.has("*"):
        check_rotated(c.rope_fraction, c.head_dim, "rope_fraction")
    return {
        **write_common(c),
        **write_heads(c),
        "partial_rotary_factor": c.rope_fraction,
        **write_mixers(c),
    }


def write_mixers(config: ModelConfig) -> dict[str, Any]:
    """Writes the kinds of layers, and the sizes of DeltaNet."""
    c = config
    kinds = {symbol: kind for kind, symbol in QWEN3_NEXT.items()}
    delta = {
        "linear_num_value_heads": c.delta_heads,
        "linear_num_key_heads": c.delta_key_heads,
        "linear_key_head_dim": c.delta_key_dim,
        "linear_value_head_dim": c.delta_value_dim,
        "linear_conv_kernel_dim": c.delta_conv,
    }
    return {
        "layer_types": [kinds[symbol] for symbol in c.symbols[::2]],
        **(delta if c.delta_heads else {}),  # 0: none, and no field of Hugging Face
    }


def gated_attention(hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of gated attention.

    `q_proj` has, head by head, the queries and the gates of the head's output.
    """
    q = f"{hf}.self_attn.q_proj.weight"
    others = [e for e in attention(hf, native, config) if e.hf_names != (q,)]
    return [entry(q, f"{native}.q", f"{native}.gate_z", groups=config.heads), *others]


def delta_net(hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of gated DeltaNet.

    Its projections are packed key head by key head, its convolutions in the order q, k, v.
    """
    hf = f"{hf}.linear_attn"
    groups = config.delta_key_heads
    qkvz = (f"{native}.{n}" for n in ("q", "k", "v", "z"))
    return [
        entry(f"{hf}.in_proj_qkvz.weight", *qkvz, groups=groups),
        entry(f"{hf}.in_proj_ba.weight", f"{native}.beta", f"{native}.dt", groups=groups),
        entry(f"{hf}.conv1d.weight", *(f"{native}.conv_{n}" for n in "qkv"), squeeze=1),
        entry(f"{hf}.dt_bias", f"{native}.dt_bias"),
        entry(f"{hf}.A_log", f"{native}.A_log"),
        entry(f"{hf}.norm.weight", f"{native}.norm"),
        entry(f"{hf}.out_proj.weight", f"{native}.out"),
    ]


def qwen3_next_mixture(packed: bool, hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of a mixture with a gated shared expert."""
    return [
        *mixture(packed, hf, native, config),
        *gated(f"{hf}.mlp.shared_expert.", f"{native}.shared_"),
        entry(f"{hf}.mlp.shared_expert_gate.weight", f"{native}.shared_open"),
    ]


def qwen3_next(packed: bool, config: ModelConfig) -> list[Entry]:
    """Returns the entries of Qwen3-Next."""
    blocks: dict[str, Block] = {
        "G": delta_net,
        "*": gated_attention,
        "-": mlp,
        "E": partial(qwen3_next_mixture, packed),
    }
    return layers(blocks, NORMS_BEFORE, config)


QWEN3_NEXT_EXPERTS = frozenset({
    "moe_intermediate_size", "norm_topk_prob", "num_experts_per_tok",
    "shared_expert_intermediate_size",
})  # fmt: skip

FAMILIES = (
    Family(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        read_qwen3_next,
        write_qwen3_next,
        partial(qwen3_next, False),
        partial(qwen3_next, True),
        unread=(UNREAD_MTP,),
        harmless=QWEN3_NEXT_EXPERTS,
        inert={"use_qk_norm": (True,)},
    ),
)
