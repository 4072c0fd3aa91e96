"""Seams: the functions of a sub-block that `parallel/` may replace, with their arguments."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from colonnade.models.cards.base import Kind


class Seam(NamedTuple):
    """A function that a module calls through an attribute, and that parallelism may replace.

    `name` is the attribute that holds the function; `local` is the function on one device, its
    initial value. `arguments` are the layouts of its tensor arguments, in order, before all other
    arguments; the last argument is the context.
    """

    name: str
    local: Callable[..., Any]
    arguments: Mapping[str, Kind] = {}


def identity(t: Tensor) -> Tensor:
    """The function on one device of seams that slice a tensor into shards or gather them."""
    return t
