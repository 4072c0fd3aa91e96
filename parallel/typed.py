"""What `spmd_types`' checker must know of our functions, to type a model's forward on one rank.

Every tensor has a type over the tensor-parallel ranks: S(i), a shard of the whole along dimension
i; P, a partial sum; R and I, the same on all ranks, with a gradient that is a partial sum (R) or
the same (I). A missing or doubled reduction is a type error, and so is a parameter whose gradient
`complete_gradients` sums without need, or does not sum though it must. The types follow every
operator of PyTorch; where they cannot, it is stated here: a rule for each `autograd.Function`, and
a contract for each kernel that works on heads, channels or experts without looking at their number.
The checker does not know FSDP2: it runs on a model that is cut over these ranks and nothing more.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import spmd_types as spmd
import torch
from spmd_types import I, P, R, S, SpmdTypeError, V, rules
from spmd_types.checker import typecheck
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode

from colonnade import kernels
from colonnade.kernels import (
    activation,
    attention,
    conv,
    delta,
    experts,
    linear,
    loss,
    norm,
    selective_scan,
    ssd,
)
from colonnade.kernels.cut import Cut
from colonnade.models import blocks, context, reparam
from colonnade.models.blocks import mamba2
from colonnade.models.decoder import Decoder, Embedding
from colonnade.models.part import Part
from colonnade.parallel.tensor import on_stream

AXIS = "tp"
Type = Any  # R, I, P, V or S(i)


def type_of(t: Tensor) -> Type:
    """A tensor's type over the ranks, with the dimension along which it is a shard."""
    spec = spmd.get_partition_spec(t)
    if spec is not None:
        for dim, axes in enumerate(spec):
            if axes is not None:
                return S(dim)
    return spmd.get_axis_local_type(t, AXIS)


def expect(t: Tensor, wanted: Type, name: str) -> None:
    """Raises SpmdTypeError where a tensor has another type."""
    found = type_of(t)
    if found != wanted:
        raise SpmdTypeError(f"{name} is {found}, not {wanted}")


# Rules of autograd functions: equations of `rules.einsum`, in which `_` is a dimension that no rank
# may hold a part of. Arguments have the names of `forward`.


def _linear(*, x: Any, weight: Any) -> Any:
    return rules.einsum("...i,oi->...o", x, weight, linear_in=(0, 1))


def _rms_norm(*, x: Any, weight: Any, bias: Any, mean: Any) -> Any:
    """A row is whole, or `mean` completes its means."""
    given = [t for t in (weight, bias) if t is not None]
    row = "_" if mean is None else "d"
    if given and given[0].ndim == 2:
        row = ("g" if mean is None else "_") + row
    equation = ",".join([f"...{row}", *(row for _ in given)])
    return rules.einsum(f"{equation}->...{row}", x, *given)


def _layer_norm(*, x: Any, weight: Any, bias: Any) -> Any:
    return _rms_norm(x=x, weight=weight, bias=bias, mean=None)


def _activate(*, up: Any, gate: Any, name: str, poly: Any, cut: Cut) -> Any:
    """PolyNorm's rows are whole, or the cut completes their sums of powers."""
    row = "_" if name == "polynorm" and cut.count == 1 else "f"
    if gate is not None:
        return rules.einsum(f"...{row},...{row}->...{row}", up, gate)
    if poly is not None:
        return rules.einsum(f"...{row},_->...{row}", up, poly)
    return rules.einsum(f"...{row}->...{row}", up)


def _activated_linear(*, up: Any, gate: Any, weight: Any, name: str, poly: Any, cut: Cut) -> Any:
    return _linear(x=_activate(up=up, gate=gate, name=name, poly=poly, cut=cut), weight=weight)


def _combine(*, rows: Any, weight: Any) -> Any:
    return rules.einsum("md,__->_d", rows, weight, linear_in=(0,))


def _objective(outputs: Any, *, x: Any, weight: Any, labels: Any, cut: Cut) -> None:
    """All sums over the vocabulary are completed inside, so the gradient of x is a partial sum."""
    _scalars(outputs, (x,), weight, labels, cut)


def _consistency(outputs: Any, *, x1: Any, x2: Any, weight: Any, labels: Any, cut: Cut) -> None:
    _scalars(outputs, (x1, x2), weight, labels, cut)


def _scalars(outputs: Any, inputs: Any, weight: Any, labels: Any, cut: Cut) -> None:
    for x in (*inputs, labels):
        expect(x, R, "an input of the loss")
    expect(weight, S(0) if cut.count > 1 else R, "the vocabulary's weight")
    rules.ignore(*inputs, weight, labels)
    for scalar in outputs:
        spmd.assert_type(scalar, {AXIS: I if cut.count > 1 else R})


def _attach(*, x: Any, term: Any) -> Any:
    """The term's gradient is 1 on every rank: right for one that is I, or whose parts add up."""
    if type_of(term) not in (I, P):
        raise SpmdTypeError(f"a term that is attached on all ranks is {type_of(term)}, not P or I")
    rules.ignore(term)
    return rules.einsum("...->...", x, linear_in=(0,))


RULES: dict[type, Callable[..., Any]] = {
    linear._Linear: _linear,
    norm._RMSNorm: _rms_norm,
    norm._LayerNorm: _layer_norm,
    activation._Activate: _activate,
    activation._ActivatedLinear: _activated_linear,
    experts._Combine: _combine,
    loss._Objective: _objective,
    loss._Consistency: _consistency,
    context._Attach: _attach,
}


def register() -> None:
    """Tell the checker of our autograd functions; those without a rule work on each rank alone."""
    for cls, rule in RULES.items():
        cls.spmd_typecheck = staticmethod(rule)  # type: ignore[attr-defined]
    for found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for cls in vars(importlib.import_module(found.name)).values():
            known = not inspect.isclass(cls) or cls in RULES
            if not known and issubclass(cls, torch.autograd.Function):
                spmd.register_local_autograd_function(cls)


# Contracts of kernels: on heads, channels or experts apart, whichever and how many there are.


class Contract(NamedTuple):
    """Types of a kernel's arguments by name, R where none is given, and of its results."""

    arguments: dict[str, Type]
    results: tuple[Type, ...]


def _sharded(dim: int, *names: str) -> dict[str, Type]:
    return dict.fromkeys(names, S(dim))


CONTRACTS: dict[Callable[..., Any], Contract] = {
    attention.attention: Contract(_sharded(2, "q", "k", "v") | _sharded(0, "sinks"), (S(2),)),
    conv.causal_conv: Contract(_sharded(2, "x") | _sharded(0, "weight", "bias"), (S(2),)),
    ssd.ssd: Contract(_sharded(2, "x", "dt", "B", "C") | _sharded(0, "A", "D"), (S(2), S(1))),
    selective_scan.selective_scan: Contract(
        _sharded(2, "x", "dt") | _sharded(0, "A", "D"), (S(2), S(1))
    ),
    delta.delta_rule: Contract(_sharded(2, "q", "k", "v", "beta", "decay"), (S(2), S(1))),
    # over the inner width of every expert, which the last product sums
    experts.expert_mlp: Contract(_sharded(1, "gate", "up") | _sharded(2, "down"), (P,)),
}


def held(kernel: Callable[..., Any], contract: Contract) -> Callable[..., Any]:
    """The kernel under its contract; inside, the checker follows no dimensions."""
    signature = inspect.signature(kernel)

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        for name, value in given.arguments.items():
            if isinstance(value, Tensor):
                expect(value, contract.arguments.get(name, R), f"{kernel.__name__}: {name}")
            elif name == "cut" and value.count == 1:
                raise SpmdTypeError(f"{kernel.__name__} is not told of the cut")
        with spmd.local():
            results = kernel(*args, **kwargs)
        several = results if isinstance(results, tuple) else (results,)
        for result, wanted in zip(several, contract.results, strict=True):
            stamp(result, wanted)
        return results

    return call


def stamp(t: Tensor, wanted: Type) -> Tensor:
    """Give a tensor that varies over the ranks the type that it is known to have."""
    spmd.assert_type(t, {AXIS: wanted})
    return t


# What else the checker cannot see.


class Operators(TorchFunctionMode):
    """Operators with sizes, which are local ones, and sums, which take partial sums alone.

    `pieces` says that ranks share a group of channels, so that it is its width that is cut.
    """

    pieces = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, cls = kwargs or {}, getattr(func, "__self__", None)
        if inspect.isclass(cls) and issubclass(cls, torch.autograd.Function):
            return cls.apply(*args)  # func would pass the checker by
        if spmd.is_type_checking():
            if func is torch.Tensor.unflatten:
                return self.unflattened(*args)
            if func is torch.Tensor.view and args[0].dim() == 1 and len(args) == 3:
                return self.unflattened(args[0], 0, args[1:])
            if func is torch.cat:
                return func(beside(args[0]), *args[1:], **kwargs)
            if func in (spmd.all_reduce, spmd.reduce_scatter):
                expect(args[0], kwargs["src"], func.__name__)
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


def as_shard(t: Tensor, dim: int) -> Tensor:
    """What differs between ranks, though the checker takes it to be the same; its gradient too."""
    return stamp(spmd.reinterpret(t, AXIS, src=R, dst=V, expert_mode=True), S(dim % t.dim()))


def mine(self: Cut, whole: Tensor, dim: int, pieces: int | None = None) -> Tensor:
    """`Cut.mine`, whose result differs between ranks: a shard, of repeated pieces where shared."""
    own = _mine(self, whole, dim, pieces)
    if self.count == 1 or not spmd.is_type_checking():
        return own
    return as_shard(own, dim)


def looked_up(self: Embedding, tokens: Tensor) -> Tensor:
    """`Embedding.forward`: where other ranks have the row, zeros, so that what is found adds up."""
    leave = self.leave

    def summed(found: Tensor) -> Tensor:
        with typecheck(local=False):
            return leave(stamp(found, P))

    self.leave = summed
    try:
        with spmd.local():
            return _looked_up(self, tokens)
    finally:
        self.leave = leave


_mine, _looked_up = Cut.mine, Embedding.forward


def contract_patches() -> Iterator[Any]:
    """Put every kernel that has a contract under it, wherever a sub-block names it."""
    for found in pkgutil.iter_modules(blocks.__path__, f"{blocks.__name__}."):
        module: ModuleType = importlib.import_module(found.name)
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value in CONTRACTS:
                yield patch.object(module, name, held(value, CONTRACTS[value]))


# The model.


def parameter_types(model: Decoder) -> dict[str, Type]:
    """By name; of whole parameters, those in `partial` are R, and others I.

    A gradient has the type's `backward_type`: P for R, else the same.

    Raises:
        SpmdTypeError: a shard is in `partial`.
    """
    types: dict[str, Type] = {}
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            assert isinstance(module, Part)
            assert isinstance(p, DTensor)
            (where,), summed = p.placements, name in module.partial
            if isinstance(where, Shard) and summed:
                raise SpmdTypeError(f"{prefix}.{name} is a shard: so is its gradient, and no sum")
            whole = R if summed else I
            types[f"{prefix}.{name}"] = S(where.dim) if isinstance(where, Shard) else whole
    return types


@contextmanager
def typechecked(model: Decoder, mesh: DeviceMesh) -> Iterator[None]:
    """Within, the model's forward is checked: raises SpmdTypeError where a type does not fit.

    Args:
        model: cut by `tensor_parallel`, filled, in fp64 or fp32; not sharded any further.
        mesh: of one dimension, `tp`, more than one rank. Its backend may be `fake`.

    Tokens, positions and what else goes in are to be stamped R; the objective comes out I, which
    its `backward` demands.
    """
    register()
    types = parameter_types(model)
    known = {id(p): types[name] for name, p in model.named_parameters()}
    stream = {id(p) for part in on_stream(model) for p in part.parameters(recurse=False)}

    def typed_shard(local: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
        with spmd.no_typecheck():
            shard = local(p)
        whole = id(p) in stream and not torch.is_grad_enabled()  # so is the stream then
        return stamp(shard, I if whole else known[id(p)])

    with ExitStack() as stack:
        stack.enter_context(patch.object(Cut, "mine", mine))
        stack.enter_context(patch.object(Embedding, "forward", looked_up))
        stack.enter_context(patch.object(reparam, "iterate", spmd.no_typecheck(reparam.iterate)))
        for change in contract_patches():
            stack.enter_context(change)
        for part in model.modules():
            if isinstance(part, Part):
                local = functools.partial(typed_shard, part.local)
                stack.enter_context(patch.object(part, "local", local))
        stack.enter_context(spmd.set_current_mesh(mesh))
        stack.enter_context(typecheck("strict", local=False))
        operators = stack.enter_context(Operators())
        for part in model.modules():
            if isinstance(part, mamba2.ScanOut) and part.groups % part.cut.count:
                stack.enter_context(
                    patch.object(part, "forward", operators.in_pieces(part.forward))
                )
        for buffer in model.buffers():
            spmd.assert_type(buffer, {AXIS: R})
        yield
