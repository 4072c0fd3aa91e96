"""Functions that compilers leave as they are: one operator each inside a compiled graph."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def opaque(name: str, fake: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function one operator of compiled graphs, which they neither look into nor break at.

    For what Inductor cannot express (calls of other libraries) or makes worse (loops over blocks).
    Eagerly nothing changes: the function is called as it is, without a dispatcher's cost. It has no
    gradient of its own: it stands inside an `autograd.Function`, which Dynamo traces.

    Args:
        name: of the operator, `colonnade::name`.
        fake: the same function on tensors without data: shapes, dtypes and devices of its results.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        operator = torch.library.custom_op(f"colonnade::{name}", function, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return operator(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    return decorate
