"""A width that is cut over ranks: what a kernel must know to complete its sums over all of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
Combine = Callable[[Tensor], Tensor]


def _alone(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True, eq=False)
class Cut:
    """Equal parts of a width, one per rank; on one device a single part.

    Attributes:
        count: parts.
        index: which of them is here.
        total: sums a tensor over the ranks, in a new one that is not to be changed in place
            (recomputation may keep it). Differentiable; its gradients are partial sums, which are
            summed as well.
        largest: the elementwise maximum over the ranks, without gradient.
        once: `total` without gradient, of what recomputation does not compute again.
    """

    count: int = 1
    index: int = 0
    total: Combine = _alone
    largest: Combine = _alone
    once: Combine = _alone

    def mine(self, whole: Tensor, dim: int, pieces: int | None = None) -> Tensor:
        """This rank's piece of a whole tensor along `dim`.

        `pieces` (by default as many as ranks) divide the ranks: with fewer, neighbours share one.
        """
        pieces = pieces or self.count
        width = whole.shape[dim] // pieces
        return whole.narrow(dim, self.index * pieces // self.count * width, width)

    def mean(self, pieces: int = 1) -> Combine | None:
        """What makes a mean over this rank's part one over the piece it shares; None: nothing.

        A width of `pieces` pieces, the ranks a multiple of them: those of one piece take the mean
        of their means.
        """
        if pieces % self.count == 0:
            return None
        piece = self.index * pieces // self.count

        def over_piece(own: Tensor) -> Tensor:
            if pieces == 1:
                return self.total(own) / self.count
            rows = [own if i == piece else torch.zeros_like(own) for i in range(pieces)]
            return self.total(torch.stack(rows))[piece] * (pieces / self.count)

        return over_piece


WHOLE = Cut()


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """`function` for compiled graphs to break at: ranks meet in it, and no graph launches that."""
    return torch.compiler.disable(function)
