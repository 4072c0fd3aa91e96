"""The interface of a sub-block to the residual wiring: two halves, called one after the other."""

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
    A sub-block may be at several indices of the row; `context.index` is the one of this call.

    Its `card` describes it. Its halves declare their `seams`, and so does the sub-block itself if
    it has any; parallelism refuses a half that does not declare them.
    """

    card: Card
    seams: ClassVar[tuple[Seam, ...]] = ()

    first: ParameterModule
    second: ParameterModule
    small: ParameterModule
    sequence_share = 1.0  # the fraction of a sequence's tokens on this rank
    exchanges = False  # whether both halves send tokens to other ranks (expert parallelism)

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card
        for seam in self.seams:
            setattr(self, seam.name, seam.local)

    def begin(self, x: Tensor, context: Context) -> Any:
        """Runs the first half on x `[S, B, D]`; returns the argument of `finish`."""
        return self.first(x, context)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Runs all of it, `[S, B, D]` to `[S, B, D]`."""
        return self.receive(self.finish(self.begin(x, context), context))

    def report(self, carried: Any) -> BlockReport | None:
        """Returns loads and balancing losses from the first half's result; None if it has none."""
        return None

    def finish(self, carried: Any, context: Context) -> Any:
        """Runs the second half; returns the argument of `receive`."""
        return self.second(carried, context)

    def receive(self, output: Any) -> Tensor:
        """Waits for what the second half has sent to other ranks, which most do not.

        Returns `[S, B, D]`, which the wiring adds to the stream.
        """
        return output


# Arguments: x, weight, bias, whether SiLU follows, the role of the cached last inputs, context.
Conv = Callable[[Tensor, Tensor, Tensor | None, bool, str, Context], Tensor]


def local_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: bool, role: str, context: Context
) -> Tensor:
    """Convolves full sequences on this device: the `conv` seam's default."""
    before = context.cached(role)
    if context.cache is not None:
        if before is None:
            before = x.new_zeros(weight.shape[1] - 1, *x.shape[1:])
        context.put(role, last_inputs(before, x, context.documents))
    return causal_conv(
        x, weight, bias, activation=activation, documents=context.documents, before=before
    )


def last_inputs(before: Tensor, x: Tensor, documents: Tensor | None) -> Tensor:
    """Returns the last rows of `before` and x together, as many as `before` has; zeros in place of
    those that are of another document than the last token."""
    rows = torch.cat([before, x])[len(x) :]
    if documents is None:
        return rows
    document_of = torch.cat([documents[:1].expand(len(before), -1), documents])[len(x) :]
    return rows.masked_fill((document_of != documents[-1])[..., None], 0)


class Convolving(ParameterModule):
    """A half with causal convolutions."""

    seams = (Seam("conv", local_conv),)
    conv: Conv
