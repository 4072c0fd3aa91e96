"""What a forward pass carries beside the activations: positions, documents, balancing terms."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.attention import document_mask, rope_table


@dataclass(eq=False)
class Context:
    """Shared by all sub-blocks of one forward pass.

    Attributes:
        positions: `[S, B]` integers, from 0 at each document's start.
        documents: `[S, B]` integers, non-decreasing along S; None: every row is one document.
        groups: balance groups in the global batch; a group's balancing loss weighs 1/groups.
        terms: balancing losses of this pass, by sub-block, detached, for reports.
    """

    positions: Tensor
    documents: Tensor | None = None
    groups: float = 1.0
    terms: dict[int, Tensor] = field(default_factory=dict)
    _cache: dict[tuple, Any] = field(default_factory=dict, repr=False)

    @property
    def mask(self) -> Tensor | None:
        """Attention mask of packed rows, made once per pass."""
        if self.documents is None:
            return None
        if ("mask",) not in self._cache:
            self._cache["mask",] = document_mask(self.documents)
        return self._cache["mask",]

    def rope(self, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotary table for this head width, made once per pass."""
        key = ("rope", width, theta, dtype)
        if key not in self._cache:
            self._cache[key] = rope_table(self.positions, width, theta, dtype)
        return self._cache[key]


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
