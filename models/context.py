"""What a forward pass carries beside the activations: positions, documents, losses, caches."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.rope import RopeScaling, rope_table

Memory = dict[tuple[int, str], Tensor]


@dataclass(eq=False)
class Context:
    """Shared by all sub-blocks of one forward pass; `at` makes the one that a sub-block sees.

    Attributes:
        positions: `[S, B]` integers, from 0 at each document's start.
        documents: `[S, B]` integers, non-decreasing along S; None: every row is one document.
        groups: balance groups in the global batch; a group's balancing loss weighs 1/groups.
        samples: `[B]` numbers of the samples, which key random draws; None: 0, 1, ...
        draw: key of this step's random draws.
        passes: how often each sample stands in the batch, one pass beside the other (THOR).
        index: place of the sub-block in the row.
        whole_documents: `documents` of the whole sequence where `positions` and `documents` are a
            part of it.
        places: `[S]`, which tokens of the whole sequence those of the part are; None: all.
        terms: balancing losses of this pass, by sub-block, detached, for reports.
        loads: rows that each expert was chosen for, `[E]`, by sub-block.
        extras: parts of the objective beside the mean cross entropy, summed over tokens, detached.
        memory: what earlier tokens left behind (keys and values, convolution inputs, states), by
            sub-block and role; None: nothing is kept.
    """

    positions: Tensor
    documents: Tensor | None = None
    groups: float = 1.0
    samples: Tensor | None = None
    draw: int = 0
    passes: int = 1
    index: int = 0
    whole_documents: Tensor | None = None
    places: Tensor | None = None
    terms: dict[int, Tensor] = field(default_factory=dict)
    loads: dict[int, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    memory: Memory | None = None
    _cache: dict[tuple, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of_rows(cls, tokens: Tensor) -> "Context":
        """The context of tokens `[S, B]` whose every row is one document."""
        return cls(torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens))

    def at(self, index: int) -> "Context":
        """The same context, seen by the sub-block at `index`."""
        return dataclasses.replace(self, index=index)

    def part(self, mine: Callable[[Tensor], Tensor]) -> "Context":
        """The same for a part of the sequence, which `mine` takes of whole tensors `[S, ...]`."""
        return dataclasses.replace(
            self,
            positions=mine(self.positions),
            documents=None if self.documents is None else mine(self.documents),
            whole_documents=self.documents,
            places=mine(torch.arange(len(self.positions), device=self.positions.device)),
            _cache={},
        )

    def whole(self) -> "Context":
        """The same with the documents of the whole sequence, where what is computed has it."""
        return dataclasses.replace(self, documents=self.whole_documents)

    @torch.compiler.disable  # or the first sub-block's graph would make it, and differ from others'
    def rope(
        self, width: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None
    ) -> tuple[Tensor, Tensor]:
        """Rotary table for this head width, made once per pass."""
        key = ("rope", width, theta, dtype, scaling)
        if key not in self._cache:
            self._cache[key] = rope_table(self.positions, width, theta, dtype, scaling)
        return self._cache[key]

    def recall(self, role: str) -> Tensor | None:
        """What this sub-block kept under `role` before these tokens."""
        return None if self.memory is None else self.memory.get((self.index, role))

    def keep(self, role: str, value: Tensor) -> None:
        """Keep `value` for the tokens to come, if this pass has a memory."""
        if self.memory is not None:
            self.memory[self.index, role] = value

    def extended(self, role: str, rows: Tensor, last: int | None = None) -> Tensor:
        """`rows` behind those kept before, all kept (or the `last`) for the tokens to come."""
        if self.memory is None:
            return rows
        before = self.recall(role)
        rows = rows if before is None else torch.cat([before, rows])
        self.keep(role, rows if last is None else rows[max(0, len(rows) - last) :])
        return rows

    def sample_numbers(self) -> Tensor:
        """`[B]`: which sample each column is."""
        if self.samples is not None:
            return self.samples
        return torch.arange(self.positions.shape[1], device=self.positions.device)

    def turns(self) -> Tensor:
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
