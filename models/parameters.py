"""The record of a parameter: shape, initial distribution, sharding. Imports no torch."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Generator, Tensor

# Fills a tensor with independent draws, so that any block of a parameter can be drawn separately,
# on any rank.
Fill = Callable[["Tensor", "Generator"], object]
# Is applied to a parameter wherever it is used, such as a spectral reparametrisation.
Transform = Callable[["Tensor"], "Tensor"]
# A linear weight `[..., out, in]` reads the stream, writes onto it, or is inside a sub-block. A
# `bias` is that of a weight that writes, `[..., out]`.
Role = Literal["reads", "inner", "writes", "table", "bias", "other"]
# The half of a sub-block that holds it, or one of the modules beside them: `small` with parameters
# that stay in fp32 whatever the precision, `experts` with the weights of experts.
Half = Literal["first", "second", "small", "experts"]


class Split(NamedTuple):
    """How the ranks of an axis may shard a parameter: equal shards along `dim`, of whole units.

    `units` is the number of heads, groups or channels along `dim`, and `field` is the recipe field
    that sets it. `replicable` says that, where ranks outnumber units, several ranks may hold the
    same unit.
    """

    dim: int
    units: int
    field: str
    replicable: bool = False

    def suits(self, ranks: int) -> bool:
        """Whether so many ranks can hold equal shards, or equal groups of ranks the same unit."""
        return self.units % ranks == 0 or (self.replicable and ranks % self.units == 0)


@dataclass
class ParameterSpec:
    """The record of a parameter, or of a buffer that is saved with the parameters.

    Attributes:
        name: its name within the sub-block.
        shape: its global shape.
        fill: its initial distribution.
        role: whether a linear weight reads the stream, writes onto it or is inside a sub-block.
        decay: whether weight decay acts on it; None: if it has two dimensions or more.
        tp: how tensor-parallel ranks may shard it; None: every rank needs all of it.
        ep: how expert-parallel ranks may shard it; None: it is no weight of experts.
        etp: how the tensor-parallel ranks of an expert may shard it.
        half: the half of the sub-block that holds it, or the module beside the halves.
        used: the fraction of its elements that one token uses (top_k / experts for experts).
        state: whether it is a buffer instead of a parameter: fp32, saved, sharded over `ep` alone.
        rate: factor of the learning rate (`models.mup`).
        partial: the axis over whose ranks its gradient is a partial sum; None: none.
        transforms: applied in order wherever it is used (`models.reparam`).
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
    partial: Literal["tp", "etp"] | None = None
    transforms: list[Transform] = field(default_factory=list)

    @property
    def decayed(self) -> bool:
        """Whether weight decay acts on it."""
        return len(self.shape) > 1 if self.decay is None else self.decay

    @property
    def split(self) -> Split | None:
        """How tensor-parallel ranks shard it: `tp`, or `etp` for the weights of experts."""
        return self.tp or self.etp

    @property
    def elements(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a linear map inside a sub-block, or one per expert."""
        return self.role in ("reads", "inner", "writes")

    @property
    def stream_dim(self) -> int | None:
        """The dimension along the stream's channels of what is added to it; None: adds nothing."""
        return {"writes": -2, "table": -1, "bias": -1}.get(self.role)


def bias_of(weight: ParameterSpec) -> ParameterSpec:
    """Returns the record of a bias `[..., out]` on the output of a linear weight.

    It lies on the ranks that hold the weight's rows. One that is added onto the stream is on every
    rank, and is added on one (`ParameterModule.linear`).
    """
    rows = len(weight.shape) - 2

    def of_rows(split: Split | None) -> Split | None:
        return split if split is not None and split.dim <= rows else None

    return ParameterSpec(
        f"{weight.name}_bias", weight.shape[:-1], constant(0.0),
        "bias" if weight.role == "writes" else "other", decay=False,
        tp=of_rows(weight.tp), ep=of_rows(weight.ep), etp=of_rows(weight.etp),
        half=weight.half, used=weight.used,
    )  # fmt: skip


def of_half(records: Iterable[ParameterSpec], half: Half) -> list[ParameterSpec]:
    """Returns the records of one half of a sub-block."""
    return [record for record in records if record.half == half]


def normal(std: float) -> Fill:
    """Draws from N(0, std²)."""
    return lambda t, g: t.normal_(0.0, std, generator=g)


def uniform(low: float, high: float) -> Fill:
    """Draws from U(low, high)."""
    return lambda t, g: t.uniform_(low, high, generator=g)


def fan_in_uniform(fan_in: int) -> Fill:
    """Draws from U(± fan_in^-½), as PyTorch does for convolutions; a filter's is its width."""
    return uniform(-(fan_in**-0.5), fan_in**-0.5)


def constant(value: float) -> Fill:
    """Sets every element to `value`."""
    return lambda t, g: t.fill_(value)


def log_uniform_a(low: float, high: float) -> Fill:
    """Draws log A with A ~ U(low, high): Mamba-2's decay rates (arXiv:2405.21060)."""
    return lambda t, g: t.uniform_(low, high, generator=g).log_()


def log_counting(t: "Tensor", g: "Generator") -> None:
    """Sets log(1), log(2), ... along the last dimension: Mamba-1's decays (arXiv:2312.00752)."""
    t.fill_(1.0).cumsum_(-1).log_()


def inverse_softplus_dt(low: float, high: float, floor: float) -> Fill:
    """Draws a bias whose softplus is log-uniform in [low, high], at least floor (Mamba's dt)."""

    def fill(t: "Tensor", g: "Generator") -> None:
        dt = t.uniform_(math.log(low), math.log(high), generator=g).exp_().clamp_(min=floor)
        t.copy_(dt + (-(-dt).expm1()).log())

    return fill


def coefficients(t: "Tensor", g: "Generator") -> None:
    """Sets a_0 = 0 and the others to 1/3: PolyCom's initial coefficients (arXiv:2411.03884)."""
    t.fill_(1 / 3)
    t[..., 0] = 0.0


def last_tap(t: "Tensor", g: "Generator") -> None:
    """Sets the filter of a causal convolution to the identity."""
    t.zero_()
    t[..., -1] = 1.0


def scaled(fill: Fill, factor: float) -> Fill:
    """Returns `fill` followed by a multiplication with `factor`."""
    return lambda t, g: (fill(t, g), t.mul_(factor))
