"""`D` and `G`: the delta rule, plain (arXiv:2406.06484) and gated (arXiv:2412.06464)."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from colonnade.kernels.delta import delta_rule
from colonnade.kernels.linear import linear
from colonnade.kernels.norm import l2_norm, rms_norm
from colonnade.kernels.precision import wide
from colonnade.kernels.segments import Passing
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

HEADS = "model.delta_heads"
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, int, Context], Tensor]


class Projected(NamedTuple):
    """What the first half hands to the second. K key heads of width P, H value heads of width V."""

    q: Tensor  # [S, B, K, P] convolved
    k: Tensor  # [S, B, K, P] convolved
    v: Tensor  # [S, B, H, V] convolved
    beta: Tensor  # [S, B, H] before the sigmoid
    dt: Tensor | None  # [S, B, H] before bias and softplus (gated)
    z: Tensor | None  # [S, B, H, V] gate of the output (gated)


def scan_here(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    chunk: int,
    context: Context,
    passing: Passing | None = None,
) -> Tensor:
    """The `scan` seam's default: all of the sequence is here, or `passing` tells of the rest."""
    state = context.cached("state")
    o, state = delta_rule(
        q, k, v, beta, decay, chunk=chunk, documents=context.documents, initial_state=state,
        passing=passing,
    )  # fmt: skip
    context.put("state", state)
    return o


class InConv(Convolving):
    """Projections, and the causal convolutions of q, k, v."""

    def __init__(self, config: ModelConfig, key_heads: int, heads: int, gated: bool) -> None:
        super().__init__()
        self.key, self.gated = config.delta_key_dim, gated
        self.value = config.delta_value_dim or self.key
        keys, values = key_heads * self.key, heads * self.value
        widths = {"q": keys, "k": keys, "v": values, "beta": heads}
        if gated:
            widths |= {"dt": heads, "z": values}
        own = Split(0, heads, HEADS)
        shared = Split(0, key_heads, "model.delta_key_heads", shared=True)
        bound = config.delta_conv**-0.5  # a depthwise filter's fan-in is its width
        for name, width in widths.items():
            split = shared if name in "qk" and config.delta_key_heads else own
            shape = width, config.hidden
            self.declare(name, shape, normal(config.init_std), "reads", split=split)
            if name in ("q", "k", "v"):
                taps = width, config.delta_conv
                self.declare(f"conv_{name}", taps, uniform(-bound, bound), split=split)

    def forward(self, x: Tensor, context: Context) -> Projected:
        def convolved(name: str, width: int) -> Tensor:
            y, weight = linear(x, self.weight_of(name)), self.weight_of(f"conv_{name}")
            y = self.conv(y, weight, None, True, f"conv_{name}", context)
            return y.unflatten(-1, (-1, width))

        return Projected(
            convolved("q", self.key),
            convolved("k", self.key),
            convolved("v", self.value),
            linear(x, self.weight_of("beta")),
            linear(x, self.weight_of("dt")) if self.gated else None,
            linear(x, self.weight_of("z")).unflatten(-1, (-1, self.value)) if self.gated else None,
        )


class Decay(Part):
    """log A and dt bias, `[H]` each (gated), in fp32 whatever the precision."""

    def __init__(self, heads: int, gated: bool) -> None:
        super().__init__()
        if gated:
            split = Split(0, heads, HEADS)
            self.declare("A_log", (heads,), log_uniform_a(0.01, 16.0), split=split)
            self.declare("dt_bias", (heads,), inverse_softplus_dt(1e-3, 0.1, 1e-4), split=split)

    def log_decay(self, dt: Tensor | None) -> Tensor | None:
        """−exp(A_log) softplus(dt + bias), `[S, B, H]`."""
        if dt is None:
            return None
        return -self.weight_of("A_log").exp() * F.softplus(wide(dt) + self.weight_of("dt_bias"))


class DeltaOut(Part):
    """Delta rule, norm per head, gate, output projection: back to `[S, B, D]`."""

    seams = (
        Seam(
            "scan", scan_here,
            {"q": "group", "k": "group", "v": "head", "beta": "head", "decay": "head"},
        ),
    )  # fmt: skip
    scan: Scan

    def __init__(self, config: ModelConfig, heads: int, out_std: float) -> None:
        super().__init__()
        self.chunk, self.eps = config.delta_chunk, config.norm_eps
        self.strength = 2.0 if config.delta_negative else 1.0
        value = config.delta_value_dim or config.delta_key_dim
        self.declare("norm", (value,), constant(1.0))
        shape, split = (config.hidden, heads * value), Split(1, heads, HEADS)
        self.declare("out", shape, normal(out_std), "writes", split=split)

    def forward(self, carried: tuple[Projected, Tensor | None], context: Context) -> Tensor:
        p, decay = carried
        q = l2_norm(p.q, 1e-6) * p.q.shape[-1] ** -0.5
        beta = wide(p.beta).sigmoid() * self.strength
        o = self.scan(q, l2_norm(p.k, 1e-6), p.v, beta, decay, self.chunk, context)
        o = rms_norm(o, self.weight_of("norm"), self.eps)
        if p.z is not None:
            o = (wide(o) * F.silu(wide(p.z))).to(o.dtype)
        return linear(o.flatten(-2), self.weight_of("out"))


class DeltaNet(SubBlock):
    """Halves: `projections, convolution | delta rule, norm, gate, out`."""

    mixes = "sequence"

    small: Decay

    def __init__(self, config: ModelConfig, out_std: float, gated: bool) -> None:
        super().__init__()
        self.config = config
        self.heads = config.delta_heads or config.hidden // config.delta_key_dim
        self.first = InConv(config, config.delta_key_heads or self.heads, self.heads, gated)
        self.small = Decay(self.heads, gated)
        self.second = DeltaOut(config, self.heads, out_std)

    def finish(self, carried: Projected, context: Context) -> Tensor:
        return self.second((carried, self.small.log_decay(carried.dt)), context)

    def mixing_flops(self, seq_len: int, index: int) -> int:
        # per token and head: K Kᵀ, Q Kᵀ and the solve over half a chunk, its products with K and
        # V, and reading, correcting and writing the state
        c = self.config
        key, value = c.delta_key_dim, c.delta_value_dim or c.delta_key_dim
        half = min(c.delta_chunk, seq_len) // 2
        inside = 2 * half * (3 * key + 2 * value)
        return self.heads * (inside + 6 * key * value)
