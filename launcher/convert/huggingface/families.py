"""The registry of the Hugging Face architectures that are supported."""

import difflib

from colonnade.launcher.convert.huggingface import (
    deepseek_v2,
    dense,
    dense_biased,
    dense_positions,
    gemma,
    glm_moe,
    gpt2,
    gpt_oss,
    granite,
    jamba,
    mamba,
    minimax,
    moe,
    nemotron,
    olmo,
    olmo_hybrid,
    olmoe,
    phi3,
    qwen2_moe,
    qwen3_5,
    qwen3_next,
)
from colonnade.launcher.convert.huggingface.family import Family, Unsupported

# A model is written as the first that can represent it, so those with more options come last.
MODULES = (
    dense,
    moe,
    olmoe,
    minimax,
    glm_moe,
    deepseek_v2,
    mamba,
    nemotron,
    qwen3_next,
    qwen3_5,
    dense_biased,
    dense_positions,
    olmo,
    olmo_hybrid,
    gemma,
    qwen2_moe,
    phi3,
    jamba,
    granite,
    gpt_oss,
    gpt2,
)
FAMILIES: dict[str, Family] = {
    family.architecture: family for module in MODULES for family in module.FAMILIES
}


def family_of(architecture: str) -> Family:
    """Returns the family of this architecture; raises Unsupported, which lists similar names."""
    if architecture not in FAMILIES:
        near = difflib.get_close_matches(architecture, FAMILIES, n=3) or sorted(FAMILIES)
        remedy = f"unknown; near names: {', '.join(near)}"
        raise Unsupported("architectures", architecture, remedy)
    return FAMILIES[architecture]
