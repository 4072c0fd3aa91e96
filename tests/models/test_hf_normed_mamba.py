"""Falcon Mamba and Jamba against transformers in fp64."""

from typing import Any

import pytest
from oracle import Case, fp64  # before transformers, which it keeps from packages that need a GPU
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
)

from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Unsupported
from colonnade.models.config import ModelConfig


def falcon_mamba(**more: Any) -> Any:
    """Builds a Falcon Mamba of odd widths."""
    shape = {
        "vocab_size": 97, "hidden_size": 15, "num_hidden_layers": 2, "state_size": 5,
        "time_step_rank": 3, "conv_kernel": 3, "layer_norm_epsilon": 1e-4, "mixer_rms_eps": 1e-3,
        "tie_word_embeddings": False, "use_cache": False,
    }  # fmt: skip
    with fp64():
        return FalconMambaForCausalLM(FalconMambaConfig(**(shape | more)))


def jamba(**more: Any) -> Any:
    """Builds a Jamba: attention in one of three layers, mixtures in two of four."""
    shape = {
        "vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 4, "intermediate_size": 17,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_period": 3,
        "attn_layer_offset": 1, "num_experts": 5, "num_experts_per_tok": 2, "mamba_d_state": 5,
        "mamba_d_conv": 3, "mamba_dt_rank": 3, "rms_norm_eps": 1e-4, "use_cache": False,
        "pad_token_id": None, "attn_implementation": "eager", "experts_implementation": "eager",
    }  # fmt: skip
    with fp64():
        return JambaForCausalLM(JambaConfig(**(shape | more)))


FALCON, JAMBA = "transformers Falcon Mamba", "transformers Jamba"
CASES = [
    Case("falcon-mamba", "m", "norms of dt, B and C", FALCON, falcon_mamba),
    Case("falcon-mamba-tied", "m", "the same, tied head, rank of dt from the width", FALCON,
         lambda: falcon_mamba(tie_word_embeddings=True, time_step_rank="auto", hidden_size=17)),
    Case("jamba", "m*-E", "norms of dt, B and C with weights, no positions", JAMBA, jamba),
    Case("jamba-dense", "m*-", "the same, no experts, tied head", JAMBA,
         lambda: jamba(num_experts=1, tie_word_embeddings=True, attn_layer_period=5)),
]  # fmt: skip
BUILDS = {"falcon_mamba": falcon_mamba, "jamba": jamba}


@pytest.mark.parametrize(
    ("build", "field", "given"),
    [
        (falcon_mamba, "mixer_rms_eps", {"mixer_rms_eps": 0.0}),
        (falcon_mamba, "use_bias", {"use_bias": True}),
        (jamba, "mamba_conv_bias", {"mamba_conv_bias": False}),
        (jamba, "expert_layer_offset", {"expert_layer_offset": 2}),
        (jamba, "hidden_act", {"hidden_act": "gelu"}),
    ],
    ids=str,
)
def test_what_is_refused(build: Any, field: str, given: dict[str, Any]) -> None:
    hf_model = build()
    with pytest.raises(Unsupported) as caught:
        family_of(type(hf_model).__name__).config_from_hf(hf_model.config.to_dict() | given)
    assert caught.value.field == field


def test_layers_at_unequal_distances_are_refused() -> None:
    normed = {"mamba1_norm": "weighted", "positions": "none", "balance": 0.0}
    config = ModelConfig(pattern="m-*-*-m-*-", **normed)
    with pytest.raises(Unsupported, match="attn_layer"):
        family_of("JambaForCausalLM").config_to_hf(config)
