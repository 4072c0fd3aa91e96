"""`*` with `attention = "mla"`: DeepSeek's latent attention (arXiv:2405.04434, section 2.1)."""

import torch
from torch import Tensor

from colonnade.kernels.linear import linear
from colonnade.kernels.norm import rms_norm
from colonnade.kernels.rope import rotate
from colonnade.models.blocks.attention import Attention, Projected, Rotary
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.parameters import ParameterSpec


class Latents(ParameterModule):
    """Projects to queries, and to keys and values through a latent, the only cached tensor.

    A key is the concatenation of the head's channels and of rotary channels that all heads share,
    which are cached too.
    """

    seams = ()

    def __init__(self, records: list[ParameterSpec], config: ModelConfig) -> None:
        super().__init__(records)
        c = config
        self.head_dim, self.value_dim = c.head_dim, c.value_dim
        self.rotary, self.eps, self.shared = Rotary(c), c.latent_norm_eps, c.rope_dim
        self.window_of = c.window_of

    def queries(self, x: Tensor) -> Tensor:
        """Returns queries, `[S, B, H * P]`."""
        if "q" in self.specs:
            return linear(x, self.weight_of("q"))
        latent = rms_norm(linear(x, self.weight_of("q_a")), self.weight_of("q_norm"), self.eps)
        return linear(latent, self.weight_of("q_b"))

    def forward(self, x: Tensor, context: Context) -> Projected:
        latent = rms_norm(linear(x, self.weight_of("kv_a")), self.weight_of("kv_norm"), self.eps)
        k_rope = linear(x, self.weight_of("k_rope"))[..., None, :]
        q = self.queries(x).unflatten(-1, (-1, self.head_dim + self.shared))
        if (table := self.rotary.table(context, x.dtype)) is not None:
            q_head, q_rope = q.split([self.head_dim, self.shared], dim=-1)
            q = torch.cat([q_head, rotate(q_rope, table)], dim=-1)
            k_rope = rotate(k_rope, table)
        last = None if (window := self.window_of(context.index)) is None else window - 1
        latent = context.append_to_cache("latent", latent, last)
        k_rope = context.append_to_cache("k_rope", k_rope, last)
        k = linear(latent, self.weight_of("k_b")).unflatten(-1, (-1, self.head_dim))
        v = linear(latent, self.weight_of("v_b")).unflatten(-1, (-1, self.value_dim))
        k = torch.cat([k, k_rope.expand(*k.shape[:-1], -1)], dim=-1)
        return Projected(q, k, v, None)


class LatentAttention(Attention):
    """Halves: `queries, latent, keys, values | attend, out`."""

    @staticmethod
    def projections(records: list[ParameterSpec], config: ModelConfig) -> ParameterModule:
        """Builds the first half."""
        return Latents(records, config)

    def begin(self, x: Tensor, context: Context) -> Projected:
        p: Projected = self.first(x, context)
        return p._replace(q=self.small.scale(p.q, context.positions))
