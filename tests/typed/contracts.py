"""Contracts of kernels: types of their arguments and results, which no operator's rule gives."""

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
    """Types of a function's arguments by name, R where none is given, and of its results.

    None is whatever type, and a result that is no tensor. `sharding` says that without the ranks'
    `Sharding` the result would be another.
    """

    arguments: dict[str, Type]
    results: tuple[Type, ...]
    sharding: bool = False


def sharded(dim: int, *names: str) -> dict[str, Type]:
    """Arguments that are shards along `dim`."""
    return dict.fromkeys(names, S(dim))


def arguments(symbol: str) -> Mapping[str, Argument]:
    """Of the operator along the sequence of a sub-block, as its card declares them."""
    mixing = CARDS[symbol].mixing
    assert mixing is not None
    return mixing.arguments


def over_heads(symbol: str) -> dict[str, Type]:
    """Their types where ranks have heads of their own."""
    kinds: dict[Kind, Type] = {"head": S(2), "group": S(2), "shared": R, "constant": S(0)}
    return {name: kinds[argument.kind] for name, argument in arguments(symbol).items()}


def over_tokens(symbol: str) -> dict[str, Type]:
    """Their types where ranks have parts of a sequence."""
    return {
        name: R if argument.kind == "constant" else S(0)
        for name, argument in arguments(symbol).items()
    }


# Each rank has heads, channels or experts of its own, whichever and how many they are. This holds
# for all axes: of the context, too, ranks may exchange their parts of a sequence for heads.
CONTRACTS: dict[Function, Contract] = {
    attention.attention: Contract(over_heads("*") | sharded(0, "sinks"), (S(2),)),
    conv.causal_conv: Contract(sharded(2, "x") | sharded(0, "weight", "bias"), (S(2),)),
    ssd.ssd: Contract(over_heads("M"), (S(2), S(1))),
    selective_scan.selective_scan: Contract(over_heads("m"), (S(2), S(1))),
    s4d.s4d: Contract(over_heads("S"), (S(2), S(1))),
    delta.delta_rule: Contract(over_heads("G"), (S(2), S(1))),
    # over the inner width of every expert, which the last product sums
    experts.expert_mlp: Contract(
        sharded(1, "gate", "up") | sharded(2, "down"), (P,), sharding=True
    ),
}  # fmt: skip


def held(function: Function, contract: Contract) -> Function:
    """The function under its contract; inside, the checker follows nothing."""
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
                raise SpmdTypeError(f"{name} is not told of the sharding")
        with spmd.no_typecheck():
            results = function(*args, **kwargs)
        several = results if isinstance(results, tuple) else (results,)
        for result, wanted in zip(several, contract.results, strict=True):
            if wanted is not None:
                stamp(result, wanted)
        return results

    return call


def in_models(replaced: Mapping[Function, Function]) -> Iterator[Any]:
    """Patches that put functions in others' place, wherever a model names them."""
    found = pkgutil.iter_modules(blocks.__path__, f"{blocks.__name__}.")
    for module in [decoder, *(importlib.import_module(one.name) for one in found)]:
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value in replaced:
                yield patch.object(module, name, replaced[value])
