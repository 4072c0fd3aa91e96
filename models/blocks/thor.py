"""`T`: THOR, experts chosen at random, trained to agree with each other (arXiv:2110.04260)."""

from torch import Tensor

from colonnade.kernels.draws import draw_integers
from colonnade.models.blocks.experts import Dispatched, ExpertBlock, Routed
from colonnade.models.blocks.mlp import Coefficients
from colonnade.models.cards.base import Card
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.parameters import of_half


class Thor(ExpertBlock):
    """Halves: `draw, dispatch | expert`. No router: each balance group gets one random expert.

    The draw is a function of the step, the index in the row, the group's samples and the pass, so
    it is the same on every layout, and in recomputation.
    """

    def __init__(self, card: Card, config: ModelConfig, out_std: float) -> None:
        records = card.records(config, out_std)
        super().__init__(card, config, records, Coefficients(of_half(records, "small")))

    def begin(self, x: Tensor, context: Context) -> Dispatched:
        S = len(x)
        group = context.sample_indices() // self.config.balance_samples
        keys = context.rng_key, context.index, group, context.pass_index()
        chosen = draw_integers(self.config.experts, *keys).expand(S, -1)[..., None]
        return self.first(Routed(x, chosen, None, x.new_ones(chosen.shape)))
