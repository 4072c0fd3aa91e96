"""The residual wiring: norms, adds and seams over a row of sub-blocks it knows nothing about."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from colonnade.models.blocks import BLOCKS, SubBlock
from colonnade.models.config import CHANNEL_MIXERS, ModelConfig
from colonnade.models.context import Context
from colonnade.models.norms import Norm


def lacks_newest(config: ModelConfig, row: str) -> list[bool]:
    """For each sub-block of the row, whether it reads the stream without the newest output.

    Ladder (arXiv:2501.06589): all but the first, or the last n. Parallel: a channel mixer right
    behind a sequence mixer reads what that one reads, so both stand side by side.
    """
    if config.residual == "ladder":
        last = len(row) if config.ladder_last is None else config.ladder_last
        return [t > 0 and t >= len(row) - last for t in range(len(row))]
    if config.residual == "parallel":
        channel = [symbol in CHANNEL_MIXERS for symbol in row]
        return [t > 0 and channel[t] and not channel[t - 1] for t in range(len(row))]
    return [False] * len(row)


class Wiring(nn.Module):
    """The stream through all sub-blocks of a row.

    With H_t the stream after t sub-blocks and h_t what sub-block t adds, sub-block t is fed
    norm(H_t), or, where `late`, norm(H_{t-1}), which lacks the newest output: that output may still
    be under way between ranks.

    `enter` and `leave` are seams, the identity on one device: what gathers a sub-block's input and
    what reduces its output. `recompute` says which activations are computed again in backward.
    `start` is the number of the row's first sub-block in the whole model.
    """

    def __init__(self, config: ModelConfig, row: str, distinct: int, start: int = 0) -> None:
        super().__init__()
        out_std = config.init_std * len(row) ** -0.5  # one residual add per sub-block
        self.blocks = nn.ModuleList(BLOCKS[s](config, out_std) for s in row[:distinct])
        before, after = config.norm_position != "after", config.norm_position != "before"
        self.norms = nn.ModuleList(Norm(config) for _ in row if before)
        self.after = nn.ModuleList(Norm(config) for _ in row if after)
        self.final = Norm(config)
        self.late, self.start = lacks_newest(config, row), start
        self.enter: Callable[[Tensor], Tensor] = lambda x: x
        self.leave: Callable[[Tensor], Tensor] = lambda h: h
        self.recompute: Callable[[], tuple[Any, Any]] | None = None

    def block(self, t: int) -> SubBlock:
        """Sub-block t of the row; shared ones stand in it several times."""
        block = self.blocks[t % len(self.blocks)]
        assert isinstance(block, SubBlock)
        return block

    def prepare(self, t: int, stream: Tensor) -> Tensor:
        """Sub-block t's input."""
        return self.enter(self.norms[t](stream) if len(self.norms) else stream)

    def add(self, t: int, stream: Tensor, left: Tensor) -> Tensor:
        """The stream with sub-block t's output, which has left it."""
        return stream + (self.after[t](left) if len(self.after) else left)

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """`[S, B, D]`, the embeddings, to `[S, B, D]`, the normed end of the stream."""
        run = self.run if self.recompute is None else self.run_recomputed
        return self.final(run(stream, context))

    def run(self, stream: Tensor, context: Context) -> Tensor:
        """All sub-blocks, the next input prepared between the halves wherever it can be."""
        x, pending = self.prepare(0, stream), None
        for t, late in enumerate([*self.late[1:], False]):  # late: the next sub-block
            block, here = self.block(t), context.at(self.start + t)
            carried = block.begin(x, here)
            if pending is not None:
                stream = self.add(t - 1, stream, pending)
            if late:
                x = self.prepare(t + 1, stream)
            pending = self.leave(block.finish(carried, here))
            if not late:
                stream, pending = self.add(t, stream, pending), None
                if t + 1 < len(self.late):
                    x = self.prepare(t + 1, stream)
        return stream

    def run_recomputed(self, stream: Tensor, context: Context) -> Tensor:
        """All sub-blocks, each a region whose input alone is kept (or what `recompute` keeps)."""
        assert self.recompute is not None

        def region(block: SubBlock, x: Tensor, here: Context) -> Tensor:
            return block.finish(block.begin(x, here), here)

        before = stream  # the stream without the newest output
        for t, late in enumerate(self.late):
            x = self.prepare(t, before if late else stream)
            here = context.at(self.start + t)
            h = checkpoint(
                region, self.block(t), x, here, use_reentrant=False, context_fn=self.recompute
            )
            before, stream = stream, self.add(t, stream, self.leave(h))
        return stream
