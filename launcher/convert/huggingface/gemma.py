"""Converts Gemma 2 and the text model of Gemma 3: norms before and after, windows, soft caps."""

from typing import Any

from colonnade.launcher.convert.huggingface.config import (
    pattern_fields,
    read_rope,
    read_ropes,
    write_ropes,
)
from colonnade.launcher.convert.huggingface.dense import (
    DENSE,
    GATED,
    UNUSED_WINDOW,
    layer_types,
    layers,
    read_common,
    read_heads,
    windows_of,
    write_common,
    write_heads,
)
from colonnade.launcher.convert.huggingface.entry import Entry, entry
from colonnade.launcher.convert.huggingface.family import Family
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.models.config import ModelConfig

ACTIVATIONS = {"gelu_pytorch_tanh": "geglu_tanh", **GATED}


def read_gemma(
    f: Fields, rope: dict[str, Any], every: int, logit_cap: float | None
) -> dict[str, Any]:
    """Reads the native fields that Gemma 2 and 3 share.

    Args:
        f: the Hugging Face config.
        rope: native fields of rotary positions.
        every: by default each `every`-th layer has no window.
        logit_cap: default of the soft cap of logits.
    """
    f.only("use_bidirectional_attention", False)
    count, window = f.integer("num_hidden_layers"), f.get("sliding_window", default=4096, null=None)
    kinds = f.entries("layer_types", of=str) or [
        "sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)
    ]
    windows = windows_of(kinds, count, window)
    common = read_common(
        f, biases="all", activations=ACTIVATIONS, act="hidden_activation", rope=rope
    )
    return {
        **pattern_fields("*-" * count),
        **common,
        **read_heads(f, kv_heads=4, head_dim=256),
        "ffn": f.integer("intermediate_size", least=1),
        "tied": f.get("tie_word_embeddings", default=True),
        "norm": "rms_offset",
        "norm_position": "both",
        "embedding_multiplier": common["hidden"] ** 0.5,
        "attention_multiplier": f.number("query_pre_attn_scalar", default=256) ** -0.5,
        "logit_cap": f.get("final_logit_softcapping", default=logit_cap, null=None),
        **windows,
    }


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    """Writes the Hugging Face fields that `read_gemma` reads."""
    c = config
    common = write_common(c, ACTIVATIONS)
    common["hidden_activation"] = common.pop("hidden_act")
    scale = c.attention_multiplier or c.head_dim**-0.5
    return {
        **common,
        **write_heads(c),
        "intermediate_size": c.ffn,
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": c.attention_cap,
        "final_logit_softcapping": c.logit_cap,
        "sliding_window": c.window or UNUSED_WINDOW,
        "layer_types": layer_types(c),
        "use_bidirectional_attention": False,
    }


def read_gemma2(f: Fields) -> ModelConfig:
    """Reads a Gemma 2 config: every other layer has a window, and scores have a soft cap."""
    cap = f.get("attn_logit_softcapping", default=50.0, null=None)
    return ModelConfig(**read_gemma(f, read_rope(f), 2, 30.0), attention_cap=cap)


def read_gemma3(f: Fields) -> ModelConfig:
    """Reads the config of Gemma 3's text model: QK-norm, and other positions with a window."""
    f.only("attn_logit_softcapping", None, remedy="transformers does not apply it in Gemma 3")
    local = f.number("rope_local_base_freq", default=10000.0)
    every = f.integer("sliding_window_pattern", default=6, least=1)
    fields = read_gemma(f, read_ropes(f, 1e6, local), every, None)
    return ModelConfig(**fields, qk_norm="head")


def write_gemma3(config: ModelConfig) -> dict[str, Any]:
    """Writes the config of Gemma 3's text model."""
    local = {"rope_local_base_freq": config.window_rope_theta}
    return write_gemma(config) | write_ropes(config) | local


def gemma(config: ModelConfig) -> list[Entry]:
    """Returns the entries of Gemma, whose layers have four norms."""
    after = "post_attention_layernorm", "post_feedforward_layernorm"
    return [
        *layers(DENSE, ("input_layernorm", "pre_feedforward_layernorm"), config),
        *(
            entry(f"model.layers.{t // 2}.{after[t % 2]}.weight", f"after.{t}.weight")
            for t in range(len(config.symbols))
        ),
    ]


HARMLESS = frozenset({"cache_implementation"})
# Folders of transformers 4 have both names, and its code reads `hidden_activation`.
INERT = {"hidden_act": ()}
FAMILIES = (
    Family(
        "Gemma2ForCausalLM",
        "gemma2",
        read_gemma2,
        write_gemma,
        gemma,
        harmless=HARMLESS,
        inert=INERT,
    ),
    Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        read_gemma3,
        write_gemma3,
        gemma,
        harmless=HARMLESS | {"_sliding_window_pattern"},  # layer_types has what follows from it
        inert=INERT,
    ),
)
