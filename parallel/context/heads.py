"""Ranks exchange their parts of a sequence for heads: each then has all of it, and fewer heads.

For attention this is Ulysses (arXiv:2309.14509); recurrences are independent by head or channel,
too.
"""

import spmd_types as spmd
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from spmd_types import R, S
from torch import Tensor

from colonnade.models.blocks import delta, mamba1, mamba2
from colonnade.models.context import Context
from colonnade.parallel.context.layout import SequenceCut


class Heads:
    """The exchange between the ranks of a group, which hold the parts of `cut`."""

    def __init__(self, cut: SequenceCut, group: dist.ProcessGroup) -> None:
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

    # The `scan` seams of sub-blocks, each around the one on this device.

    def state_space(self, scan: mamba2.Scan, grouped: bool) -> mamba2.Scan:
        """What both have in common; B and C are of groups of heads, or of all."""

        def exchanged(
            x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
            chunk: int, context: Context,
        ) -> Tensor:  # fmt: skip
            if grouped:
                x, dt, B, C = self.take(x, dt, B, C)
            else:
                (x, dt), (B, C) = self.take(x, dt), self.everything(B, C)
            A, D = self.mine(A), self.mine(D)
            return self.give(scan(x, dt, A, B, C, D, chunk, context.whole()))

        return exchanged

    def mamba2(self, scan: mamba2.Scan) -> mamba2.Scan:
        """By heads, and groups of B and C."""
        return self.state_space(scan, grouped=True)

    def mamba1(self, scan: mamba1.Scan) -> mamba1.Scan:
        """By channels, which share B and C."""
        return self.state_space(scan, grouped=False)

    def delta(self, scan: delta.Scan) -> delta.Scan:
        """By value heads, and key heads that they share."""

        def exchanged(
            q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None,
            chunk: int, context: Context,
        ) -> Tensor:  # fmt: skip
            given = (q, k, v, beta) if decay is None else (q, k, v, beta, decay)
            q, k, v, beta, *rest = self.take(*given)
            decay = rest[0] if rest else None
            return self.give(scan(q, k, v, beta, decay, chunk, context.whole()))

        return exchanged
