"""The table of Hugging Face's architectures that we read and write."""

import difflib

from colonnade.models import hf_dense, hf_mamba, hf_moe, hf_nemotron, hf_qwen3_next
from colonnade.models.hf_base import Family, Unsupported

FAMILIES: dict[str, Family] = {
    **hf_dense.FAMILIES,
    **hf_moe.FAMILIES,
    **hf_mamba.FAMILIES,
    **hf_nemotron.FAMILIES,
    **hf_qwen3_next.FAMILIES,
}


def family_of(architecture: str) -> Family:
    """The family with this name; `Unsupported` tells near names."""
    if architecture not in FAMILIES:
        near = difflib.get_close_matches(architecture, FAMILIES, n=3) or sorted(FAMILIES)
        remedy = f"unknown; near names: {', '.join(near)}"
        raise Unsupported("architectures", architecture, remedy)
    return FAMILIES[architecture]
