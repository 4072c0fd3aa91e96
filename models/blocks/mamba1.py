"""`m`: Mamba-1, a state-space mixer with a decay per channel and state (arXiv:2312.00752)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from colonnade.kernels.linear import linear
from colonnade.kernels.norm import rms_norm
from colonnade.kernels.precision import wide
from colonnade.kernels.segments import StatePassing
from colonnade.kernels.selective_scan import selective_scan
from colonnade.models.blocks.base import Convolving, SubBlock
from colonnade.models.cards.base import Card
from colonnade.models.cards.mamba1 import SCAN
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.parameters import ParameterSpec, of_half
from colonnade.models.seams import Seam

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Context], Tensor]


class Projected(NamedTuple):
    """The result of the first half, and argument of the second. C channels."""

    z: Tensor  # [S, B, C] gate
    x: Tensor  # [S, B, C] convolved


def local_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int, context: Context,
    state_passing: StatePassing | None = None,
) -> Tensor:  # fmt: skip
    """Scans full sequences, or with `state_passing` segments: the `scan` seam's default."""
    state = context.cached("state")
    y, state = selective_scan(
        x, dt, A, B, C, D, chunk=chunk, documents=context.documents, initial_state=state,
        state_passing=state_passing,
    )  # fmt: skip
    context.put("state", state)
    return y


class InConv(Convolving):
    """Projects to z and x, and convolves x causally."""

    def forward(self, u: Tensor, context: Context) -> Projected:
        weight, bias = self.weight_of("conv_x"), self.weight_of("conv_x_bias")
        x = self.conv(linear(u, self.weight_of("x")), weight, bias, True, "conv_x", context)
        return Projected(linear(u, self.weight_of("z")), x)


class Decay(ParameterModule):
    """log A `[C, N]`, dt bias and the skip D `[C]`, in fp32 whatever the precision."""


class ScanOut(ParameterModule):
    """Projects to dt, B, C, scans, gates and projects back to `[S, B, D]`."""

    seams = (Seam("scan", local_scan, SCAN.kinds),)
    scan: Scan

    def __init__(self, records: list[ParameterSpec], config: ModelConfig) -> None:
        super().__init__(records)
        self.chunk = config.mamba1_chunk
        self.norm, self.eps = config.mamba1_norm, config.mamba1_norm_eps

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns low-rank dt `[S, B, R]`, B and C `[S, B, N]`, from all channels of a token, each
        normed if configured.

        Where ranks shard the channels, all-reduces the partial products, in one call.
        """
        dt, B, C = (linear(x, self.weight_of(name)) for name in ("dt_a", "B", "C"))
        if self.sharding.size > 1:
            widths = [t.shape[-1] for t in (dt, B, C)]
            dt, B, C = self.sharding.all_reduce(torch.cat([dt, B, C], -1)).split(widths, -1)
        if self.norm == "none":
            return dt, B, C
        return self.normed(dt, "dt_a"), self.normed(B, "B"), self.normed(C, "C")

    def normed(self, x: Tensor, name: str) -> Tensor:
        """Returns low-rank dt, B or C after its RMSNorm."""
        weight = self.weight_of(f"{name}_norm") if self.norm == "weighted" else None
        return rms_norm(x, weight, self.eps)

    def forward(self, carried: tuple[Projected, Decay], context: Context) -> Tensor:
        (z, x), small = carried
        low_rank_dt, B, C = self.select(x)
        raw = linear(low_rank_dt, self.weight_of("dt_b"))
        dt = F.softplus(wide(raw) + small.weight_of("dt_bias"))
        A = -small.weight_of("A_log").exp()
        y = self.scan(x, dt, A, B, C, small.weight_of("D"), self.chunk, context)
        return linear(y * F.silu(z), self.weight_of("out"))


class Mamba1(SubBlock):
    """Halves: `projections, convolution | selection, scan, gate, out`."""

    small: Decay

    def __init__(self, card: Card, config: ModelConfig, out_std: float) -> None:
        super().__init__(card)
        records = card.records(config, out_std)
        self.first = InConv(of_half(records, "first"))
        self.small = Decay(of_half(records, "small"))
        self.second = ScanOut(of_half(records, "second"), config)

    def finish(self, carried: Projected, context: Context) -> Tensor:
        return self.second((carried, self.small), context)
