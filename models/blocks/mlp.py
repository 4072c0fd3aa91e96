"""`-`: the MLP, gated or not."""

from torch import Tensor

from colonnade.kernels.activation import activated_linear, gated
from colonnade.kernels.linear import linear
from colonnade.models.blocks.base import SubBlock
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.part import Part, normal


class Up(Part):
    """Up and gate projections: `[S, B, D]` to `[S, B, F]` each (no gate: None)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = gated(config.activation)
        for name in ("gate", "up") if self.gated else ("up",):
            self.declare(name, (config.ffn, config.hidden), normal(config.init_std))

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        gate = linear(x, self.weight_of("gate")) if self.gated else None
        return linear(x, self.weight_of("up")), gate


class Down(Part):
    """Activation and down projection: back to `[S, B, D]`."""

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        super().__init__()
        self.activation = config.activation
        self.declare("down", (config.hidden, config.ffn), normal(out_std))

    def forward(self, inner: tuple[Tensor, Tensor | None], context: Context) -> Tensor:
        return activated_linear(*inner, self.weight_of("down"), self.activation)


class MLP(SubBlock):
    """Halves: `up, gate | activation, down`, so that backward can make the activation again."""

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        super().__init__()
        self.first, self.second = Up(config), Down(config, out_std)
