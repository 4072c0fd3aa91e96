"""Types of results of PyTorch operators that the checker does not know, and of collectives over
other axes."""

import inspect
from collections.abc import Callable
from typing import Any

import spmd_types as spmd
import torch
from spmd_types import P, R, S, V
from torch import Tensor
from torch.overrides import TorchFunctionMode

from colonnade.kernels.sharding import Sharding
from typed.types import as_shard, axis, expect, includes_axis, stamp, type_of

REDUCTIONS = spmd.all_reduce, spmd.reduce_scatter
COLLECTIVES = *REDUCTIONS, spmd.all_gather, spmd.convert


class Operators(TorchFunctionMode):
    """Types operators whose arguments are local sizes; checks that reductions take partial sums.

    `shared_groups` says that several ranks hold one group of channels, so that the width of the
    group is sharded.
    """

    shared_groups = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, cls = kwargs or {}, getattr(func, "__self__", None)
        if inspect.isclass(cls) and issubclass(cls, torch.autograd.Function):
            return cls.apply(*args)  # func itself would bypass the checker
        if not spmd.is_type_checking():
            return func(*args, **kwargs)
        if func in COLLECTIVES:
            return collective(func, args, kwargs)
        if func is torch.Tensor.unflatten:
            return self.unflattened(*args)
        if func is torch.Tensor.view and (sizes := first_dim_split(*args)):
            return self.unflattened(args[0], 0, sizes)
        if func is torch.Tensor.narrow and are_rows(args[0]) and args[1] == 0:
            return of_same_type(func, args, kwargs)
        if func is torch.Tensor.to and isinstance(args[1], torch.device):
            return of_same_type(func, args, kwargs)
        if func is torch.cat and all(map(are_rows, args[0])):
            with spmd.no_typecheck():
                rows = torch.cat(*args, **kwargs)
            return stamp(rows, S(0))
        if func is torch.cat:
            return func(concatenable(args[0]), *args[1:], **kwargs)
        if func is torch.Tensor.new_zeros and args[1] == () and varies(args[0]):
            return partial_zero(args[0])
        if func is torch.Tensor.new_zeros and varies(args[0]):  # zeros beside rows
            return of_same_type(func, args, kwargs)
        return func(*args, **kwargs)

    def with_shared_groups(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The forward of a half whose groups of channels are each held by several ranks."""

        def call(*args: Any) -> Tensor:
            self.shared_groups = True
            try:
                return forward(*args)
            finally:
                self.shared_groups = False

        return call

    def unflattened(self, x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
        """Unflattens a dimension: where it is sharded, the first of the new dimensions is, or the
        second where ranks share a group."""
        kind, dim = type_of(x), dim % x.dim()
        with spmd.no_typecheck():
            y = x.unflatten(dim, sizes)
        if isinstance(kind, S) and kind.dim >= dim:
            shift = len(sizes) - 1
            if kind.dim == dim:
                shift = 1 if self.shared_groups and y.shape[dim] == 1 and sizes[0] == 1 else 0
            kind = S(kind.dim + shift)
        return stamp(y, kind)


def first_dim_split(x: Tensor, *sizes: Any) -> tuple[int, ...]:
    """The sizes into which a view splits the first dimension, if it changes no other; else ()."""
    wanted = tuple(sizes[0]) if isinstance(sizes[0], tuple) else sizes
    count = len(wanted) - x.dim() + 1
    return wanted[:count] if count > 1 and wanted[count:] == tuple(x.shape[1:]) else ()


def are_rows(t: Tensor) -> bool:
    """Whether these are rows, `[rows, D]`, of which each rank has as many as it has: without the
    last, or with others behind them, they are its rows, too."""
    return t.dim() == 2 and type_of(t) == S(0)


def collective(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """A collective over the axis that is checked changes the type; over another it does not."""
    x, group = args
    if not includes_axis(group):
        return of_same_type(func, args, kwargs)
    if func in REDUCTIONS:
        expect(x, kwargs["src"], func.__name__)
    if axis() == spmd.MeshAxis.of(group):
        return func(x, group, **kwargs)
    # One of the factors of the group's axis: the collective over all of them is one over each.
    expect(x, kwargs["src"], func.__name__)
    with spmd.no_typecheck():
        y = func(x, group, **kwargs)
    return stamp(y, kwargs["dst"])


def local_over(of_axis: Callable[[Sharding], bool]) -> Callable[..., Tensor]:
    """`Sharding.local`, whose result differs between the ranks of the axis where it is `of_axis`:
    a shard, which several may hold. Where it is not, the result has the type of the full tensor."""

    def local(self: Sharding, full: Tensor, dim: int, shards: int | None = None) -> Tensor:
        if self.size == 1 or not spmd.is_type_checking():
            return _local(self, full, dim, shards)
        if not of_axis(self):
            with spmd.no_typecheck():
                shard = _local(self, full, dim, shards)
            return stamp(shard, type_of(full))
        return as_shard(_local(self, full, dim, shards), dim)

    return local


_local = Sharding.local


def of_same_type(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Runs a function whose result has the type of its first argument."""
    with spmd.no_typecheck():
        y = func(*args, **kwargs)
    return stamp(y, type_of(args[0]))


def varies(t: Tensor) -> bool:
    """Whether ranks have different values."""
    return type_of(t) in (P, V) or isinstance(type_of(t), S)


def partial_zero(t: Tensor) -> Tensor:
    """A scalar zero to which partial sums are added, so it is a partial sum, P, too."""
    with spmd.no_typecheck():
        zero = t.new_zeros(())
    return stamp(zero, P)


def concatenable(tensors: Any) -> list[Tensor]:
    """Tensors to concatenate: beside shards, tensors that are constant along the sharded dimension
    become shards, too."""
    kinds = {t for t in map(type_of, tensors) if isinstance(t, S)}
    if len(kinds) != 1:
        return list(tensors)
    (shard,) = kinds

    def typed(t: Tensor) -> Tensor:
        constant = type_of(t) == R and (t.shape[shard.dim] == 1 or t.stride(shard.dim) == 0)
        return as_shard(t, shard.dim) if constant else t

    return [typed(t) for t in tensors]
