"""Phi-3 against transformers in fp64."""

from typing import Any

import pytest
from oracle import fp64  # before transformers, which it keeps from packages that need a GPU
from test_hf_dense import PLAIN, YARN, case, shape
from transformers import Phi3Config, Phi3ForCausalLM

from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Unsupported


def phi3(rope: dict[str, Any] = PLAIN, **more: Any) -> Any:
    """Builds a Phi-3."""
    with fp64():
        return Phi3ForCausalLM(Phi3Config(**shape(rope, hidden_size=32, **more)))


CASES = [
    case("phi3", "packed tensors", "Phi-3", phi3),
    case(
        "phi3-window", "the same, a window, RoPE on half of the channels, tied head", "Phi-3",
        lambda: phi3(PLAIN | {"partial_rotary_factor": 0.5}, sliding_window=6,
                     tie_word_embeddings=True),
    ),
]  # fmt: skip
BUILDS = {"phi3": phi3}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("rope_scaling.rope_type", {"rope_parameters": None, "rope_scaling": LONG}),
        ("rope_scaling.rope_type", {"rope_parameters": dict(YARN)}),
        ("resid_pdrop", {"resid_pdrop": 0.1}),
        ("partial_rotary_factor", {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.4}}),
    ],
    ids=str,
)
def test_what_is_refused(field: str, given: dict[str, Any]) -> None:
    with pytest.raises(Unsupported) as caught:
        family_of("Phi3ForCausalLM").config_from_hf(phi3().config.to_dict() | given)
    assert caught.value.field == field
