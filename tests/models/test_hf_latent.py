"""DeepSeek-V2, GLM-4.7-Flash and Phi-3 against transformers in fp64."""

from typing import Any

import pytest
from oracle import Case, fp64  # before transformers, which it keeps from packages that need a GPU
from test_hf_dense import PLAIN, YARN, case
from test_hf_dense import shape as dense_shape
from test_hf_moe import shape
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Unsupported

LATENT = {
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "kv_lora_rank": 6, "q_lora_rank": 7, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 5, "n_routed_experts": 6, "moe_intermediate_size": 7,
}  # fmt: skip
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2}


def deepseek_v2(**more: Any) -> Any:
    """Builds a DeepSeek-V2: one dense layer of three, a shared expert as wide as two."""
    options = {"first_k_dense_replace": 1, "n_shared_experts": 2, "n_group": None}
    with fp64():
        config = DeepseekV2Config(**shape(**LATENT | options | more))
        return DeepseekV2ForCausalLM(config)


def glm_lite(**more: Any) -> Any:
    """Builds a GLM-4.7-Flash."""
    with fp64():
        return Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**shape(**LATENT | more)))


def phi3(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds a Phi-3."""
    with fp64():
        return Phi3ForCausalLM(Phi3Config(**dense_shape(rope, hidden_size=32, **more)))


V2, LITE = "transformers DeepSeek-V2", "transformers GLM-4.7-Flash"
SCALED = YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}
CASES = [
    Case("deepseek-v2", "*-E", "latent attention, softmax router, shared expert", V2, deepseek_v2),
    Case("deepseek-v2-groups", "*-E", "the same, groups of experts, YaRN with mscale", V2,
         lambda: deepseek_v2(**LIMITED, rope_parameters=dict(SCALED), routed_scaling_factor=2.0)),
    Case("deepseek-v2-queries", "*E", "no latent of queries, tied head", V2,
         lambda: deepseek_v2(q_lora_rank=None, first_k_dense_replace=0,
                             tie_word_embeddings=True)),
    Case("glm-lite", "*-E", "latent attention, router bias, shared expert", LITE, glm_lite),
    Case("glm-lite-layers", "*-E", "the same, any layers dense, groups of experts, YaRN", LITE,
         lambda: glm_lite(mlp_layer_types=["sparse", "dense", "sparse"], n_group=2, topk_group=1,
                          rope_parameters=dict(SCALED))),
    case("phi3", "packed tensors", "Phi-3", phi3),
    case(
        "phi3-window", "the same, a window, RoPE on half of the channels, tied head", "Phi-3",
        lambda: phi3(PLAIN | {"partial_rotary_factor": 0.5}, sliding_window=6,
                     tie_word_embeddings=True),
    ),
]  # fmt: skip
BUILDS = {"deepseek_v2": deepseek_v2, "glm_lite": glm_lite, "phi3": phi3}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("build", "field", "given"),
    [
        (deepseek_v2, "scoring_func", {"scoring_func": "sigmoid"}),
        (deepseek_v2, "norm_topk_prob", {"norm_topk_prob": True}),
        (deepseek_v2, "n_group", {"topk_method": "group_limited_greedy"}),
        (deepseek_v2, "num_key_value_heads", {"num_key_value_heads": 2}),
        (glm_lite, "mlp_layer_types", {"mlp_layer_types": ["dense"]}),
        (glm_lite, "mlp_layer_types", {"mlp_layer_types": ["other"] * 3}),
        (glm_lite, "first_k_dense_replace", {"first_k_dense_replace": 2}),
        (glm_lite, "head_dim", {"head_dim": 8}),
        (phi3, "rope_scaling.rope_type", {"rope_parameters": None, "rope_scaling": LONG}),
        (phi3, "rope_scaling.rope_type", {"rope_parameters": dict(YARN)}),
        (phi3, "resid_pdrop", {"resid_pdrop": 0.1}),
        (phi3, "partial_rotary_factor",
         {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.4}}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(build: Any, field: str, given: dict[str, Any]) -> None:
    hf_model = build()
    with pytest.raises(Unsupported) as caught:
        family_of(type(hf_model).__name__).config_from_hf(hf_model.config.to_dict() | given)
    assert caught.value.field == field


def test_modules_for_further_tokens_are_left_out_with_a_notice() -> None:
    notices: list[str] = []
    given = glm_lite().config.to_dict() | {"num_nextn_predict_layers": 1}
    family_of("Glm4MoeLiteForCausalLM").config_from_hf(given, notices.append)
    assert "num_nextn_predict_layers = 1" in notices[0]
