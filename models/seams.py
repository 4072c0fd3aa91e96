"""Seams: where `parallel/` takes part in a sub-block, declared with their arguments."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from colonnade.models.cards.base import Kind


class Seam(NamedTuple):
    """A function that a sub-block calls by name, and that parallelism may replace.

    `name` is the attribute that holds the function, at first `local`. `arguments` are its tensors
    in order, before all others; the last argument is the context.
    """

    name: str
    local: Callable[..., Any]
    arguments: Mapping[str, Kind] = {}


def same(whole: Tensor) -> Tensor:
    """The local function of seams that take a rank's part of a sequence, or put parts together."""
    return whole
