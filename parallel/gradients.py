"""Norm and clipping of sharded gradients."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from types import MappingProxyType

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
    local_norms: Mapping[nn.Parameter, Tensor] = MappingProxyType({}),
) -> Tensor:
    """The 2-norm of all gradients together, on every rank; `copies` are parameters that another
    rank counts.

    Squares are summed locally, and all-reduced over exactly the mesh axes that shard a gradient, so
    that a replicated one counts once; and over `stages`, whose ranks have different parameters.
    `local_norms` has the norms of this rank's shards of gradients that have left the device.
    Collective.
    """
    by_axes: dict[tuple, list[nn.Parameter]] = defaultdict(list)
    held = list(parameters)
    for p in held:
        if p in copies or (p.grad is None and p not in local_norms):
            continue
        if isinstance(p, DTensor):
            sharded = tuple(i for i, p in enumerate(p.placements) if not p.is_replicate())
            by_axes[p.device_mesh, sharded].append(p)
        else:
            by_axes[None, ()].append(p)
    squares = [torch.zeros((), dtype=wide_dtype(held[0]), device=held[0].device)]
    for (mesh, axes), members in by_axes.items():
        present = {p: local(p.grad) for p in members if p.grad is not None}
        found = torch._foreach_norm(list(present.values())) if present else ()
        norms = {**local_norms, **dict(zip(present, found, strict=True))}
        square = torch.stack([norms[p] for p in members]).square().sum()
        for axis in axes:
            dist.all_reduce(square, group=mesh.get_group(axis))
        squares.append(square)
    total = torch.stack(squares).sum()
    if stages is not None:
        dist.all_reduce(total, group=stages)
    return total.sqrt()


def wide_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which gradients of a tensor are reduced and updates computed: at least fp32."""
    return torch.promote_types(t.dtype, torch.float32)


def clip_factor(norm: float, limit: float, dtype: torch.dtype) -> float:
    """The factor that makes the norm of all gradients at most `limit`, computed in `dtype`; 1 where
    the limit is 0, which does not clip (arXiv:1211.5063, section 3.2)."""
    if not limit:
        return 1.0
    return (limit / (torch.tensor(norm, dtype=dtype) + 1e-6)).clamp(max=1.0).item()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies all gradients by a factor."""
    gradients = local_gradients(parameters) if factor != 1.0 else []
    if gradients:  # none where a stage's weights are frozen
        torch._foreach_mul_(gradients, factor)
