"""`m`: Mamba-1, a state-space mixer with a decay per channel and state (arXiv:2312.00752)."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from colonnade.models.cards.base import Argument, Card, Mixing
from colonnade.models.options import (
    Count,
    Formula,
    Length,
    Need,
    Options,
    choice,
    formula,
    length,
    option,
    taps,
    width,
)
from colonnade.models.parameters import (
    Fill,
    ParameterSpec,
    Split,
    constant,
    fan_in_uniform,
    inverse_softplus_dt,
    log_counting,
    normal,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from colonnade.models.blocks.base import SubBlock
    from colonnade.models.config import ModelConfig

CHANNELS = "model.mamba1_inner"

OF_CHANNELS = Argument("head", lambda c: c.mamba1_inner)
OF_STATES = Argument("shared", width=lambda c: c.mamba1_state)
SCAN = Mixing(
    "scan",
    {
        "x": OF_CHANNELS,
        "dt": Argument("head", lambda c: c.mamba1_inner, wide=True),
        "A": Argument("constant"),
        "B": OF_STATES,
        "C": OF_STATES,
        "D": Argument("constant"),
    },
    result=OF_CHANNELS,
    # per channel N states, and the transition of a segment: the product of the decays of each
    state=lambda c: 2 * c.mamba1_inner * c.mamba1_state,
)


def dt_projection_fill(c: "ModelConfig") -> Fill:
    """Draws from U(± rank^-½), with the rank of muP's base model, because muP scales the rest."""

    def fill(t: "Tensor", g: "Generator") -> None:
        bound = (c.base() or c).mamba1_rank ** -0.5
        t.uniform_(-bound, bound, generator=g)

    return fill


class Mamba1Card(Card):
    """Halves: `projections, convolution | selection, scan, gate, out`."""

    symbol, title, mixing = "m", "Mamba-1", SCAN

    def parameters(self, config: "ModelConfig", out_std: float) -> list[ParameterSpec]:
        """Returns projections to z and x, x's filter, projections to dt, B and C, decay, output."""
        c, C, rank = config, config.mamba1_inner, config.mamba1_rank
        channels, inputs = Split(0, C, CHANNELS), Split(1, C, CHANNELS)
        filters = fan_in_uniform(c.mamba1_conv)
        dt_bias = inverse_softplus_dt(1e-3, 0.1, 1e-4)
        init = normal(c.init_std)
        selected = {"dt_a": rank, "B": c.mamba1_state, "C": c.mamba1_state}
        normed = selected if c.mamba1_norm == "weighted" else {}
        return [
            ParameterSpec("z", (C, c.hidden), init, "reads", tp=channels),
            ParameterSpec("x", (C, c.hidden), init, "reads", tp=channels),
            ParameterSpec("conv_x", (C, c.mamba1_conv), filters, tp=channels),
            ParameterSpec("conv_x_bias", (C,), filters, tp=channels),
            ParameterSpec(
                "A_log", (C, c.mamba1_state), log_counting, decay=False, tp=channels, half="small"
            ),
            ParameterSpec("dt_bias", (C,), dt_bias, tp=channels, half="small"),
            ParameterSpec("D", (C,), constant(1.0), tp=channels, half="small"),
            *(
                ParameterSpec(name, (size, C), init, "inner", tp=inputs, half="second")
                for name, size in selected.items()
            ),
            *(
                ParameterSpec(f"{name}_norm", (size,), constant(1.0), half="second")
                for name, size in normed.items()
            ),
            ParameterSpec(
                "dt_b", (C, rank), dt_projection_fill(c), "inner", tp=channels, half="second"
            ),
            ParameterSpec(
                "out", (c.hidden, C), normal(out_std), "writes", tp=inputs, half="second"
            ),
        ]

    def mixing_flops(self, config: "ModelConfig", seq_len: int, index: int) -> int:
        """Counts decay, write and read of every state element, 2 FLOPs each."""
        return 6 * config.mamba1_inner * config.mamba1_state

    def build(self, config: "ModelConfig", out_std: float) -> "SubBlock":
        """Builds the module."""
        from colonnade.models.blocks.mamba1 import Mamba1

        return Mamba1(self, config, out_std)


NORMED = Need(lambda m: m.mamba1_norm != "none", "with model.mamba1_norm = none", ("mamba1_norm",))


class Mamba1Options(Options):
    """`m`: Mamba-1."""

    cards: ClassVar[tuple[Card, ...]] = (Mamba1Card(),)

    mamba1_inner: Annotated[Count, width(16, divided=True)] = formula(
        Formula("hidden", times=2), "channels", ge=1
    )
    mamba1_state: Annotated[Count, width(4, grows=False)] = option(16, "state width N", ge=1)
    mamba1_rank: Annotated[Count, width(2)] = formula(
        Formula("hidden", by=16, up=True), "rank of dt", ge=1
    )
    mamba1_conv: Annotated[Count, taps()] = option(4, "width of the causal convolution", ge=1)
    mamba1_norm: Annotated[Literal["none", "plain", "weighted"], choice()] = option(
        "none", "norm the low-rank dt, B and C: without weights, or with"
    )
    mamba1_norm_eps: Annotated[float, choice(NORMED)] = formula(
        Formula("norm_eps"), "norm_eps of these norms", gt=0
    )
    mamba1_chunk: Annotated[Length, length(4, training=True)] = option(
        64, "tokens per chunk of the scan", ge=1
    )
