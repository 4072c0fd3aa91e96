"""What the residual wiring sees of a sub-block: two halves, called one after the other."""

from typing import Any

from torch import Tensor, nn

from colonnade.models.context import Context
from colonnade.models.part import Part


class SubBlock(nn.Module):
    """A function of the normed stream, in two halves between which collectives can hide.

    `first` and `second` hold the matrices; `small`, where a sub-block has it, holds parameters that
    stay in fp32 whatever the precision (routers, decay rates), and is used by `begin` or `finish`.
    """

    first: nn.Module
    second: nn.Module
    small: Part

    def begin(self, x: Tensor, context: Context) -> Any:
        """First half. x: `[S, B, D]`. Returns what `finish` takes."""
        return self.first(x, context)

    def finish(self, carried: Any, context: Context) -> Tensor:
        """Second half. Returns `[S, B, D]`, to be added to the stream."""
        return self.second(carried, context)

    def mixing_flops(self, seq_len: int) -> int:
        """Forward FLOPs per token beside those of the weights (2 per weight used)."""
        return 0

    def idle_weights(self) -> int:
        """Weights that one token does not use (experts not chosen)."""
        return 0
