"""What the residual wiring sees of a sub-block: two halves, called one after the other."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from colonnade.kernels.conv import causal_conv
from colonnade.models.cards.base import Card
from colonnade.models.context import Context
from colonnade.models.names import CanonicalNames
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.report import BlockReport
from colonnade.models.seams import Seam


class SubBlock(CanonicalNames):
    """A function of the normed stream, in two halves between which collectives can hide.

    `first` and `second` hold the matrices; `small`, where a sub-block has it, holds parameters that
    stay in fp32 whatever the precision (routers, decay rates), and is used by `begin` or `finish`.
    A sub-block may stand at several places of the row; `context.index` says at which it is called.

    Its `card` says all that is known of it. Its halves, and where it needs any it itself, declare
    their `seams`: parallelism refuses what does not say so.
    """

    card: Card
    seams: ClassVar[tuple[Seam, ...]] = ()

    first: ParameterModule
    second: ParameterModule
    small: ParameterModule
    share = 1.0  # of a sequence that this rank has

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card
        for seam in self.seams:
            setattr(self, seam.name, seam.local)

    def begin(self, x: Tensor, context: Context) -> Any:
        """First half. x: `[S, B, D]`. Returns what `finish` takes."""
        return self.first(x, context)

    def report(self, carried: Any) -> BlockReport | None:
        """Loads and balancing losses, read off what the first half returned."""
        return None

    def finish(self, carried: Any, context: Context) -> Tensor:
        """Second half. Returns `[S, B, D]`, to be added to the stream."""
        return self.second(carried, context)


# x, weight, bias, whether SiLU follows, the name under which it keeps its last inputs, context
Conv = Callable[[Tensor, Tensor, Tensor | None, bool, str, Context], Tensor]


def local_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: bool, role: str, context: Context
) -> Tensor:
    """The `conv` seam's default: the whole sequence is on this device."""
    before = context.cached(role)
    if context.cache is not None:
        if before is None:
            before = x.new_zeros(weight.shape[1] - 1, *x.shape[1:])
        context.put(role, torch.cat([before, x])[len(x) :])
    return causal_conv(
        x, weight, bias, activation=activation, documents=context.documents, before=before
    )


class Convolving(ParameterModule):
    """A half with causal convolutions."""

    seams = (Seam("conv", local_conv),)
    conv: Conv
