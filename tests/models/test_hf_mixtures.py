"""OLMoE, FlexOlmo, MiniMax-M2, GLM-4.5, dots.llm1, GLM-4.7-Flash, DeepSeek-V2 and Qwen3.5."""

from functools import partial
from typing import Any

import oracle  # before transformers, which it keeps from packages that need a GPU
import pytest
import torch
import torch.nn.functional as F
import transformers
from equal import assert_equal
from oracle import Case, fp64
from test_hf_moe import checkpoint_names, hf_mtp_loss
from transformers.modeling_layers import MtpModel

from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import (
    Unsupported,
    from_hf,
    to_hf,
    without_absent_mtp,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 20, "intermediate_size": 13, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "use_cache": False,
    "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None, "attn_implementation": "eager", "experts_implementation": "eager",
}  # fmt: skip
BIASED = {
    "n_routed_experts": 6, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "num_hidden_layers": 3, "moe_intermediate_size": 7,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
LATENT = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 5, "q_lora_rank": 7,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5,
}  # fmt: skip
DELTA = {
    "head_dim": 8, "linear_num_value_heads": 6, "linear_num_key_heads": 3,
    "linear_key_head_dim": 5, "linear_value_head_dim": 7, "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "num_hidden_layers": 3, "rope_parameters": {
        "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0], "mrope_interleaved": True,
    },
}  # fmt: skip
PARTIAL = {"rope_parameters": SHAPE["rope_parameters"] | {"partial_rotary_factor": 0.5}}
YARN = {"rope_parameters": {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 32,
}}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # class, its config, fields
    "OLMoE": ("OlmoeForCausalLM", "OlmoeConfig", {"hidden_size": 24, "num_experts": 5}),
    "FlexOlmo": ("FlexOlmoForCausalLM", "FlexOlmoConfig", {"head_dim": 6, "num_experts": 5}),
    "MiniMax-M2": (
        "MiniMaxM2ForCausalLM", "MiniMaxM2Config",
        {"head_dim": 8, "num_local_experts": 5, **PARTIAL},
    ),
    "GLM-4.5": (
        "Glm4MoeForCausalLM", "Glm4MoeConfig",
        {**BIASED, **PARTIAL, "head_dim": 8, "use_qk_norm": True, "num_mtp_layers": 0},
    ),
    "dots.llm1": ("Dots1ForCausalLM", "Dots1Config", {**BIASED, "head_dim": 6}),
    "GLM-4.7-Flash": (
        "Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig",
        {n: v for n, v in (BIASED | LATENT).items() if n != "first_k_dense_replace"},
    ),
    "DeepSeek-V2": (
        "DeepseekV2ForCausalLM", "DeepseekV2Config", {**BIASED, **LATENT, "kv_lora_rank": 6}
    ),
    "Qwen3.5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", DELTA),
    "Qwen3.5-MoE": (
        "Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig",
        {**DELTA, "num_experts": 5, "moe_intermediate_size": 9,
         "shared_expert_intermediate_size": 11},
    ),
}  # fmt: skip


def build(name: str, **more: Any) -> Any:
    """Builds a tiny model of odd sizes."""
    model, config, fields = MODELS[name]
    experts = {} if name == "Qwen3.5" else {"num_experts_per_tok": 2}
    with fp64():
        return getattr(transformers, model)(
            getattr(transformers, config)(**(SHAPE | experts | fields | more))
        )


BUILDS = {name: partial(build, name) for name in MODELS}  # for `test_hf_fields`


def case(test: str, symbols: str, options: str, model: str, **more: Any) -> Case:
    return Case(test, symbols, options, f"transformers {model}", lambda: build(model, **more))


CASES = [
    case("olmoe", "*E", "QK-norm over all heads, weights as they are", "OLMoE"),
    case("olmoe-normalised", "*E", "weights of a token sum to 1, tied head, biases of attention",
         "OLMoE", attention_bias=True, norm_topk_prob=True, tie_word_embeddings=True),
    case("flex-olmo", "*E", "norms behind sub-blocks, QK-norm over all heads", "FlexOlmo"),
    case("flex-olmo-one", "*E", "one expert per token, biases of attention", "FlexOlmo",
         num_experts_per_tok=1, attention_bias=True),
    case("minimax", "*E", "sigmoid router with bias, RoPE on half", "MiniMax-M2"),
    case("minimax-three", "*E", "three experts per token, RoPE on all channels", "MiniMax-M2",
         num_experts_per_tok=3, rope_parameters=SHAPE["rope_parameters"]),
    case("glm-4.5", "*-E", "RoPE on half, sigmoid router with bias, shared expert", "GLM-4.5"),
    case("glm-4.5-plain", "*E", "no QK-norm, one group, two shared experts, biases of q, k, v",
         "GLM-4.5", attention_bias=True,
         use_qk_norm=False, n_group=1, n_shared_experts=2, first_k_dense_replace=0,
         norm_topk_prob=False),
    case("dots1", "*-E", "QK-norm, sigmoid router with bias, shared expert", "dots.llm1"),
    case("dots1-window", "*-E", "sliding window in the last layers, biases", "dots.llm1",
         attention_bias=True, sliding_window=7, max_window_layers=1, norm_topk_prob=True),
    case("glm-4.7-flash", "*-E", "latent attention, shared expert", "GLM-4.7-Flash"),
    case("glm-4.7-flash-kinds", "*-E", "dense layers anywhere, no latent of queries",
         "GLM-4.7-Flash", mlp_layer_types=["sparse", "dense", "sparse"], q_lora_rank=None),
    case("deepseek-v2", "*-E", "latent attention, softmax router, shared expert", "DeepSeek-V2"),
    case("deepseek-v2-groups", "*-E", "best groups by their best expert, YaRN", "DeepSeek-V2",
         topk_method="group_limited_greedy", n_group=3, topk_group=2, **YARN),
    case("deepseek-v2-lite", "*E", "no latent of queries, two shared experts", "DeepSeek-V2",
         q_lora_rank=None, n_shared_experts=2, first_k_dense_replace=0),
    case("qwen3.5", "G*-", "two value heads per key head, RoPE on half", "Qwen3.5"),
    case("qwen3.5-heads", "G*-", "a value head per key head, tied head", "Qwen3.5",
         linear_num_key_heads=6, tie_word_embeddings=True, num_hidden_layers=2,
         layer_types=["linear_attention", "full_attention"]),
    case("qwen3.5-moe", "G*E", "gated shared expert", "Qwen3.5-MoE"),
]  # fmt: skip


def test_multi_token_prediction_of_glm() -> None:
    """Tensors of the modules map as DeepSeek-V3's, and a folder may lack them."""
    hf_model = build("GLM-4.5", num_mtp_layers=1)
    table = oracle.family(hf_model)
    config = table.config_from_hf(hf_model.config.to_dict())
    assert (config.mtp, config.mtp_pattern) == (1, "*E")
    with fp64():
        module = MtpModel(hf_model, 1).layers
    oracle.randomise(hf_model, seed=4)
    oracle.randomise(module, seed=5)
    weights = hf_model.state_dict() | checkpoint_names(module.state_dict(), layers=3)
    native = from_hf(table, config, weights)
    back = to_hf(table, config, native, packed=True)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[n], weights[n]) for n in weights)
    assert without_absent_mtp(table, config, hf_model.state_dict()).mtp == 0

    tokens, labels = oracle.data(config.vocab, 4)
    with fp64():
        hidden = hf_model.model(tokens.T).last_hidden_state
        logits = hf_model.lm_head(hidden).flatten(0, 1)
        expected = F.cross_entropy(logits, labels.T.flatten(), reduction="sum")
        mtp_loss = hf_mtp_loss(hf_model, module, hidden, tokens, labels)
        expected = expected + config.mtp_weight * mtp_loss
    expected.backward()
    model = oracle.decoder(config, native)
    objective, _ = model(tokens, oracle.one_document_per_row(), labels)
    objective.backward()
    assert_equal({"objective": objective.detach()}, {"objective": expected.detach()})
    gradients = oracle.gradients(hf_model) | checkpoint_names(oracle.gradients(module), layers=3)
    assert_equal(oracle.gradients(model), from_hf(table, config, gradients, state=False))


REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("OLMoE", "clip_qkv", {"clip_qkv": 8.0}),
    ("OLMoE", "head_dim", {"head_dim": 8}),
    ("OLMoE", "norm_topk_prob", {"norm_topk_prob": True, "num_experts_per_tok": 1}),
    ("FlexOlmo", "sliding_window", {"sliding_window": 8}),
    ("MiniMax-M2", "rotary_dim", {"rotary_dim": 2}),
    ("MiniMax-M2", "rotary_dim", {"rotary_dim": "half"}),
    ("MiniMax-M2", "attn_type_list", {"attn_type_list": [0, 1]}),
    ("MiniMax-M2", "shared_intermediate_size", {"shared_intermediate_size": 8}),
    ("MiniMax-M2", "scoring_func", {"scoring_func": "softmax"}),
    ("MiniMax-M2", "norm_topk_prob", {"num_experts_per_tok": 1}),
    ("MiniMax-M2", "layernorm_mlp_beta", {"layernorm_mlp_beta": 2.0}),
    ("GLM-4.5", "partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.1}}),
    ("GLM-4.5", "use_qk_norm", {"use_qk_norm": "full"}),
    ("dots.llm1", "layer_types", {"layer_types": ["full_attention"]}),
    ("dots.llm1", "layer_types", {"layer_types": ["linear_attention"] * 3}),
    ("dots.llm1", "sliding_window",
     {"layer_types": ["sliding_attention"] * 3, "sliding_window": None}),
    ("dots.llm1", "scoring_func", {"scoring_func": "softmax"}),
    ("GLM-4.7-Flash", "first_k_dense_replace", {"first_k_dense_replace": 2}),
    ("GLM-4.7-Flash", "mlp_layer_types", {"mlp_layer_types": ["dense"]}),
    ("GLM-4.7-Flash", "rope_interleave", {"rope_interleave": False}),
    ("GLM-4.7-Flash", "num_key_value_heads", {"num_key_value_heads": 1}),
    ("DeepSeek-V2", "topk_method", {"topk_method": "noaux_tc"}),
    ("DeepSeek-V2", "norm_topk_prob", {"norm_topk_prob": True}),
    ("DeepSeek-V2", "scoring_func", {"scoring_func": "sigmoid"}),
    ("DeepSeek-V2", "moe_layer_freq", {"moe_layer_freq": 2}),
    ("DeepSeek-V2", "mlp_bias", {"mlp_bias": True}),
    ("Qwen3.5", "attn_output_gate", {"attn_output_gate": False}),
    ("Qwen3.5", "layer_types", {"layer_types": ["linear_attention"]}),
    ("Qwen3.5", "rope_scaling.other",
     {"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5, "other": 1}}),
    ("Qwen3.5-MoE", "norm_topk_prob", {"norm_topk_prob": False}),
    ("Qwen3.5-MoE", "num_experts", {"num_experts": 0}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "field", "change"), REFUSED, ids=[f"{n}-{f}" for n, f, _ in REFUSED]
)
def test_unknown_fields_are_refused(name: str, field: str, change: dict[str, Any]) -> None:
    given = build(name).config.to_dict()
    with pytest.raises(Unsupported) as caught:
        family_of(MODELS[name][0]).config_from_hf(given | change)
    assert caught.value.field == field
    assert caught.value.remedy


NATIVE: list[tuple[str, str, dict[str, Any]]] = [
    ("OLMoE", "shared_ffn", {"shared_ffn": 13}),
    ("OLMoE", "head_dim", {"head_dim": 8}),
    ("OLMoE", "norm_position", {"norm_position": "after"}),
    ("FlexOlmo", "qk_norm", {"qk_norm": "head"}),
    ("MiniMax-M2", "router_scale", {"router_scale": 2.0}),
    ("MiniMax-M2", "router_normalise", {"router_normalise": False}),
    ("MiniMax-M2", "rope_fraction", {"rope_fraction": 0.1}),
    ("GLM-4.5", "qk_norm", {"qk_norm": "full"}),
    ("GLM-4.5", "shared_ffn", {"shared_ffn": 9}),
    ("GLM-4.5", "symbols", {"pattern": "*E*-*E"}),
    ("dots.llm1", "router_bias", {"router_bias": False}),
    ("GLM-4.7-Flash", "latent_norm_eps", {"latent_norm_eps": 1e-3}),
    ("DeepSeek-V2", "router_normalise", {"router_normalise": True}),
    ("DeepSeek-V2", "router_score", {"router_score": "sigmoid"}),
    ("Qwen3.5", "pattern", {"pattern": "GE", "repeat": 1}),
    ("Qwen3.5", "delta_negative", {"delta_negative": True}),
    ("Qwen3.5-MoE", "shared_gate", {"shared_gate": False}),
    ("Qwen3.5-MoE", "pattern", {"pattern": "G-GE", "repeat": 1}),
]


@pytest.mark.parametrize(
    ("name", "field", "change"), NATIVE, ids=[f"{n}-{f}" for n, f, _ in NATIVE]
)
def test_native_fields_that_a_family_cannot_represent(
    name: str, field: str, change: dict[str, Any]
) -> None:
    hf_model = build(name)
    config = oracle.native_config(hf_model).model_copy(update=change)
    with pytest.raises(Unsupported) as caught:
        oracle.family(hf_model).config_to_hf(config)
    assert caught.value.field == field


def test_fields_of_published_folders() -> None:
    """Moonlight is DeepSeek-V3's class; MiniMax-M2 names the rotated channels by their number."""
    moonlight = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "bos_token_id": 163584,
        "eos_token_id": 163585, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11264,
        "kv_lora_rank": 512, "max_position_embeddings": 8192, "model_type": "deepseek_v3",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 16,
        "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 50000.0, "routed_scaling_factor": 2.446,
        "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
        "topk_group": 1, "topk_method": "noaux_tc", "use_cache": True, "v_head_dim": 128,
        "vocab_size": 163840,
    }  # fmt: skip
    c = family_of("DeepseekV3ForCausalLM").config_from_hf(moonlight)
    assert (c.norm_eps, c.latent_norm_eps, c.q_rank, c.shared_ffn) == (1e-5, 1e-6, None, 2816)
    assert c.symbols == "*-" + "*E" * 26
    minimax = {
        "architectures": ["MiniMaxM2ForCausalLM"], "attn_type_list": [1] * 4, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 1536,
        "layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_beta": 1.0, "mlp_intermediate_size": 8192, "model_type": "minimax_m2",
        "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 4,
        "num_key_value_heads": 8, "num_local_experts": 256, "num_mtp_modules": 3,
        "qk_norm_type": "per_layer", "rope_theta": 5000000, "rotary_dim": 64,
        "scoring_func": "sigmoid", "shared_intermediate_size": 0, "tie_word_embeddings": False,
        "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True, "vocab_size": 200064,
    }  # fmt: skip
    notices: list[str] = []
    c = family_of("MiniMaxM2ForCausalLM").config_from_hf(minimax, notices.append)
    assert (c.rope_fraction, c.head_dim, c.rope_theta) == (0.5, 128, 5e6)
    assert "num_mtp_modules = 3" in notices[0]
