"""`M`: Mamba-2, a state-space mixer with scalar decay per head (arXiv:2405.21060)."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from colonnade.kernels.linear import linear
from colonnade.kernels.norm import rms_norm
from colonnade.kernels.precision import wide
from colonnade.kernels.segments import Passing
from colonnade.kernels.ssd import ssd
from colonnade.models.blocks.base import Convolving, SubBlock
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.part import (
    Part,
    Split,
    constant,
    inverse_softplus_dt,
    log_uniform_a,
    normal,
    uniform,
)
from colonnade.models.seams import Seam


class Projected(NamedTuple):
    """What the first half hands to the second. P head width, G groups, N state."""

    z: Tensor  # [S, B, H*P] gate
    x: Tensor  # [S, B, H*P] convolved
    B: Tensor  # [S, B, G*N] convolved
    C: Tensor  # [S, B, G*N] convolved
    dt: Tensor  # [S, B, H] before bias and softplus


HEADS = "model.mamba_heads"
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Context], Tensor]


def scan_here(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int, context: Context,
    passing: Passing | None = None,
) -> Tensor:  # fmt: skip
    """The `scan` seam's default: all of the sequence is here, or `passing` tells of the rest."""
    state = context.cached("state")
    y, state = ssd(
        x, dt, A, B, C, D, chunk=chunk, documents=context.documents, initial_state=state,
        passing=passing,
    )  # fmt: skip
    context.put("state", state)
    return y


class InConv(Convolving):
    """Projections to z, x, B, C, dt, and the causal convolution of x, B, C."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        inner = heads * config.mamba_head_dim
        state = config.mamba_groups * config.mamba_state
        own, groups = (
            Split(0, heads, HEADS),
            Split(0, config.mamba_groups, "model.mamba_groups", shared=True),
        )
        widths = {"z": inner, "x": inner, "B": state, "C": state, "dt": heads}
        bound = config.mamba_conv**-0.5  # a depthwise filter's fan-in is its width
        for name, width in widths.items():
            split, filled = groups if name in "BC" else own, normal(config.init_std)
            self.declare(name, (width, config.hidden), filled, "reads", split=split)
            if name in "xBC":
                taps, filled = (width, config.mamba_conv), uniform(-bound, bound)
                self.declare(f"conv_{name}", taps, filled, split=split)
                self.declare(f"conv_{name}_bias", taps[:1], filled, split=split)

    def forward(self, u: Tensor, context: Context) -> Projected:
        parts = {name: linear(u, self.weight_of(name)) for name in Projected._fields}
        for name in "xBC":
            weight, bias = self.weight_of(f"conv_{name}"), self.weight_of(f"conv_{name}_bias")
            parts[name] = self.conv(parts[name], weight, bias, True, f"conv_{name}", context)
        return Projected(**parts)


class Decay(Part):
    """log A, dt bias and the skip D, `[H]` each, in fp32 whatever the precision."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        split = Split(0, heads, HEADS)
        self.declare("A_log", (heads,), log_uniform_a(1.0, 16.0), split=split)
        self.declare("dt_bias", (heads,), inverse_softplus_dt(1e-3, 0.1, 1e-4), split=split)
        self.declare("D", (heads,), constant(1.0), split=split)


class ScanOut(Part):
    """Scan, gated norm within groups, output projection: back to `[S, B, D]`."""

    seams = (
        Seam(
            "scan", scan_here,
            {"x": "head", "dt": "head", "A": "constant", "B": "group", "C": "group",
             "D": "constant"},
        ),
    )  # fmt: skip
    scan: Scan

    def __init__(self, config: ModelConfig, heads: int, out_std: float) -> None:
        super().__init__()
        self.width, self.state = config.mamba_head_dim, config.mamba_state
        self.groups, self.chunk, self.eps = config.mamba_groups, config.mamba_chunk, config.norm_eps
        inner = heads * self.width
        self.declare("norm", (inner,), constant(1.0), split=Split(0, heads, HEADS))
        shape, split = (config.hidden, inner), Split(1, heads, HEADS)
        self.declare("out", shape, normal(out_std), "writes", split=split)

    def forward(
        self, carried: tuple[Projected, Tensor, Tensor, Tensor], context: Context
    ) -> Tensor:
        p, dt, A, D = carried
        x = p.x.unflatten(-1, (-1, self.width))
        B, C = (t.unflatten(-1, (-1, self.state)) for t in (p.B, p.C))
        y = self.scan(x, dt, A, B, C, D, self.chunk, context).flatten(-2) * F.silu(p.z)
        here = B.shape[-2]  # groups, or the part of one that this rank has
        grouped, weight = y.unflatten(-1, (here, -1)), self.weight_of("norm").view(here, -1)
        normed = rms_norm(grouped, weight, self.eps, mean=self.cut.mean(self.groups))
        return linear(normed.flatten(-2), self.weight_of("out"))


class Mamba2(SubBlock):
    """Halves: `projections, convolution | scan, gated norm, out`."""

    mixes = "sequence"

    small: Decay

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        super().__init__()
        self.config = config
        self.heads = config.mamba_heads or 2 * config.hidden // config.mamba_head_dim
        self.first = InConv(config, self.heads)
        self.small = Decay(self.heads)
        self.second = ScanOut(config, self.heads, out_std)

    def finish(self, carried: Projected, context: Context) -> Tensor:
        small = self.small
        dt = F.softplus(wide(carried.dt) + small.weight_of("dt_bias"))
        A = -small.weight_of("A_log").exp()
        return self.second((carried, dt, A, small.weight_of("D")), context)

    def mixing_flops(self, seq_len: int, index: int) -> int:
        # per token: C Bᵀ per group and its product with x over half a chunk, state in and state out
        c = self.config
        half = min(c.mamba_chunk, seq_len) // 2
        inside = 2 * half * (c.mamba_groups * c.mamba_state + self.heads * c.mamba_head_dim)
        return inside + 4 * self.heads * c.mamba_head_dim * c.mamba_state
