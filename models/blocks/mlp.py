"""`-`: the MLP, gated or not."""

from torch import Tensor

from colonnade.kernels.activation import activated_linear
from colonnade.models.blocks.base import SubBlock
from colonnade.models.cards.base import Card
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.parameters import ParameterSpec, of_half


class Up(ParameterModule):
    """Projects to up and gate: `[S, B, D]` to `[S, B, F]` each (no gate: None)."""

    seams = ()

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        gate = self.linear(x, "gate") if "gate" in self.specs else None
        return self.linear(x, "up"), gate


class Down(ParameterModule):
    """Applies the activation and projects back to `[S, B, D]`."""

    seams = ()

    def __init__(self, records: list[ParameterSpec], activation: str) -> None:
        super().__init__(records)
        self.activation = activation

    def forward(
        self, carried: tuple[tuple[Tensor, Tensor | None], Tensor | None], context: Context
    ) -> Tensor:
        inner, poly = carried
        down = self.weight_of("down")
        y = activated_linear(*inner, down, self.activation, poly, self.sharding)
        return self.biased(y, "down")


class Coefficients(ParameterModule):
    """a_0 to a_3 of a polynomial activation (arXiv:2411.03884), in fp32 whatever the precision."""

    def values(self) -> Tensor | None:
        """Returns `[4]`, or None where the activation is no polynomial."""
        return self.weight_of("poly") if "poly" in self.specs else None


class MLP(SubBlock):
    """Halves: `up, gate | activation, down`, so that backward can recompute the activation."""

    small: Coefficients

    def __init__(self, card: Card, config: ModelConfig, out_std: float) -> None:
        super().__init__(card)
        records = card.records(config, out_std)
        self.first = Up(of_half(records, "first"))
        self.small = Coefficients(of_half(records, "small"))
        self.second = Down(of_half(records, "second"), config.activation)

    def finish(self, carried: tuple[Tensor, Tensor | None], context: Context) -> Tensor:
        return self.second((carried, self.small.values()), context)
