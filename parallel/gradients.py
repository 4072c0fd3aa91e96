"""Norm and clipping of sharded gradients."""

from collections import defaultdict
from collections.abc import Iterable, Set

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """This rank's shard of every gradient."""
    return [local(p.grad) for p in parameters if p.grad is not None]


def local(t: Tensor) -> Tensor:
    """This rank's shard of a DTensor, which shares its memory; any other tensor as it is."""
    return t.to_local() if isinstance(t, DTensor) else t


def gradient_norm(
    parameters: Iterable[nn.Parameter],
    stages: dist.ProcessGroup | None = None,
    copies: Set[nn.Parameter] = frozenset(),
) -> Tensor:
    """The 2-norm of all gradients together, on every rank; `copies` are parameters that another
    rank counts.

    Squares are summed locally, and all-reduced over exactly the mesh axes that shard a gradient, so
    that a replicated one counts once; and over `stages`, whose ranks have different parameters.
    Collective.
    """
    by_axes: dict[tuple, list[Tensor]] = defaultdict(list)
    held = list(parameters)
    for p in held:
        g = None if p in copies else p.grad
        if isinstance(g, DTensor):
            sharded = tuple(i for i, p in enumerate(g.placements) if not p.is_replicate())
            by_axes[g.device_mesh, sharded].append(g.to_local())
        elif g is not None:
            by_axes[None, ()].append(g)
    squares = [torch.zeros((), dtype=held[0].dtype, device=held[0].device)]
    for (mesh, axes), grads in by_axes.items():
        square = torch.stack(torch._foreach_norm(grads)).square().sum()
        for axis in axes:
            dist.all_reduce(square, group=mesh.get_group(axis))
        squares.append(square)
    total = torch.stack(squares).sum()
    if stages is not None:
        dist.all_reduce(total, group=stages)
    return total.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scales all gradients so that their norm is at most `limit` (arXiv:1211.5063, section 3.2)."""
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    if gradients := local_gradients(parameters):  # none where a stage's weights are frozen
        torch._foreach_mul_(gradients, scale)
