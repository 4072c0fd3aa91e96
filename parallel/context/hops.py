"""Segments' tensors on their way to other ranks: round the ring, or to the following segment."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from colonnade.parallel.context.layout import SequenceSharding


def group_of(name: str) -> dist.ProcessGroup:
    """The group of this name: operators are given no groups."""
    return _resolve_process_group(name)  # type: ignore[arg-type]  # a new type for a string


Place = tuple[int, int]  # a rank, and a segment's place there


class Hop(NamedTuple):
    """Where each of this rank's segments goes, and from where the next ones come; None: nowhere."""

    to: list[Place | None]
    come: list[Place | None]

    def back(self) -> "Hop":
        """The same way in the other direction."""
        return Hop(self.come, self.to)


def round_ring(cut: SequenceSharding) -> Hop:
    """All segments of a rank to the next rank, those of the last to the first."""
    n, r = cut.ranks, cut.rank
    places = range(cut.parts)
    return Hop([((r + 1) % n, i) for i in places], [((r - 1) % n, i) for i in places])


def along(cut: SequenceSharding) -> Hop:
    """What a segment has to where the following segment is; the last one's goes nowhere."""
    after = [cut.holder(s + 1) if s + 1 < cut.segments else None for s in cut.own]
    before = [cut.holder(s - 1) if s > 0 else None for s in cut.own]
    return Hop(after, before)


def send(t: Tensor, hop: Hop, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Send `[parts, ...]`, contiguous, on its way. Returns what waits for what comes instead.

    Where nothing comes there are zeros. `t` is not to be changed before that.
    """
    rank, received = group.rank(), torch.zeros_like(t)
    for i, place in enumerate(hop.to):
        if place is not None and place[0] == rank:
            received[place[1]] = t[i]
    operations = [
        dist.P2POp(kind, part, group=group, group_peer=other)
        for kind, tensor, places in ((dist.isend, t, hop.to), (dist.irecv, received, hop.come))
        for other, part in _messages(tensor, places)
        if other != rank
    ]
    works = dist.batch_isend_irecv(operations) if operations else []

    def arrived() -> Tensor:
        for work in works:
            work.wait()
        return received

    return arrived


def _messages(t: Tensor, places: list[Place | None]) -> list[tuple[int, Tensor]]:
    """A part for every segment, or one for all of a rank's that stay together."""
    ranks = {None if place is None else place[0] for place in places}
    if len(ranks) == 1 and (only := ranks.pop()) is not None:
        return [(only, t)]
    return [(place[0], t[i]) for i, place in enumerate(places) if place is not None]
