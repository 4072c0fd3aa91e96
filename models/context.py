"""The inputs of a forward pass beside the tokens: positions, documents, keys of draws, a cache."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.rope import RopeScaling, rope_table
from colonnade.models.cache import Cache


@dataclass(frozen=True, eq=False)
class Context:
    """The inputs of one forward pass that all sub-blocks share; `at` makes that of a sub-block.

    Attributes:
        positions: `[S, B]` integers, from 0 at the start of each document.
        documents: `[S, B]` integers, non-decreasing along S; None: every row is one document.
        groups: balance groups in the global batch; the balancing loss of a group weighs 1/groups.
        samples: `[B]` indices of the samples, which key random draws; None: 0, 1, ...
        rng_key: the key of this step's random draws.
        passes: how many copies of each sample the batch has, one pass after the other along B
            (THOR).
        index: the index of the sub-block in the row.
        whole_documents: `documents` of the whole sequence, where `positions` and `documents` are
            those of a segment.
        token_index: `[S]`, the indices in the whole sequence of a segment's tokens; None: all.
        cache: the cache of earlier tokens, in generation; None: nothing is cached.
        tables: what is computed of positions at its first use: rotary tables, documents of keys.
    """

    positions: Tensor
    documents: Tensor | None = None
    groups: float = 1.0
    samples: Tensor | None = None
    rng_key: int = 0
    passes: int = 1
    index: int = 0
    whole_documents: Tensor | None = None
    token_index: Tensor | None = None
    cache: Cache | None = None
    tables: dict[tuple, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of_rows(cls, tokens: Tensor) -> "Context":
        """Returns the context of tokens `[S, B]` in which every row is one document."""
        return cls(torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens))

    def at(self, index: int) -> "Context":
        """Returns the context of the sub-block at `index`."""
        return dataclasses.replace(self, index=index)

    def segment(self, take: Callable[[Tensor], Tensor]) -> "Context":
        """Returns the context of a segment; `take` slices it from a full tensor `[S, ...]`."""
        return dataclasses.replace(
            self,
            positions=take(self.positions),
            documents=None if self.documents is None else take(self.documents),
            whole_documents=self.documents,
            token_index=take(torch.arange(len(self.positions), device=self.positions.device)),
            tables={},
        )

    def for_full_sequence(self) -> "Context":
        """Returns the context with the documents of the whole sequence, for an operator over it."""
        return dataclasses.replace(self, documents=self.whole_documents)

    def rope(
        self, width: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the rotary table of this head width, computed once per pass."""
        key = (width, theta, dtype, scaling)
        if key not in self.tables:
            self.tables[key] = rope_table(self.positions, width, theta, dtype, scaling)
        return self.tables[key]

    def key_documents(self, keys: int) -> Tensor | None:
        """Returns the documents of the last `keys` tokens `[keys, B]`, with those that are cached.

        None: every row is one document.
        """
        if self.cache is None or not self.cache.padded:
            return self.documents
        key = ("documents", keys)
        if key not in self.tables:
            before_newest = torch.arange(keys - 1, -1, -1, device=self.positions.device)[:, None]
            self.tables[key] = (before_newest <= self.positions[-1]).int()
        return self.tables[key]

    def cached(self, role: str) -> Tensor | None:
        """Returns this sub-block's cached tensor under `role`; None if there is no such tensor."""
        return None if self.cache is None else self.cache.get(self.index, role)

    def put(self, role: str, value: Tensor) -> None:
        """Stores `value` for later tokens if there is a cache."""
        if self.cache is not None:
            self.cache.put(self.index, role, value)

    def append_to_cache(self, role: str, rows: Tensor, last: int | None = None) -> Tensor:
        """Returns the cached rows followed by `rows` (`Cache.append`); without a cache `rows`."""
        return rows if self.cache is None else self.cache.append(self.index, role, rows, last)

    def sample_indices(self) -> Tensor:
        """Returns the index of each column's sample, `[B]`."""
        if self.samples is not None:
            return self.samples
        return torch.arange(self.positions.shape[1], device=self.positions.device)

    def pass_index(self) -> Tensor:
        """Returns the index of each column's pass, `[B]`."""
        columns = torch.arange(len(self.sample_indices()), device=self.positions.device)
        return columns // (len(columns) // self.passes)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = term.shape, term.dtype
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones(ctx.shape, dtype=ctx.dtype, device=grad.device)


def attach(x: Tensor, term: Tensor) -> Tensor:
    """Returns `x`, and adds `term` to the loss: backward through x gives `term` the gradient 1.

    So a term computed inside a sub-block needs no path to the loss, which may be in another
    pipeline stage or outside a recomputed region. The loss itself must be differentiated with
    gradient 1.
    """
    return _Attach.apply(x, term)
