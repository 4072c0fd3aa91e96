"""The residual wiring: norms, adds and seams around the sub-blocks of a row, of any kind."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from colonnade.models.blocks.base import SubBlock
from colonnade.models.config import CARDS, ModelConfig, mixes_sequence
from colonnade.models.context import Context
from colonnade.models.norms import Norm
from colonnade.models.records import writing_std
from colonnade.models.report import BlockReport, PassReport


class Stage(NamedTuple):
    """A pipeline stage: sub-blocks `start` to `stop` (not included) of a row.

    The first stage of a model also has the embedding, the last one the final norm and the head.
    """

    start: int
    stop: int

    @property
    def indices(self) -> range:
        """The indices of its sub-blocks in the row."""
        return range(self.start, self.stop)


class State(NamedTuple):
    """The state between two sub-blocks, which pipeline stages send on, `[S, B, D]` each.

    Attributes:
        stream: the residual stream, without `pending`.
        pending: the output of the newest sub-block, whose all-reduce or reduce-scatter may still be
            in flight; None: it is in the stream already.
    """

    stream: Tensor
    pending: Tensor | None = None


class Halves:
    """One sub-block in one pass: `first`, `second`, `receive`; others may run in between."""

    def __init__(self, block: SubBlock, context: Context) -> None:
        self.block, self.context = block, context

    def first(self, x: Tensor) -> Any:
        """Runs the first half on the input `[S, B, D]`; returns the argument of `second`."""
        return self.block.begin(x, self.context)

    def second(self, carried: Any) -> Any:
        """Runs the second half; returns the argument of `receive`."""
        return self.block.finish(carried, self.context)

    def receive(self, output: Any) -> Tensor:
        """Waits for what the second half sent; returns `[S, B, D]`, which `leave` takes."""
        return self.block.receive(output)


class Started(NamedTuple):
    """A sub-block whose first half has run, with its result."""

    halves: Halves
    carried: Any


Pending = Callable[[], Tensor]  # returns the newest output after `leave`, which it may launch


def skips_newest(config: ModelConfig, row: str) -> list[bool]:
    """Returns for each sub-block of a row whether it reads the stream without the newest output.

    Ladder (arXiv:2501.06589): all but the first do, or the last n. Parallel: a channel mixer that
    directly follows a sequence mixer does, so that both read the same stream.
    """
    if config.residual == "ladder":
        last = len(row) if config.ladder_last is None else config.ladder_last
        return [t > 0 and t >= len(row) - last for t in range(len(row))]
    if config.residual == "parallel":
        mixers = [mixes_sequence(symbol) for symbol in row]
        return [t > 0 and mixers[t - 1] and not mixers[t] for t in range(len(row))]
    return [False] * len(row)


class Wiring(nn.Module):
    """Passes the residual stream through the sub-blocks of a row, or of some stages of it.

    With H_t the stream before sub-block t and h_t the output of sub-block t, the input of sub-block
    t is norm(H_t), or, where `skips_newest[t]`, norm(H_{t-1}), which is H_t without the newest
    output h_{t-1}: the reduction of that output over ranks may still be in flight.

    `enter` and `leave` are seams, the identity on one device. Under tensor and sequence parallelism
    `enter` all-gathers a sub-block's input along the sequence, and `leave` reduce-scatters its
    output; under tensor parallelism alone `enter` sends nothing forward, and `leave` all-reduces.
    `gathers` says that `enter` sends something: it is then launched before a second half, to
    overlap with it. Otherwise `enter` is called after the second half, so that the previous
    reduction may overlap with a whole sub-block. `halves` runs the two halves of a sub-block, and
    may recompute them in backward. `start` is the index of the row's first sub-block in the model.
    `visit` is told the direction and the index of each sub-block whose pass begins.

    Of a pipeline it has the sub-blocks of the `stages` of one rank, and runs one of these at a
    time. Sub-blocks and norms are keyed by their index in the whole row; which norms there are, the
    config says (`norm_positions`). A norm after sub-block t
    is in the stage that adds t's output to the stream, which is the stage of sub-block t + 1 where
    that one skips the newest output.
    """

    def __init__(
        self,
        config: ModelConfig,
        row: str,
        distinct: int,
        start: int = 0,
        stages: Sequence[Stage] | None = None,
    ) -> None:
        super().__init__()
        self.skips_newest, self.start, self.distinct = skips_newest(config, row), start, distinct
        self.multiplier = config.residual_multiplier
        self.whole_row = Stage(0, len(row))
        stages = [self.whole_row] if stages is None else stages
        indices = sorted(t for stage in stages for t in stage.indices)
        std = writing_std(config, row)
        positions = config.norm_positions(row)
        added = [t for t in range(len(row)) if t + self.defers_add(t) in indices]
        self.blocks = nn.ModuleDict(
            {
                str(t): CARDS[row[t]].build(config, std)
                for t in dict.fromkeys(t % distinct for t in indices)
            }
        )
        self.norms = nn.ModuleDict(
            {str(t): Norm(config) for t in indices if positions[t] != "after"}
        )
        self.after = nn.ModuleDict(
            {str(t): Norm(config) for t in added if positions[t] != "before"}
        )
        if any(stage.stop == len(row) for stage in stages):
            self.final = Norm(config)
        self.enter: Callable[[Tensor], Tensor] = lambda x: x
        self.leave: Callable[[Tensor], Tensor] = lambda h: h
        self.gathers = False
        self.halves: Callable[[SubBlock, Context], Halves] = Halves
        self.visit: Callable[[str, int], None] | None = None

    def block(self, t: int) -> SubBlock:
        """Returns sub-block t of the row; under model.share several t have the same one."""
        block = self.blocks[str(t % self.distinct)]
        assert isinstance(block, SubBlock)
        return block

    def has_block(self, t: int) -> bool:
        """Whether this rank has the weights of sub-block t of the row."""
        return str(t % self.distinct) in self.blocks

    def defers_add(self, t: int) -> bool:
        """Whether sub-block t's output is added to the stream only while sub-block t + 1 runs."""
        return t + 1 < len(self.skips_newest) and self.skips_newest[t + 1]

    def prepare_input(self, t: int, stream: Tensor, stage: Stage) -> Tensor | None:
        """Returns sub-block t's input; None past the stage: it is left to the next one."""
        if t not in stage.indices:
            return None
        return self.enter(self.norms[str(t)](stream) if str(t) in self.norms else stream)

    def add_output(self, t: int, stream: Tensor, pending: Pending | None) -> Tensor:
        """Returns the stream plus sub-block t's output, normed and multiplied if configured; None
        adds nothing."""
        if pending is None:
            return stream
        output = pending()
        if str(t) in self.after:
            output = self.after[str(t)](output)
        return stream + (output if self.multiplier == 1.0 else self.multiplier * output)

    def forward(self, stream: Tensor, context: Context) -> tuple[Tensor, PassReport]:
        """Maps embeddings `[S, B, D]` to the final stream after its norm, `[S, B, D]`."""
        state, report = self.run(State(stream), context)
        return self.final(state.stream), report

    def run(
        self, state: State, context: Context, stage: Stage | None = None
    ) -> tuple[State, PassReport]:
        """Runs the sub-blocks of the row, or of one stage of it: prepares inputs as early, and adds
        outputs as late as possible.

        The order of calls at sub-block t, without norms; `>` marks a collective that is launched,
        and may be in flight until its result is used:

            standard               ladder, `enter` gathers    ladder, `enter` sends nothing
            x_t = enter(H_t) >
            first(x_t)             first(x_t)                 first(x_t)
                                   H_t = H_{t-1} + h_{t-1}
                                   x_{t+1} = enter(H_t) >
            second                 second                     second
            h_t = leave >          h_t = leave >              h_t = leave >
            H_{t+1} = H_t + h_t                               H_t = H_{t-1} + h_{t-1}
                                                              x_{t+1} = enter(H_t)

        Where both halves of a sub-block send tokens to the ranks of their experts (`exchanges`),
        its first half runs before the second half of the sub-block before it, which hides the
        dispatch; and its output is received after the first half of the sub-block behind it, which
        hides the way back. With E such a sub-block, in a ladder:

            first(*0)  first(E1) >  second(*0)  second(E1) >  first(*2)  receive(E1)  second(*2)
        """
        stage = stage or self.whole_row
        stream, x = state.stream, self.prepare_input(stage.start, state.stream, stage)
        received = state.pending
        pending: Pending | None = None if received is None else lambda: received
        reports: dict[int, BlockReport] = {}
        started: Started | None = None
        for t in stage.indices:
            defers_add = self.defers_add(t)
            # If `enter` all-gathers, the next input is prepared before the second half, which hides
            # the gather. If not, it is prepared after the second half: adding `pending` waits for
            # its reduction, which can then overlap with the whole sub-block.
            exchanges_next = self.exchanges(t + 1, stage)
            gathers = self.gathers or self.exchanges(t - 1, stage) or exchanges_next
            advance_after_second = defers_add and not gathers
            halves, carried = started or self.begin(t, x, context, reports)
            started = None
            if not advance_after_second:
                stream, x = self.advance(t, stream, pending, stage)
                pending = None  # frees what it has received before the second half allocates
                if x is not None and exchanges_next:
                    started = self.begin(t + 1, x, context, reports)
            output = halves.second(carried)
            defer = defers_add and self.exchanges(t, stage)
            newest = self.leave_output(t, halves, output, defer)
            del carried, output  # frees them before the next first half allocates its own
            if advance_after_second:
                stream, x = self.advance(t, stream, pending, stage)
            pending = newest
            if not defers_add:
                stream, pending = self.add_output(t, stream, pending), None
                x = self.prepare_input(t + 1, stream, stage)
        return State(stream, None if pending is None else pending()), PassReport.of(reports)

    def exchanges(self, t: int, stage: Stage) -> bool:
        """Whether sub-block t is in the stage, and sends tokens to the ranks of their experts."""
        return t in stage.indices and self.block(t).exchanges

    def begin(
        self, t: int, x: Tensor | None, context: Context, reports: dict[int, BlockReport]
    ) -> Started:
        """Runs the first half of sub-block t on its input, and puts its report into `reports`."""
        block, index = self.block(t), self.start + t
        if self.visit is not None:
            self.visit("forward", index)
        halves = self.halves(block, context.at(index))
        assert x is not None
        carried = halves.first(x)
        if (report := block.report(carried)) is not None:
            reports[index] = report
        return Started(halves, carried)

    def leave_output(self, t: int, halves: Halves, output: Any, defer: bool) -> Pending:
        """Returns a function that returns sub-block t's output after `leave`.

        `leave` is called now, or, with `defer`, in that function, which then waits for what the
        second half has sent to other ranks.
        """
        if defer:
            return lambda: self.leave(self.visited(t, halves.receive(output)))
        left = self.leave(self.visited(t, halves.receive(output)))
        return lambda: left

    def visited(self, t: int, output: Tensor) -> Tensor:
        """Returns a sub-block's output, whose gradient tells `visit` that backward begins."""
        if (visit := self.visit) is not None and output.requires_grad:
            index = self.start + t
            output.register_hook(lambda gradient: visit("backward", index))
        return output

    def advance(
        self, t: int, stream: Tensor, pending: Pending | None, stage: Stage
    ) -> tuple[Tensor, Tensor | None]:
        """Adds the output of sub-block t - 1 to the stream; if t + 1 skips t's output, also
        prepares the input of t + 1."""
        stream = self.add_output(t - 1, stream, pending)
        return stream, self.prepare_input(t + 1, stream, stage) if self.defers_add(t) else None
