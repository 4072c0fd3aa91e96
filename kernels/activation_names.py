"""Activations by name, without torch: which there are, and what they need."""

from typing import Literal

Activation = Literal[
    "swiglu", "geglu", "gelu", "gelu_tanh", "relu", "relu2", "silu", "polyrelu", "polynorm"
]


def gated(activation: str) -> bool:
    """Whether an activation has a gate projection beside `up`."""
    return activation in ("swiglu", "geglu")


def polynomial(activation: str) -> bool:
    """Whether an activation has coefficients to learn, `poly` (PolyCom, arXiv:2411.03884)."""
    return activation in ("polyrelu", "polynorm")
