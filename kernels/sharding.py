"""A width that is sharded over ranks, and the all-reduces that complete a kernel's sums over it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
Reduction = Callable[[Tensor], Tensor]


def _identity(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True, eq=False)
class Sharding:
    """How a width is sharded: each rank of a group holds one of equal shards. On one device the
    group has size 1, and nothing is reduced.

    Attributes:
        size: ranks in the group.
        rank: this rank's position in the group.
        all_reduce: sums a tensor over the ranks and returns a new tensor, which the caller must not
            change in place (recomputation may keep it). Differentiable; its gradients are partial
            sums, which backward all-reduces as well.
        all_reduce_max: takes the elementwise maximum over the ranks, without gradient.
        all_reduce_no_grad: sums like `all_reduce`, without gradient and without an operator whose
            result recomputation keeps; for code that recomputation does not run again.
        once: turns a tensor that every rank has into a term of a partial sum: itself on one rank,
            zeros on the others. Differentiable; its gradients are partial sums.
    """

    size: int = 1
    rank: int = 0
    all_reduce: Reduction = _identity
    all_reduce_max: Reduction = _identity
    all_reduce_no_grad: Reduction = _identity
    once: Reduction = _identity

    def local(self, full: Tensor, dim: int, shards: int | None = None) -> Tensor:
        """Slices this rank's shard of a full tensor along `dim`.

        `shards` (by default one per rank) divide the ranks: where they are fewer, neighbouring
        ranks hold the same shard.
        """
        shards = shards or self.size
        width = full.shape[dim] // shards
        return full.narrow(dim, self.rank * shards // self.size * width, width)

    def mean_over_ranks(self, groups: int = 1) -> Reduction | None:
        """Returns the function that turns the mean over a rank's columns into the mean over the
        whole group of columns that they belong to; None where each rank holds whole groups.

        The width consists of `groups` equal groups of columns. Where they are fewer than the ranks
        they divide these, and the ranks of one group average their means by an all-reduce.
        """
        if groups % self.size == 0:
            return None
        group = self.rank * groups // self.size

        def mean(local_mean: Tensor) -> Tensor:
            if groups == 1:
                return self.all_reduce(local_mean) / self.size
            # One all-reduce over all ranks serves every group: a row of the sum is a group's.
            rows = [
                local_mean if i == group else torch.zeros_like(local_mean) for i in range(groups)
            ]
            return self.all_reduce(torch.stack(rows))[group] * (groups / self.size)

        return mean


UNSHARDED = Sharding()


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Makes compiled graphs break at `function`: it runs collectives, which no graph launches."""
    return torch.compiler.disable(function)
