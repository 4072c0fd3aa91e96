"""OLMo Hybrid against transformers in fp64: conversion of configs and weights."""

from pathlib import Path
from typing import Any

import oracle  # before transformers, which it keeps from packages that need a GPU
import pytest
import torch
from oracle import Case, fp64
from safetensors.torch import load_file, save_file
from test_hf_dense import PLAIN, YARN, shape
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Unsupported, from_hf, to_hf
from colonnade.launcher.weights.source import open_weights

NOPE = {"rope_theta": None, "rope_type": "default"}


def olmo_hybrid(kinds: str = "G*G", rope: dict[str, Any] = NOPE, **more: Any) -> Any:
    """Builds an OLMo Hybrid with a layer for each of `kinds`, `G` or `*`, and no positions."""
    names = {"G": "linear_attention", "*": "full_attention"}
    layers = {
        "hidden_size": 24, "layer_types": [names[kind] for kind in kinds],
        "num_hidden_layers": len(kinds), "linear_num_value_heads": 6, "linear_num_key_heads": 3,
        "linear_key_head_dim": 5, "linear_value_head_dim": 7, "linear_conv_kernel_dim": 3,
        "eos_token_id": None,
    }  # fmt: skip
    with fp64():
        return OlmoHybridForCausalLM(OlmoHybridConfig(**shape(rope, **layers | more)))


NAME = "transformers OLMo Hybrid"
CASES = [
    Case(
        "olmo-hybrid", "G*-",
        "norms before DeltaNet and its MLP, after attention and its MLP, beta up to 2, QK-norm "
        "over all heads, no positions", NAME, olmo_hybrid,
    ),
    Case(
        "olmo-hybrid-rope", "G*-", "the same, YaRN, biases on attention, tied head, beta up to 1",
        NAME, lambda: olmo_hybrid("*GG*", YARN, attention_bias=True, tie_word_embeddings=True,
                                  linear_allow_neg_eigval=False),
    ),
    Case(
        "olmo-hybrid-heads", "G*-", "the same, RoPE, a value head per key head", NAME,
        lambda: olmo_hybrid("GG*", PLAIN, linear_num_key_heads=6, num_key_value_heads=4),
    ),
]  # fmt: skip
BUILDS = {
    "olmo_hybrid": olmo_hybrid, "olmo_hybrid_rope": lambda: olmo_hybrid("*G", PLAIN),
}  # fmt: skip


def test_names_of_tensors_in_files(tmp_path: Path) -> None:
    """Reads what transformers saves, and it loads those names that are written."""
    hf_model = olmo_hybrid()
    oracle.randomise(hf_model, seed=4)
    hf_model.save_pretrained(tmp_path)
    table, config = oracle.family(hf_model), oracle.native_config(hf_model)
    saved = load_file(tmp_path / "model.safetensors")
    native, expected = from_hf(table, config, saved), hf_model.state_dict()
    from_memory = from_hf(table, config, expected)
    assert native.keys() == from_memory.keys()
    assert all(torch.equal(native[n], t) for n, t in from_memory.items())

    with open_weights(tmp_path, lambda sentence: None) as weights:
        assert all(torch.equal(weights.whole(n), t) for n, t in native.items())
        conv_v = weights.read("blocks.0.conv_v", (slice(20, 30), slice(1, 2)))
        assert torch.equal(conv_v, native["blocks.0.conv_v"][20:30, 1:2])

    written = to_hf(table, config, native)
    names = {n.removeprefix("model.layers.1.") for n in written if ".1." in n and "norm" in n}
    norms = {"post_attention_layernorm.weight", "post_feedforward_layernorm.weight"}
    assert norms == names - {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    assert from_hf(table, config, written).keys() == native.keys()
    save_file({n: t.contiguous() for n, t in written.items()}, tmp_path / "model.safetensors")
    with fp64():
        loaded = OlmoHybridForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[n], t) for n, t in expected.items())


# As transformers' script writes it from the models of OLMo-core, without what does not matter.
PUBLISHED = {
    "architectures": ["OlmoHybridForCausalLM"], "model_type": "olmo_hybrid", "vocab_size": 100352,
    "hidden_size": 3840, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 30, "num_key_value_heads": 30, "max_position_embeddings": 65536,
    "rope_parameters": None, "rope_theta": None, "rms_norm_eps": 1e-6,
}  # fmt: skip


def test_defaults_are_those_of_the_published_model() -> None:
    c = family_of("OlmoHybridForCausalLM").config_from_hf(PUBLISHED)
    assert (c.pattern, c.repeat, c.norm_after) == ("G-G-G-*-", 8, "*")
    assert (c.delta_heads, c.delta_key_heads) == (30, 30)
    assert (c.delta_key_dim, c.delta_value_dim, c.delta_conv) == (96, 192, 4)
    assert (c.positions, c.delta_negative, c.norm_eps, c.delta_norm_eps) == (
        "none", True, 1e-6, 1e-5,
    )  # fmt: skip
    assert family_of("OlmoHybridForCausalLM").config_from_hf(
        {n: v for n, v in PUBLISHED.items() if n != "rope_theta"}
    ).rope_theta == 10000.0  # fmt: skip


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("layer_types", {"layer_types": ["linear_attention"] * 32}),
        ("layer_types", {"layer_types": ["full_attention"] * 32}),
        ("layer_types", {"layer_types": ["linear_attention", "full_attention"]}),
        ("layer_types", {"layer_types": ["sliding_attention"] * 32}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("attention_dropout", {"attention_dropout": 0.1}),
        ("linear_num_key_heads", {"linear_num_key_heads": 0}),
        ("linear_allow_neg_eigval", {"linear_allow_neg_eigval": 2}),
        ("rope_parameters.rope_type", {"rope_parameters": {"rope_theta": None,
                                                           "rope_type": "yarn"}}),
        ("rope_parameters.factor", {"rope_parameters": {"rope_theta": None, "factor": 2.0}}),
        ("sliding_window", {"sliding_window": 5}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(field: str, given: dict[str, Any]) -> None:
    with pytest.raises(Unsupported) as caught:
        family_of("OlmoHybridForCausalLM").config_from_hf(PUBLISHED | given)
    assert caught.value.field == field
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("pattern", {"pattern": "G-*E"}),
        ("layer_types", {"pattern": "G-"}),
        ("activation", {"activation": "gelu"}),
        ("norm_after", {"norm_after": ""}),
        ("norm_after", {"norm_after": "G"}),
        ("norm_position", {"norm_position": "both"}),
        ("delta_norm_eps", {"delta_norm_eps": 1e-3}),
        ("qk_norm", {"qk_norm": "head"}),
        ("norm", {"norm": "layer"}),
    ],
    ids=str,
)
def test_what_the_family_cannot_represent(field: str, change: dict[str, Any]) -> None:
    config = oracle.native_config(olmo_hybrid())
    family_of("OlmoHybridForCausalLM").config_to_hf(config)
    with pytest.raises(Unsupported) as caught:
        family_of("OlmoHybridForCausalLM").config_to_hf(config.changed(**change))
    assert caught.value.field == field
