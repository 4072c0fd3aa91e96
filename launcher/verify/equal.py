"""What "equal" means: |a − b| <= relative · max|b| + of_all · (norm of all of b).

A difference beyond that may be rounding, which ill-conditioned recipes amplify. Its noise says how
far rounding alone moves the tensor (`launcher.verify.rounding`), and this file what follows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Noise comes from one ulp of every weight, where a layout rounds at every operator: differences of
# random recipes on random layouts were up to 3 times their noise (EXPERIMENTS.md), which leaves
# FACTOR some room. A fault larger than that is still found. Where that is more than TELLING of a
# tensor's largest element, the tensor tells nothing: what a reduction misses is off by about all.
FACTOR = 16.0
TELLING = 0.1

# `rounding` is beyond the bound and explained; `lost` is within what rounding alone does, which is
# so much that a fault could hide in it.
Judgement = Literal["equal", "rounding", "lost", "unequal"]


@dataclass(frozen=True)
class Bounds:
    """How far a tensor may be from its reference.

    Attributes:
        relative: share of the tensor's own largest element.
        of_all: share of the 2-norm of all tensors that are compared with it.
    """

    relative: float
    of_all: float

    def __str__(self) -> str:
        return f"|a - b| <= {self.relative:g} max|b| + {self.of_all:g} norm(all b)"


EXACT = Bounds(1e-9, 1e-12)  # fp64
# fp32 beside fp64. Rounding alone: gradients were off by 1e-6 of their largest element in most
# models; what a reduction misses is off by about all.
SINGLE = Bounds(1e-3, 1e-5)
BOUNDS = {"fp64": EXACT, "fp32": SINGLE}


class Difference(NamedTuple):
    """A tensor beside its reference: the largest |a − b|, and how large it may be."""

    name: str
    difference: float
    allowed: float
    size: float = 0.0  # max|b|
    why: str = ""  # what stands in the way of a comparison; the difference is then infinite
    noise: float = 0.0  # how far rounding alone moves the tensor, where that was measured

    @property
    def excess(self) -> float:
        """The difference as a multiple of what is allowed; at most 1 is equal."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.allowed if self.allowed else math.inf

    @property
    def judgement(self) -> Judgement:
        """Whether the tensor is equal, and if not, whether its noise explains that."""
        if self.excess <= 1:
            return "equal"
        room = FACTOR * self.noise
        if self.why or self.difference > self.allowed + room:
            return "unequal"
        return "rounding" if room <= TELLING * self.size else "lost"

    def __str__(self) -> str:
        if self.why:
            return f"{self.name} {self.why}"
        return (
            f"{self.name} differs by {self.difference:.3g}, {self.excess:.3g} times what is allowed"
        )


def compare(
    ours: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    bounds: Bounds = EXACT,
    apart: Mapping[str, float] | None = None,
) -> list[Difference]:
    """Every tensor of `ours` beside that of `reference`, the worst first.

    A tensor that only one of them has, of another shape, or with an element that is not finite, is
    infinitely different. `apart` says how far copies of a tensor of `ours` are from each other,
    which counts on top; 0 where it names none.
    """
    squares = [t.detach().double().square().sum() for t in reference.values()]
    norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    found = [
        _beside(
            name, ours.get(name), reference.get(name), bounds, norm, (apart or {}).get(name, 0.0)
        )
        for name in {**reference, **ours}
    ]
    return sorted(found, key=lambda d: -d.excess)


def _beside(
    name: str, a: Tensor | None, b: Tensor | None, bounds: Bounds, norm: float, apart: float
) -> Difference:
    why = ""
    if a is None or b is None:
        why = "is missing" if a is None else "has no reference"
    elif a.shape != b.shape:
        why = f"is {tuple(a.shape)}, its reference {tuple(b.shape)}"
    elif not (b.isfinite().all() and a.isfinite().all()):
        why = "is not finite" if b.isfinite().all() else "has a reference that is not finite"
    elif not math.isfinite(apart):
        why = "is not the same on all ranks"
    if why or a is None or b is None:
        return Difference(name, math.inf, 0.0, why=why)
    if not b.numel():
        return Difference(name, 0.0, 0.0)
    x, y = a.detach().double(), b.detach().double()
    size = float(y.abs().max())
    allowed = bounds.relative * size + bounds.of_all * norm
    return Difference(name, float((x - y).abs().max()) + apart, allowed, size)
