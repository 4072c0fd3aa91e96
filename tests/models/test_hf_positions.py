"""OLMo, OLMo-3, Gemma 2 and 3, SmolLM3 and Helium against transformers in fp64."""

from typing import Any

import pytest
from oracle import fp64  # before transformers, which it keeps from packages that need a GPU
from test_hf_dense import LLAMA3, PLAIN, WINDOWS, YARN, case, shape
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    HeliumConfig,
    HeliumForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Unsupported

LOCAL = {"rope_type": "default", "rope_theta": 30.0}
WINDOWED = {"hidden_size": 24, "sliding_window": 6, "layer_types": WINDOWS}


def ropes(full: dict[str, Any], sliding: dict[str, Any] = LOCAL) -> dict[str, Any]:
    """Returns the tables of both kinds of attention."""
    return {"full_attention": dict(full), "sliding_attention": dict(sliding)}


def olmo(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds an OLMo."""
    fields = shape(rope, hidden_size=24, **more)
    del fields["rms_norm_eps"]
    with fp64():
        return OlmoForCausalLM(OlmoConfig(**fields))


def olmo3(full: dict[str, Any] = YARN, sliding: dict[str, Any] = LOCAL, **more: Any) -> Any:
    """Builds an OLMo-3."""
    with fp64():
        return Olmo3ForCausalLM(Olmo3Config(**shape(ropes(full, sliding), **WINDOWED | more)))


def gemma2(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds a Gemma 2."""
    caps = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}
    fields = WINDOWED | {"head_dim": 8, "query_pre_attn_scalar": 5} | caps | more
    with fp64():
        return Gemma2ForCausalLM(Gemma2Config(**shape(rope, **fields)))


def gemma3(full: dict[str, Any] = PLAIN, sliding: dict[str, Any] = LOCAL, **more: Any) -> Any:
    """Builds a Gemma 3 for text."""
    fields = WINDOWED | {"head_dim": 8, "query_pre_attn_scalar": 5} | more
    with fp64():
        return Gemma3ForCausalLM(Gemma3TextConfig(**shape(ropes(full, sliding), **fields)))


def smollm3(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds a SmolLM3 whose second layer has no positions."""
    fields = {"hidden_size": 24, "no_rope_layers": [1, 0, 1], "tie_word_embeddings": False}
    with fp64():
        return SmolLM3ForCausalLM(SmolLM3Config(**shape(rope, **fields | more)))


def ministral3(rope: dict[str, Any] = YARN, **more: Any) -> Any:
    """Builds a Ministral 3, whose queries are scaled from position 32 on."""
    beta = {"llama_4_scaling_beta": 0.4, "original_max_position_embeddings": 16}
    with fp64():
        config = shape(rope | beta, **{"head_dim": 8, **more})
        return Ministral3ForCausalLM(Ministral3Config(**config))


def helium(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds a Helium."""
    with fp64():
        config = shape(rope, **{"hidden_size": 24, "head_dim": 6, **more})
        return HeliumForCausalLM(HeliumConfig(**config))


LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0}
CASES = [
    case("olmo", "LayerNorm without weights", "OLMo", olmo),
    case(
        "olmo-biases", "the same, biases on attention, tied head, Llama 3 RoPE scaling", "OLMo",
        lambda: olmo(LLAMA3, attention_bias=True, tie_word_embeddings=True),
    ),
    case("olmo3", "YaRN without a window, plain RoPE of another base with one", "OLMo-3", olmo3),
    case(
        "olmo3-stretched", "YaRN with and without a window", "OLMo-3",
        lambda: olmo3(YARN, YARN | {"rope_theta": 30.0}, attention_bias=True),
    ),
    case(
        "olmo3-full", "no window", "OLMo-3",
        lambda: olmo3(layer_types=["full_attention"] * 3, tie_word_embeddings=True),
    ),
    case(
        "gemma2", "norms on both sides, windows, tanh GeGLU, soft caps, scaled embeddings",
        "Gemma 2", gemma2,
    ),
    case(
        "gemma2-plain", "the same, no window, no caps, biases, untied head", "Gemma 2",
        lambda: gemma2(layer_types=["full_attention"] * 3, attn_logit_softcapping=None,
                       final_logit_softcapping=None, attention_bias=True,
                       tie_word_embeddings=False),
    ),
    case("gemma3", "the same, QK-norm, RoPE of another base with a window", "Gemma 3", gemma3),
    case(
        "gemma3-stretched", "the same, linear RoPE scaling without a window, logit cap", "Gemma 3",
        lambda: gemma3(LINEAR, final_logit_softcapping=3.0, hidden_activation="gelu"),
    ),
    case("smollm3", "some layers without positions", "SmolLM3", smollm3),
    case(
        "smollm3-windows", "the same, with a window there, biases, tied head, YaRN", "SmolLM3",
        lambda: smollm3(YARN, use_sliding_window=True, sliding_window=6, attention_bias=True,
                        mlp_bias=True, tie_word_embeddings=True),
    ),
    case("smollm3-nope", "no positions", "SmolLM3", lambda: smollm3(no_rope_layers=[0, 0, 0])),
    case("ministral3", "queries that grow with their position, YaRN", "Ministral 3", ministral3),
    case(
        "ministral3-window", "the same, YaRN with mscale, a window, tied head", "Ministral 3",
        lambda: ministral3(YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, sliding_window=6,
                           tie_word_embeddings=True),
    ),
    case(
        "ministral3-plain", "the same, positions as they are", "Ministral 3",
        lambda: ministral3(PLAIN),
    ),
    case("helium", "adjacent rotary pairs", "Helium", helium),
    case(
        "helium-biases", "the same, biases on q, k, v and the MLP, YaRN, tied head", "Helium",
        lambda: helium(YARN, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
]  # fmt: skip
BUILDS = {
    "olmo": olmo, "olmo3": olmo3, "gemma2": gemma2, "gemma3": gemma3, "smollm3": smollm3,
    "helium": helium, "ministral3": ministral3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("build", "field", "given"),
    [
        (olmo, "clip_qkv", {"clip_qkv": 8.0}),
        (olmo, "rms_norm_eps", {"rms_norm_eps": 1e-3}),
        (olmo3, "sliding_window", {"sliding_window": None}),
        (olmo3, "rope_parameters.rope_theta", {"rope_parameters": PLAIN}),
        (olmo3, "rope_parameters.sliding_attention",
         {"rope_parameters": ropes(PLAIN, YARN)}),
        (gemma2, "layer_types", {"layer_types": ["full_attention"]}),
        (gemma3, "use_bidirectional_attention", {"use_bidirectional_attention": True}),
        (gemma3, "attn_logit_softcapping", {"attn_logit_softcapping": 4.0}),
        (gemma3, "rope_parameters.full_attention.truncate",
         {"rope_parameters": ropes(YARN | {"truncate": False})}),
        (gemma3, "query_pre_attn_scalar", {"query_pre_attn_scalar": 0}),
        (smollm3, "no_rope_layers", {"no_rope_layers": [1]}),
        (helium, "head_dim", {"head_dim": 8}),
        (ministral3, "rope_parameters.llama_4_scaling_beta", {"rope_parameters": YARN}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(build: Any, field: str, given: dict[str, Any]) -> None:
    hf_model = build()
    with pytest.raises(Unsupported) as caught:
        family_of(type(hf_model).__name__).config_from_hf(hf_model.config.to_dict() | given)
    assert caught.value.field == field


# Fields of published configs, in the spelling of transformers 4.
GEMMA3_4B = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "cache_implementation": "hybrid",
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 10240,
    "max_position_embeddings": 131072, "model_type": "gemma3_text", "num_attention_heads": 8,
    "num_hidden_layers": 34, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 1000000,
    "sliding_window": 1024, "sliding_window_pattern": 6, "use_cache": True, "vocab_size": 262208,
}  # fmt: skip
OLMO3_7B = {
    "architectures": ["Olmo3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 65536, "model_type": "olmo3",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06, "rope_scaling": {
        "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
        "original_max_position_embeddings": 8192, "rope_type": "yarn",
    },
    "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False,
    "vocab_size": 100278,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
}  # fmt: skip


def test_transformers_4_spelling() -> None:
    """There `rope_scaling` concerns attentions without a window alone."""
    c = family_of("Gemma3ForCausalLM").config_from_hf(GEMMA3_4B)
    assert (c.window_of(0), c.window_of(10), c.full_attention) == (1024, None, (5, 11, 17, 23, 29))
    assert (c.rope_of(0), c.rope_of(10)) == ((10000.0, False), (1000000.0, True))
    assert (c.tied, c.rope_scaling, c.rope_factor) == (True, "linear", 8.0)
    c = family_of("Olmo3ForCausalLM").config_from_hf(OLMO3_7B)
    assert (c.rope_of(0), c.rope_of(6)) == ((500000.0, False), (500000.0, True))
    assert (c.rope_original, c.rope_attention_factor) == (8192, 1.2079441541679836)
