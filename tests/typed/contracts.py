"""Contracts of kernels: the types of their arguments and results, stated for the entire kernel."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest.mock import patch

import spmd_types as spmd
from spmd_types import P, R, S, SpmdTypeError
from torch import Tensor

from colonnade.kernels import attention, conv, delta, experts, s4d, selective_scan, ssd
from colonnade.models import blocks, decoder
from colonnade.models.cards.base import Argument, Kind
from colonnade.models.config import CARDS
from typed.types import Type, expect, stamp

Function = Callable[..., Any]


class Contract(NamedTuple):
    """The types that a function takes and returns.

    Attributes:
        arguments: types by name, R where none is given; None: any type.
        results: types in order; None: any type, or not a tensor.
        sharding: whether the function needs the ranks' `Sharding`, without which its result would
            be another.
    """

    arguments: dict[str, Type]
    results: tuple[Type, ...]
    sharding: bool = False


def sharded(dim: int, *names: str) -> dict[str, Type]:
    """The types of arguments that are shards along `dim`."""
    return dict.fromkeys(names, S(dim))


def arguments(symbol: str) -> Mapping[str, Argument]:
    """The arguments of the operator that mixes along the sequence, as a sub-block's card declares
    them."""
    mixing = CARDS[symbol].mixing
    assert mixing is not None
    return mixing.arguments


def over_heads(symbol: str) -> dict[str, Type]:
    """The types of these arguments where heads are sharded."""
    kinds: dict[Kind, Type] = {"head": S(2), "group": S(2), "shared": R, "constant": S(0)}
    return {name: kinds[argument.kind] for name, argument in arguments(symbol).items()}


def over_tokens(symbol: str) -> dict[str, Type]:
    """The types of these arguments where the sequence is sharded."""
    return {
        name: R if argument.kind == "constant" else S(0)
        for name, argument in arguments(symbol).items()
    }


# Heads, channels or the widths of experts are sharded; kernels compute each independently. This
# holds along every axis: over the context group an all-to-all may exchange sequences for heads.
CONTRACTS: dict[Function, Contract] = {
    attention.attention: Contract(over_heads("*") | sharded(0, "sinks"), (S(2),)),
    conv.causal_conv: Contract(sharded(2, "x") | sharded(0, "weight", "bias"), (S(2),)),
    ssd.ssd: Contract(over_heads("M"), (S(2), S(1))),
    selective_scan.selective_scan: Contract(over_heads("m"), (S(2), S(1))),
    s4d.s4d: Contract(over_heads("S"), (S(2), S(1))),
    delta.delta_rule: Contract(over_heads("G"), (S(2), S(1))),
    # over the inner width of every expert, which the last product sums
    experts.expert_mlp: Contract(
        sharded(1, "gate", "up", "gate_bias", "up_bias") | sharded(2, "down") | {"down_bias": P},
        (P,),
        sharding=True,
    ),
}  # fmt: skip


def under_contract(function: Function, contract: Contract) -> Function:
    """Wraps a function to check its arguments and stamp its results; the checker does not follow
    the operators inside."""
    signature, name = inspect.signature(function), getattr(function, "__name__", "a seam")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        for argument, value in given.arguments.items():
            wanted = contract.arguments.get(argument, R)
            if isinstance(value, Tensor) and wanted is not None:
                expect(value, wanted, f"{name}: {argument}")
            elif argument == "sharding" and contract.sharding and value.size == 1:
                raise SpmdTypeError(f"{name} is called without the sharding")
        with spmd.no_typecheck():
            results = function(*args, **kwargs)
        several = results if isinstance(results, tuple) else (results,)
        for result, wanted in zip(several, contract.results, strict=True):
            if wanted is not None:
                stamp(result, wanted)
        return results

    return call


def in_models(replaced: Mapping[Function, Function]) -> Iterator[Any]:
    """Patches that replace functions in every module of the models that imports them, and in the
    module of those that are called by its name."""
    modules = pkgutil.iter_modules(blocks.__path__, f"{blocks.__name__}.")
    importing = [importlib.import_module(module.name) for module in modules]
    for module in [decoder, experts, *importing]:
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value in replaced:
                yield patch.object(module, name, replaced[value])
