"""A parameter's record: all that is known of it before there is a tensor. Imports no torch."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Generator, Tensor

# Fills a tensor with independent draws: any block of a parameter can be made alone, anywhere.
Fill = Callable[["Tensor", "Generator"], object]
# What stands between a parameter and its use, such as a spectral reparametrisation.
Transform = Callable[["Tensor"], "Tensor"]
# A linear weight `[..., out, in]` reads the stream, writes onto it, or stands within a sub-block.
Role = Literal["reads", "inner", "writes", "table", "other"]
# The half of a sub-block that holds it; `small`: kept in fp32 whatever the precision, by neither.
Half = Literal["first", "second", "small"]


class Split(NamedTuple):
    """How the ranks of an axis may shard a parameter: equal shards along `dim`, of whole pieces.

    `pieces` are heads, groups or channels; `field` is what sets their number. `shared` says that
    where ranks outnumber the pieces, several may use the same one.
    """

    dim: int
    pieces: int
    field: str
    shared: bool = False

    def suits(self, ranks: int) -> bool:
        """Whether so many ranks can take equal shards, or groups of them share pieces."""
        return self.pieces % ranks == 0 or (self.shared and ranks % self.pieces == 0)


@dataclass
class ParameterSpec:
    """All that is known of a parameter, or of state beside the parameters.

    Attributes:
        name: within its sub-block.
        shape: of the whole of it.
        fill: its initial distribution.
        role: what a linear weight does with the stream.
        decay: whether weight decay acts on it; None: if it has two dimensions or more.
        tp: how tensor-parallel ranks may shard it; None: each needs it whole.
        ep: how ranks that hold experts of their own may shard it; None: it is none of theirs.
        etp: how the ranks that share an expert may shard it.
        half: of the sub-block, that holds it.
        used: the share of its elements that one token meets (of experts those it is sent to).
        state: whether it is no parameter but a buffer: fp32, whole on every rank, saved.
        rate: factor of the learning rate (`models.mup`).
        partial: whether its gradient is a partial sum over tensor-parallel ranks.
        transforms: applied in turn wherever it is used (`models.reparam`).
    """

    name: str
    shape: tuple[int, ...]
    fill: Fill
    role: Role = "other"
    decay: bool | None = None
    tp: Split | None = None
    ep: Split | None = None
    etp: Split | None = None
    half: Half = "first"
    used: Fraction = Fraction(1)
    state: bool = False
    rate: float = 1.0
    partial: bool = False
    transforms: list[Transform] = field(default_factory=list)

    @property
    def decayed(self) -> bool:
        """Whether weight decay acts on it."""
        return len(self.shape) > 1 if self.decay is None else self.decay

    @property
    def split(self) -> Split | None:
        """How the ranks of the tensor axis shard it, over which an expert is sharded as well."""
        return self.tp or self.etp

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a linear map inside a sub-block, or one per expert."""
        return self.role in ("reads", "inner", "writes")


def of_half(records: Iterable[ParameterSpec], half: Half) -> list[ParameterSpec]:
    """Those of one half of a sub-block."""
    return [record for record in records if record.half == half]


def normal(std: float) -> Fill:
    """N(0, std²)."""
    return lambda t, g: t.normal_(0.0, std, generator=g)


def uniform(low: float, high: float) -> Fill:
    """U(low, high)."""
    return lambda t, g: t.uniform_(low, high, generator=g)


def constant(value: float) -> Fill:
    """Every element the same."""
    return lambda t, g: t.fill_(value)


def log_uniform_a(low: float, high: float) -> Fill:
    """log A with A ~ U(low, high): Mamba-2's decay rates (arXiv:2405.21060)."""
    return lambda t, g: t.uniform_(low, high, generator=g).log_()


def log_counting(t: "Tensor", g: "Generator") -> None:
    """log(1), log(2), ... along the last dimension: Mamba-1's decay rates (arXiv:2312.00752)."""
    t.fill_(1.0).cumsum_(-1).log_()


def inverse_softplus_dt(low: float, high: float, floor: float) -> Fill:
    """A bias whose softplus is log-uniform in [low, high], at least floor (Mamba's dt bias)."""

    def fill(t: "Tensor", g: "Generator") -> None:
        dt = t.uniform_(math.log(low), math.log(high), generator=g).exp_().clamp_(min=floor)
        t.copy_(dt + (-(-dt).expm1()).log())

    return fill


def coefficients(t: "Tensor", g: "Generator") -> None:
    """a_0 = 0, then 1/3 each: the first coefficients of PolyCom (arXiv:2411.03884)."""
    t.fill_(1 / 3)
    t[..., 0] = 0.0


def last_tap(t: "Tensor", g: "Generator") -> None:
    """The filter of a causal convolution that changes nothing."""
    t.zero_()
    t[..., -1] = 1.0


def scaled(fill: Fill, factor: float) -> Fill:
    """`fill`, times a factor."""
    return lambda t, g: (fill(t, g), t.mul_(factor))
