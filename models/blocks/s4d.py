"""`S`: S4D, a diagonal linear state space, the same at every token (arXiv:2206.11893)."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from colonnade.kernels.linear import linear
from colonnade.kernels.s4d import s4d
from colonnade.kernels.segments import StatePassing
from colonnade.models.blocks.base import SubBlock
from colonnade.models.cards.base import Card
from colonnade.models.cards.s4d import SCAN
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.parameters import ParameterSpec, of_half
from colonnade.models.seams import Seam

# x, dt, real and imaginary part of A and of C, D, tokens per chunk, context
Scan = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Context], Tensor
]  # fmt: skip


class Projected(NamedTuple):
    """The result of the first half, and argument of the second. C channels."""

    z: Tensor  # [S, B, C] gate
    x: Tensor  # [S, B, C]


def local_scan(
    x: Tensor, dt: Tensor, A_real: Tensor, A_imag: Tensor, C_real: Tensor, C_imag: Tensor,
    D: Tensor, chunk: int, context: Context, state_passing: StatePassing | None = None,
) -> Tensor:  # fmt: skip
    """Scans full sequences, or with `state_passing` segments: the `scan` seam's default."""
    state = context.cached("state")
    y, state = s4d(
        x, dt, A_real, A_imag, C_real, C_imag, D, chunk=chunk, documents=context.documents,
        initial_state=state, state_passing=state_passing,
    )  # fmt: skip
    context.put("state", state)
    return y


class Projections(ParameterModule):
    """Projects to z and x."""

    seams = ()

    def forward(self, u: Tensor, context: Context) -> Projected:
        return Projected(linear(u, self.weight_of("z")), linear(u, self.weight_of("x")))


class StateSpace(ParameterModule):
    """Steps, A, C and the skip D, in fp32 whatever the precision."""

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Computes dt `[C]`, real and imaginary part of A and of C, `[C, N]` each, and D `[C]`."""
        dt, A_real = self.weight_of("log_dt").exp(), -self.weight_of("A_real_log").exp()
        A_imag, C_real, C_imag, D = map(self.weight_of, ("A_imag", "C_real", "C_imag", "D"))
        return dt, A_real, A_imag, C_real, C_imag, D


class ScanOut(ParameterModule):
    """Scans, applies GELU and the gate, and projects back to `[S, B, D]`."""

    seams = (Seam("scan", local_scan, SCAN.kinds),)
    scan: Scan

    def __init__(self, records: list[ParameterSpec], chunk: int) -> None:
        super().__init__(records)
        self.chunk = chunk

    def forward(self, carried: tuple[Projected, StateSpace], context: Context) -> Tensor:
        (z, x), small = carried
        y = self.scan(x, *small.system(), self.chunk, context)
        return linear(F.gelu(y) * F.silu(z), self.weight_of("out"))


class S4D(SubBlock):
    """Halves: `projections | scan, GELU, gate, out`."""

    small: StateSpace

    def __init__(self, card: Card, config: ModelConfig, out_std: float) -> None:
        super().__init__(card)
        records = card.records(config, out_std)
        self.first = Projections(of_half(records, "first"))
        self.small = StateSpace(of_half(records, "small"))
        self.second = ScanOut(of_half(records, "second"), config.s4d_chunk)

    def finish(self, carried: Projected, context: Context) -> Tensor:
        return self.second((carried, self.small), context)
