"""Granite, dense, with mixtures and hybrid, against transformers in fp64."""

from typing import Any

import pytest
from oracle import Case, fp64  # before transformers, which it keeps from packages that need a GPU
from test_hf_dense import PLAIN, YARN, case, shape
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
)

from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Unsupported
from colonnade.models.config import ModelConfig

MULTIPLIERS = {
    "hidden_size": 24, "embedding_multiplier": 3.0, "residual_multiplier": 0.3,
    "attention_multiplier": 0.21, "logits_scaling": 6.0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2, "experts_implementation": "eager"}
MAMBA = {
    "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 5, "mamba_d_conv": 3,
    "mamba_chunk_size": 16, "layer_types": ["linear_attention", "full_attention",
    "linear_attention"], "shared_intermediate_size": 9,
}  # fmt: skip


def granite(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds a dense Granite."""
    with fp64():
        return GraniteForCausalLM(GraniteConfig(**shape(rope, **MULTIPLIERS | more)))


def granite_moe(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds a Granite with mixtures."""
    fields = MULTIPLIERS | EXPERTS | more
    with fp64():
        return GraniteMoeForCausalLM(GraniteMoeConfig(**shape(rope, **fields)))


def granite_shared(**more: Any) -> Any:
    """Builds a Granite with mixtures and a shared expert."""
    fields = MULTIPLIERS | EXPERTS | {"shared_intermediate_size": 9} | more
    with fp64():
        return GraniteMoeSharedForCausalLM(GraniteMoeSharedConfig(**shape(PLAIN, **fields)))


def granite_hybrid(**more: Any) -> Any:
    """Builds a hybrid Granite."""
    fields = MULTIPLIERS | EXPERTS | MAMBA | more
    with fp64():
        return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**shape(PLAIN, **fields)))


GRANITE = "transformers Granite"
CASES = [
    case("granite", "multipliers of embeddings, scores, outputs, logits", "Granite", granite),
    case(
        "granite-biases", "the same, biases on all projections, tied head, YaRN", "Granite",
        lambda: granite(YARN, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    Case("granite-moe", "*E", "multipliers", f"{GRANITE}MoE", granite_moe),
    Case("granite-moe-biases", "*E", "multipliers, biases on attention, tied head",
         f"{GRANITE}MoE", lambda: granite_moe(attention_bias=True, tie_word_embeddings=True)),
    Case("granite-shared", "*E", "multipliers, shared expert", f"{GRANITE}MoEShared",
         granite_shared),
    Case("granite-unshared", "*E", "multipliers, no shared expert", f"{GRANITE}MoEShared",
         lambda: granite_shared(shared_intermediate_size=0)),
    Case("granite-hybrid", "M*E", "multipliers, shared expert, no positions",
         f"{GRANITE}MoEHybrid", granite_hybrid),
    Case("granite-hybrid-dense", "M*-", "multipliers, no experts, RoPE, two groups, tied head",
         f"{GRANITE}MoEHybrid",
         lambda: granite_hybrid(num_local_experts=0, position_embedding_type="rope",
                                mamba_n_groups=2, tie_word_embeddings=True)),
]  # fmt: skip
BUILDS = {
    "granite": granite, "granite_moe": granite_moe, "granite_shared": granite_shared,
    "granite_hybrid": granite_hybrid,
    "granite_hybrid_dense": lambda: granite_hybrid(num_local_experts=0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("build", "field", "given"),
    [
        (granite, "embedding_multiplier", {"embedding_multiplier": 0.0}),
        (granite, "logits_scaling", {"logits_scaling": "six"}),
        (granite_moe, "num_experts_per_tok", {"num_experts_per_tok": 1}),
        (granite_hybrid, "mamba_n_heads", {"mamba_n_heads": 5}),
        (granite_hybrid, "mamba_proj_bias", {"mamba_proj_bias": True}),
        (granite_hybrid, "layer_types", {"layer_types": ["mamba"]}),
        (granite_hybrid, "layer_types", {"layer_types": ["mlp"] * 3}),
        (granite_hybrid, "position_embedding_type", {"position_embedding_type": "alibi"}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(build: Any, field: str, given: dict[str, Any]) -> None:
    hf_model = build()
    with pytest.raises(Unsupported) as caught:
        family_of(type(hf_model).__name__).config_from_hf(hf_model.config.to_dict() | given)
    assert caught.value.field == field


def test_the_default_factor_of_scores_can_be_written_by_any_family() -> None:
    config = ModelConfig(pattern="*-*-", hidden=64, attention_multiplier=0.25, balance=0.0)
    assert config.head_dim == 16
    family_of("LlamaForCausalLM").config_to_hf(config)
    family_of("GraniteForCausalLM").config_to_hf(config.changed(attention_multiplier=None))
    with pytest.raises(Unsupported) as caught:
        family_of("LlamaForCausalLM").config_to_hf(config.changed(attention_multiplier=0.2))
    assert caught.value.field == "attention_multiplier"
