"""`*`: softmax attention over grouped queries, and the base class of latent attention."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from colonnade.kernels.attention import attention
from colonnade.kernels.norm import rms_norm
from colonnade.kernels.precision import wide, wide_dtype
from colonnade.kernels.rope import RopeScaling, rotate, yarn_mscale
from colonnade.models.blocks.base import Convolving, SubBlock
from colonnade.models.cards.attention import ATTEND, rotated_width
from colonnade.models.cards.base import Card
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.parameter_module import ParameterModule
from colonnade.models.parameters import ParameterSpec, of_half
from colonnade.models.seams import Seam


@dataclass(frozen=True, eq=False)
class Softmax:
    """Options of the softmax over scores, by their names in `kernels.attention.attention`."""

    scale: float
    window: int | None = None
    cap: float | None = None
    sinks: Tensor | None = None  # [H]
    clip: tuple[float, float] | None = None


class Projected(NamedTuple):
    """The result of the first half, and argument of the second."""

    q: Tensor  # [S, B, H, P]
    k: Tensor  # [S, B, K, P], after the cached keys of earlier tokens if the context has a cache
    v: Tensor  # [S, B, K, V]
    gate: Tensor | None  # [S, B, H, 1] or [S, B, H, V], before the sigmoid


Attend = Callable[[Tensor, Tensor, Tensor, Softmax, Context], Tensor]


def local_attend(q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, context: Context) -> Tensor:
    """Attends to keys and values on this device: the `attend` seam's default."""
    return attention(q, k, v, documents=context.key_documents(len(k)), **vars(softmax))


def rope_scaling(config: ModelConfig) -> RopeScaling | None:
    """Returns the configured scaling of rotary positions; None without."""
    c = config
    if c.rope_scaling == "none":
        return None
    return RopeScaling(
        c.rope_scaling, c.rope_factor, c.rope_original, low=c.rope_low, high=c.rope_high,
        fast=c.rope_fast, slow=c.rope_slow, mscale=c.rope_mscale, mscale_all=c.rope_mscale_all,
        attention_factor=c.rope_attention_factor, truncate=c.rope_truncate,
    )  # fmt: skip


class Rotary:
    """The rotary positions of the attentions of a row."""

    def __init__(self, config: ModelConfig) -> None:
        self.width, self.scaling = rotated_width(config), rope_scaling(config)
        self.rope_of = config.rope_of

    # Inside the graphs of sub-blocks, the first would compute it and differ from the others, and
    # each would be guarded on its index.
    @torch.compiler.disable
    def table(self, context: Context, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Returns the rotary table of the sub-block at `context.index`; None: it has none."""
        rope = self.rope_of(context.index) if self.width else None
        if rope is None:
            return None
        theta, scaled = rope
        return context.rope(self.width, theta, dtype, self.scaling if scaled else None)


def score_scale(config: ModelConfig) -> float:
    """Returns the factor of scores: 1/√P or the configured one.

    Under muP (arXiv:2203.03466, section 4.1) it is that at the base width, and falls as 1/P. Latent
    attention under YaRN also multiplies it by the square of the factor from `mscale_all_dim`
    (DeepSeek-V3).
    """
    width = config.score_width
    base_width = width if (base := config.base()) is None else base.score_width
    scale = (config.attention_multiplier or base_width**-0.5) * base_width / width
    if config.attention == "mla" and config.rope_scaling == "yarn" and config.rope_mscale_all:
        scale *= yarn_mscale(config.rope_factor, config.rope_mscale_all) ** 2
    return scale


class QKV(Convolving):
    """Projects to queries, keys, values and gate: `[S, B, D]` to `[S, B, heads, P]` each."""

    def __init__(self, records: list[ParameterSpec], config: ModelConfig) -> None:
        super().__init__(records)
        c = config
        self.width = c.head_dim
        self.rotary = Rotary(c)
        self.gate, self.qk_norm, self.taps = c.attention_gate, c.qk_norm, c.attention_conv
        self.eps, self.offset = c.norm_eps, 1.0 if c.norm == "rms_offset" else 0.0

    def project(self, x: Tensor, name: str, context: Context) -> Tensor:
        """Returns one of q, k, v before rotary positions: `[S, B, heads, P]`."""
        y = self.linear(x, name)
        if self.taps:
            y = self.conv(y, self.weight_of(f"conv_{name}"), None, False, f"conv_{name}", context)
        normed = self.qk_norm != "none" and name != "v"
        if normed and self.qk_norm == "full":
            weight, mean = self.weight_of(f"{name}_norm"), self.sharding.mean_over_ranks()
            y = rms_norm(y, weight, self.eps, None, self.offset, mean)
        y = y.unflatten(-1, (-1, self.width))
        if normed and self.qk_norm == "head":
            y = rms_norm(y, self.weight_of(f"{name}_norm"), self.eps, None, self.offset)
        return y

    def output_gate(self, x: Tensor) -> Tensor | None:
        """Returns the gate's logits, per channel from all of x, or per head from its slice of x.

        The latter is gated attention of arXiv:2306.12929, section 4.2. None without a gate.
        """
        if self.gate == "channel":
            return self.linear(x, "gate_z").unflatten(-1, (-1, self.width))
        if self.gate == "head":
            weight = self.weight_of("gate_w")
            slices = self.sharding.local(x, -1).unflatten(-1, weight.shape)
            return ((slices * weight).sum(-1) + self.weight_of("gate_b"))[..., None]
        return None

    def forward(self, x: Tensor, context: Context) -> Projected:
        q, k, v = (self.project(x, name, context) for name in "qkv")
        if (table := self.rotary.table(context, x.dtype)) is not None:
            q, k = rotate(q, table), rotate(k, table)
        return Projected(q, k, v, self.output_gate(x))


class AttendOut(ParameterModule):
    """Attends, gates and projects back to `[S, B, D]`."""

    seams = (Seam("attend", local_attend, ATTEND.kinds),)
    attend: Attend

    def forward(self, carried: tuple[Projected, Softmax], context: Context) -> Tensor:
        p, softmax = carried
        y = self.attend(p.q, p.k, p.v, softmax, context)
        if p.gate is not None:
            y = y * p.gate.sigmoid()
        return self.linear(y.flatten(-2), "out")


class Temperature(ParameterModule):
    """Sinks and the position temperature's growth, `[H]` each, in fp32 whatever the precision."""

    def scale(self, q: Tensor, positions: Tensor) -> Tensor:
        """Returns q times 1 + exp(−exp(β)) ln n, where n is the position counted from 1.

        This is the position term of Selective Self-Attention (arXiv:2411.12892) as its authors'
        code has it, with a β per head; the terms that depend on the query's content, and those of
        the values, are not implemented.
        """
        if "growth" not in self.specs:
            return q
        rate = (-self.weight_of("growth").exp()).exp()
        log_n = (positions + 1).to(rate.dtype).log()
        return (wide(q) * (1 + log_n[..., None] * rate)[..., None]).to(q.dtype)


class Attention(SubBlock):
    """Halves: `q, k, v, positions | attend, gate, out`."""

    small: Temperature

    def __init__(self, card: Card, config: ModelConfig, out_std: float) -> None:
        super().__init__(card)
        self.config, self.scale = config, score_scale(config)
        records = card.records(config, out_std)
        self.first = self.projections(of_half(records, "first"), config)
        self.small = Temperature(of_half(records, "small"))
        self.second = AttendOut(of_half(records, "second"))

    @staticmethod
    def projections(records: list[ParameterSpec], config: ModelConfig) -> ParameterModule:
        """Builds the first half."""
        return QKV(records, config)

    def begin(self, x: Tensor, context: Context) -> Projected:
        p: Projected = self.first(x, context)
        window = self.config.window_of(context.index)
        last = None if window is None else window - 1
        k = context.append_to_cache("k", p.k, last)
        v = context.append_to_cache("v", p.v, last)
        return p._replace(q=self.scaled(p.q, context.positions), k=k, v=v)

    def scaled(self, q: Tensor, positions: Tensor) -> Tensor:
        """Returns the queries times the factors that depend on their positions."""
        c, q = self.config, self.small.scale(q, positions)
        if not c.query_temperature:
            return q
        steps = (positions // c.query_temperature_length).to(wide_dtype(q.dtype))
        factor = 1 + c.query_temperature * steps.log1p()
        return (wide(q) * factor[..., None, None]).to(q.dtype)

    def finish(self, carried: Projected, context: Context) -> Tensor:
        c = self.config
        clip = (c.clip_low, c.clip_high)
        softmax = Softmax(
            self.scale,
            c.window_of(context.index),
            c.attention_cap,
            self.small.weight_of("sinks") if c.sinks else None,
            None if clip == (0.0, 1.0) else clip,
        )
        return self.second((carried, softmax), context)
