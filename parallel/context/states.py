"""State passing between ranks: one all-gather over the context group completes a recurrence.

Every rank runs its segments from zeros. One all-gather brings each segment's final state E and its
transition T to every rank, which computes from them the states before its own segments. With 2
ranks on the zigzag sharding:

    segment                0            1                2                    3
    rank                   0            1                1                    0
    from zeros, at once    E0, T0       E1, T1           E2, T2               E3, T3
    all-gather             every rank has (E, T) of all segments, reordered from rank order
    state before           0        ->  E0           ->  E1 + T1 E0       ->  E2 + T2 (E1 + T1 E0)
    taken by rank          0            1                1                    0

Backward all-gathers gradients in place of final states and runs from the last segment to the first
(`kernels.segments`). For Mamba-2 see arXiv:2405.21060, section 8.2.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.kernels.segments import grads_after, states_before
from colonnade.models.context import Context
from colonnade.parallel.context.layout import SequenceSharding

c10d = torch.ops._c10d_functional
# States or gradients and transitions of all segments, `same_document`, `matrix` -> of all segments.
SegmentScan = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]


class RankStatePassing:
    """`kernels.segments.StatePassing` by an all-gather over the context group.

    Collective: every rank launches in the same order. A rank sends (n − 1) times its states and
    transitions, in at least fp32, in each direction.

    Attributes:
        segments: how many segments this rank holds.
        same_document: `[segments of the sequence − 1, B]`, whether a document continues from a
            segment into the next; None: always.
    """

    def __init__(
        self, sharding: SequenceSharding, group: dist.ProcessGroup, same_document: Tensor | None
    ) -> None:
        self.sharding, self.group, self.same_document = sharding, group, same_document
        self.segments = sharding.segments_per_rank

    def launch(self, state: Tensor, transition: Tensor, matrix: bool) -> Callable[[], Tensor]:
        """See `StatePassing.launch`."""
        return self.launch_all_gather(states_before, state, transition, matrix)

    def launch_backward(
        self, grad: Tensor, transition: Tensor, matrix: bool
    ) -> Callable[[], Tensor]:
        """See `StatePassing.launch_backward`."""
        return self.launch_all_gather(grads_after, grad, transition, matrix)

    def launch_all_gather(
        self, scan: SegmentScan, state: Tensor, transition: Tensor, matrix: bool
    ) -> Callable[[], Tensor]:
        """Launches one all-gather of both tensors over the context group.

        Returns:
            a function that waits, scans over the segments of the whole sequence, and returns the
            results of this rank's segments.
        """
        packed = torch.cat([state.flatten(2), transition.flatten(2)], -1)
        width = packed.shape[-1] - transition[0, 0].numel()
        launched = c10d.all_gather_into_tensor(packed, self.sharding.size, self.group.group_name)

        def wait() -> Tensor:
            all_segments = c10d.wait_tensor(launched)[self.sharding.sequence_order()]
            states, transitions = all_segments.split([width, packed.shape[-1] - width], -1)
            results = scan(
                states.unflatten(-1, state.shape[2:]),
                transitions.unflatten(-1, transition.shape[2:]),
                self.same_document,
                matrix,
            )
            return results[self.sharding.local_segments]

        return wait


def document_continues(sharding: SequenceSharding, context: Context) -> Tensor | None:
    """Whether a document continues from each segment into the next, `[segments − 1, B]` bool.

    None: always.
    """
    documents = context.whole_documents
    if documents is None:
        return None
    length = len(documents) // sharding.segments
    return documents[length - 1 : -1 : length] == documents[length::length]
