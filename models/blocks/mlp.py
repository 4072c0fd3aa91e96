"""`-`: the MLP, gated or not."""

from torch import Tensor

from colonnade.kernels.activation import activate, gated
from colonnade.kernels.linear import linear
from colonnade.models.blocks.base import SubBlock
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.part import Part, normal


class Up(Part):
    """Up and gate projections with the activation: `[S, B, D]` to `[S, B, F]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        for name in ("gate", "up") if gated(config.activation) else ("up",):
            self.declare(name, (config.ffn, config.hidden), normal(config.init_std))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        gate = linear(x, self.weight_of("gate")) if gated(self.activation) else None
        return activate(linear(x, self.weight_of("up")), gate, self.activation)


class Down(Part):
    """Down projection: `[S, B, F]` to `[S, B, D]`."""

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        super().__init__()
        self.declare("down", (config.hidden, config.ffn), normal(out_std))

    def forward(self, a: Tensor, context: Context) -> Tensor:
        return linear(a, self.weight_of("down"))


class MLP(SubBlock):
    """Halves: `up, gate, activation | down`."""

    symbol = "-"

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        super().__init__()
        self.first, self.second = Up(config), Down(config, out_std)
