"""What PyTorch's operators do that the checker does not know, and collectives along other axes."""

import inspect
from collections.abc import Callable
from typing import Any

import spmd_types as spmd
import torch
from spmd_types import P, R, S, V
from torch import Tensor
from torch.overrides import TorchFunctionMode

from typed.types import along, as_shard, expect, stamp, type_of

REDUCTIONS = spmd.all_reduce, spmd.reduce_scatter
COLLECTIVES = *REDUCTIONS, spmd.all_gather, spmd.convert


class Operators(TorchFunctionMode):
    """Operators with sizes, which are local ones; sums, which take partial sums alone.

    `pieces` says that ranks share a group of channels, so that it is its width that is cut.
    """

    pieces = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, cls = kwargs or {}, getattr(func, "__self__", None)
        if inspect.isclass(cls) and issubclass(cls, torch.autograd.Function):
            return cls.apply(*args)  # func would pass the checker by
        if not spmd.is_type_checking():
            return func(*args, **kwargs)
        if func in COLLECTIVES:
            return collective(func, args, kwargs)
        if func is torch.Tensor.unflatten:
            return self.unflattened(*args)
        if func is torch.Tensor.view and (sizes := of_first(*args)):
            return self.unflattened(args[0], 0, sizes)
        if func is torch.Tensor.to and isinstance(args[1], torch.device):
            return of_same_type(func, args, kwargs)
        if func is torch.cat:
            return func(beside(args[0]), *args[1:], **kwargs)
        if func is torch.Tensor.new_zeros and args[1] == () and varies(args[0]):
            return nothing_yet(args[0])
        return func(*args, **kwargs)

    def in_pieces(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The half of a sub-block in which ranks share groups."""

        def call(*args: Any) -> Tensor:
            self.pieces = True
            try:
                return forward(*args)
            finally:
                self.pieces = False

        return call

    def unflattened(self, x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
        """A shard's whole pieces, of so many channels each, are a shard of all pieces."""
        found, dim = type_of(x), dim % x.dim()
        with spmd.no_typecheck():
            y = x.unflatten(dim, sizes)
        if isinstance(found, S) and found.dim >= dim:
            further = len(sizes) - 1
            if found.dim == dim:
                further = 1 if self.pieces and y.shape[dim] == 1 and sizes[0] == 1 else 0
            found = S(found.dim + further)
        return stamp(y, found)


def of_first(x: Tensor, *sizes: Any) -> tuple[int, ...]:
    """Into which sizes a view splits the first dimension, if it splits that one alone."""
    wanted = tuple(sizes[0]) if isinstance(sizes[0], tuple) else sizes
    count = len(wanted) - x.dim() + 1
    return wanted[:count] if count > 1 and wanted[count:] == tuple(x.shape[1:]) else ()


def collective(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Along the axis a collective changes the type; along another it leaves it as it is."""
    x, group = args
    if not along(group):
        return of_same_type(func, args, kwargs)
    if func in REDUCTIONS:
        expect(x, kwargs["src"], func.__name__)
    return func(x, group, **kwargs)


def of_same_type(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """A result of the type of the first argument."""
    with spmd.no_typecheck():
        y = func(*args, **kwargs)
    return stamp(y, type_of(args[0]))


def varies(t: Tensor) -> bool:
    """Whether ranks have different values."""
    return type_of(t) in (P, V) or isinstance(type_of(t), S)


def nothing_yet(t: Tensor) -> Tensor:
    """A scalar zero, to which partial sums are to be added: it is one, too."""
    with spmd.no_typecheck():
        zero = t.new_zeros(())
    return stamp(zero, P)


def beside(tensors: Any) -> list[Tensor]:
    """Tensors to concatenate: with shards along another dimension, what is the same along it."""
    found = {t for t in map(type_of, tensors) if isinstance(t, S)}
    if len(found) != 1:
        return list(tensors)
    (shard,) = found

    def cut(t: Tensor) -> Tensor:
        same = type_of(t) == R and (t.shape[shard.dim] == 1 or t.stride(shard.dim) == 0)
        return as_shard(t, shard.dim) if same else t

    return [cut(t) for t in tensors]
