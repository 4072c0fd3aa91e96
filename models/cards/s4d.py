"""`S`: S4D, a diagonal linear state space, the same at every token (arXiv:2206.11893)."""

import math
from typing import TYPE_CHECKING, Annotated, ClassVar

from colonnade.models.cards.base import Argument, Card, Mixing
from colonnade.models.options import Count, Formula, Length, Options, formula, length, option, width
from colonnade.models.parameters import Fill, ParameterSpec, Split, constant, normal, uniform

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from colonnade.models.blocks.base import SubBlock
    from colonnade.models.config import ModelConfig

CHANNELS = "model.s4d_inner"

OF_CHANNELS = Argument("head", lambda c: c.s4d_inner)
SCAN = Mixing(
    "scan",
    {
        "x": OF_CHANNELS,
        **dict.fromkeys(("dt", "A_real", "A_imag", "C_real", "C_imag", "D"), Argument("constant")),
    },
    result=OF_CHANNELS,
    # a pair's state is 2 real numbers; its transition, a complex factor, is a real 2x2 matrix
    state=lambda c: (2 + 4) * c.s4d_inner * c.s4d_state,
)


def linear_frequencies(t: "Tensor", g: "Generator") -> None:
    """Fills the last dimension with 0, π, 2π, ...: S4D-Lin's imaginary parts."""
    t.fill_(math.pi).cumsum_(-1).sub_(math.pi)


class S4DCard(Card):
    """Halves: `projections | scan, GELU, gate, out`."""

    symbol, title, mixing = "S", "S4D", SCAN

    def parameters(self, config: "ModelConfig", out_std: float) -> list[ParameterSpec]:
        """Returns projections to z and x, the state space and the output projection.

        The step dt is log-uniform in [0.001, 0.1], A_n = −1/2 + iπn (S4D-Lin), C complex normal of
        variance 1, D standard normal. C alone has weight decay.
        """
        c, C, N = config, config.s4d_inner, config.s4d_state
        channels, outputs = Split(0, C, CHANNELS), normal(0.5**0.5)
        log_steps = uniform(math.log(1e-3), math.log(1e-1))

        def small(name: str, shape: tuple[int, ...], fill: Fill, decay: bool) -> ParameterSpec:
            return ParameterSpec(name, shape, fill, decay=decay, tp=channels, half="small")

        return [
            ParameterSpec("z", (C, c.hidden), normal(c.init_std), "reads", tp=channels),
            ParameterSpec("x", (C, c.hidden), normal(c.init_std), "reads", tp=channels),
            small("log_dt", (C,), log_steps, decay=False),
            small("A_real_log", (C, N), constant(math.log(0.5)), decay=False),
            small("A_imag", (C, N), linear_frequencies, decay=False),
            small("C_real", (C, N), outputs, decay=True),
            small("C_imag", (C, N), outputs, decay=True),
            small("D", (C,), normal(1.0), decay=False),
            ParameterSpec(
                "out", (c.hidden, C), normal(out_std), "writes",
                tp=Split(1, C, CHANNELS), half="second",
            ),
        ]  # fmt: skip

    def mixing_flops(self, config: "ModelConfig", seq_len: int, index: int) -> int:
        """Counts the convolution over half a chunk, and writing and reading the state."""
        half = min(config.s4d_chunk, seq_len) // 2
        return config.s4d_inner * (2 * half + 8 * config.s4d_state)

    def build(self, config: "ModelConfig", out_std: float) -> "SubBlock":
        """Builds the module."""
        from colonnade.models.blocks.s4d import S4D

        return S4D(self, config, out_std)


class S4DOptions(Options):
    """`S`: S4D."""

    cards: ClassVar[tuple[Card, ...]] = (S4DCard(),)

    # as many weights as Mamba-1's projections, so that one can replace the other
    s4d_inner: Annotated[Count, width(16, divided=True)] = formula(
        Formula("hidden", times=2), "channels", ge=1
    )
    s4d_state: Annotated[Count, width(4, grows=False)] = option(
        32, "complex pairs N of a channel's state", ge=1
    )
    s4d_chunk: Annotated[Length, length(4, training=True)] = option(
        64, "tokens per chunk of the scan", ge=1
    )
