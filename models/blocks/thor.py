"""`T`: THOR, experts chosen at random, of which every one learns the same (arXiv:2110.04260)."""

from torch import Tensor

from colonnade.kernels.activation import gated
from colonnade.kernels.draws import draw_integers
from colonnade.models.blocks.base import SubBlock
from colonnade.models.blocks.mixture import Dispatch, Dispatched, Experts
from colonnade.models.blocks.mlp import Coefficients
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context


class Thor(SubBlock):
    """Halves: `draw, dispatch | expert`. No router: each balance group meets one random expert.

    The draw is a function of the step, the place in the row, the group's samples and the pass, so
    it is the same on every layout, and again in recomputation.
    """

    mixes = "channels"

    small: Coefficients

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        super().__init__()
        self.config = config.model_copy(update={"shared_ffn": 0, "shared_gate": False})
        self.small = Coefficients(config)
        self.first, self.second = Dispatch(self.config), Experts(self.config, out_std)

    def begin(self, x: Tensor, context: Context) -> Dispatched:
        S = len(x)
        group = context.sample_numbers() // self.config.balance_samples
        keys = context.rng_key, context.index, group, context.pass_index()
        chosen = draw_integers(self.config.experts, *keys).expand(S, -1)[..., None]
        return self.first((x, chosen, None, x.new_ones(chosen.shape)))

    def finish(self, carried: Dispatched, context: Context) -> Tensor:
        return self.second((carried, self.small.values()), context)

    def idle_weights(self) -> int:
        c = self.config
        matrices = 3 if gated(c.activation) else 2
        return (c.experts - 1) * matrices * c.hidden * (c.expert_ffn or c.ffn)
