"""Functions that are not traced: each is one custom operator in a compiled graph, and on tensors
without data."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

P = ParamSpec("P")
R = TypeVar("R")


def opaque(
    name: str, fake: Callable[P, R], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function a custom operator in compiled graphs: not traced, and without a graph break.

    For functions that Inductor cannot express (calls of other libraries) or slows down (loops over
    blocks or tokens). In eager mode the function is called directly, without the dispatcher's cost;
    only on fake tensors, where each operator within it would be one to keep books of, it is the
    operator too. That has no autograd formula: call it inside an `autograd.Function`, which Dynamo
    traces.

    Args:
        name: the operator is called `colonnade::name`.
        fake: the same function on tensors without data: shapes, dtypes and devices of its results.
        mutates: names of the arguments that it changes. Its results alias no argument.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        operator = torch.library.custom_op(f"colonnade::{name}", function, mutates_args=mutates)
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or any(isinstance(a, FakeTensor) for a in args):
                return operator(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    return decorate
