"""Nemotron-H and Qwen3-Next against transformers in fp64: conversion of configs and weights."""

from pathlib import Path
from typing import Any

import oracle  # before transformers, which it keeps from packages that need a GPU
import pytest
import torch
from equal import assert_equal
from oracle import Case, fp64
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Unsupported, from_hf, to_hf
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context


def nemotron(pattern: str, **more: Any) -> Any:
    """Builds a Nemotron-H of odd widths.

    `time_step_min` is so small that transformers clamps no dt, as Nemotron-H's own code does not.
    """
    shape = {
        "vocab_size": 97, "hidden_size": 20, "hybrid_override_pattern": pattern,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 23,
        "mamba_num_heads": 6, "mamba_head_dim": 5, "ssm_state_size": 7, "n_groups": 2,
        "conv_kernel": 3, "chunk_size": 16, "time_step_min": 1e-30, "n_routed_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 9,
        "moe_shared_expert_intermediate_size": 11, "layer_norm_epsilon": 1e-4, "use_cache": False,
        "attn_implementation": "eager", "experts_implementation": "eager",
    }  # fmt: skip
    with fp64():
        return NemotronHForCausalLM(NemotronHConfig(**(shape | more)))


def qwen3_next(kinds: str, **more: Any) -> Any:
    """Builds a Qwen3-Next of odd widths, two value heads per key head.

    It has a layer for each of `kinds`, `G` or `*`.
    """
    names = {"G": "linear_attention", "*": "full_attention"}
    shape = {
        "vocab_size": 97, "hidden_size": 20, "intermediate_size": 23, "num_attention_heads": 4,
        "layer_types": [names[kind] for kind in kinds], "num_hidden_layers": len(kinds),
        "num_key_value_heads": 2, "head_dim": 8, "linear_num_value_heads": 6,
        "linear_num_key_heads": 3, "linear_key_head_dim": 5, "linear_value_head_dim": 7,
        "linear_conv_kernel_dim": 3, "num_experts": 5, "num_experts_per_tok": 2,
        "moe_intermediate_size": 9, "shared_expert_intermediate_size": 11, "rms_norm_eps": 1e-4,
        "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.25}, "use_cache": False,
        "attn_implementation": "eager", "experts_implementation": "eager",
    }  # fmt: skip
    with fp64():
        return Qwen3NextForCausalLM(Qwen3NextConfig(**(shape | more)))


NEMOTRON, QWEN3_NEXT = "transformers NemotronH", "transformers Qwen3Next"
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = [
    Case("nemotron", "M-*", "squared ReLU, no positions", NEMOTRON, lambda: nemotron("M-M*-")),
    Case(
        "nemotron-groups", "M-*", "a group per head, a key per query, SiLU", NEMOTRON,
        lambda: nemotron("M*-", n_groups=6, num_key_value_heads=4, mlp_hidden_act="silu"),
    ),
    Case(
        "nemotron-experts", "ME*",
        "experts without gate, sigmoid router with bias, shared expert", NEMOTRON,
        lambda: nemotron("ME*E", routed_scaling_factor=2.5, chunk_size=64),
    ),
    Case(
        "nemotron-expert-groups", "ME-*", "router limited to 2 of 3 groups", NEMOTRON,
        lambda: nemotron("ME-E*", n_group=3, topk_group=2, num_experts_per_tok=3),
    ),
    Case(
        "nemotron-one-expert", "E*", "one expert per token, weights not normalised", NEMOTRON,
        lambda: nemotron("*E", num_experts_per_tok=1, norm_topk_prob=False),
    ),
    Case(
        "qwen3-next", "G*E",
        "two value heads per key head, gate per channel, RoPE on a quarter, gated shared expert",
        QWEN3_NEXT, lambda: qwen3_next("GG*"),
    ),
    Case(
        "qwen3-next-heads", "G*E", "a value head per key head, tied head", QWEN3_NEXT,
        lambda: qwen3_next("G*", linear_num_key_heads=6, tie_word_embeddings=True),
    ),
    Case(
        "qwen3-next-one-key", "G*E", "one key head, weights not normalised", QWEN3_NEXT,
        lambda: qwen3_next("*G", linear_num_key_heads=1, norm_topk_prob=False),
    ),
    Case(
        "qwen3-next-yarn", "*E", "YaRN on half of the channels", QWEN3_NEXT,
        lambda: qwen3_next("**", rope_parameters=dict(YARN), num_key_value_heads=1),
    ),
    Case(
        "qwen3-next-dense", "G*-E", "some layers dense", QWEN3_NEXT,
        lambda: qwen3_next("G*GG", mlp_only_layers=[3], decoder_sparse_step=2),
    ),
    Case(
        "qwen3-next-mlp", "G*-", "no experts", QWEN3_NEXT,
        lambda: qwen3_next("G*", num_experts=0),
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", ["nemotron", "qwen3-next"])
def test_several_chunks(name: str) -> None:
    """Transformers has chunks of 64 (Qwen3-Next) or 16 tokens, the native model of 10."""
    hf_model = next(case for case in CASES if case.name == name).build()
    chunks = {"mamba_chunk": 10, "delta_chunk": 10}
    config = oracle.native_config(hf_model).model_copy(update=chunks)
    native = oracle.with_random_weights(config, hf_model, seed=2)
    tokens = torch.randint(97, (135, 2), generator=torch.Generator().manual_seed(2))
    weight = torch.randn(135, 2, 97, generator=torch.Generator().manual_seed(3)).double()

    expected = oracle.run_hf(hf_model, tokens).logits.transpose(0, 1)
    logits = native(tokens, Context(torch.arange(135)[:, None].expand(135, 2)))
    assert_equal({"logits": logits.detach()}, {"logits": expected.detach()})
    (expected * weight).sum().backward()
    (logits * weight).sum().backward()
    expected_gradients = oracle.in_native_names(oracle.gradients(hf_model), config, hf_model)
    assert_equal(oracle.gradients(native), expected_gradients)


@pytest.mark.parametrize("name", ["nemotron-experts", "qwen3-next-dense"])
def test_names_of_tensors_in_files(name: str, tmp_path: Path) -> None:
    """Reads the tensors that transformers saves, and it loads those that are written."""
    hf_model = next(case for case in CASES if case.name == name).build()
    oracle.randomise(hf_model, seed=4)
    hf_model.save_pretrained(tmp_path)
    table, config = oracle.family(hf_model), oracle.native_config(hf_model)
    saved = load_file(tmp_path / "model.safetensors")
    native = from_hf(table, config, saved)
    assert native.keys() == oracle.empty(config).state_dict().keys()

    written = to_hf(table, config, native)
    assert same(written, saved)
    save_file({n: t.contiguous() for n, t in written.items()}, tmp_path / "model.safetensors")
    with fp64():  # some versions build routers in fp32 whatever dtype is asked for
        loaded = type(hf_model).from_pretrained(tmp_path, dtype=torch.float64)
    assert same(loaded.state_dict(), hf_model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in b)


def test_transformers_clamps_dt_where_nemotron_does_not() -> None:
    """Nemotron-H's own code applies `time_step_limit`; Megatron and the native model no limit."""
    clamped, unclamped = nemotron("M", time_step_min=0.5), nemotron("M")
    assert oracle.native_config(clamped) == oracle.native_config(unclamped)
    with pytest.raises(AssertionError, match="logits differs"):
        oracle.assert_same_function(clamped, seed=1)


# Published configs, without fields that do not matter.
NEMOTRON_8B = {
    "architectures": ["NemotronHForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attention_head_dim": 128, "chunk_size": 128, "conv_kernel": 4, "expand": 2,
    "hidden_dropout": 0.0, "hidden_size": 4096,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "initializer_range": 0.02, "intermediate_size": 21504, "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 128,
    "mamba_proj_bias": False, "max_position_embeddings": 8192, "mlp_bias": False,
    "mlp_hidden_act": "relu2", "model_type": "nemotron_h", "n_groups": 8,
    "num_attention_heads": 32, "num_hidden_layers": 52, "num_key_value_heads": 8,
    "num_logits_to_keep": 1, "rescale_prenorm_residual": True, "residual_in_fp32": False,
    "rms_norm_eps": 1e-05, "sliding_window": None, "ssm_state_size": 128,
    "tie_word_embeddings": False, "time_step_floor": 0.0001, "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256, "use_bias": False,
    "use_conv_bias": True, "use_mamba_kernels": True, "vocab_size": 131072,
}  # fmt: skip
QWEN3_NEXT_80B = {
    "architectures": ["Qwen3NextForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "decoder_sparse_step": 1, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_value_head_dim": 128, "max_position_embeddings": 262144,
    "mlp_only_layers": [], "model_type": "qwen3_next", "moe_intermediate_size": 512,
    "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512,
    "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2,
    "output_router_logits": False, "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 10000000, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512, "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip
PUBLISHED = {"NemotronHForCausalLM": NEMOTRON_8B, "Qwen3NextForCausalLM": QWEN3_NEXT_80B}


def test_transformers_4_spelling() -> None:
    c = family_of("NemotronHForCausalLM").config_from_hf(NEMOTRON_8B)
    assert c.symbols == NEMOTRON_8B["hybrid_override_pattern"]
    assert (c.positions, c.activation, c.head_dim, c.kv_heads) == ("none", "relu2", 128, 8)
    c = family_of("Qwen3NextForCausalLM").config_from_hf(QWEN3_NEXT_80B)
    assert (c.pattern, c.repeat) == ("GEGEGE*E", 12)
    assert (c.delta_heads, c.delta_key_heads, c.rope_fraction) == (32, 16, 0.25)
    assert (c.norm, c.attention_gate, c.shared_gate) == ("rms_offset", "channel", True)


REFUSED = [
    ("NemotronHForCausalLM", "use_bias", {"use_bias": True}),
    ("NemotronHForCausalLM", "mamba_proj_bias", {"mamba_proj_bias": True}),
    ("NemotronHForCausalLM", "mlp_bias", {"mlp_bias": True}),
    ("NemotronHForCausalLM", "tie_word_embeddings", {"tie_word_embeddings": True}),
    ("NemotronHForCausalLM", "time_step_limit", {"time_step_limit": [0.001, 0.1]}),
    ("NemotronHForCausalLM", "sliding_window", {"sliding_window": 512}),
    ("NemotronHForCausalLM", "mlp_hidden_act", {"mlp_hidden_act": "tanh"}),
    ("NemotronHForCausalLM", "hybrid_override_pattern", {"hybrid_override_pattern": "M|-"}),
    ("NemotronHForCausalLM", "hybrid_override_pattern", {"layers_block_type": ["mamba"] * 52}),
    ("NemotronHForCausalLM", "num_hidden_layers", {"num_hidden_layers": 51}),
    ("NemotronHForCausalLM", "norm_eps", {"norm_eps": 1e-6}),
    ("NemotronHForCausalLM", "attention_head_dim", {"attention_head_dim": 64}),
    ("NemotronHForCausalLM", "model_type", {"model_type": "qwen3_next"}),
    (
        "NemotronHForCausalLM", "moe_latent_size",
        {"hybrid_override_pattern": "ME", "num_hidden_layers": 2, "moe_latent_size": 64},
    ),
    (
        "NemotronHForCausalLM", "norm_topk_prob",
        {"hybrid_override_pattern": "ME", "num_hidden_layers": 2, "num_experts_per_tok": 1},
    ),
    ("Qwen3NextForCausalLM", "attention_bias", {"attention_bias": True}),
    ("Qwen3NextForCausalLM", "hidden_act", {"hidden_act": "gelu"}),
    ("Qwen3NextForCausalLM", "partial_rotary_factor", {"partial_rotary_factor": 0.01}),
    ("Qwen3NextForCausalLM", "layer_types", {"layer_types": ["linear_attention"] * 3}),
    ("Qwen3NextForCausalLM", "layer_types", {"layer_types": ["sliding_attention"] * 48}),
    ("Qwen3NextForCausalLM", "rope_scaling.rope_type",
     {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("Qwen3NextForCausalLM", "shared_expert_intermediate_size",
     {"shared_expert_intermediate_size": 0}),
    ("Qwen3NextForCausalLM", "norm_topk_prob", {"num_experts_per_tok": 1}),
    ("Qwen3NextForCausalLM", "use_sliding_window", {"use_sliding_window": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "field", "change"), REFUSED, ids=[str(c) for *_, c in REFUSED])
def test_unknown_fields_are_refused(name: str, field: str, change: dict[str, Any]) -> None:
    with pytest.raises(Unsupported) as caught:
        family_of(name).config_from_hf(PUBLISHED[name] | change)
    assert caught.value.field == field
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("name", "field", "change"),
    [
        ("NemotronHForCausalLM", "pattern", {"pattern": "mD"}),
        ("NemotronHForCausalLM", "activation", {"pattern": "M-"}),
        ("NemotronHForCausalLM", "positions", {"pattern": "M*"}),
        ("NemotronHForCausalLM", "tied", {"pattern": "M", "tied": True}),
        ("NemotronHForCausalLM", "router_score", {"pattern": "ME", "activation": "relu2"}),
        ("Qwen3NextForCausalLM", "pattern", {"pattern": "G"}),
        ("Qwen3NextForCausalLM", "pattern", {"pattern": "GE-*"}),
        ("Qwen3NextForCausalLM", "norm", {"pattern": "G-"}),
        ("Qwen3NextForCausalLM", "delta_negative",
         {"pattern": "G-", "norm": "rms_offset", "delta_negative": True}),
        ("Qwen3NextForCausalLM", "qk_norm",
         {"pattern": "*-", "norm": "rms_offset", "attention_gate": "channel"}),
        ("Qwen3NextForCausalLM", "rope_fraction", {"pattern": "*-", "rope_fraction": 0.3}),
    ],
    ids=str,
)  # fmt: skip
def test_native_fields_that_a_family_cannot_represent(
    name: str, field: str, change: dict[str, Any]
) -> None:
    with pytest.raises(Unsupported) as caught:
        family_of(name).config_to_hf(ModelConfig(**change))
    assert caught.value.field == field
