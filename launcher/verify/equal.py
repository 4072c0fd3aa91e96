"""Compares tensors by the rule |a − b| <= relative · max|b| + of_all · (norm of all of b).

A larger difference may be rounding, which ill-conditioned recipes amplify. The noise of a tensor
says how far rounding alone moves it (`launcher.verify.rounding`); `Difference.judgement` says which
differences it explains.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Noise is measured with one ulp of every weight, but a layout rounds at every operator: differences
# of random recipes on random layouts were up to 3 times their noise (EXPERIMENTS.md). NOISE_FACTOR
# leaves a margin above that; a fault that is larger is still detected. Where NOISE_FACTOR times the
# noise exceeds MAX_NOISE of a tensor's largest element, the tensor is inconclusive: a missing
# reduction changes a tensor by about its own size.
NOISE_FACTOR = 16.0
MAX_NOISE = 0.1

# `rounding`: beyond the bound, but explained by the noise. `inconclusive`: explained by the noise,
# which is so large that a fault could hide in it.
Judgement = Literal["equal", "rounding", "inconclusive", "unequal"]


@dataclass(frozen=True)
class Bounds:
    """The largest allowed difference of a tensor from its reference.

    Attributes:
        relative: as a fraction of the reference's largest element.
        of_all: as a fraction of the 2-norm of all tensors of the reference.
    """

    relative: float
    of_all: float

    def __str__(self) -> str:
        return f"|a - b| <= {self.relative:g} max|b| + {self.of_all:g} norm(all b)"


EXACT = Bounds(1e-9, 1e-12)  # fp64
# fp32 compared with fp64. Rounding changed gradients by 1e-6 of their largest element in most
# models; a missing reduction changes a tensor by about its own size.
SINGLE = Bounds(1e-3, 1e-5)
BOUNDS = {"fp64": EXACT, "fp32": SINGLE}


class Difference(NamedTuple):
    """The difference of a tensor from its reference.

    Attributes:
        name: of the tensor.
        difference: the largest |a − b|.
        allowed: the bound of the difference.
        size: max|b|.
        why: why the tensors cannot be compared, or empty; the difference is then infinite.
        noise: how far rounding alone moves the tensor; 0 where that was not measured.
    """

    name: str
    difference: float
    allowed: float
    size: float = 0.0
    why: str = ""
    noise: float = 0.0

    @property
    def excess(self) -> float:
        """The difference as a multiple of the allowed one; at most 1 is equal."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.allowed if self.allowed else math.inf

    @property
    def judgement(self) -> Judgement:
        """Whether the tensor is equal, and if not, whether its noise explains the difference."""
        if self.excess <= 1:
            return "equal"
        explained = NOISE_FACTOR * self.noise
        if self.why or self.difference > self.allowed + explained:
            return "unequal"
        return "rounding" if explained <= MAX_NOISE * self.size else "inconclusive"

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
    replica_differences: Mapping[str, float] | None = None,
) -> list[Difference]:
    """Compares every tensor of `ours` with that of `reference`; returns the worst first.

    The difference is infinite for a tensor that only one of them has, whose shapes differ, or that
    has an element that is not finite.

    Args:
        ours: tensors by name.
        reference: the tensors to compare them with.
        bounds: the allowed difference.
        replica_differences: by name, how much the copies of a tensor of `ours` on several ranks
            differ from each other, which is added to its difference; 0 for other names.
    """
    squares = [t.detach().double().square().sum() for t in reference.values()]
    norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    between_replicas = replica_differences or {}
    differences = [
        _difference(
            name,
            ours.get(name),
            reference.get(name),
            bounds,
            norm,
            between_replicas.get(name, 0.0),
        )
        for name in {**reference, **ours}
    ]
    return sorted(differences, key=lambda d: -d.excess)


def _difference(
    name: str,
    a: Tensor | None,
    b: Tensor | None,
    bounds: Bounds,
    norm: float,
    replica_difference: float,
) -> Difference:
    """The difference of one tensor; `norm` is the 2-norm of all tensors of the reference."""
    why = ""
    if a is None or b is None:
        why = "is missing" if a is None else "has no reference"
    elif a.shape != b.shape:
        why = f"is {tuple(a.shape)}, its reference {tuple(b.shape)}"
    elif not (b.isfinite().all() and a.isfinite().all()):
        why = "is not finite" if b.isfinite().all() else "has a reference that is not finite"
    elif not math.isfinite(replica_difference):
        why = "is not the same on all ranks"
    if why or a is None or b is None:
        return Difference(name, math.inf, 0.0, why=why)
    if not b.numel():
        return Difference(name, 0.0, 0.0)
    x, y = a.detach().double(), b.detach().double()
    size = float(y.abs().max())
    allowed = bounds.relative * size + bounds.of_all * norm
    difference = float((x - y).abs().max()) + replica_difference
    return Difference(name, difference, allowed, size)
