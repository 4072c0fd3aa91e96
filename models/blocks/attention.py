"""`*`: grouped-query softmax attention with rotary positions."""

from collections.abc import Callable

from torch import Tensor

from colonnade.kernels.attention import attention, rotate
from colonnade.kernels.linear import linear
from colonnade.models.blocks.base import SubBlock
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.part import Part, normal

Attend = Callable[[Tensor, Tensor, Tensor, Context], Tensor]


def attend_here(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """The `attend` seam's default: all keys and values are on this device."""
    return attention(q, k, v, context.mask)


class QKV(Part):
    """Queries, keys and values, with positions: `[S, B, D]` to `[S, B, heads, P]` each."""

    def __init__(self, config: ModelConfig, heads: int, kv_heads: int, width: int) -> None:
        super().__init__()
        self.width, self.theta = width, config.rope_theta
        self.rope = config.positions == "rope"
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            self.declare(name, (count * width, config.hidden), normal(config.init_std))

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            linear(x, self.weight_of(name)).unflatten(-1, (-1, self.width)) for name in "qkv"
        )
        if self.rope:
            table = context.rope(self.width, self.theta, x.dtype)
            q, k = rotate(q, table), rotate(k, table)
        return q, k, v


class AttendOut(Part):
    """Attention and its output projection: back to `[S, B, D]`."""

    def __init__(self, config: ModelConfig, heads: int, width: int, out_std: float) -> None:
        super().__init__()
        self.attend: Attend = attend_here
        self.declare("out", (config.hidden, heads * width), normal(out_std))

    def forward(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> Tensor:
        return linear(self.attend(*qkv, context).flatten(-2), self.weight_of("out"))


class Attention(SubBlock):
    """Halves: `q, k, v, positions | attend, out`."""

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        super().__init__()
        self.heads, self.width = config.heads, config.head_dim or config.hidden // config.heads
        kv_heads = config.kv_heads or config.heads
        self.first = QKV(config, self.heads, kv_heads, self.width)
        self.second = AttendOut(config, self.heads, self.width, out_std)

    def mixing_flops(self, seq_len: int) -> int:
        # scores and values, 2 FLOPs each per visible key, of which a causal query sees half
        return 2 * seq_len * self.heads * self.width
