"""Which segments of a sequence a rank holds, and where their neighbours are."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceSharding:
    """A sequence cut into equal segments, as one of several ranks sees it.

    Zigzag: of 2n segments rank r holds r and 2n−1−r, so that all see as many keys before them
    (arXiv:2407.21783, section 3.3.2). Otherwise rank r holds segment r.

    Attributes:
        ranks: n.
        rank: r.
        zigzag: two segments a rank, or one.
    """

    ranks: int
    rank: int
    zigzag: bool = True

    @property
    def parts(self) -> int:
        """Segments of a rank."""
        return 2 if self.zigzag else 1

    @property
    def segments(self) -> int:
        """Segments of the sequence."""
        return self.parts * self.ranks

    def of(self, rank: int) -> list[int]:
        """The segments of a rank, in order."""
        return [rank, self.segments - 1 - rank] if self.zigzag else [rank]

    @property
    def own(self) -> list[int]:
        """This rank's segments."""
        return self.of(self.rank)

    def holder(self, segment: int) -> tuple[int, int]:
        """The rank that holds a segment, and the segment's place there."""
        if segment < self.ranks:
            return segment, 0
        return self.segments - 1 - segment, 1

    def order(self) -> list[int]:
        """Of the segments of all ranks, one rank after the other, which is first, second, ..."""
        held = [segment for rank in range(self.ranks) for segment in self.of(rank)]
        return sorted(range(self.segments), key=held.__getitem__)

    def mine(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole sequence, `[S, ...]` to `[S / n, ...]`."""
        segments = whole.chunk(self.segments)
        return torch.cat([segments[i] for i in self.own])

    def natural(self, ranks: Tensor) -> Tensor:
        """The parts of all ranks, one after the other, in the order of the sequence: `[S, ...]`."""
        segments = ranks.chunk(self.segments)
        return torch.cat([segments[i] for i in self.order()])

    def by_rank(self, whole: Tensor) -> Tensor:
        """The opposite of `natural`."""
        segments = whole.chunk(self.segments)
        return torch.cat([segments[i] for rank in range(self.ranks) for i in self.of(rank)])
