"""Multi-token prediction (MTP): modules that predict later tokens, each from the one before."""

import torch
from torch import Tensor, nn

from colonnade.kernels.labels import IGNORED
from colonnade.kernels.linear import linear
from colonnade.models import records
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.norms import Norm
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.report import PassReport
from colonnade.models.wiring import Wiring


class Join(ParameterModule):
    """Projects and adds the two inputs of a module: `[S, B, D]` each to `[S, B, D]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(records.join(config))

    def forward(self, stream: Tensor, token: Tensor) -> Tensor:
        return linear(stream, self.weight_of("stream")) + linear(token, self.weight_of("token"))


class Predictor(nn.Module):
    """MTP module `depth` (from 0), which predicts the token `depth` + 2 positions ahead.

    Its inputs are the final stream h of the module before it (of the model for depth 0), and the
    embedding of the token which that one predicts: h' = M [norm(h) ; norm(embedding)], then a row
    of sub-blocks (arXiv:2412.19437, eqs. 21 and 22). Embedding and head are the model's.
    """

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        row = config.mtp_pattern
        self.norm_stream, self.norm_token = Norm(config), Norm(config)
        self.join = Join(config)
        self.wiring = Wiring(config, row, len(row), len(config.symbols) + depth * len(row))

    def forward(self, stream: Tensor, token: Tensor, context: Context) -> tuple[Tensor, PassReport]:
        """Takes the previous final stream after its norm and the embeddings, `[S, B, D]` each."""
        x = self.join(self.norm_stream(stream), self.norm_token(token))
        return self.wiring(x, context)


def shift(
    tokens: Tensor, labels: Tensor, documents: Tensor | None, depth: int
) -> tuple[Tensor, Tensor]:
    """Shifts tokens `[S, B']` and labels `[S, B]` by `depth` positions; documents are `[S, B']`.

    Positions whose token would be past the end of the row, or in another document, have no loss.
    """
    shifted_tokens = torch.cat([tokens[depth:], tokens[-1:].expand(min(depth, len(tokens)), -1)])
    shifted_labels = torch.full_like(labels, IGNORED)
    shifted_labels[:-depth] = labels[depth:]
    if documents is not None:
        d = documents[:, : labels.shape[1]]
        other_document = d[depth:] != d[:-depth]
        shifted_labels[:-depth].masked_fill_(other_document, IGNORED)
    return shifted_tokens, shifted_labels
