"""The experts of `E` and `T`: dispatch of tokens to experts, their MLPs, and the sum per token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from colonnade.kernels import experts as kernels
from colonnade.kernels.activation import activated_linear
from colonnade.kernels.experts import DispatchOrder, expert_mlp
from colonnade.kernels.linear import linear
from colonnade.models.blocks.base import SubBlock
from colonnade.models.blocks.mlp import Coefficients
from colonnade.models.cards.base import Card
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.parameters import ParameterSpec, of_half
from colonnade.models.report import BlockReport
from colonnade.models.seams import Seam


class Routed(NamedTuple):
    """The choices of experts.

    Attributes:
        x: `[S, B, D]`.
        chosen: `[S, B, k]`, as are the others.
        keep_mask: False for choices to drop; None keeps all.
        weight: of each choice.
        bound: the most tokens that any expert keeps; None: not bounded by a capacity.
    """

    x: Tensor
    chosen: Tensor
    keep_mask: Tensor | None
    weight: Tensor
    bound: int | None = None


@dataclass(frozen=True)
class Sent:
    """Rows on their way to the ranks of their experts.

    Attributes:
        receive: waits for the rows that this rank's experts compute. Returns them, `[M, D]`, sorted
            by expert, with the number of rows of each of these experts.
        order: inverts the sort of this rank's tokens by expert.
    """

    receive: Callable[[], tuple[Tensor, Tensor]]
    order: DispatchOrder


class Returned(NamedTuple):
    """Outputs on their way back to the ranks of their tokens.

    Attributes:
        rows: the outputs, which may be in flight.
        receive: waits for these. Returns each token's weighted sum, `[S, B, D]`.
        shared: `[S, B, D]`, the output of the shared expert.
    """

    rows: Tensor
    receive: Callable[[Tensor], Tensor]
    shared: Tensor | None = None


def local_dispatch(routed: Routed, experts: int) -> Sent:
    """Sorts tokens by expert on this device: the `dispatch` seam's default."""
    x, chosen, keep_mask, *_ = routed
    rows, order = kernels.dispatch(
        x.flatten(0, 1),
        chosen.flatten(0, 1),
        experts,
        None if keep_mask is None else keep_mask.flatten(0, 1),
    )
    return Sent(lambda: (rows, order.counts), order)


def local_combine(rows: Tensor, sent: Sent, weight: Tensor) -> Returned:
    """Sums each token's rows, weighted, on this device: the `combine` seam's default."""
    shape = *weight.shape[:2], rows.shape[-1]

    def receive(rows: Tensor) -> Tensor:
        return kernels.combine(rows, sent.order, weight.flatten(0, 1)).view(shape)

    return Returned(rows, receive)


class SharedInner(NamedTuple):
    """The shared expert between its halves: up and gate, `[S, B, F]`; its own gate, `[S, B, 1]`,
    before the sigmoid."""

    up: Tensor
    gate: Tensor | None
    opening: Tensor | None


class Dispatched(NamedTuple):
    """The result of the first half: rows on their way, and all that the second half needs."""

    sent: Sent
    weight: Tensor  # [S, B, k], of each choice
    shared: SharedInner | None
    report: BlockReport | None = None  # in training, where there is a router


class Dispatch(ParameterModule):
    """Sends tokens to their experts; meanwhile, runs the shared expert's first half.

    The seam `dispatch` sorts tokens by expert; over ranks it launches an all-to-all.
    """

    seams, compiled = (Seam("dispatch", local_dispatch),), "shared_inner"
    dispatch: Callable[[Routed, int], Sent]

    def __init__(self, records: list[ParameterSpec], experts: int) -> None:
        super().__init__(records)
        self.experts = experts

    def forward(self, routed: Routed) -> Dispatched:
        sent = self.dispatch(routed, self.experts)
        shared = self.shared_inner(routed.x) if "shared_up" in self.specs else None
        return Dispatched(sent, routed.weight, shared)

    def shared_inner(self, x: Tensor) -> SharedInner:
        """Runs the shared expert's first half."""
        gate = linear(x, self.weight_of("shared_gate")) if "shared_gate" in self.specs else None
        opening = linear(x, self.weight_of("shared_open")) if "shared_open" in self.specs else None
        return SharedInner(linear(x, self.weight_of("shared_up")), gate, opening)


class Experts(ParameterModule):
    """Runs the MLPs of this rank's experts on their rows, `[M, D]` to `[M, D]`.

    A module of its own, because expert parallelism shards its weights over other ranks than those
    of the rest of the sub-block. Nothing in it is compiled: an expert's number of rows is not known
    when it would be.
    """

    seams, compiled = (), None

    def __init__(self, records: list[ParameterSpec], activation: str) -> None:
        super().__init__(records)
        self.activation = activation

    def forward(self, rows: Tensor, counts: Tensor, poly: Tensor | None) -> Tensor:
        gate = self.weight_of("gate") if "gate" in self.specs else None
        up, down = self.weight_of("up"), self.weight_of("down")
        biases = {f"{n}_bias": self.bias_of(n) for n in ("gate", "up", "down")}
        return expert_mlp(
            rows, counts, gate, up, down, self.activation, poly, self.sharding, **biases
        )


class Combine(ParameterModule):
    """Sends the experts' outputs back; meanwhile, runs the shared expert's second half.

    The seam `combine` sums each token's rows; over ranks it launches an all-to-all first.
    """

    seams, compiled = (Seam("combine", local_combine),), "shared_output"
    combine: Callable[[Tensor, Sent, Tensor], Returned]

    def __init__(self, records: list[ParameterSpec], activation: str) -> None:
        super().__init__(records)
        self.activation = activation

    def forward(self, rows: Tensor, dispatched: Dispatched, poly: Tensor | None) -> Returned:
        returned = self.combine(rows, dispatched.sent, dispatched.weight)
        if dispatched.shared is None:
            return returned
        return returned._replace(shared=self.shared_output(dispatched.shared, poly))

    def shared_output(self, inner: SharedInner, poly: Tensor | None) -> Tensor:
        """Runs the shared expert's second half; returns `[S, B, D]`."""
        up, gate, opening = inner
        down = self.weight_of("shared_down")
        y = activated_linear(up, gate, down, self.activation, poly, self.sharding)
        return y if opening is None else y * opening.sigmoid()


class ExpertBlock(SubBlock):
    """A sub-block with experts; a subclass chooses each token's experts in `begin`."""

    small: Coefficients
    first: Dispatch
    second: Combine

    def __init__(
        self, card: Card, config: ModelConfig, records: list[ParameterSpec], small: Coefficients
    ) -> None:
        super().__init__(card)
        self.config, self.small = config, small
        self.first = Dispatch(of_half(records, "first"), config.experts)
        self.experts = Experts(of_half(records, "experts"), config.activation)
        self.second = Combine(of_half(records, "second"), config.activation)

    def finish(self, carried: Dispatched, context: Context) -> Returned:
        poly = self.small.values()
        rows = self.experts(*carried.sent.receive(), poly)
        return self.second(rows, carried, poly)

    def receive(self, output: Returned) -> Tensor:
        y = output.receive(output.rows)
        return y if output.shared is None else y + output.shared
