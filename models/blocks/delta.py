"""`D` and `G`: the delta rule, plain (arXiv:2406.06484) and gated (arXiv:2412.06464)."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from colonnade.kernels.delta import delta_rule
from colonnade.kernels.linear import linear
from colonnade.kernels.norm import l2_norm, rms_norm
from colonnade.kernels.precision import wide
from colonnade.kernels.segments import StatePassing
from colonnade.models.blocks.base import Convolving, SubBlock
from colonnade.models.cards.base import Card
from colonnade.models.cards.delta import delta_mixing
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.parameters import ParameterSpec, of_half
from colonnade.models.seams import Seam

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, int, Context], Tensor]


class Projected(NamedTuple):
    """The result of the first half: K key heads of width P, H value heads of width V."""

    q: Tensor  # [S, B, K, P] convolved
    k: Tensor  # [S, B, K, P] convolved
    v: Tensor  # [S, B, H, V] convolved
    beta: Tensor  # [S, B, H] before the sigmoid
    dt: Tensor | None  # [S, B, H] before bias and softplus (gated)
    z: Tensor | None  # [S, B, H, V] gate of the output (gated)


def local_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    chunk: int,
    context: Context,
    state_passing: StatePassing | None = None,
) -> Tensor:
    """Scans full sequences, or with `state_passing` segments: the `scan` seam's default."""
    state = context.cached("state")
    o, state = delta_rule(
        q, k, v, beta, decay, chunk=chunk, documents=context.documents, initial_state=state,
        state_passing=state_passing,
    )  # fmt: skip
    context.put("state", state)
    return o


class InConv(Convolving):
    """Projects the input, and convolves q, k and v causally."""

    def __init__(self, records: list[ParameterSpec], key: int, value: int) -> None:
        super().__init__(records)
        self.key, self.value = key, value

    def forward(self, x: Tensor, context: Context) -> Projected:
        def convolved(name: str, width: int) -> Tensor:
            y, weight = linear(x, self.weight_of(name)), self.weight_of(f"conv_{name}")
            y = self.conv(y, weight, None, True, f"conv_{name}", context)
            return y.unflatten(-1, (-1, width))

        gate = None
        if "z" in self.specs:
            gate = linear(x, self.weight_of("z")).unflatten(-1, (-1, self.value))
        return Projected(
            convolved("q", self.key),
            convolved("k", self.key),
            convolved("v", self.value),
            linear(x, self.weight_of("beta")),
            linear(x, self.weight_of("dt")) if "dt" in self.specs else None,
            gate,
        )


class Decay(ParameterModule):
    """log A and dt bias, `[H]` each (gated), in fp32 whatever the precision."""

    def log_decay(self, dt: Tensor | None) -> Tensor | None:
        """Returns −exp(A_log) softplus(dt + bias), `[S, B, H]`; None if not gated."""
        if dt is None:
            return None
        return -self.weight_of("A_log").exp() * F.softplus(wide(dt) + self.weight_of("dt_bias"))


class DeltaOut(ParameterModule):
    """Applies delta rule, norm per head, gate and output projection: back to `[S, B, D]`."""

    seams = (Seam("scan", local_scan, delta_mixing(gated=True).kinds),)
    scan: Scan

    def __init__(self, records: list[ParameterSpec], config: ModelConfig) -> None:
        super().__init__(records)
        self.chunk, self.eps = config.delta_chunk, config.delta_norm_eps
        self.max_beta = 2.0 if config.delta_negative else 1.0

    def forward(self, carried: tuple[Projected, Tensor | None], context: Context) -> Tensor:
        p, decay = carried
        q = l2_norm(p.q, 1e-6) * p.q.shape[-1] ** -0.5
        beta = wide(p.beta).sigmoid() * self.max_beta
        o = self.scan(q, l2_norm(p.k, 1e-6), p.v, beta, decay, self.chunk, context)
        o = rms_norm(o, self.weight_of("norm"), self.eps)
        if p.z is not None:
            o = (wide(o) * F.silu(wide(p.z))).to(o.dtype)
        return linear(o.flatten(-2), self.weight_of("out"))


class DeltaNet(SubBlock):
    """Halves: `projections, convolution | delta rule, norm, gate, out`."""

    small: Decay

    def __init__(self, card: Card, config: ModelConfig, out_std: float) -> None:
        super().__init__(card)
        records = card.records(config, out_std)
        self.first = InConv(of_half(records, "first"), config.delta_key_dim, config.delta_value_dim)
        self.small = Decay(of_half(records, "small"))
        self.second = DeltaOut(of_half(records, "second"), config)

    def finish(self, carried: Projected, context: Context) -> Tensor:
        return self.second((carried, self.small.log_decay(carried.dt)), context)
