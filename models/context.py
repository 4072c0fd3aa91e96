"""What a forward pass is given beside the tokens: positions, documents, keys of draws, a cache."""

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
    """The inputs of one forward pass that all sub-blocks share; `at` makes the one that each sees.

    Attributes:
        positions: `[S, B]` integers, from 0 at each document's start.
        documents: `[S, B]` integers, non-decreasing along S; None: every row is one document.
        groups: balance groups in the global batch; a group's balancing loss weighs 1/groups.
        samples: `[B]` numbers of the samples, which key random draws; None: 0, 1, ...
        rng_key: of this step's random draws.
        passes: how often each sample stands in the batch, one pass beside the other (THOR).
        index: place of the sub-block in the row.
        whole_documents: `documents` of the whole sequence where `positions` and `documents` are of
            a segment.
        token_index: `[S]`, which tokens of the whole sequence those of a segment are; None: all.
        cache: what earlier tokens left behind, in generation; None: nothing is kept.
        tables: rotary tables of these positions, each made at its first use.
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
        """The context of tokens `[S, B]` whose every row is one document."""
        return cls(torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens))

    def at(self, index: int) -> "Context":
        """The same context, seen by the sub-block at `index`."""
        return dataclasses.replace(self, index=index)

    def segment(self, take: Callable[[Tensor], Tensor]) -> "Context":
        """The same for a segment of the sequence: `take` gives it of a whole tensor `[S, ...]`."""
        return dataclasses.replace(
            self,
            positions=take(self.positions),
            documents=None if self.documents is None else take(self.documents),
            whole_documents=self.documents,
            token_index=take(torch.arange(len(self.positions), device=self.positions.device)),
            tables={},
        )

    def whole(self) -> "Context":
        """The same with the documents of the whole sequence, where what is computed has it."""
        return dataclasses.replace(self, documents=self.whole_documents)

    @torch.compiler.disable  # or the first sub-block's graph would make it, and differ from others'
    def rope(
        self, width: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None
    ) -> tuple[Tensor, Tensor]:
        """Rotary table for this head width, made once per pass."""
        key = (width, theta, dtype, scaling)
        if key not in self.tables:
            self.tables[key] = rope_table(self.positions, width, theta, dtype, scaling)
        return self.tables[key]

    def cached(self, role: str) -> Tensor | None:
        """What this sub-block put under `role` at earlier tokens; None without a cache."""
        return None if self.cache is None else self.cache.get(self.index, role)

    def put(self, role: str, value: Tensor) -> None:
        """Keep `value` for the tokens to come, if there is a cache."""
        if self.cache is not None:
            self.cache.put(self.index, role, value)

    def extended(self, role: str, rows: Tensor, last: int | None = None) -> Tensor:
        """`rows` behind the cached ones, see `Cache.extend`; without a cache `rows` themselves."""
        return rows if self.cache is None else self.cache.extend(self.index, role, rows, last)

    def sample_numbers(self) -> Tensor:
        """`[B]`: which sample each column is."""
        if self.samples is not None:
            return self.samples
        return torch.arange(self.positions.shape[1], device=self.positions.device)

    def pass_index(self) -> Tensor:
        """`[B]`: in which of the passes each column is."""
        columns = torch.arange(len(self.sample_numbers()), device=self.positions.device)
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
    """`x`, with `term` added to the loss: wherever x's gradient flows, term's flows too.

    A term met deep in the model needs no path to the loss, which may lie in another pipeline stage
    or outside a recomputed region. The loss itself must be differentiated with gradient 1.
    """
    return _Attach.apply(x, term)
