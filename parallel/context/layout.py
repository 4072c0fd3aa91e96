"""How context parallelism shards a sequence: which segments a rank holds, and who holds the others.

zigzag, n = 2 ranks       segments   0   1   2   3        rank 0 holds 0 and 3
                          rank       0   1   1   0        rank 1 holds 1 and 2

contiguous, n = 2 ranks   segments   0       1            rank r holds segment r
                          rank       0       1
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceSharding:
    """The division of a sequence into equal segments over a group, seen from one of its ranks.

    Zigzag: of 2n segments rank r holds r and 2n−1−r, so that every rank's queries see as many keys
    under the causal mask (arXiv:2407.21783, section 3.3.2). Otherwise rank r holds segment r.

    Attributes:
        size: n, the ranks of the context-parallel group.
        rank: r, this rank's index in the group.
        zigzag: two segments a rank, or one.
    """

    size: int
    rank: int
    zigzag: bool = True

    @property
    def segments_per_rank(self) -> int:
        """How many segments each rank holds."""
        return 2 if self.zigzag else 1

    @property
    def segments(self) -> int:
        """How many segments the sequence has."""
        return self.segments_per_rank * self.size

    def segments_of(self, rank: int) -> list[int]:
        """The indices of the segments that a rank holds, in ascending order."""
        return [rank, self.segments - 1 - rank] if self.zigzag else [rank]

    @property
    def local_segments(self) -> list[int]:
        """The indices of the segments that this rank holds, in ascending order."""
        return self.segments_of(self.rank)

    def owner(self, segment: int) -> tuple[int, int]:
        """The rank that holds a segment, and the segment's index among those of that rank."""
        if segment < self.size:
            return segment, 0
        return self.segments - 1 - segment, 1

    def sequence_order(self) -> list[int]:
        """The permutation that brings segments in rank order into the order of the sequence.

        Entry s is the index of segment s in the concatenation of all ranks' segments, as an
        all-gather over the group returns it.
        """
        in_rank_order = [s for rank in range(self.size) for s in self.segments_of(rank)]
        return sorted(range(self.segments), key=in_rank_order.__getitem__)

    def shard(self, full: Tensor) -> Tensor:
        """Takes this rank's segments of a full sequence: `[S, ...]` to `[S/n, ...]`."""
        segments = full.chunk(self.segments)
        return torch.cat([segments[s] for s in self.local_segments])

    def in_sequence_order(self, shards: Tensor) -> Tensor:
        """Reorders the concatenated shards of all ranks into the full sequence, `[S, ...]`."""
        segments = shards.chunk(self.segments)
        return torch.cat([segments[i] for i in self.sequence_order()])

    def in_rank_order(self, full: Tensor) -> Tensor:
        """Reorders a full sequence into the concatenated shards of all ranks, `[S, ...]`: the
        inverse of `in_sequence_order`."""
        segments = full.chunk(self.segments)
        return torch.cat([segments[s] for rank in range(self.size) for s in self.segments_of(rank)])
