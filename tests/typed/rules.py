"""The rule of each `autograd.Function`: the types of its results from those of its arguments.

Rules are equations of `rules.einsum`, in which `_` is a dimension that may not be sharded. Their
arguments have the names of those of `forward`.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import spmd_types as spmd
import torch
from spmd_types import I, P, R, S, SpmdTypeError, rules

from colonnade import kernels
from colonnade.kernels import activation, experts, linear, loss, norm
from colonnade.kernels.sharding import Sharding
from colonnade.models import context
from typed.types import axis, expect, type_of


def _linear(*, x: Any, weight: Any, defer: Any = None) -> Any:
    return rules.einsum("...i,oi->...o", x, weight, linear_in=(0, 1))


def _rms_norm(*, x: Any, weight: Any, bias: Any, mean: Any) -> Any:
    """A row is not sharded, or `mean` all-reduces its means."""
    given = [t for t in (weight, bias) if t is not None]
    row = "_" if mean is None else "d"
    if given and given[0].ndim == 2:
        row = ("g" if mean is None else "_") + row
    equation = ",".join([f"...{row}", *(row for _ in given)])
    return rules.einsum(f"{equation}->...{row}", x, *given)


def _layer_norm(*, x: Any, weight: Any, bias: Any) -> Any:
    return _rms_norm(x=x, weight=weight, bias=bias, mean=None)


def _activate(*, up: Any, gate: Any, name: str, poly: Any, sharding: Sharding) -> Any:
    """PolyNorm's rows are not sharded, or the ranks all-reduce their sums of powers."""
    row = "_" if name == "polynorm" and sharding.size == 1 else "f"
    if gate is not None:
        return rules.einsum(f"...{row},...{row}->...{row}", up, gate)
    if poly is not None:
        return rules.einsum(f"...{row},_->...{row}", up, poly)
    return rules.einsum(f"...{row}->...{row}", up)


def _activated_linear(
    *,
    up: Any,
    gate: Any,
    weight: Any,
    name: str,
    poly: Any,
    sharding: Sharding,
    defer: Any = None,
) -> Any:
    return _linear(
        x=_activate(up=up, gate=gate, name=name, poly=poly, sharding=sharding), weight=weight
    )


def _combine(*, rows: Any, weight: Any) -> Any:
    return rules.einsum("md,__->_d", rows, weight, linear_in=(0,))


def _objective(outputs: Any, *, x: Any, weight: Any, labels: Any, sharding: Sharding) -> None:
    """Sums over the vocabulary are all-reduced inside, so the gradient of x is a partial sum."""
    _scalars(outputs, (x,), weight, labels, sharding)


def _consistency(
    outputs: Any, *, x1: Any, x2: Any, weight: Any, labels: Any, sharding: Sharding
) -> None:
    _scalars(outputs, (x1, x2), weight, labels, sharding)


def _scalars(outputs: Any, inputs: Any, weight: Any, labels: Any, sharding: Sharding) -> None:
    for x in (*inputs, labels):
        expect(x, R, "an input of the loss")
    expect(weight, S(0) if sharding.size > 1 else R, "the vocabulary's weight")
    rules.ignore(*inputs, weight, labels)
    for scalar in outputs:
        spmd.assert_type(scalar, {axis(): I if sharding.size > 1 else R})


def _attach(*, x: Any, term: Any) -> Any:
    """The term's gradient is 1 on every rank, which is right where the term is I or P."""
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
    """Registers the rules of our autograd functions; those without one are local to a rank."""
    for cls, rule in RULES.items():
        cls.spmd_typecheck = staticmethod(rule)  # type: ignore[attr-defined]
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for cls in vars(importlib.import_module(module.name)).values():
            has_rule = not inspect.isclass(cls) or cls in RULES
            if not has_rule and issubclass(cls, torch.autograd.Function):
                spmd.register_local_autograd_function(cls)
