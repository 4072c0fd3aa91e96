"""`E`: a mixture of experts behind a router."""

from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from colonnade.models.cards.base import Card
from colonnade.models.cards.mlp import activation, experts, mlp
from colonnade.models.cards.thor import ThorCard
from colonnade.models.options import (
    ROW,
    Count,
    Formula,
    Need,
    Options,
    choice,
    formula,
    option,
    width,
)
from colonnade.models.parameters import ParameterSpec, constant, normal

if TYPE_CHECKING:
    from colonnade.models.blocks.base import SubBlock
    from colonnade.models.config import ModelConfig


class MixtureCard(Card):
    """Halves: `route, dispatch | experts, combine`."""

    symbol, title, mixing = "E", "a mixture of experts", None

    def parameters(self, config: "ModelConfig", out_std: float) -> list[ParameterSpec]:
        """Returns router, experts and the shared expert, which every token uses."""
        c, init = config, normal(config.init_std)
        router = [ParameterSpec("router", (c.experts, c.hidden), init, "reads", half="small")]
        if c.router_bias:
            bias = ParameterSpec("router_bias", (c.experts,), constant(0.0), half="small")
            bias.state = True
            router.append(bias)
        if c.router_offset:
            shape = (c.experts,)
            router.append(ParameterSpec("router_offset", shape, constant(0.0), half="small"))
        shared = mlp(c, c.shared_ffn, "model.shared_ffn", out_std, "shared_")
        if c.shared_gate:
            shared.append(ParameterSpec("shared_open", (1, c.hidden), init, "reads"))
        routed = experts(c, out_std, Fraction(c.top_k, c.experts))
        return [*activation(c), *router, *(shared if c.shared_ffn else []), *routed]

    def build(self, config: "ModelConfig", out_std: float) -> "SubBlock":
        """Builds the module."""
        from colonnade.models.blocks.mixture import Mixture

        return Mixture(self, config, out_std)


def in_balance_groups(m: "ModelConfig") -> bool:
    """Whether any result depends on the balance groups (a mean over all groups does not)."""
    grouped = m.balance > 0 or m.capacity is not None
    return m.has("T") or (m.has("E") and grouped)


SHARED = Need(lambda m: m.shared_ffn > 0, "with model.shared_ffn = 0", ("shared_ffn",))
SEVERAL = Need(
    lambda m: m.top_k > 1,
    "with model.top_k = 1: the weight of a single expert is never normalised",
    ("top_k",),
)
LIMITED = Need(
    lambda m: m.router_top_groups is not None,
    "without model.router_top_groups",
    ("router_top_groups",),
)
GROUPED = Need(
    lambda m: m.router_groups > 1, "with model.router_groups = 1", ("router_groups",)
)  # fmt: skip
STEERED = Need(lambda m: m.router_bias, "without model.router_bias", ("router_bias",))
IN_GROUPS = Need(
    in_balance_groups,
    "without THOR (`T` in model.pattern), with model.balance = 0 and no model.capacity",
    (*ROW, "balance", "capacity"),
)


class ExpertOptions(Options):
    """`E`: mixture of experts; `T`: THOR."""

    cards: ClassVar[tuple[Card, ...]] = (MixtureCard(), ThorCard())

    experts: Annotated[Count, choice()] = option(8, "experts of each sub-block", ge=1)
    top_k: Annotated[Count, choice(symbols="E")] = option(2, "experts per token", ge=1)
    expert_ffn: Annotated[Count, width(12, divided=True)] = formula(
        Formula("ffn"), "inner width of an expert", ge=1
    )
    expert_bias: Annotated[bool, choice()] = option(False, "biases on the experts' projections")
    shared_ffn: Annotated[Count, width(12, divided=True, optional=True, symbols="E")] = option(
        0, "inner width of the shared expert, which every token uses; 0: none", ge=0
    )
    shared_gate: Annotated[bool, choice(SHARED, symbols="E")] = option(
        False, "a sigmoid gate on the shared expert"
    )
    router_score: Annotated[Literal["softmax", "sigmoid"], choice(symbols="E")] = option(
        "softmax", "softmax over all experts of a token, or sigmoid of each expert"
    )
    router_normalise: Annotated[bool, choice(SEVERAL, symbols="E")] = option(
        True, "a token's weights sum to 1"
    )
    router_scale: Annotated[float, choice(symbols="E")] = option(1.0, "factor of the weights", gt=0)
    router_groups: Annotated[Count, choice(LIMITED, symbols="E")] = option(
        1, "groups of experts", ge=1
    )
    router_top_groups: Annotated[Count | None, choice(GROUPED, symbols="E")] = option(
        None, "groups a token may choose from", ge=1
    )
    router_offset: Annotated[bool, choice(symbols="E")] = option(
        False, "a learned bias on the logits of experts"
    )
    router_bias: Annotated[bool, choice(symbols="E")] = option(
        False, "a bias on the choice of experts balances loads; set balance to 0 to drop the loss"
    )
    router_bias_rate: Annotated[float, choice(STEERED, symbols="E", training=True)] = option(
        1e-3, "change of the bias per step", ge=0
    )
    router_noise: Annotated[float, choice(symbols="E", training=True)] = option(
        0.0, "standard deviation of noise in training", ge=0
    )
    capacity: Annotated[float | None, choice(symbols="E")] = option(
        None, "rows of an expert over its fair share; default: no limit", gt=0
    )
    balance: Annotated[float, choice(symbols="E", training=True)] = option(
        0.01, "weight of the load-balancing loss", ge=0
    )
    balance_sequence: Annotated[float, choice(symbols="E", training=True)] = option(
        0.0, "the same, computed for each sample separately", ge=0
    )
    balance_samples: Annotated[Count, choice(IN_GROUPS, training=True)] = option(
        1, "consecutive samples per balance group", ge=1
    )
    router_z: Annotated[float, choice(symbols="E", training=True)] = option(
        0.0, "weight of the router's z-loss", ge=0
    )
    thor_alpha: Annotated[float, choice(symbols="T", training=True)] = option(
        1.0, "weight of the consistency loss", ge=0
    )
