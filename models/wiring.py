"""The residual wiring: norms, adds and seams over a row of sub-blocks it knows nothing about."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from colonnade.models.blocks.base import SubBlock
from colonnade.models.config import CARDS, ModelConfig, mixes_sequence
from colonnade.models.context import Context
from colonnade.models.norms import Norm
from colonnade.models.records import writing_std


def lacks_newest(config: ModelConfig, row: str) -> list[bool]:
    """For each sub-block of the row, whether it reads the stream without the newest output.

    Ladder (arXiv:2501.06589): all but the first, or the last n. Parallel: a channel mixer right
    behind a sequence mixer reads what that one reads, so both stand side by side.
    """
    if config.residual == "ladder":
        last = len(row) if config.ladder_last is None else config.ladder_last
        return [t > 0 and t >= len(row) - last for t in range(len(row))]
    if config.residual == "parallel":
        mixers = [mixes_sequence(symbol) for symbol in row]
        return [t > 0 and mixers[t - 1] and not mixers[t] for t in range(len(row))]
    return [False] * len(row)


class Wiring(nn.Module):
    """The stream through all sub-blocks of a row.

    With H_t the stream after t sub-blocks and h_t what sub-block t adds, sub-block t is fed
    norm(H_t), or, where `late`, norm(H_{t-1}), which lacks the newest output: that output may still
    be under way between ranks.

    `enter` and `leave` are seams, the identity on one device: what gathers a sub-block's input and
    what reduces its output. `gathers` says that `enter` sends something, which then hides behind a
    second half; otherwise it comes after it, and the reduction before it may take a whole
    sub-block. `recompute` says which activations are computed again in backward. `start` is the
    number of the row's first sub-block in the whole model.
    """

    def __init__(self, config: ModelConfig, row: str, distinct: int, start: int = 0) -> None:
        super().__init__()
        std = writing_std(config, row)
        self.blocks = nn.ModuleList(CARDS[s].build(config, std) for s in row[:distinct])
        before, after = config.norm_position != "after", config.norm_position != "before"
        self.norms = nn.ModuleList(Norm(config) for _ in row if before)
        self.after = nn.ModuleList(Norm(config) for _ in row if after)
        self.final = Norm(config)
        self.late, self.start = lacks_newest(config, row), start
        self.enter: Callable[[Tensor], Tensor] = lambda x: x
        self.leave: Callable[[Tensor], Tensor] = lambda h: h
        self.gathers = False
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
        return self.final(self.run(stream, context))

    def run(self, stream: Tensor, context: Context) -> Tensor:
        """All sub-blocks; one's input is made as soon as it can be while another one runs."""
        x, pending = self.prepare(0, stream), None

        def advance() -> None:
            """The newest output but one is added, and the next input made if that is all of it."""
            nonlocal stream, x
            if pending is not None:
                stream = self.add(t - 1, stream, pending)
            if late:
                x = self.prepare(t + 1, stream)

        for t, late in enumerate([*self.late[1:], False]):  # late: the next sub-block
            between = self.gathers or not late
            h = self.halves(t, x, context.at(self.start + t), advance if between else nothing)
            newest = self.leave(h)
            if not between:
                advance()
            pending = newest
            if not late:
                stream, pending = self.add(t, stream, pending), None
                if t + 1 < len(self.late):
                    x = self.prepare(t + 1, stream)
        return stream

    def halves(self, t: int, x: Tensor, context: Context, between: Callable[[], None]) -> Tensor:
        """Both halves of sub-block t, and `between` them what belongs to its neighbours.

        Under `recompute` the halves alone run again; what stood between them stays as it was.
        """
        block, again = self.block(t), False

        def run(x: Tensor) -> Tensor:
            nonlocal again
            carried = block.begin(x, context)
            if not again:
                again = True
                with unseen():
                    between()
            return block.finish(carried, context)

        if self.recompute is None:
            return run(x)
        return checkpoint(run, x, use_reentrant=False, context_fn=self.recompute)


def nothing() -> None:
    """Between halves, where there is nothing to do."""


def unseen() -> AbstractContextManager[None]:
    """A checkpoint around this does not see what is saved for backward within."""
    return saved_tensors_hooks(lambda kept: kept, lambda kept: kept)
