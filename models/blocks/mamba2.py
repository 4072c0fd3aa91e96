"""`M`: Mamba-2, a state-space mixer with scalar decay per head (arXiv:2405.21060)."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from colonnade.kernels.linear import linear
from colonnade.kernels.norm import rms_norm
from colonnade.kernels.precision import wide
from colonnade.kernels.segments import StatePassing
from colonnade.kernels.ssd import ssd
from colonnade.models.blocks.base import Convolving, SubBlock
from colonnade.models.cards.base import Card
from colonnade.models.cards.mamba2 import SCAN
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.parameters import ParameterSpec, of_half
from colonnade.models.seams import Seam


class Projected(NamedTuple):
    """The result of the first half. H heads of width P, G groups, N state."""

    z: Tensor  # [S, B, H*P] gate
    x: Tensor  # [S, B, H*P] convolved
    B: Tensor  # [S, B, G*N] convolved
    C: Tensor  # [S, B, G*N] convolved
    dt: Tensor  # [S, B, H] before bias and softplus


Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Context], Tensor]


def local_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int, context: Context,
    state_passing: StatePassing | None = None,
) -> Tensor:  # fmt: skip
    """Scans full sequences, or with `state_passing` segments: the `scan` seam's default."""
    state = context.cached("state")
    y, state = ssd(
        x, dt, A, B, C, D, chunk=chunk, documents=context.documents, initial_state=state,
        state_passing=state_passing,
    )  # fmt: skip
    context.put("state", state)
    return y


class InConv(Convolving):
    """Projects to z, x, B, C, dt, and convolves x, B and C causally."""

    def forward(self, u: Tensor, context: Context) -> Projected:
        projected = {name: linear(u, self.weight_of(name)) for name in Projected._fields}
        for name in "xBC":
            weight, bias = self.weight_of(f"conv_{name}"), self.weight_of(f"conv_{name}_bias")
            projected[name] = self.conv(
                projected[name], weight, bias, True, f"conv_{name}", context
            )
        return Projected(**projected)


class Decay(ParameterModule):
    """log A, dt bias and the skip D, `[H]` each, in fp32 whatever the precision."""


class ScanOut(ParameterModule):
    """Scans, gates, norms within groups and projects back to `[S, B, D]`."""

    seams = (Seam("scan", local_scan, SCAN.kinds),)
    scan: Scan

    def __init__(self, records: list[ParameterSpec], config: ModelConfig) -> None:
        super().__init__(records)
        self.width, self.state = config.mamba_head_dim, config.mamba_state
        self.groups, self.chunk, self.eps = config.mamba_groups, config.mamba_chunk, config.norm_eps

    def forward(
        self, carried: tuple[Projected, Tensor, Tensor, Tensor], context: Context
    ) -> Tensor:
        p, dt, A, D = carried
        x = p.x.unflatten(-1, (-1, self.width))
        B, C = (t.unflatten(-1, (-1, self.state)) for t in (p.B, p.C))
        y = self.scan(x, dt, A, B, C, D, self.chunk, context).flatten(-2) * F.silu(p.z)
        local_groups = B.shape[
            -2
        ]  # 1 where several ranks hold the same group, each some heads of it
        grouped = y.unflatten(-1, (local_groups, -1))
        weight = self.weight_of("norm").view(local_groups, -1)
        mean = self.sharding.mean_over_ranks(self.groups)
        normed = rms_norm(grouped, weight, self.eps, mean=mean)
        return linear(normed.flatten(-2), self.weight_of("out"))


class Mamba2(SubBlock):
    """Halves: `projections, convolution | scan, gated norm, out`."""

    small: Decay

    def __init__(self, card: Card, config: ModelConfig, out_std: float) -> None:
        super().__init__(card)
        records = card.records(config, out_std)
        self.first = InConv(of_half(records, "first"))
        self.small = Decay(of_half(records, "small"))
        self.second = ScanOut(of_half(records, "second"), config)

    def finish(self, carried: Projected, context: Context) -> Tensor:
        small = self.small
        dt = F.softplus(wide(carried.dt) + small.weight_of("dt_bias"))
        A = -small.weight_of("A_log").exp()
        return self.second((carried, dt, A, small.weight_of("D")), context)
