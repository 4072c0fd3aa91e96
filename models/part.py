"""A module that declares its parameters with their initial distribution, and the `local` seam."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from colonnade.kernels.cut import WHOLE
from colonnade.models.names import canonical
from colonnade.models.seams import Seam

# Fills a tensor with independent draws: any block of a parameter can be made alone, anywhere.
Fill = Callable[[Tensor, Generator], object]
# What stands between a parameter and its use, such as a spectral reparametrisation.
Transform = Callable[[Tensor], Tensor]
# A linear weight `[..., out, in]` reads the stream, writes onto it, or stands within a sub-block.
Role = Literal["reads", "inner", "writes", "table", "other"]


class Split(NamedTuple):
    """How ranks may share a parameter: equal parts along `dim`, of whole pieces each.

    `pieces` are heads, groups or channels; `field` is what sets their number. `shared` says that
    where ranks outnumber the pieces, several may use the same one.
    """

    dim: int
    pieces: int
    field: str
    shared: bool = False

    def suits(self, ranks: int) -> bool:
        """Whether so many ranks can take equal parts, or groups of them share pieces."""
        return self.pieces % ranks == 0 or (self.shared and ranks % self.pieces == 0)


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


def log_counting(t: Tensor, g: Generator) -> None:
    """log(1), log(2), ... along the last dimension: Mamba-1's decay rates (arXiv:2312.00752)."""
    t.copy_(torch.arange(1, t.shape[-1] + 1, dtype=t.dtype).log_().expand_as(t))


def inverse_softplus_dt(low: float, high: float, floor: float) -> Fill:
    """A bias whose softplus is log-uniform in [low, high], at least floor (Mamba's dt bias)."""

    def fill(t: Tensor, g: Generator) -> None:
        dt = t.uniform_(math.log(low), math.log(high), generator=g).exp_().clamp_(min=floor)
        t.copy_(dt + torch.log(-torch.expm1(-dt)))

    return fill


def coefficients(t: Tensor, g: Generator) -> None:
    """a_0 = 0, then 1/3 each: the first coefficients of PolyCom (arXiv:2411.03884)."""
    t.fill_(1 / 3)
    t[..., 0] = 0.0


def last_tap(t: Tensor, g: Generator) -> None:
    """The filter of a causal convolution that changes nothing."""
    t.zero_()
    t[..., -1] = 1.0


@dataclass
class ParameterSpec:
    """All that is known of a parameter, or of a buffer beside them, but its shape.

    Attributes:
        fill: its initial distribution.
        role: what a linear weight does with the stream.
        decay: whether weight decay acts on it.
        rate: factor of the learning rate (`models.mup`).
        split: how tensor-parallel ranks may share it; None: each needs it whole.
        partial: whether its gradient is a partial sum over these ranks.
        transforms: applied in turn wherever it is used (`models.reparam`).
    """

    fill: Fill
    role: Role = "other"
    decay: bool = False
    rate: float = 1.0
    split: Split | None = None
    partial: bool = False
    transforms: list[Transform] = field(default_factory=list)


class Part(nn.Module):
    """One half of a sub-block, or another holder of parameters.

    `local` is a seam: what stands between a parameter at rest and its use. It is the identity here;
    `parallel/` replaces it by the rank's shard.

    `specs` has one record for each parameter and buffer, by name. `cut` says which part of all that
    is split is here. Of the transformed weights `started` have a state, and `due` may advance it at
    the next use.

    A half of a sub-block declares its `seams`, `()` where it works token by token; what declares
    none is refused where ranks share sequences.
    """

    seams: ClassVar[tuple[Seam, ...] | None] = None

    def __init__(self) -> None:
        super().__init__()
        for seam in self.seams or ():
            setattr(self, seam.name, seam.local)
        self.local: Callable[[Tensor], Tensor] = lambda parameter: parameter
        self.specs: dict[str, ParameterSpec] = {}
        self.cut = WHOLE
        self.due: set[str] = set()
        self.started: set[str] = set()

    def declare(
        self,
        name: str,
        shape: tuple[int, ...],
        fill: Fill,
        role: Role = "other",
        decay: bool | None = None,
        split: Split | None = None,
    ) -> None:
        """Register the parameter `name`, to be filled by `fill` wherever its shards lie.

        `split` says how ranks may share it. `decay` says whether weight decay acts on it; by
        default on whatever has two dimensions.
        """
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        decayed = len(shape) > 1 if decay is None else decay
        self.specs[name] = ParameterSpec(fill, role, decayed, split=split)

    def declare_state(self, name: str, shape: tuple[int, ...], value: float) -> None:
        """Register a buffer: fp32 state beside the parameters, whole on every rank, saved."""
        self.register_buffer(name, torch.empty(shape))
        self.specs[name] = ParameterSpec(constant(value))

    @torch.no_grad()
    def fill(self) -> None:
        """Draw every parameter and buffer of this part, in fp32, from PyTorch's CPU generator."""
        own = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        for name, tensor in own:
            drawn = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
            self.specs[name].fill(drawn, torch.default_generator)
            tensor.copy_(drawn)

    @property
    def transformed(self) -> set[str]:
        """The parameters that have transforms."""
        return {name for name, spec in self.specs.items() if spec.transforms}

    def weight_of(self, name: str) -> Tensor:
        """The parameter `name` as this rank uses it."""
        weight = self.local(getattr(self, name))
        for transform in self.specs[name].transforms:
            weight = transform(weight)
        return weight


class Declared(NamedTuple):
    """A parameter with its canonical name and its record."""

    name: str
    parameter: nn.Parameter
    spec: ParameterSpec


def declared(model: nn.Module) -> Iterator[Declared]:
    """Every parameter of a model.

    Raises:
        ValueError: a parameter that no `Part` declared.
    """
    for path, part in model.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            full = canonical(f"{path}.{name}" if path else name)
            if not isinstance(part, Part):
                raise ValueError(f"{full} was not declared by a Part")
            yield Declared(full, parameter, part.specs[name])
