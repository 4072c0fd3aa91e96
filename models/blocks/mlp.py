"""`-`: the MLP, gated or not."""

from torch import Tensor

from colonnade.kernels.activation import activated_linear, gated, polynomial
from colonnade.kernels.linear import linear
from colonnade.models.blocks.base import SubBlock
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.part import Part, Split, coefficients, normal


class Up(Part):
    """Up and gate projections: `[S, B, D]` to `[S, B, F]` each (no gate: None)."""

    seams = ()

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.gated = gated(config.activation)
        for name in ("gate", "up") if self.gated else ("up",):
            shape, split = (width, config.hidden), Split(0, width, "model.ffn")
            self.declare(name, shape, normal(config.init_std), "reads", split=split)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        gate = linear(x, self.weight_of("gate")) if self.gated else None
        return linear(x, self.weight_of("up")), gate


class Down(Part):
    """Activation and down projection: back to `[S, B, D]`."""

    seams = ()

    def __init__(self, config: ModelConfig, width: int, out_std: float) -> None:
        super().__init__()
        self.activation = config.activation
        shape, split = (config.hidden, width), Split(1, width, "model.ffn")
        self.declare("down", shape, normal(out_std), "writes", split=split)

    def forward(
        self, carried: tuple[tuple[Tensor, Tensor | None], Tensor | None], context: Context
    ) -> Tensor:
        inner, poly = carried
        return activated_linear(*inner, self.weight_of("down"), self.activation, poly, self.cut)


class Coefficients(Part):
    """a_0 to a_3 of a polynomial activation (arXiv:2411.03884), in fp32 whatever the precision."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if polynomial(config.activation):
            self.declare("poly", (4,), coefficients)

    def values(self) -> Tensor | None:
        """`[4]`, or None where the activation is no polynomial."""
        return self.weight_of("poly") if "poly" in self.specs else None


class MLP(SubBlock):
    """Halves: `up, gate | activation, down`, so that backward can make the activation again."""

    mixes = "channels"

    small: Coefficients

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        super().__init__()
        self.first, self.small = Up(config, config.ffn), Coefficients(config)
        self.second = Down(config, config.ffn, out_std)

    def finish(self, carried: tuple[Tensor, Tensor | None], context: Context) -> Tensor:
        return self.second((carried, self.small.values()), context)
