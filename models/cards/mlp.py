"""`-`: the MLP, gated or not; and the weights of experts, which are MLPs."""

from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, ClassVar

from colonnade.kernels.activation_names import Activation, gated, polynomial
from colonnade.models.cards.base import Card
from colonnade.models.options import ROW, Count, Need, Options, choice, option, width
from colonnade.models.parameters import ParameterSpec, Split, bias_of, coefficients, normal

if TYPE_CHECKING:
    from colonnade.models.blocks.base import SubBlock
    from colonnade.models.config import ModelConfig


class MLPCard(Card):
    """Halves: `up, gate | activation, down`."""

    symbol, title, mixing = "-", "an MLP", None

    def parameters(self, config: "ModelConfig", out_std: float) -> list[ParameterSpec]:
        """Returns projections with their biases, and a polynomial activation's coefficients."""
        weights = mlp(config, config.ffn, "model.ffn", out_std)
        biases = map(bias_of, weights if config.mlp_bias else [])
        return [*weights, *biases, *activation(config)]

    def build(self, config: "ModelConfig", out_std: float) -> "SubBlock":
        """Builds the module."""
        from colonnade.models.blocks.mlp import MLP

        return MLP(self, config, out_std)


def mlp(
    c: "ModelConfig", inner: int, field: str, out_std: float, prefix: str = ""
) -> list[ParameterSpec]:
    """Returns the weights of an MLP whose inner width the recipe field `field` sets."""
    shape, split = (inner, c.hidden), Split(0, inner, field)
    up = ParameterSpec(f"{prefix}up", shape, normal(c.init_std), "reads", tp=split)
    gate = ParameterSpec(f"{prefix}gate", shape, normal(c.init_std), "reads", tp=split)
    down = ParameterSpec(
        f"{prefix}down", shape[::-1], normal(out_std), "writes",
        tp=Split(1, inner, field), half="second",
    )  # fmt: skip
    return [*([gate] if gated(c.activation) else []), up, down]


def experts(c: "ModelConfig", out_std: float, used: Fraction) -> list[ParameterSpec]:
    """Returns all experts' MLPs, stacked along dimension 0; a token uses the fraction `used`."""
    E, F, D, field = c.experts, c.expert_ffn, c.hidden, c.source_of("expert_ffn")
    over_experts = Split(0, E, "model.experts")
    inner = [
        ParameterSpec(
            name, (E, F, D), normal(c.init_std), "reads",
            ep=over_experts, etp=Split(1, F, field), half="experts", used=used,
        )
        for name in (("gate", "up") if gated(c.activation) else ("up",))
    ]  # fmt: skip
    down = ParameterSpec(
        "down", (E, D, F), normal(out_std), "writes",
        ep=over_experts, etp=Split(2, F, field), half="experts", used=used,
    )  # fmt: skip
    weights = [*inner, down]
    return [*weights, *map(bias_of, weights if c.expert_bias else [])]


def activation(c: "ModelConfig") -> list[ParameterSpec]:
    """Returns a_0 to a_3 of a polynomial activation, in fp32 whatever the precision; else none."""
    if not polynomial(c.activation):
        return []
    return [ParameterSpec("poly", (4,), coefficients, half="small")]


def takes_width(m: "ModelConfig") -> bool:
    """Whether `ffn` is the width of an MLP, or of experts because expert_ffn is not set."""
    return m.has("-") or (m.has("E", "T") and not m.is_explicit("expert_ffn"))


WIDTH = Need(
    takes_width,
    "without an MLP (`-` in model.pattern) or experts (`E`, `T`) that take their width from it",
    (*ROW, "expert_ffn"),
)


class MLPOptions(Options):
    """`-`: MLP; its fields apply to experts too."""

    cards: ClassVar[tuple[Card, ...]] = (MLPCard(),)

    ffn: Annotated[Count, width(24, WIDTH, divided=True, symbols="-ET")] = option(
        704, "inner width of an MLP", ge=1
    )
    mlp_bias: Annotated[bool, choice()] = option(False, "biases on an MLP's projections")
    activation: Annotated[Activation, choice(symbols="-ET")] = option(
        "swiglu", "swiglu…, geglu… have a gate; polyrelu, polynorm: PolyCom"
    )
