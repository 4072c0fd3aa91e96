"""`*` with `attention = "mla"`: DeepSeek's latent attention (arXiv:2405.04434, section 2.1)."""

import torch
from torch import Tensor

from colonnade.kernels.linear import linear
from colonnade.kernels.norm import rms_norm
from colonnade.kernels.rope import rotate
from colonnade.models.blocks.attention import (
    AttendOut,
    Attention,
    Projected,
    Temperature,
    rope_scaling,
    score_scale,
)
from colonnade.models.blocks.base import SubBlock
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.part import Part, Split, constant, normal


def latent_eps(config: ModelConfig) -> float:
    """The epsilon of the norms of latents."""
    return config.norm_eps if config.latent_norm_eps is None else config.latent_norm_eps


class Latents(Part):
    """Queries; keys and values through a latent that is all a cache has to hold.

    A head's key is its own channels beside rotated ones that all heads share.
    """

    seams = ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.own = c.head_dim or c.hidden // c.heads
        self.value = c.value_dim or self.own
        self.rotated, self.rope, self.theta = c.rope_dim, c.positions == "rope", c.rope_theta
        self.scaling, self.eps, self.q_rank = rope_scaling(c), latent_eps(c), c.q_rank
        self.window_of = c.window_of
        queries = c.heads * (self.own + self.rotated)
        q_std, split = 0.0 if c.zero_init else c.init_std, Split(0, c.heads, "model.heads")
        if c.q_rank:
            self.declare("q_a", (c.q_rank, c.hidden), normal(c.init_std), "reads")
            self.declare("q_norm", (c.q_rank,), constant(1.0))
            self.declare("q_b", (queries, c.q_rank), normal(q_std), "inner", split=split)
        else:
            self.declare("q", (queries, c.hidden), normal(q_std), "reads", split=split)
        self.declare("kv_a", (c.kv_rank, c.hidden), normal(c.init_std), "reads")
        self.declare("kv_norm", (c.kv_rank,), constant(1.0))
        self.declare("k_rope", (self.rotated, c.hidden), normal(c.init_std), "reads")
        for name, width in (("k_b", self.own), ("v_b", self.value)):
            shape = c.heads * width, c.kv_rank
            self.declare(name, shape, normal(c.init_std), "inner", split=split)

    def queries(self, x: Tensor) -> Tensor:
        """`[S, B, H * P]`."""
        if not self.q_rank:
            return linear(x, self.weight_of("q"))
        latent = rms_norm(linear(x, self.weight_of("q_a")), self.weight_of("q_norm"), self.eps)
        return linear(latent, self.weight_of("q_b"))

    def forward(self, x: Tensor, context: Context) -> Projected:
        latent = rms_norm(linear(x, self.weight_of("kv_a")), self.weight_of("kv_norm"), self.eps)
        shared = linear(x, self.weight_of("k_rope"))[..., None, :]
        q = self.queries(x).unflatten(-1, (-1, self.own + self.rotated))
        if self.rope:
            table = context.rope(self.rotated, self.theta, x.dtype, self.scaling)
            own, turned = q.split([self.own, self.rotated], dim=-1)
            q, shared = torch.cat([own, rotate(turned, table)], dim=-1), rotate(shared, table)
        last = None if (window := self.window_of(context.index)) is None else window - 1
        latent = context.extended("latent", latent, last)
        shared = context.extended("k_rope", shared, last)
        k = linear(latent, self.weight_of("k_b")).unflatten(-1, (-1, self.own))
        v = linear(latent, self.weight_of("v_b")).unflatten(-1, (-1, self.value))
        k = torch.cat([k, shared.expand(*k.shape[:-1], -1)], dim=-1)
        return Projected(q, k, v, None)


class LatentAttention(Attention):
    """Halves: `queries, latent, keys, values | attend, out`."""

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        SubBlock.__init__(self)
        self.config, self.scale = config, score_scale(config)
        self.first = Latents(config)
        self.small = Temperature(config)
        self.second = AttendOut(config, self.first.value, out_std)

    def begin(self, x: Tensor, context: Context) -> Projected:
        p: Projected = self.first(x, context)
        return p._replace(q=self.small.scale(p.q, context.positions))
