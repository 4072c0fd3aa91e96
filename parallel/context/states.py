"""Recurrences over a sequence of which each rank holds a part: states go from segment to segment.

Every rank starts its segments from zeros; one gather brings what each segment leaves behind and
what it makes of the state before it; from these every rank finds the states before its own
segments. Backward is the mirror image. (For Mamba-2: arXiv:2405.21060, section 8.2.)
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.kernels.segments import grads_after, states_before
from colonnade.models.context import Context
from colonnade.parallel.context.layout import SequenceSharding

c10d = torch.ops._c10d_functional
Scan = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]


class RankStatePassing:
    """`kernels.segments.StatePassing` between ranks. Collective: every rank launches alike.

    A rank sends (n − 1) times its states and transitions, in at least fp32, in each direction.
    `same` `[segments − 1, B]`: whether a document goes on from a segment to the next; None: yes.
    """

    def __init__(
        self, cut: SequenceSharding, group: dist.ProcessGroup, same: Tensor | None
    ) -> None:
        self.cut, self.group, self.same = cut, group, same
        self.segments = cut.parts

    def launch(self, state: Tensor, transition: Tensor, matrix: bool) -> Callable[[], Tensor]:
        """See `StatePassing.launch`."""
        return self.exchange(states_before, state, transition, matrix)

    def launch_back(self, grad: Tensor, transition: Tensor, matrix: bool) -> Callable[[], Tensor]:
        """See `StatePassing.launch_back`."""
        return self.exchange(grads_after, grad, transition, matrix)

    def exchange(
        self, scan: Scan, state: Tensor, transition: Tensor, matrix: bool
    ) -> Callable[[], Tensor]:
        """Gather both from all segments; what then waits has the scan's part of this rank."""
        flat = torch.cat([state.flatten(2), transition.flatten(2)], -1)
        width = flat.shape[-1] - transition[0, 0].numel()
        coming = c10d.all_gather_into_tensor(flat, self.cut.ranks, self.group.group_name)

        def arrived() -> Tensor:
            all_of_them = c10d.wait_tensor(coming)[self.cut.order()]
            states, transitions = all_of_them.split([width, flat.shape[-1] - width], -1)
            found = scan(
                states.unflatten(-1, state.shape[2:]),
                transitions.unflatten(-1, transition.shape[2:]),
                self.same,
                matrix,
            )
            return found[self.cut.own]

        return arrived


def document_continues(cut: SequenceSharding, context: Context) -> Tensor | None:
    """`[segments − 1, B]`: whether a document goes on from a segment to the next; None: yes."""
    documents = context.whole_documents
    if documents is None:
        return None
    length = len(documents) // cut.segments
    return documents[length - 1 : -1 : length] == documents[length::length]
