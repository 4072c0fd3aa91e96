"""The registry of the Hugging Face architectures that are supported."""

import difflib

from colonnade.launcher.convert.huggingface import dense, mamba, moe, nemotron, qwen3_next
from colonnade.launcher.convert.huggingface.family import Family, Unsupported

FAMILIES: dict[str, Family] = {
    **dense.FAMILIES,
    **moe.FAMILIES,
    **mamba.FAMILIES,
    **nemotron.FAMILIES,
    **qwen3_next.FAMILIES,
}


def family_of(architecture: str) -> Family:
    """Returns the family of this architecture; raises Unsupported, which lists similar names."""
    if architecture not in FAMILIES:
        near = difflib.get_close_matches(architecture, FAMILIES, n=3) or sorted(FAMILIES)
        remedy = f"unknown; near names: {', '.join(near)}"
        raise Unsupported("architectures", architecture, remedy)
    return FAMILIES[architecture]
