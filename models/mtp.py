"""Multi-token prediction: modules that predict further tokens, each from the one before."""

import torch
from torch import Tensor, nn

from colonnade.kernels.linear import linear
from colonnade.kernels.loss import IGNORED
from colonnade.models import records
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.norms import Norm
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.report import PassReport
from colonnade.models.wiring import Wiring


class Join(ParameterModule):
    """The two inputs of a module become one: `[S, B, D]` each to `[S, B, D]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(records.join(config))

    def forward(self, stream: Tensor, token: Tensor) -> Tensor:
        return linear(stream, self.weight_of("stream")) + linear(token, self.weight_of("token"))


class Predictor(nn.Module):
    """Module `depth` (from 0): from the stream of the one before and the token that it predicted.

    h' = M [norm(h) ; norm(embedding)], then a row of sub-blocks (arXiv:2412.19437, eqs. 21 and 22);
    embedding and head are the model's.
    """

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        row = config.mtp_pattern
        self.norm_stream, self.norm_token = Norm(config), Norm(config)
        self.join = Join(config)
        self.wiring = Wiring(config, row, len(row), len(config.symbols) + depth * len(row))

    def forward(self, stream: Tensor, token: Tensor, context: Context) -> tuple[Tensor, PassReport]:
        """`[S, B, D]` each: the normed stream before, and the further tokens' embeddings."""
        x = self.join(self.norm_stream(stream), self.norm_token(token))
        return self.wiring(x, context)


def shifted(
    tokens: Tensor, labels: Tensor, documents: Tensor | None, depth: int
) -> tuple[Tensor, Tensor]:
    """Tokens `[S, B']` and labels `[S, B]`, `depth` places on; documents `[S, B']`.

    A place whose token would come from behind the row's end or from another document has no loss.
    """
    ahead = torch.cat([tokens[depth:], tokens[-1:].expand(min(depth, len(tokens)), -1)])
    wanted = torch.full_like(labels, IGNORED)
    wanted[:-depth] = labels[depth:]
    if documents is not None:
        d = documents[:, : labels.shape[1]]
        crossed = d[depth:] != d[:-depth]
        wanted[:-depth].masked_fill_(crossed, IGNORED)
    return ahead, wanted
