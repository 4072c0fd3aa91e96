"""Functions that torch.compile does not trace: each is one custom operator in a compiled graph."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def opaque(name: str, fake: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function a custom operator in compiled graphs: not traced, and without a graph break.

    For functions that Inductor cannot express (calls of other libraries) or slows down (loops over
    blocks). In eager mode the function is called directly, without the dispatcher's cost. The
    operator has no autograd formula: call it inside an `autograd.Function`, which Dynamo traces.

    Args:
        name: the operator is called `colonnade::name`.
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
