"""Llama 3, Qwen3 and OLMo-2 against transformers in fp64: conversion of configs and weights."""

from typing import Any

import oracle  # before transformers, which it keeps from packages that need a GPU
import pytest
import torch
from oracle import Case, fp64
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Unsupported, from_hf
from colonnade.models.config import ModelConfig

PLAIN = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 20.0, "beta_slow": 2.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def shape(rope: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Returns the config of a tiny transformer with odd sizes."""
    return {
        "vocab_size": 97, "hidden_size": 20, "intermediate_size": 23, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-4,
        "rope_parameters": dict(rope), "max_position_embeddings": 128, "use_cache": False,
        "pad_token_id": None, "attn_implementation": "eager", **more,
    }  # fmt: skip


def llama(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds a Llama whose head width is not hidden / heads."""
    with fp64():
        return LlamaForCausalLM(LlamaConfig(**shape(rope, **{"head_dim": 8, **more})))


def qwen3(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds a Qwen3, which has QK-norm in each head."""
    with fp64():
        return Qwen3ForCausalLM(Qwen3Config(**shape(rope, **{"head_dim": 6, **more})))


def olmo2(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds an OLMo-2 whose head width is hidden / heads."""
    with fp64():
        return Olmo2ForCausalLM(Olmo2Config(**shape(rope, **{"hidden_size": 24, **more})))


def case(name: str, options: str, model: str, build: Any) -> Case:
    """Returns a case whose row is attention and MLPs."""
    return Case(name, "*-", options, f"transformers {model}", build)


WINDOWS = ["full_attention", "sliding_attention", "full_attention"]
CASES = [
    case("llama", "grouped queries, RoPE, SwiGLU", "Llama", llama),
    case("llama-tied", "tied head", "Llama", lambda: llama(tie_word_embeddings=True)),
    case("llama-heads", "a key per query", "Llama", lambda: llama(num_key_value_heads=4)),
    case("llama-geglu", "GeGLU", "Llama", lambda: llama(hidden_act="gelu")),
    case(
        "llama-biases", "biases on all projections", "Llama",
        lambda: llama(attention_bias=True, mlp_bias=True),
    ),
    case("llama-linear", "linear RoPE scaling", "Llama", lambda: llama(LINEAR)),
    case("llama-llama3", "Llama 3 RoPE scaling", "Llama", lambda: llama(LLAMA3)),
    case("llama-yarn", "YaRN", "Llama", lambda: llama(YARN)),
    case(
        "llama-yarn-factors", "YaRN with mscale, untruncated", "Llama",
        lambda: llama(YARN | {"mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False}),
    ),
    case(
        "llama-yarn-attention", "YaRN with an attention factor", "Llama",
        lambda: llama(YARN | {"attention_factor": 1.3}),
    ),
    case("qwen3", "QK-norm per head", "Qwen3", qwen3),
    case(
        "qwen3-tied", "QK-norm, biases, tied head", "Qwen3",
        lambda: qwen3(tie_word_embeddings=True, attention_bias=True),
    ),
    case(
        "qwen3-windows", "sliding window in some layers", "Qwen3",
        lambda: qwen3(use_sliding_window=True, sliding_window=7, layer_types=WINDOWS),
    ),
    case(
        "qwen3-late-windows", "sliding window from a layer on, YaRN", "Qwen3",
        lambda: qwen3(YARN, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    case("olmo2", "norms behind sub-blocks, QK-norm over all heads", "OLMo-2", olmo2),
    case(
        "olmo2-llama3", "norms behind, tied head, Llama 3 RoPE scaling", "OLMo-2",
        lambda: olmo2(LLAMA3, tie_word_embeddings=True, num_key_value_heads=1),
    ),
]  # fmt: skip


# A published Llama 3.1 config, in the spelling of transformers 4.
LLAMA_31 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip


def test_transformers_4_spelling() -> None:
    c = family_of("LlamaForCausalLM").config_from_hf(LLAMA_31)
    assert (c.symbols, c.hidden, c.ffn, c.vocab) == ("*-" * 32, 4096, 14336, 128256)
    assert (c.heads, c.kv_heads, c.norm_eps, c.activation) == (32, 8, 1e-5, "swiglu")
    rope = c.rope_theta, c.rope_scaling, c.rope_factor, c.rope_original, c.rope_low, c.rope_high
    assert rope == (500000.0, "llama3", 8.0, 8192, 1.0, 4.0)
    old = LLAMA_31 | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    c = family_of("LlamaForCausalLM").config_from_hf(old)
    assert (c.rope_scaling, c.rope_factor) == ("linear", 2.0)


REFUSED = [
    ("attention_bias", {"attention_bias": "all"}),
    ("attention_dropout", {"attention_dropout": 0.1}),
    ("mlp_bias", {"mlp_bias": 1}),
    ("hidden_act", {"hidden_act": "relu"}),
    ("hidden_size", {"hidden_size": None}),
    ("hidden_size", {"hidden_size": 4096.5}),
    ("ffn", {"intermediate_size": 0}),
    ("vocab", {"vocab_size": "many"}),
    ("num_hidden_layers", {"num_hidden_layers": 0}),
    ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("rope_scaling.rope_type", {"rope_scaling": {"type": "longrope", "factor": 2.0}}),
    ("rope_scaling.factor", {"rope_scaling": {"rope_type": "linear"}}),
    (
        "rope_scaling.mrope_section",
        {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2, 3]}},
    ),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("sliding_window", {"sliding_window": 512}),
    ("quantization_config", {"quantization_config": {"quant_method": "fp8"}}),
    ("logit_scale", {"logit_scale": 0.5}),
]


@pytest.mark.parametrize(("field", "change"), REFUSED, ids=[str(c) for _, c in REFUSED])
def test_unknown_fields_are_refused(field: str, change: dict[str, Any]) -> None:
    with pytest.raises(Unsupported) as caught:
        family_of("LlamaForCausalLM").config_from_hf(LLAMA_31 | change)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} = ")
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("qk_norm", {"qk_norm": "full"}),
        ("symbols", {"pattern": "**--"}),
        ("activation", {"activation": "relu2"}),
        ("norm", {"norm": "layer"}),
        ("logit_cap", {"logit_cap": 30.0}),
        ("rope_scaling", {"rope_scaling": "ntk", "rope_factor": 2.0}),
        ("positions", {"positions": "none"}),
        ("windows", {"window": 16}),
        ("share", {"pattern": "*-", "share": True}),
        ("mtp", {"mtp": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_native_fields_that_llama_cannot_represent(field: str, change: dict[str, Any]) -> None:
    config = ModelConfig(**({"pattern": "*-", "repeat": 2} | change))
    with pytest.raises(Unsupported) as caught:
        family_of("LlamaForCausalLM").config_to_hf(config)
    assert caught.value.field == field


def test_training_fields_need_no_counterpart() -> None:
    config = ModelConfig(pattern="*-*-", logit_z=1e-4, balance=0.3, mamba_chunk=64, experts=7)
    family_of("LlamaForCausalLM").config_to_hf(config)


def test_missing_unknown_and_misshapen_tensors_are_refused() -> None:
    hf_model = llama()
    table, config = oracle.family(hf_model), oracle.native_config(hf_model)
    weights = dict(hf_model.state_dict())
    name = "model.layers.1.mlp.up_proj.weight"

    def refused(changed: dict[str, torch.Tensor], field: str) -> None:
        with pytest.raises(Unsupported) as caught:
            from_hf(table, config, changed)
        assert caught.value.field == field

    refused({n: t for n, t in weights.items() if n != name}, name)
    refused(weights | {name: weights[name][1:]}, name)
    refused(weights | {name: weights[name].T}, name)
    refused(weights | {"model.layers.3.mlp.up_proj.weight": weights[name]},
            "model.layers.3.mlp.up_proj.weight")  # fmt: skip
    refused(weights | {"model.layers.1.self_attn.q_proj.bias": torch.ones(32)},
            "model.layers.1.self_attn.q_proj.bias")  # fmt: skip
    from_hf(
        table, config, weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    )


def test_a_tied_head_may_be_in_a_checkpoint_if_equal() -> None:
    hf_model = llama(tie_word_embeddings=True)
    table, config = oracle.family(hf_model), oracle.native_config(hf_model)
    weights = dict(hf_model.state_dict())
    assert "lm_head.weight" in weights
    native = from_hf(table, config, weights)
    without = {n: t for n, t in weights.items() if n != "lm_head.weight"}
    assert from_hf(table, config, without).keys() == native.keys()
    with pytest.raises(Unsupported, match=r"lm_head\.weight"):
        from_hf(table, config, weights | {"lm_head.weight": weights["lm_head.weight"] + 1})


def test_the_error_for_an_unknown_architecture_names_similar_ones() -> None:
    with pytest.raises(Unsupported, match="Qwen3ForCausalLM"):
        family_of("Qwen33ForCausalLM")
