"""All-to-all over the context group: from shards of the sequence to shards of the heads, and back.

Each rank then has the full sequence of some heads. For attention this is Ulysses
(arXiv:2309.14509); recurrences are independent by head or channel, too.
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
    """All-to-all between the sequence shards and the head shards of the n ranks of a group."""

    def __init__(self, sharding: SequenceSharding, group: dist.ProcessGroup) -> None:
        self.sharding, self.group = sharding, group

    def sequence_to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """All-to-all of each tensor: `[S/n, B, H, ...]` to `[S, B, H/n, ...]`, in sequence order.

        All are launched before the first is waited for. Where n is a multiple of H, several ranks
        receive the same head; backward sums its gradients.
        """
        n, launched = self.sharding.size, []
        for t in tensors:
            if t.shape[2] % n:
                t = t.repeat_interleave(n // t.shape[2], dim=2)
            launched.append(self.all_to_all(t.unflatten(2, (n, -1)).movedim(2, 0)))
        return [self.sharding.in_sequence_order(t.flatten(0, 1)) for t in launched]

    def heads_to_sequence(self, t: Tensor) -> Tensor:
        """All-to-all in the opposite direction: `[S, B, H/n, ...]` to `[S/n, B, H, ...]`."""
        by_rank = self.sharding.in_rank_order(t).unflatten(0, (self.sharding.size, -1))
        return self.all_to_all(by_rank).movedim(0, 2).flatten(2, 3)

    def all_to_all(self, t: Tensor) -> Tensor:
        """All-to-all of `[n, ...]` over the group: entry i goes to rank i, and entry i of the
        result, `[n, ...]`, comes from it. Backward is an all-to-all as well.

        PyTorch's own collective: that of `spmd_types` cannot be kept by recomputation.
        """
        return funcol.all_to_all_single_autograd(t.contiguous(), None, None, self.group)

    def local_heads(self, t: Tensor) -> Tensor:
        """Slices this rank's heads of a tensor that every rank has: `[H, ...]` to `[H/n, ...]`."""
        return t.chunk(self.sharding.size)[self.sharding.rank]

    def all_gather(self, *tensors: Tensor) -> list[Tensor]:
        """All-gathers each tensor, which all heads share: `[S/n, ...]` to `[S, ...]`, in sequence
        order; backward reduce-scatters the gradients."""

        def gathered(t: Tensor) -> Tensor:
            dtype = {"op_dtype": t.dtype}
            return spmd.all_gather(
                t.contiguous(), self.group, src=S(0), dst=R, **dtype, backward_options=dtype
            )

        return [self.sharding.in_sequence_order(gathered(t)) for t in tensors]

    def wrap(self, seam: Seam) -> Callable[..., Tensor]:
        """The seam's local function, run on the full sequence of this rank's heads.

        Each argument moves by its kind: an all-to-all of heads and groups, an all-gather of what
        heads share, a slice of constants. An all-to-all brings the output back.

        Raises:
            RefusedError: the seam does not declare its arguments.
        """
        kinds = list(seam.arguments.values())
        if not kinds:
            raise RefusedError(
                f"the seam {seam.name!r} of {seam.local.__module__} does not say how its arguments "
                "lie over heads, which recurrence = heads exchanges; declare `arguments`"
            )

        def on_full_sequence(*args: Any) -> Tensor:
            *given, context = args
            tensors = dict(enumerate(given[: len(kinds)]))

            def present(*wanted: Kind) -> list[int]:
                """The indices of the arguments of these kinds that are not None."""
                return [
                    i for i, kind in enumerate(kinds) if kind in wanted and tensors[i] is not None
                ]

            # Each call launches all its tensors before it waits for the first.
            exchanges = (
                (("head", "group"), self.sequence_to_heads),
                (("shared",), self.all_gather),
            )
            for wanted, exchange in exchanges:
                if indices := present(*wanted):
                    results = exchange(*(tensors[i] for i in indices))
                    tensors |= zip(indices, results, strict=True)
            for i in present("constant"):
                tensors[i] = self.local_heads(tensors[i])
            options = given[len(kinds) :]
            return self.heads_to_sequence(
                seam.local(*tensors.values(), *options, context.for_full_sequence())
            )

        return on_full_sequence
