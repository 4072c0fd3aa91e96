"""A module that declares its parameters with their initial distribution, and the `local` seam."""

import math
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from colonnade.kernels.cut import WHOLE
from colonnade.models.seams import Seam

# Fills a tensor with independent draws: any block of a parameter can be made alone, anywhere.
Fill = Callable[[Tensor, Generator], object]
# What stands between a parameter and its use, such as a spectral reparametrisation.
Change = Callable[[Tensor], Tensor]
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


class Part(nn.Module):
    """One half of a sub-block, or another holder of parameters.

    `local` is a seam: what stands between a parameter at rest and its use. It is the identity here;
    `parallel/` replaces it by the rank's shard.

    By name of the parameter: `splits` says how ranks may share it (what is not there each of them
    needs whole); `partial` are those whose gradients other ranks hold the rest of; `changes` is
    what is done to a weight wherever it is used (`models.reparam`), `started` and `due` which of
    these have a state, and may advance it at the next use; `rates` are factors of the learning rate
    (`models.mup`). `cut` says which part of all that is split is here.

    A half of a sub-block declares its `seams`, `()` where it works token by token; what declares
    none is refused where ranks share sequences.
    """

    seams: ClassVar[tuple[Seam, ...] | None] = None

    def __init__(self) -> None:
        super().__init__()
        for seam in self.seams or ():
            setattr(self, seam.name, seam.local)
        self.local: Callable[[Tensor], Tensor] = lambda parameter: parameter
        self.fills: dict[str, Fill] = {}
        self.roles: dict[str, Role] = {}
        self.splits: dict[str, Split] = {}
        self.cut = WHOLE
        self.partial: set[str] = set()
        self.undecayed: set[str] = set()
        self.rates: dict[str, float] = {}
        self.changes: dict[str, list[Change]] = {}
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
        self.fills[name], self.roles[name] = fill, role
        if split is not None:
            self.splits[name] = split
        if not (len(shape) > 1 if decay is None else decay):
            self.undecayed.add(name)

    def declare_state(self, name: str, shape: tuple[int, ...], value: float) -> None:
        """Register a buffer: fp32 state beside the parameters, whole on every rank, saved."""
        self.register_buffer(name, torch.empty(shape))
        self.fills[name] = constant(value)

    @torch.no_grad()
    def fill(self) -> None:
        """Draw every parameter and buffer of this part, in fp32, from PyTorch's CPU generator."""
        own = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        for name, tensor in own:
            drawn = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
            self.fills[name](drawn, torch.default_generator)
            tensor.copy_(drawn)

    def change(self, name: str, change: Change) -> None:
        """Put `change` between the parameter `name` and its uses, behind those already there."""
        self.changes.setdefault(name, []).append(change)

    def weight_of(self, name: str) -> Tensor:
        """The parameter `name` as this rank uses it."""
        weight = self.local(getattr(self, name))
        for change in self.changes.get(name, ()):
            weight = change(weight)
        return weight
