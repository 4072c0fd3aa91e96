"""`T`: THOR, experts chosen at random (arXiv:2110.04260). Its options are those of `E`."""

from fractions import Fraction
from typing import TYPE_CHECKING

from colonnade.models.cards.base import Card
from colonnade.models.cards.mlp import activation, experts
from colonnade.models.parameters import ParameterSpec

if TYPE_CHECKING:
    from colonnade.models.blocks.base import SubBlock
    from colonnade.models.config import ModelConfig


class ThorCard(Card):
    """Halves: `draw, dispatch | expert`."""

    symbol, title, mixing = "T", "THOR", None

    def parameters(self, config: "ModelConfig", out_std: float) -> list[ParameterSpec]:
        """Returns the experts, of which a token uses one."""
        used = Fraction(1, config.experts)
        return [*activation(config), *experts(config, out_std, used)]

    def build(self, config: "ModelConfig", out_std: float) -> "SubBlock":
        """Builds the module."""
        from colonnade.models.blocks.thor import Thor

        return Thor(self, config, out_std)
