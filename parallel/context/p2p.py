"""Point-to-point send/recv of segments over the context group: around the ring, or to the rank
that holds the next segment."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from colonnade.parallel.context.layout import SequenceSharding


def group_by_name(name: str) -> dist.ProcessGroup:
    """The process group of this name: custom operators cannot take a group as an argument."""
    return _resolve_process_group(name)  # type: ignore[arg-type]  # a new type for a string


Slot = tuple[int, int]  # a rank, and a segment's index among those that the rank holds


class Route(NamedTuple):
    """Where a send/recv moves each of this rank's segments.

    Attributes:
        destinations: by local segment, the slot that it is sent to; None: it is not sent.
        sources: by local segment, the slot that its replacement comes from; None: none comes.
    """

    destinations: list[Slot | None]
    sources: list[Slot | None]

    def reversed(self) -> "Route":
        """The route in the opposite direction."""
        return Route(self.sources, self.destinations)


def ring_route(sharding: SequenceSharding) -> Route:
    """Sends all segments of a rank to the next rank, and those of the last rank to the first."""
    n, rank = sharding.size, sharding.rank
    indices = range(sharding.segments_per_rank)
    return Route([((rank + 1) % n, i) for i in indices], [((rank - 1) % n, i) for i in indices])


def next_segment_route(sharding: SequenceSharding) -> Route:
    """Sends segment s to the slot of segment s + 1; the last segment is not sent."""
    segments = sharding.local_segments
    destinations = [sharding.owner(s + 1) if s + 1 < sharding.segments else None for s in segments]
    sources = [sharding.owner(s - 1) if s > 0 else None for s in segments]
    return Route(destinations, sources)


def launch_send_recv(t: Tensor, route: Route, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Launches one batched send/recv of all segments of `t` along the route, over the group.

    Args:
        t: `[segments_per_rank, ...]`, contiguous. It must not change before the wait.
        route: of every local segment. A segment whose destination is on this rank is copied.
        group: the context-parallel group.

    Returns:
        a function that waits and returns the segments received, like `t`; zeros where the route
        has no source.
    """
    rank, received = group.rank(), torch.zeros_like(t)
    for i, destination in enumerate(route.destinations):
        if destination is not None and destination[0] == rank:
            received[destination[1]] = t[i]
    sends, receives = (dist.isend, t, route.destinations), (dist.irecv, received, route.sources)
    operations = [
        dist.P2POp(operation, message, group=group, group_peer=peer)
        for operation, tensor, slots in (sends, receives)
        for peer, message in _messages(tensor, slots)
        if peer != rank
    ]
    works = dist.batch_isend_irecv(operations) if operations else []

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return received

    return wait


def _messages(t: Tensor, slots: list[Slot | None]) -> list[tuple[int, Tensor]]:
    """One message with its peer for every segment, or one for all where they have the same peer."""
    ranks = {None if slot is None else slot[0] for slot in slots}
    if len(ranks) == 1 and (peer := ranks.pop()) is not None:
        return [(peer, t)]
    return [(slot[0], t[i]) for i, slot in enumerate(slots) if slot is not None]
