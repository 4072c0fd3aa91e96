"""The residual wiring: norms, adds and seams over a row of sub-blocks it knows nothing about."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from colonnade.kernels.norm import rms_norm
from colonnade.models.blocks import BLOCKS, SubBlock
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.part import Part, constant


class Norm(Part):
    """RMSNorm's weight, `[D]`, in fp32 whatever the precision."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.declare("weight", (config.hidden,), constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight_of("weight"), self.eps)


class Wiring(nn.Module):
    """The stream through all sub-blocks.

    With H_t the stream after t sub-blocks and h_t what sub-block t adds, standard wiring feeds
    sub-block t with norm(H_t), ladder with norm(H_{t-1}), which lacks the newest output
    (arXiv:2501.06589): that output may still be under way between ranks.

    `enter` and `leave` are seams, the identity on one device: what gathers a sub-block's input and
    what reduces its output. `recompute` says which activations are computed again in backward.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        row = config.symbols
        out_std = config.init_std * len(row) ** -0.5  # one residual add per sub-block
        self.blocks = nn.ModuleList(BLOCKS[s](config, out_std, t) for t, s in enumerate(row))
        self.norms = nn.ModuleList(Norm(config) for _ in row)
        self.final = Norm(config)
        self.late = [t > 0 and config.residual == "ladder" for t in range(len(row))]
        self.enter: Callable[[Tensor], Tensor] = lambda x: x
        self.leave: Callable[[Tensor], Tensor] = lambda h: h
        self.recompute: Callable[[], tuple[Any, Any]] | None = None

    def prepare(self, t: int, stream: Tensor) -> Tensor:
        """Sub-block t's input."""
        return self.enter(self.norms[t](stream))

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """`[S, B, D]`, the embeddings, to `[S, B, D]`, the normed end of the stream."""
        run = self.run if self.recompute is None else self.run_recomputed
        return self.final(run(stream, context))

    def run(self, stream: Tensor, context: Context) -> Tensor:
        """All sub-blocks, the next input prepared between the halves wherever it can be."""
        x, pending = self.prepare(0, stream), None
        for t, block in enumerate(self.blocks):
            assert isinstance(block, SubBlock)
            carried = block.begin(x, context)
            if pending is not None:
                stream = stream + pending
            last = t + 1 == len(self.blocks)
            if not last and self.late[t + 1]:
                x = self.prepare(t + 1, stream)
            pending = self.leave(block.finish(carried, context))
            if not last and not self.late[t + 1]:
                stream, pending = stream + pending, None
                x = self.prepare(t + 1, stream)
        return stream if pending is None else stream + pending

    def run_recomputed(self, stream: Tensor, context: Context) -> Tensor:
        """All sub-blocks, each a region whose input alone is kept (or what `recompute` keeps)."""
        assert self.recompute is not None

        def region(block: SubBlock, x: Tensor) -> Tensor:
            return block.finish(block.begin(x, context), context)

        before = stream  # the stream without the newest output
        for t, block in enumerate(self.blocks):
            x = self.prepare(t, before if self.late[t] else stream)
            h = checkpoint(region, block, x, use_reentrant=False, context_fn=self.recompute)
            before, stream = stream, stream + self.leave(h)
        return stream
