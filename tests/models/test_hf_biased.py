"""Qwen2, Mistral, Ministral, Seed-OSS, Arcee and Qwen2-MoE against transformers in fp64."""

from typing import Any

import pytest
from oracle import Case, fp64  # before transformers, which it keeps from packages that need a GPU
from test_hf_dense import LLAMA3, PLAIN, WINDOWS, YARN, case, shape
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
)

from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Unsupported

WIDE = {"hidden_size": 24}


def qwen2(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds a Qwen2, whose q, k and v have biases."""
    with fp64():
        return Qwen2ForCausalLM(Qwen2Config(**shape(rope, **WIDE | more)))


def mistral(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds a Mistral whose head width is not hidden / heads."""
    with fp64():
        return MistralForCausalLM(MistralConfig(**shape(rope, **{"head_dim": 8, **more})))


def ministral(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds a Ministral with windows in some layers."""
    fields = {"head_dim": 8, "sliding_window": 6, "layer_types": WINDOWS, **more}
    with fp64():
        return MinistralForCausalLM(MinistralConfig(**shape(rope, **fields)))


def seed_oss(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds a Seed-OSS; in training it would drop out."""
    with fp64():
        return SeedOssForCausalLM(SeedOssConfig(**shape(rope, **{"head_dim": 6, **more}))).eval()


def arcee(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds an Arcee."""
    with fp64():
        return ArceeForCausalLM(ArceeConfig(**shape(rope, **WIDE | {"head_dim": 8} | more)))


def qwen2_moe(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds a Qwen2-MoE."""
    fields = {
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 7,
        "shared_expert_intermediate_size": 9, "experts_implementation": "eager", **more,
    }  # fmt: skip
    with fp64():
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(**shape(rope, **WIDE | fields)))


CASES = [
    case("qwen2", "biases on q, k, v", "Qwen2", qwen2),
    case(
        "qwen2-late-windows", "the same, tied head, sliding window from a layer on, YaRN", "Qwen2",
        lambda: qwen2(YARN, use_sliding_window=True, sliding_window=5, max_window_layers=1,
                      tie_word_embeddings=True),
    ),
    case(
        "mistral", "a sliding window in all layers", "Mistral",
        lambda: mistral(sliding_window=6),
    ),
    case("mistral-full", "no window", "Mistral", lambda: mistral(sliding_window=None)),
    case("ministral", "sliding window in some layers", "Ministral", ministral),
    case(
        "ministral-full", "no window", "Ministral",
        lambda: ministral(layer_types=["full_attention"] * 3),
    ),
    case("seed-oss", "biases on q, k, v", "Seed-OSS", seed_oss),
    case(
        "seed-oss-all", "biases on all projections", "Seed-OSS",
        lambda: seed_oss(attention_out_bias=True, mlp_bias=True),
    ),
    case("arcee", "relu² without a gate, YaRN", "Arcee", lambda: arcee(YARN)),
    case(
        "arcee-biases", "tanh-GELU without a gate, biases on all projections", "Arcee",
        lambda: arcee(hidden_act="gelu_pytorch_tanh", attention_bias=True, mlp_bias=True),
    ),
    Case(
        "qwen2-moe", "*E-", "biases on q, k, v, gated shared expert, some layers dense",
        "transformers Qwen2-MoE", lambda: qwen2_moe(mlp_only_layers=[1]),
    ),
    Case(
        "qwen2-moe-windows", "*E-", "windows in every other layer, normalised weights",
        "transformers Qwen2-MoE",
        lambda: qwen2_moe(use_sliding_window=True, sliding_window=7, max_window_layers=3,
                          norm_topk_prob=True, qkv_bias=False),
    ),
]  # fmt: skip
BUILDS = {
    "qwen2": qwen2, "mistral": mistral, "ministral": ministral, "seed_oss": seed_oss,
    "arcee": arcee, "qwen2_moe": qwen2_moe,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "field", "given"),
    [
        ("SeedOssForCausalLM", "attention_out_bias",
         {"attention_bias": False, "attention_out_bias": True}),
        ("MinistralForCausalLM", "layer_types", {"layer_types": ["sliding_attention"]}),
        ("MinistralForCausalLM", "layer_types", {"layer_types": ["chunked_attention"] * 3}),
        ("MinistralForCausalLM", "sliding_window",
         {"layer_types": ["sliding_attention"] * 3, "sliding_window": None}),
        ("Qwen2ForCausalLM", "sliding_window",
         {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False}),
        ("ArceeForCausalLM", "hidden_act", {"hidden_act": "tanh"}),
        ("Qwen2ForCausalLM", "attention_bias", {"attention_bias": True}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(name: str, field: str, given: dict[str, Any]) -> None:
    with pytest.raises(Unsupported) as caught:
        family_of(name).config_from_hf(shape(LLAMA3) | given)
    assert caught.value.field == field


def test_dropout_is_left_out_with_a_notice() -> None:
    notices: list[str] = []
    family_of("SeedOssForCausalLM").config_from_hf(shape(PLAIN), notices.append)
    assert {n.split()[0] for n in notices} == {"attention_dropout", "residual_dropout"}
