"""The names of activations and the operands that each needs; imports no torch."""

from typing import Literal

Activation = Literal[
    "swiglu",
    "geglu",
    "geglu_tanh",
    "swiglu_clamped",
    "gelu",
    "gelu_tanh",
    "relu",
    "relu2",
    "silu",
    "polyrelu",
    "polynorm",
]


def gated(activation: str) -> bool:
    """Whether an activation has a gate projection in addition to `up`."""
    return activation in ("swiglu", "geglu", "geglu_tanh", "swiglu_clamped")


def polynomial(activation: str) -> bool:
    """Whether an activation has learned coefficients, `poly` (PolyCom, arXiv:2411.03884)."""
    return activation in ("polyrelu", "polynorm")
