"""Seams: where `parallel/` takes part in a sub-block, declared with their arguments."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

# How an argument lies over the heads of a sub-block (of Mamba-1 the channels), which do not meet:
# head      [S, B, H, ...]  of each head
# group     [S, B, G, ...]  of each group of heads; where ranks outnumber groups, several share one
# shared    [S, B, ...]     the same for all heads
# constant  [H, ...]        of each head, for all tokens
Kind = Literal["head", "group", "shared", "constant"]


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
