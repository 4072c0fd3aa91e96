"""Mamba, Mamba2 and Bamba against transformers in fp64: conversion of configs and weights."""

import math
from typing import Any

import oracle  # before transformers, which it keeps from packages that need a GPU
import pytest
import torch
from oracle import Case, fp64
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Unsupported, from_hf
from colonnade.models.config import ModelConfig


def mamba(**more: Any) -> Any:
    """Builds a Mamba of odd widths; native chunks of 32 tokens do not divide the 41 of a row."""
    shape = {
        "vocab_size": 97, "hidden_size": 15, "num_hidden_layers": 2, "state_size": 5,
        "time_step_rank": 3, "conv_kernel": 3, "layer_norm_epsilon": 1e-4,
        "tie_word_embeddings": False, "use_cache": False,
    }  # fmt: skip
    with fp64():
        return MambaForCausalLM(MambaConfig(**(shape | more)))


def mamba2(**more: Any) -> Any:
    """Builds a Mamba2 of odd widths, with groups of heads that share B and C."""
    shape = {
        "vocab_size": 97, "hidden_size": 15, "num_hidden_layers": 2, "num_heads": 6, "head_dim": 5,
        "state_size": 7, "n_groups": 2, "conv_kernel": 3, "chunk_size": 16,
        "layer_norm_epsilon": 1e-4, "use_cache": False,
    }  # fmt: skip
    with fp64():
        return Mamba2ForCausalLM(Mamba2Config(**(shape | more)))


def bamba(**more: Any) -> Any:
    """Builds a Bamba with attention in one of three layers, RoPE on half of its channels."""
    shape = {
        "vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 17,
        "num_attention_heads": 2, "num_key_value_heads": 1, "attn_layer_indices": [1],
        "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 5,
        "mamba_d_conv": 3, "mamba_chunk_size": 16, "rms_norm_eps": 1e-4, "use_cache": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "pad_token_id": None,
        "attn_implementation": "eager",
    }  # fmt: skip
    with fp64():
        return BambaForCausalLM(BambaConfig(**(shape | more)))


MAMBA, MAMBA2, BAMBA = (f"transformers {name}" for name in ("Mamba", "Mamba2", "Bamba"))
CASES = [
    Case("mamba", "m", "untied head", MAMBA, mamba),
    Case("mamba-tied", "m", "tied head", MAMBA, lambda: mamba(tie_word_embeddings=True)),
    Case(
        "mamba-auto", "m", "rank of dt from the width, thrice as wide inside", MAMBA,
        lambda: mamba(time_step_rank="auto", hidden_size=17, expand=3, conv_kernel=4),
    ),
    Case("mamba2", "M", "two groups", MAMBA2, mamba2),
    Case("mamba2-one-group", "M", "one group", MAMBA2, lambda: mamba2(n_groups=1)),
    Case("mamba2-all-groups", "M", "a group per head", MAMBA2, lambda: mamba2(n_groups=6)),
    Case(
        "mamba2-tied", "M", "tied head, one chunk", MAMBA2,
        lambda: mamba2(tie_word_embeddings=True, chunk_size=64, conv_kernel=4),
    ),
    Case("bamba", "M*-", "RoPE on half of the channels", BAMBA, bamba),
    Case(
        "bamba-tied", "M*-", "tied head, attention first and last", BAMBA,
        lambda: bamba(tie_word_embeddings=True, attn_layer_indices=[0, 2], num_key_value_heads=2),
    ),
]  # fmt: skip


# Published configs, in the spelling of transformers 4.
MAMBA_130M = {
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536,
    "d_model": 768, "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu",
    "hidden_size": 768, "initializer_range": 0.1, "intermediate_size": 1536,
    "layer_norm_epsilon": 1e-05, "model_type": "mamba", "n_layer": 24, "num_hidden_layers": 24,
    "pad_token_id": 0, "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": False,
    "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 16,
    "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1,
    "time_step_min": 0.001, "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32",
    "transformers_version": "4.39.0.dev0", "use_bias": False, "use_cache": True,
    "use_conv_bias": True, "vocab_size": 50280,
}  # fmt: skip
MAMBA2_SMALL = {
    "architectures": ["Mamba2ForCausalLM"], "chunk_size": 256, "conv_kernel": 4, "expand": 2,
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 768, "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2", "n_groups": 1, "num_heads": 24, "num_hidden_layers": 24,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "state_size": 128,
    "tie_word_embeddings": True, "time_step_limit": [0.0, math.inf], "time_step_rank": 48,
    "use_bias": False, "use_conv_bias": True, "vocab_size": 50288,
}  # fmt: skip
BAMBA_9B = {
    "architectures": ["BambaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_layer_indices": [9, 18, 27], "attn_rotary_emb": 64, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64,
    "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 128,
    "mamba_proj_bias": False, "max_position_embeddings": 262144, "mlp_bias": False,
    "model_type": "bamba", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_logits_to_keep": 1, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 128256,
}  # fmt: skip
PUBLISHED = {
    "MambaForCausalLM": MAMBA_130M, "Mamba2ForCausalLM": MAMBA2_SMALL, "BambaForCausalLM": BAMBA_9B,
}  # fmt: skip


def test_transformers_4_spelling() -> None:
    c = family_of("MambaForCausalLM").config_from_hf(MAMBA_130M)
    assert (c.symbols, c.hidden, c.vocab, c.tied, c.norm_eps) == ("m" * 24, 768, 50280, True, 1e-5)
    sizes = c.mamba1_inner, c.mamba1_state, c.mamba1_rank, c.mamba1_conv
    assert sizes == (1536, 16, 48, 4)
    c = family_of("Mamba2ForCausalLM").config_from_hf(MAMBA2_SMALL)
    assert (c.symbols, c.hidden, c.tied) == ("M" * 24, 768, True)
    assert (c.mamba_heads, c.mamba_head_dim, c.mamba_state, c.mamba_groups) == (24, 64, 128, 1)
    c = family_of("BambaForCausalLM").config_from_hf(BAMBA_9B)
    assert [i for i, s in enumerate(c.symbols[::2]) if s == "*"] == [9, 18, 27]
    assert (c.rope_fraction, c.head_dim, c.kv_heads, c.mamba_state) == (0.5, 128, 8, 128)


def test_an_infinite_limit_in_json() -> None:
    written = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}  # as transformers 5 has it
    family_of("Mamba2ForCausalLM").config_from_hf(MAMBA2_SMALL | written)


REFUSED = [
    ("MambaForCausalLM", "use_bias", {"use_bias": True}),
    ("MambaForCausalLM", "use_conv_bias", {"use_conv_bias": False}),
    ("MambaForCausalLM", "hidden_act", {"hidden_act": "gelu"}),
    ("MambaForCausalLM", "rms_norm", {"rms_norm": False}),
    ("MambaForCausalLM", "ssm_cfg", {"ssm_cfg": {"layer": "Mamba2"}}),
    ("MambaForCausalLM", "intermediate_size", {"intermediate_size": 1537}),
    ("MambaForCausalLM", "mixer_rms_eps", {"mixer_rms_eps": 1e-6}),
    ("Mamba2ForCausalLM", "time_step_limit", {"time_step_limit": [0.001, math.inf]}),
    ("Mamba2ForCausalLM", "time_step_limit", {"time_step_limit": [0.0, 0.1]}),
    ("Mamba2ForCausalLM", "use_bias", {"use_bias": True}),
    ("Mamba2ForCausalLM", "num_heads", {"num_heads": 23}),
    ("Mamba2ForCausalLM", "rms_norm", {"rms_norm": False}),
    ("Mamba2ForCausalLM", "time_step_limit", {"time_step_limit": None}),
    ("BambaForCausalLM", "mamba_proj_bias", {"mamba_proj_bias": True}),
    ("BambaForCausalLM", "mamba_conv_bias", {"mamba_conv_bias": False}),
    ("BambaForCausalLM", "attention_bias", {"attention_bias": True}),
    ("BambaForCausalLM", "mlp_bias", {"mlp_bias": True}),
    ("BambaForCausalLM", "partial_rotary_factor", {"partial_rotary_factor": 0.25}),
    ("BambaForCausalLM", "attn_rotary_emb", {"attn_rotary_emb": 32}),
    ("BambaForCausalLM", "mamba_n_heads", {"mamba_n_heads": 100}),
]


@pytest.mark.parametrize(("name", "field", "change"), REFUSED, ids=[str(c) for *_, c in REFUSED])
def test_unknown_fields_are_refused(name: str, field: str, change: dict[str, Any]) -> None:
    with pytest.raises(Unsupported) as caught:
        family_of(name).config_from_hf(PUBLISHED[name] | change)
    assert caught.value.field == field
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("name", "field", "change"),
    [
        ("MambaForCausalLM", "pattern", {"pattern": "mM"}),
        ("MambaForCausalLM", "mamba1_inner", {"pattern": "m", "mamba1_inner": 300}),
        ("MambaForCausalLM", "norm", {"pattern": "m", "norm": "layer"}),
        ("Mamba2ForCausalLM", "mamba_heads", {"pattern": "M", "mamba_heads": 7}),
        ("BambaForCausalLM", "pattern", {"pattern": "M-*"}),
        ("BambaForCausalLM", "rope_fraction", {"pattern": "M-*-"}),
        ("BambaForCausalLM", "activation", {"pattern": "M-", "activation": "relu2"}),
    ],
    ids=str,
)
def test_native_fields_that_a_family_cannot_represent(
    name: str, field: str, change: dict[str, Any]
) -> None:
    with pytest.raises(Unsupported) as caught:
        family_of(name).config_to_hf(ModelConfig(**change))
    assert caught.value.field == field


def test_missing_unknown_and_misshapen_tensors_are_refused() -> None:
    hf_model = mamba2()
    table, config = oracle.family(hf_model), oracle.native_config(hf_model)
    weights = dict(hf_model.state_dict())
    name = "backbone.layers.1.mixer.conv1d.weight"
    for changed, field in (
        ({n: t for n, t in weights.items() if n != name}, name),
        (weights | {name: weights[name].squeeze(1)}, name),
        (weights | {"backbone.layers.1.mixer.in_proj.bias": torch.ones(3)},
         "backbone.layers.1.mixer.in_proj.bias"),
    ):  # fmt: skip
        with pytest.raises(Unsupported) as caught:
            from_hf(table, config, changed)
        assert caught.value.field == field
