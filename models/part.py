"""A module that declares its parameters with their initial distribution, and the `local` seam."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

# Fills a tensor with independent draws: any block of a parameter can be made alone, anywhere.
Fill = Callable[[Tensor, Generator], object]


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


def inverse_softplus_dt(low: float, high: float, floor: float) -> Fill:
    """A bias whose softplus is log-uniform in [low, high], at least floor (Mamba's dt bias)."""

    def fill(t: Tensor, g: Generator) -> None:
        dt = t.uniform_(math.log(low), math.log(high), generator=g).exp_().clamp_(min=floor)
        t.copy_(dt + torch.log(-torch.expm1(-dt)))

    return fill


class Part(nn.Module):
    """One half of a sub-block, or another holder of parameters.

    `local` is a seam: what stands between a parameter at rest and its use. It is the identity here;
    `parallel/` replaces it by the rank's shard.
    """

    def __init__(self) -> None:
        super().__init__()
        self.local: Callable[[Tensor], Tensor] = lambda parameter: parameter
        self.fills: dict[str, Fill] = {}

    def declare(self, name: str, shape: tuple[int, ...], fill: Fill) -> None:
        """Register the parameter `name`, to be filled by `fill` wherever its shards lie."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.fills[name] = fill

    def weight_of(self, name: str) -> Tensor:
        """The parameter `name` as this rank uses it."""
        return self.local(getattr(self, name))
