"""`m`: Mamba-1, a state-space mixer with a decay per channel and state (arXiv:2312.00752)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from colonnade.kernels.linear import linear
from colonnade.kernels.precision import wide
from colonnade.kernels.segments import Passing
from colonnade.kernels.selective_scan import selective_scan
from colonnade.models.blocks.base import Convolving, SubBlock
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.part import (
    Part,
    Split,
    constant,
    inverse_softplus_dt,
    log_counting,
    normal,
    uniform,
)
from colonnade.models.seams import Seam

CHANNELS = "model.mamba1_inner"
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Context], Tensor]


class Projected(NamedTuple):
    """What the first half hands to the second. C channels."""

    z: Tensor  # [S, B, C] gate
    x: Tensor  # [S, B, C] convolved


def scan_here(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int, context: Context,
    passing: Passing | None = None,
) -> Tensor:  # fmt: skip
    """The `scan` seam's default: all of the sequence is here, or `passing` tells of the rest."""
    state = context.cached("state")
    y, state = selective_scan(
        x, dt, A, B, C, D, chunk=chunk, documents=context.documents, initial_state=state,
        passing=passing,
    )  # fmt: skip
    context.put("state", state)
    return y


class InConv(Convolving):
    """Projections to z and x, and the causal convolution of x."""

    def __init__(self, config: ModelConfig, inner: int) -> None:
        super().__init__()
        split = Split(0, inner, CHANNELS)
        for name in "zx":
            self.declare(
                name, (inner, config.hidden), normal(config.init_std), "reads", split=split
            )
        bound = config.mamba1_conv**-0.5  # a depthwise filter's fan-in is its width
        self.declare("conv_x", (inner, config.mamba1_conv), uniform(-bound, bound), split=split)
        self.declare("conv_x_bias", (inner,), uniform(-bound, bound), split=split)

    def forward(self, u: Tensor, context: Context) -> Projected:
        weight, bias = self.weight_of("conv_x"), self.weight_of("conv_x_bias")
        x = self.conv(linear(u, self.weight_of("x")), weight, bias, True, "conv_x", context)
        return Projected(linear(u, self.weight_of("z")), x)


class Decay(Part):
    """log A `[C, N]`, dt bias and the skip D `[C]`, in fp32 whatever the precision."""

    def __init__(self, inner: int, state: int) -> None:
        super().__init__()
        split = Split(0, inner, CHANNELS)
        self.declare("A_log", (inner, state), log_counting, decay=False, split=split)
        self.declare("dt_bias", (inner,), inverse_softplus_dt(1e-3, 0.1, 1e-4), split=split)
        self.declare("D", (inner,), constant(1.0), split=split)


def rank_of(config: ModelConfig) -> int:
    """The rank of dt."""
    return config.mamba1_rank or -(-config.hidden // 16)


class ScanOut(Part):
    """Selection of dt, B, C, scan, gate, output projection: back to `[S, B, D]`."""

    seams = (
        Seam(
            "scan", scan_here,
            {"x": "head", "dt": "head", "A": "constant", "B": "shared", "C": "shared",
             "D": "constant"},
        ),
    )  # fmt: skip
    scan: Scan

    def __init__(self, config: ModelConfig, inner: int, out_std: float) -> None:
        super().__init__()
        self.chunk, rank = config.mamba1_chunk, rank_of(config)
        bound = rank_of(config.base() or config) ** -0.5  # muP scales the base's bound by itself
        for name, width in (("dt_a", rank), ("B", config.mamba1_state), ("C", config.mamba1_state)):
            shape, split = (width, inner), Split(1, inner, CHANNELS)
            self.declare(name, shape, normal(config.init_std), "inner", split=split)
        split = Split(0, inner, CHANNELS)
        self.declare("dt_b", (inner, rank), uniform(-bound, bound), "inner", split=split)
        shape, split = (config.hidden, inner), Split(1, inner, CHANNELS)
        self.declare("out", shape, normal(out_std), "writes", split=split)

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt within its rank, B and C of every token, from all channels: `[S, B, R or N]`."""
        dt, B, C = (linear(x, self.weight_of(name)) for name in ("dt_a", "B", "C"))
        if self.cut.count == 1:
            return dt, B, C
        widths = [t.shape[-1] for t in (dt, B, C)]
        dt, B, C = self.cut.total(torch.cat([dt, B, C], -1)).split(widths, -1)
        return dt, B, C

    def forward(self, carried: tuple[Projected, Decay], context: Context) -> Tensor:
        (z, x), small = carried
        low, B, C = self.select(x)
        raw = linear(low, self.weight_of("dt_b"))
        dt = F.softplus(wide(raw) + small.weight_of("dt_bias"))
        A = -small.weight_of("A_log").exp()
        y = self.scan(x, dt, A, B, C, small.weight_of("D"), self.chunk, context)
        return linear(y * F.silu(z), self.weight_of("out"))


class Mamba1(SubBlock):
    """Halves: `projections, convolution | selection, scan, gate, out`."""

    mixes = "sequence"

    small: Decay

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        super().__init__()
        self.inner = config.mamba1_inner or 2 * config.hidden
        self.state = config.mamba1_state
        self.first = InConv(config, self.inner)
        self.small = Decay(self.inner, self.state)
        self.second = ScanOut(config, self.inner, out_std)

    def finish(self, carried: Projected, context: Context) -> Tensor:
        return self.second((carried, self.small), context)

    def mixing_flops(self, seq_len: int, index: int) -> int:
        return 6 * self.inner * self.state  # decay, write and read of every state, 2 each
