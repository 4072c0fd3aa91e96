"""The residual wiring: norms, adds and seams over a row of sub-blocks it knows nothing about."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from colonnade.models.blocks.base import SubBlock
from colonnade.models.config import CARDS, ModelConfig, mixes_sequence
from colonnade.models.context import Context
from colonnade.models.norms import Norm
from colonnade.models.records import writing_std
from colonnade.models.report import BlockReport, PassReport


class Stage(NamedTuple):
    """Sub-blocks `start` to `stop` (not included) of a row, which a pipeline's rank holds.

    The first stage of a model has the embedding, the last one the final norm and the head.
    """

    start: int
    stop: int


class State(NamedTuple):
    """What goes from one sub-block to the next, and so from stage to stage, `[S, B, D]` each.

    Attributes:
        stream: the residual stream, without `pending`.
        pending: the newest sub-block's output, perhaps still being reduced; None: it is added.
    """

    stream: Tensor
    pending: Tensor | None = None


class Halves:
    """One sub-block in one pass: `first`, then `second`; other sub-blocks' may run between."""

    def __init__(self, block: SubBlock, context: Context) -> None:
        self.block, self.context = block, context

    def first(self, x: Tensor) -> Any:
        """The first half of the input `[S, B, D]`; returns what `second` takes."""
        return self.block.begin(x, self.context)

    def second(self, carried: Any) -> Tensor:
        """The second half: `[S, B, D]`, to leave for the stream."""
        return self.block.finish(carried, self.context)


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
    """The stream through the sub-blocks of a row, or through a stage of it.

    With H_t the stream after t sub-blocks and h_t what sub-block t adds, sub-block t is fed
    norm(H_t), or, where `late`, norm(H_{t-1}), which lacks the newest output: that output may still
    be under way between ranks.

    `enter` and `leave` are seams, the identity on one device: what gathers a sub-block's input and
    what reduces its output. `gathers` says that `enter` sends something, which then hides behind a
    second half; otherwise it comes after it, and the reduction before it may take a whole
    sub-block. `halves` runs a sub-block's halves, and may have backward compute them again.
    `start` is the number of the row's first sub-block in the whole model.

    Sub-blocks and norms are keyed by their place in the whole row. A norm behind a sub-block stands
    in the stage where the output is added, which for a late successor is the successor's.
    """

    def __init__(
        self,
        config: ModelConfig,
        row: str,
        distinct: int,
        start: int = 0,
        stage: Stage | None = None,
    ) -> None:
        super().__init__()
        self.late, self.start, self.distinct = lacks_newest(config, row), start, distinct
        self.places = range(*(stage or Stage(0, len(row))))
        std = writing_std(config, row)
        before, after = config.norm_position != "after", config.norm_position != "before"
        added = [t for t in range(len(row)) if after and t + self.waits(t) in self.places]
        self.blocks = nn.ModuleDict(
            {str(t): CARDS[row[t]].build(config, std) for t in self.places if t < distinct}
        )
        self.norms = nn.ModuleDict({str(t): Norm(config) for t in self.places if before})
        self.after = nn.ModuleDict({str(t): Norm(config) for t in added})
        if self.places.stop == len(row):
            self.final = Norm(config)
        self.enter: Callable[[Tensor], Tensor] = lambda x: x
        self.leave: Callable[[Tensor], Tensor] = lambda h: h
        self.gathers = False
        self.halves: Callable[[SubBlock, Context], Halves] = Halves

    def block(self, t: int) -> SubBlock:
        """Sub-block t of the row; shared ones stand in it several times."""
        block = self.blocks[str(t % self.distinct)]
        assert isinstance(block, SubBlock)
        return block

    def waits(self, t: int) -> bool:
        """Whether sub-block t's output is added no sooner than while the next one runs."""
        return t + 1 < len(self.late) and self.late[t + 1]

    def prepare(self, t: int, stream: Tensor) -> Tensor | None:
        """Sub-block t's input; None where the next stage makes it, or the row has ended."""
        if t not in self.places:
            return None
        return self.enter(self.norms[str(t)](stream) if len(self.norms) else stream)

    def add(self, t: int, stream: Tensor, left: Tensor | None) -> Tensor:
        """The stream with sub-block t's output, which has left it; as it is without one."""
        if left is None:
            return stream
        return stream + (self.after[str(t)](left) if len(self.after) else left)

    def forward(self, stream: Tensor, context: Context) -> tuple[Tensor, PassReport]:
        """`[S, B, D]`, the embeddings, to `[S, B, D]`, the normed end of the stream."""
        state, report = self.run(State(stream), context)
        return self.final(state.stream), report

    def run(self, state: State, context: Context) -> tuple[State, PassReport]:
        """All sub-blocks; an input is made as soon as it can be, an output added as late.

        The order of calls at sub-block t, norms left out; `>` marks what is launched, and may be
        under way until it is used:

            standard               ladder, `enter` gathers    ladder, `enter` sends nothing
            x_t = enter(H_t) >
            first(x_t)             first(x_t)                 first(x_t)
                                   H_t = H_{t-1} + h_{t-1}
                                   x_{t+1} = enter(H_t) >
            second                 second                     second
            h_t = leave >          h_t = leave >              h_t = leave >
            H_{t+1} = H_t + h_t                               H_t = H_{t-1} + h_{t-1}
                                                              x_{t+1} = enter(H_t)
        """
        stream, pending = state
        x = self.prepare(self.places.start, stream)
        found: dict[int, BlockReport] = {}
        for t in self.places:
            block, index, waits = self.block(t), self.start + t, self.waits(t)
            halves, last = self.halves(block, context.at(index)), waits and not self.gathers
            assert x is not None
            carried = halves.first(x)
            if (report := block.report(carried)) is not None:
                found[index] = report
            if not last:
                stream, x = self.advance(t, stream, pending)
            newest = self.leave(halves.second(carried))
            del carried  # or it would lie beside the next sub-block's
            if last:
                stream, x = self.advance(t, stream, pending)
            pending = newest
            if not waits:
                stream, pending = self.add(t, stream, pending), None
                x = self.prepare(t + 1, stream)
        return State(stream, pending), PassReport.of(found)

    def advance(
        self, t: int, stream: Tensor, pending: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream with the output before t's; and where t's own waits, the next input."""
        stream = self.add(t - 1, stream, pending)
        return stream, self.prepare(t + 1, stream) if self.waits(t) else None
