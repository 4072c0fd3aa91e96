"""Ranks exchange their parts of a sequence for heads: each then has all of it, and fewer heads.

For attention this is Ulysses (arXiv:2309.14509); recurrences are independent by head or channel,
too.
"""

from collections.abc import Callable
from typing import Any

import spmd_types as spmd
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from spmd_types import R, S
from torch import Tensor

from colonnade.models.seams import Kind, Seam
from colonnade.parallel.context.layout import SequenceSharding
from colonnade.parallel.seams import RefusedError


class HeadExchange:
    """The exchange between the ranks of a group, which hold the parts of `cut`."""

    def __init__(self, cut: SequenceSharding, group: dist.ProcessGroup) -> None:
        self.cut, self.group = cut, group

    def take(self, *tensors: Tensor) -> list[Tensor]:
        """`[S/n, B, H, ...]` each to `[S, B, H/n, ...]`, in the order of the sequence.

        All are launched before the first is waited for. Where n is a multiple of H, several ranks
        take the same head; its gradients are added up.
        """
        n, launched = self.cut.ranks, []
        for t in tensors:
            if t.shape[2] % n:
                t = t.repeat_interleave(n // t.shape[2], dim=2)
            launched.append(self.exchanged(t.unflatten(2, (n, -1)).movedim(2, 0)))
        return [self.cut.natural(t.flatten(0, 1)) for t in launched]

    def give(self, t: Tensor) -> Tensor:
        """The opposite: `[S, B, H/n, ...]` to `[S/n, B, H, ...]`."""
        sent = self.cut.by_rank(t).unflatten(0, (self.cut.ranks, -1))
        return self.exchanged(sent).movedim(0, 2).flatten(2, 3)

    def exchanged(self, t: Tensor) -> Tensor:
        """`[n, ...]`, to each rank one of it, to `[n, ...]`, of each rank one; backward as well.

        PyTorch's own collective: that of `spmd_types` cannot be kept by recomputation.
        """
        return funcol.all_to_all_single_autograd(t.contiguous(), None, None, self.group)

    def mine(self, t: Tensor) -> Tensor:
        """Of what there is for each head, `[H, ...]`, that of this rank's: `[H/n, ...]`."""
        return t.chunk(self.cut.ranks)[self.cut.rank]

    def everything(self, *tensors: Tensor) -> list[Tensor]:
        """What all heads share, `[S/n, ...]` each, to `[S, ...]`; its gradients are added up."""

        def gathered(t: Tensor) -> Tensor:
            dtype = {"op_dtype": t.dtype}
            return spmd.all_gather(
                t.contiguous(), self.group, src=S(0), dst=R, **dtype, backward_options=dtype
            )

        return [self.cut.natural(gathered(t)) for t in tensors]

    def around(self, seam: Seam) -> Callable[..., Tensor]:
        """The seam's local function over whole sequences, of the heads that are this rank's.

        Each argument moves by its kind: heads and groups are exchanged, shared ones all-gathered,
        and constants sliced; the output is exchanged back.

        Raises:
            RefusedError: the seam does not declare its arguments.
        """
        kinds = list(seam.arguments.values())
        if not kinds:
            raise RefusedError(
                f"the seam {seam.name!r} of {seam.local.__module__} does not say how its arguments "
                "lie over heads, which recurrence = heads exchanges; declare `arguments`"
            )

        def moved(*args: Any) -> Tensor:
            *given, context = args
            tensors = dict(enumerate(given[: len(kinds)]))

            def of(*wanted: Kind) -> list[int]:
                return [
                    i for i, kind in enumerate(kinds) if kind in wanted and tensors[i] is not None
                ]

            moves = (("head", "group"), self.take), (("shared",), self.everything)
            for wanted, move in moves:
                if found := of(*wanted):
                    tensors |= zip(found, move(*(tensors[i] for i in found)), strict=True)
            for i in of("constant"):
                tensors[i] = self.mine(tensors[i])
            context = context.for_full_sequence()
            return self.give(seam.local(*tensors.values(), *given[len(kinds) :], context))

        return moved
