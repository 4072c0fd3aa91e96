"""The language model: embedding, wiring, head."""

import torch.nn.functional as F
from torch import Tensor, nn

from colonnade.kernels.linear import linear
from colonnade.kernels.loss import linear_cross_entropy
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.part import Part, normal
from colonnade.models.wiring import Wiring


class Embedding(Part):
    """Token embeddings, `[V, D]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.declare("weight", (config.vocab, config.hidden), normal(config.init_std))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight_of("weight"))


class Head(Part):
    """Vocabulary projection: logits, or the loss without ever holding all of them.

    Tied, it has no weight of its own and is handed the embedding's.
    """

    def __init__(self, config: ModelConfig, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk
        if not config.tied:
            self.declare("weight", (config.vocab, config.hidden), normal(config.init_std))

    def forward(self, x: Tensor, labels: Tensor | None, tied: Tensor | None) -> Tensor:
        weight = self.weight_of("weight") if tied is None else tied
        if labels is None:
            return linear(x, weight)
        return linear_cross_entropy(x.flatten(0, 1), weight, labels.flatten(), self.chunk)


class Decoder(nn.Module):
    """A decoder over a pattern of sub-blocks, written for one device."""

    def __init__(self, config: ModelConfig, loss_chunk: int = 1024) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.wiring = Wiring(config)
        self.head = Head(config, loss_chunk)

    def forward(self, tokens: Tensor, context: Context, labels: Tensor | None = None) -> Tensor:
        """Loss or logits.

        Args:
            tokens: `[S, B]` integers.
            context: positions and documents of these tokens, and balance groups.
            labels: `[S, B]` integers, −100 where there is no loss; None for logits.

        Returns:
            sum over valid tokens of the negative log likelihood, a scalar in at least fp32; without
            labels the logits `[S, B, V]`.
        """
        x = self.wiring(self.embedding(tokens), context)
        tied = self.embedding.weight_of("weight") if self.config.tied else None
        return self.head(x, labels, tied)
