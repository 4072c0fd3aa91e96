"""Llama 3, Qwen3 and OLMo-2, and what other transformers share with them."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import read_rope, row, write_rope
from colonnade.launcher.convert.huggingface.family import Entry, Family, Unsupported, entry
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.models.config import ModelConfig

# Inside of a gated MLP: their hidden_act and our activation.
GATED = {"silu": "swiglu", "gelu": "geglu"}

# (their prefix, our prefix, config) -> the tensors of one sub-block
Block = Callable[[str, str, ModelConfig], list[Entry]]


def read_common(f: Fields, eps: float = 1e-6, theta: float = 10000.0) -> dict[str, Any]:
    """Our fields that every transformer has, rotary positions among them."""
    f.only("attention_bias", False)
    f.only("attention_dropout", 0.0, null=0.0)
    return {
        "vocab": f.get("vocab_size"),
        "hidden": f.integer("hidden_size", least=1),
        "heads": f.integer("num_attention_heads", least=1),
        "activation": GATED[f.only("hidden_act", *GATED)],
        "norm_eps": f.get("rms_norm_eps", default=eps),
        "tied": f.get("tie_word_embeddings", default=False),
        "init_std": f.get("initializer_range", default=0.02),
        "balance": 0.0,  # losses of training are for the recipe to choose
        **read_rope(f, theta),
    }


def write_common(config: ModelConfig) -> dict[str, Any]:
    """Theirs, of `read_common`."""
    c = config
    acts = {ours: theirs for theirs, ours in GATED.items()}
    if c.activation not in acts:
        remedy = f"only {' or '.join(acts)} can be represented"
        raise Unsupported("activation", c.activation, remedy)
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "num_hidden_layers": len(c.symbols) // 2,
        "num_attention_heads": c.heads,
        "hidden_act": acts[c.activation],
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "initializer_range": c.init_std,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **write_rope(c),
    }


def read_heads(
    f: Fields, kv_heads: int | None = None, head_dim: int | None = None
) -> dict[str, Any]:
    """Our fields of grouped queries; by default a key per query, and hidden / heads wide.

    Args:
        f: their config, with its numbers of heads and channels.
        kv_heads: how many where none are given (a null is a key per query in every family).
        head_dim: how wide where no width is given.
    """
    heads = f.integer("num_attention_heads", least=1)
    width = f.integer("hidden_size", least=1) // heads
    null = {} if head_dim else {"null": width}
    return {
        "kv_heads": f.get("num_key_value_heads", default=kv_heads or heads, null=heads),
        "head_dim": f.integer("head_dim", default=head_dim or width, least=1, **null),
    }


def write_heads(config: ModelConfig) -> dict[str, Any]:
    """Theirs, of `read_heads`."""
    c = config
    width = c.head_dim
    return {"num_key_value_heads": c.kv_heads, "head_dim": width}


def ends(config: ModelConfig) -> list[Entry]:
    """Embedding, last norm, head."""
    tensors = [
        entry("model.embed_tokens.weight", "embedding.weight"),
        entry("model.norm.weight", "final.weight"),
    ]
    return tensors if config.tied else [*tensors, entry("lm_head.weight", "head.weight")]


def attention(theirs: str, ours: str, config: ModelConfig) -> list[Entry]:
    """Grouped queries."""
    tensors = [entry(f"{theirs}.self_attn.{n}_proj.weight", f"{ours}.{n}") for n in "qkv"]
    if config.qk_norm != "none":
        tensors += [entry(f"{theirs}.self_attn.{n}_norm.weight", f"{ours}.{n}_norm") for n in "qk"]
    return [*tensors, entry(f"{theirs}.self_attn.o_proj.weight", f"{ours}.out")]


def mlp(theirs: str, ours: str, config: ModelConfig) -> list[Entry]:
    """Gated MLP."""
    return [
        entry(f"{theirs}.mlp.gate_proj.weight", f"{ours}.gate"),
        entry(f"{theirs}.mlp.up_proj.weight", f"{ours}.up"),
        entry(f"{theirs}.mlp.down_proj.weight", f"{ours}.down"),
    ]


BEFORE = ("input_layernorm", "post_attention_layernorm")
AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")


def layer(
    theirs: str,
    prefix: str,
    first: int,
    symbols: str,
    config: ModelConfig,
    blocks: dict[str, Block],
    norms: tuple[str, str],
) -> list[Entry]:
    """One of their layers: two of our sub-blocks, number `first` and the next of those whose names
    begin with `prefix`."""
    place = "after" if norms == AFTER else "norms"
    tensors = []
    for t, (symbol, norm) in enumerate(zip(symbols, norms, strict=True), start=first):
        tensors.append(entry(f"{theirs}.{norm}.weight", f"{prefix}{place}.{t}.weight"))
        tensors += blocks[symbol](theirs, f"{prefix}blocks.{t}", config)
    return tensors


def layers(blocks: dict[str, Block], norms: tuple[str, str], config: ModelConfig) -> list[Entry]:
    """A whole model, of layers of attention and a channel mixer."""
    tensors = ends(config)
    for t in range(0, len(config.symbols), 2):
        pair = config.symbols[t : t + 2]
        theirs = f"model.layers.{t // 2}"
        tensors += layer(theirs, "", t, pair, config, blocks, norms)
    return tensors


def windows(kinds: Iterable[str], width: int) -> dict[str, Any]:
    """Our window fields, from theirs per layer."""
    full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    return {"window": width, "full_attention": full}


DENSE: dict[str, Block] = {"*": attention, "-": mlp}


def read_llama(f: Fields) -> ModelConfig:
    """Llama: no options."""
    f.only("mlp_bias", False)
    return ModelConfig(
        **row("*-" * f.integer("num_hidden_layers")),
        ffn=f.get("intermediate_size"),
        **read_common(f),
        **read_heads(f),
    )


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """Theirs, of `read_llama`."""
    ffn = {"intermediate_size": config.ffn, "mlp_bias": False}
    return write_common(config) | write_heads(config) | ffn


def read_qwen3(f: Fields) -> ModelConfig:
    """Qwen3: norms of queries and keys in each head, and windows in some layers."""
    count, window = f.integer("num_hidden_layers"), {}
    kinds, width = f.entries("layer_types", of=str), f.get("sliding_window", default=None)
    from_layer = f.integer("max_window_layers", default=28)
    if f.get("use_sliding_window", default=False):
        width = f.get("sliding_window")
        kinds = kinds or [
            "sliding_attention" if i >= from_layer else "full_attention" for i in range(count)
        ]
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise Unsupported("layer_types", kind, "only full_attention or sliding_attention")
    if kinds and "sliding_attention" in kinds:
        if width is None or not f.get("use_sliding_window", default=False):
            raise Unsupported("sliding_window", width, "layer_types asks for a window; give both")
        window = windows(kinds, width)
    return ModelConfig(
        **row("*-" * count),
        ffn=f.get("intermediate_size"),
        qk_norm="head",
        **read_common(f),
        **read_heads(f, kv_heads=32, head_dim=128),
        **window,
    )


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """Theirs, of `read_qwen3`."""
    places = [t for t, symbol in enumerate(config.symbols) if symbol == "*"]
    full = [config.window_of(t) is None for t in places]
    return {
        **write_common(config),
        **write_heads(config),
        "intermediate_size": config.ffn,
        "use_sliding_window": not all(full),
        "sliding_window": None if all(full) else config.window,
        "max_window_layers": full.index(False) if not all(full) else len(full),
        "layer_types": ["full_attention" if f else "sliding_attention" for f in full],
    }


def read_olmo2(f: Fields) -> ModelConfig:
    """OLMo-2: norms behind sub-blocks, and of all queries and all keys."""
    return ModelConfig(
        **row("*-" * f.integer("num_hidden_layers")),
        ffn=f.get("intermediate_size"),
        qk_norm="full",
        norm_position="after",
        **read_common(f, eps=1e-5),
        **read_heads(f),
    )


def write_olmo2(config: ModelConfig) -> dict[str, Any]:
    """Theirs, of `read_olmo2`."""
    return write_common(config) | write_heads(config) | {"intermediate_size": config.ffn}


FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            "LlamaForCausalLM",
            "llama",
            read_llama,
            write_llama,
            partial(layers, DENSE, BEFORE),
            inert={"is_llama_config": (True,)},
        ),
        Family(
            "Qwen3ForCausalLM",
            "qwen3",
            read_qwen3,
            write_qwen3,
            partial(layers, DENSE, BEFORE),
            inert={"use_qk_norm": (True,)},
        ),
        Family("Olmo2ForCausalLM", "olmo2", read_olmo2, write_olmo2, partial(layers, DENSE, AFTER)),
    )
}
