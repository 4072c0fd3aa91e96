"""Converts Llama 3, Qwen3 and OLMo-2, and the fields and entries that other families share."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from colonnade.kernels.activation_names import gated as has_gate
from colonnade.launcher.convert.huggingface.config import pattern_fields, read_rope, write_rope
from colonnade.launcher.convert.huggingface.entry import Entry, entry
from colonnade.launcher.convert.huggingface.family import Family, Unsupported
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.models.config import ModelConfig

# Activations of gated MLPs: hidden_act of Hugging Face to the native `activation`.
GATED = {"silu": "swiglu", "gelu": "geglu"}
# Those of MLPs without a gate.
UNGATED: dict[str, Any] = {
    "relu2": "relu2",
    "relu": "relu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# (Hugging Face prefix, native prefix, config) -> the entries of one sub-block
Block = Callable[[str, str, ModelConfig], list[Entry]]


Biases = Literal["none", "qkv", "all"]


def read_common(
    f: Fields,
    eps: float = 1e-6,
    theta: float = 10000.0,
    biases: Biases = "none",
    activations: Mapping[str, str] = GATED,
    dropout: float = 0.0,
    act: str = "hidden_act",
    rope: Mapping[str, Any] | None = None,
    fraction: float | None = None,
) -> dict[str, Any]:
    """Reads the native fields that all transformers share, including rotary positions.

    `biases` are those that `attention_bias` switches on; "none": it must be false. `activations`
    are native ones by the value of the field `act`, the first the default. `dropout` is the default
    of `attention_dropout`, which may have another value only where it is above 0. `rope` are native
    fields of rotary positions that were read already, and `fraction` is as in `read_rope`.
    """
    if biases == "none":
        f.only("attention_bias", False)
    biased = biases != "none" and f.truth("attention_bias", default=False)
    if dropout:
        leave_out_dropout(f, "attention_dropout", dropout)
    else:
        f.only("attention_dropout", 0.0, null=0.0)
    return {
        "vocab": f.get("vocab_size"),
        "hidden": f.integer("hidden_size", least=1),
        "heads": f.integer("num_attention_heads", least=1),
        "activation": activations[f.only(act, *activations)],
        "norm_eps": f.get("rms_norm_eps", default=eps),
        "tied": f.get("tie_word_embeddings", default=False),
        "init_std": f.get("initializer_range", default=0.02),
        "balance": 0.0,  # a recipe chooses the training losses
        "attention_bias": biases if biased else "none",
        **(read_rope(f, theta, fraction) if rope is None else rope),
    }


def leave_out_dropout(f: Fields, name: str, default: float) -> None:
    """Notifies that a probability of dropout, which acts in training alone, is not read."""
    if value := f.get(name, default=default, null=0.0):
        f.notify(f"{name} = {value} is left out: training here drops nothing out")


def write_common(config: ModelConfig, activations: Mapping[str, str] = GATED) -> dict[str, Any]:
    """Writes the Hugging Face fields that `read_common` reads."""
    c = config
    hidden_acts = {native: hf for hf, native in activations.items()}
    if c.activation not in hidden_acts:
        remedy = f"only {' or '.join(hidden_acts)} can be represented"
        raise Unsupported("activation", c.activation, remedy)
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "num_hidden_layers": len(c.symbols) // 2,
        "num_attention_heads": c.heads,
        "hidden_act": hidden_acts[c.activation],
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "initializer_range": c.init_std,
        "attention_bias": c.attention_bias != "none",
        "attention_dropout": 0.0,
        **write_rope(c),
    }


def read_heads(
    f: Fields, kv_heads: int | None = None, head_dim: int | None = None
) -> dict[str, Any]:
    """Reads the native fields of the heads of grouped-query attention.

    Args:
        f: the Hugging Face config.
        kv_heads: default of num_key_value_heads; None: as many as query heads. A null means as many
            as query heads in every family.
        head_dim: default of head_dim; None: hidden_size / num_attention_heads.
    """
    heads = f.integer("num_attention_heads", least=1)
    width = f.integer("hidden_size", least=1) // heads
    null = {} if head_dim else {"null": width}
    return {
        "kv_heads": f.get("num_key_value_heads", default=kv_heads or heads, null=heads),
        "head_dim": f.integer("head_dim", default=head_dim or width, least=1, **null),
    }


def write_heads(config: ModelConfig) -> dict[str, Any]:
    """Writes the Hugging Face fields that `read_heads` reads."""
    return {"num_key_value_heads": config.kv_heads, "head_dim": config.head_dim}


def attention(hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of grouped-query attention."""
    biases, hf = config.attention_bias, f"{hf}.self_attn"
    entries = [
        e for n in "qkv" for e in linear(f"{hf}.{n}_proj", f"{native}.{n}", biases != "none")
    ]
    if config.qk_norm != "none":
        entries += [entry(f"{hf}.{n}_norm.weight", f"{native}.{n}_norm") for n in "qk"]
    return [*entries, *linear(f"{hf}.o_proj", f"{native}.out", biases == "all")]


def linear(hf: str, native: str, bias: bool) -> list[Entry]:
    """Returns the entries of a linear weight, and of its bias where it has one."""
    entries = [entry(f"{hf}.weight", native)]
    return [*entries, entry(f"{hf}.bias", f"{native}_bias")] if bias else entries


def gated(hf: str, native: str) -> list[Entry]:
    """Returns the entries of gate, up and down projection; both prefixes end before these names."""
    return [entry(f"{hf}{n}_proj.weight", f"{native}{n}") for n in ("gate", "up", "down")]


def mlp(hf: str, native: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of an MLP, gated or not."""
    names = ("gate", "up", "down") if has_gate(config.activation) else ("up", "down")
    return [
        e for n in names for e in linear(f"{hf}.mlp.{n}_proj", f"{native}.{n}", config.mlp_bias)
    ]


Norms = tuple[str, str]  # Hugging Face names of the norms of the two sub-blocks of a layer

NORMS_BEFORE = ("input_layernorm", "post_attention_layernorm")
NORMS_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")


def layer(
    hf: str,
    prefix: str,
    first: int,
    symbols: str,
    config: ModelConfig,
    blocks: dict[str, Block],
    norms: Norms,
) -> list[Entry]:
    """Returns the entries of one Hugging Face layer, which is two native sub-blocks.

    Args:
        hf: prefix of the layer's names, without a dot at the end.
        prefix: of the native names of the row that holds the sub-blocks.
        first: index of the first of the two sub-blocks in that row.
        symbols: of the two sub-blocks.
        config: of the model.
        blocks: what returns the entries of a sub-block, by symbol.
        norms: Hugging Face names of the norms of the two sub-blocks.
    """
    entries = []
    kinds = zip(symbols, norms, config.norm_positions(symbols), strict=True)
    for t, (symbol, norm, position) in enumerate(kinds, start=first):
        native_norms = "after" if position == "after" else "norms"
        entries.append(entry(f"{hf}.{norm}.weight", f"{prefix}{native_norms}.{t}.weight"))
        entries += blocks[symbol](hf, f"{prefix}blocks.{t}", config)
    return entries


def layers(
    blocks: dict[str, Block],
    norms: Norms | Mapping[str, Norms],
    config: ModelConfig,
    last_norm: str = "norm",
) -> list[Entry]:
    """Returns the entries of a model whose layers are a sequence mixer and a channel mixer; where
    the names of `norms` depend on the sequence mixer, they are given by its symbol."""
    entries = [
        entry("model.embed_tokens.weight", "embedding.weight"),
        entry(f"model.{last_norm}.weight", "final.weight"),
    ]
    if not config.tied:
        entries.append(entry("lm_head.weight", "head.weight"))
    for t in range(0, len(config.symbols), 2):
        pair = config.symbols[t : t + 2]
        hf = f"model.layers.{t // 2}"
        names = norms[pair[0]] if isinstance(norms, Mapping) else norms
        entries += layer(hf, "", t, pair, config, blocks, names)
    return entries


# Written where no attention has a window: transformers makes a mask with one all the same.
UNUSED_WINDOW = 4096


DENSE: dict[str, Block] = {"*": attention, "-": mlp}


def read_llama(f: Fields) -> ModelConfig:
    """Reads a Llama config, with biases on all projections or on none."""
    return ModelConfig(
        **pattern_fields("*-" * f.integer("num_hidden_layers")),
        ffn=f.get("intermediate_size"),
        mlp_bias=f.truth("mlp_bias", default=False),
        **read_common(f, biases="all"),
        **read_heads(f),
    )


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """Writes a Llama config."""
    mlp_fields = {"intermediate_size": config.ffn, "mlp_bias": config.mlp_bias}
    return write_common(config) | write_heads(config) | mlp_fields


def read_windows(f: Fields, count: int) -> dict[str, Any]:
    """Reads the native fields of Qwen's sliding windows, in some of `count` layers."""
    switched = f.get("use_sliding_window", default=False)
    width = f.get("sliding_window", **({} if switched else {"default": None}))
    first = f.integer("max_window_layers", default=28)
    kinds = f.entries("layer_types", of=str) or [
        "sliding_attention" if switched and i >= first else "full_attention" for i in range(count)
    ]
    return windows_of(kinds, count, width if switched else None)


def layer_types(config: ModelConfig) -> list[str]:
    """Returns the kind of each attention of the row, for the field `layer_types`."""
    windows = (config.window_of(t) for t, symbol in enumerate(config.symbols) if symbol == "*")
    return ["full_attention" if w is None else "sliding_attention" for w in windows]


def windows_of(kinds: list[str], count: int, window: int | None) -> dict[str, Any]:
    """Returns the native fields of attention windows for the kinds of `count` layers.

    Raises Unsupported for an unknown kind, a wrong number of layers, or a missing width.
    """
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise Unsupported("layer_types", kind, "only full_attention or sliding_attention")
    if len(kinds) != count:
        raise Unsupported("layer_types", len(kinds), f"but num_hidden_layers = {count}")
    if "sliding_attention" not in kinds:
        return {}
    if window is None:
        raise Unsupported("sliding_window", window, "layer_types asks for a window; give both")
    full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    return {"window": window, "full_attention": full}


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """Writes the Hugging Face fields that `read_windows` reads."""
    kinds = layer_types(config)
    full = [kind == "full_attention" for kind in kinds]
    return {
        "use_sliding_window": not all(full),
        "sliding_window": None if all(full) else config.window,
        "max_window_layers": full.index(False) if not all(full) else len(full),
        "layer_types": kinds,
    }


def read_qwen3(f: Fields) -> ModelConfig:
    """Reads a Qwen3 config: QK-norm in each head, and sliding windows in some layers."""
    count = f.integer("num_hidden_layers")
    return ModelConfig(
        **pattern_fields("*-" * count),
        ffn=f.get("intermediate_size"),
        qk_norm="head",
        **read_common(f, biases="all"),
        **read_heads(f, kv_heads=32, head_dim=128),
        **read_windows(f, count),
    )


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """Writes a Qwen3 config."""
    fields = write_common(config) | write_heads(config) | write_windows(config)
    return fields | {"intermediate_size": config.ffn}


def read_olmo2(f: Fields) -> ModelConfig:
    """Reads an OLMo-2 config: norms behind sub-blocks, QK-norm over all heads together."""
    return ModelConfig(
        **pattern_fields("*-" * f.integer("num_hidden_layers")),
        ffn=f.get("intermediate_size"),
        qk_norm="full",
        norm_position="after",
        **read_common(f, eps=1e-5, biases="all"),
        **read_heads(f),
    )


def write_olmo2(config: ModelConfig) -> dict[str, Any]:
    """Writes an OLMo-2 config."""
    return write_common(config) | write_heads(config) | {"intermediate_size": config.ffn}


FAMILIES = (
    Family(
        "LlamaForCausalLM",
        "llama",
        read_llama,
        write_llama,
        partial(layers, DENSE, NORMS_BEFORE),
        inert={"is_llama_config": (True,)},
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        read_qwen3,
        write_qwen3,
        partial(layers, DENSE, NORMS_BEFORE),
        inert={"use_qk_norm": (True,)},
    ),
    Family(
        "Olmo2ForCausalLM",
        "olmo2",
        read_olmo2,
        write_olmo2,
        partial(layers, DENSE, NORMS_AFTER),
    ),
)
