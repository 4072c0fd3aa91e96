"""Measures bandwidth and latency of pairs of ranks, and the skew of their clocks, by send/recv."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from colonnade.launcher.cluster.fabric.clock import Exchange, Skew, skew
from colonnade.launcher.cluster.fabric.tournament import Pair

PINGS = 20  # round trips of which the median counts
WARM_UP = 3  # round trips before them: the first one makes connections
SMALLEST = 64 * 2**10  # bytes of the first message
LARGEST = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # bytes
ENOUGH = 0.03  # seconds: a message that takes as long is long enough
REPEATS = 5  # messages of which the median counts
BUDGET = 1.0  # seconds after which a message is not sent again


@dataclass(frozen=True)
class Link:
    """What was measured between two members; a member is an index into those measured.

    Attributes:
        first, second: the members; the first one's number is lower.
        forward: bytes per second from the first to the second.
        backward: bytes per second from the second to the first.
        latency: seconds of half a round trip of the smallest message.
        skew: how far the second one's clock is ahead of the first one's.
    """

    first: int
    second: int
    forward: float
    backward: float
    latency: float
    skew: Skew

    @property
    def slower(self) -> float:
        """The bandwidth of the slower direction."""
        return min(self.forward, self.backward)

    def merged(self, other: "Link") -> "Link":
        """The better figures of two measurements: other load makes them worse, never better."""
        best = min(self.skew, other.skew, key=lambda s: s.bound)
        return Link(
            self.first, self.second,
            max(self.forward, other.forward), max(self.backward, other.backward),
            min(self.latency, other.latency), best,
        )  # fmt: skip


def measure_links(
    rounds: Sequence[Sequence[Pair]], members: Sequence[int], device: torch.device
) -> dict[Pair, Link]:
    """Measures pairs of members, the pairs of a round at the same time, round by round. Collective.

    A round takes about half a second (of links below 10 MB/s up to 5 s), whatever the number of its
    pairs. All ranks call it, also those that are no members.

    Args:
        rounds: pairs of indices into `members`, disjoint in each round.
        members: ranks.
        device: of this rank.

    Returns:
        the links by pair, on every rank.
    """
    rank, measured = dist.get_rank(), []
    for pairs in rounds:
        meet(device)
        for first, second in pairs:
            if rank in (members[first], members[second]):
                leads = rank == members[first]
                meter = Meter(members[second if leads else first], leads, device)
                if leads:
                    measured.append(meter.link(first, second))
                else:
                    meter.answer()
    gathered: list[list[Link]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, measured)
    return {(link.first, link.second): link for links in gathered for link in links}


def meet(device: torch.device) -> None:
    """Waits until all ranks are at this point (all-reduces on the device, which on GPUs also makes
    NCCL's communicator of all ranks before pairs use it)."""
    dist.all_reduce(torch.zeros(1, device=device))
    synchronize(device)


def synchronize(device: torch.device) -> None:
    """Waits for the work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Meter:
    """One end of a pair that is measured.

    Args:
        peer: the rank of the other end.
        leads: this end is the pair's first member.
        device: on which messages lie.
        clock: returns the time of day in ns.
    """

    def __init__(
        self, peer: int, leads: bool, device: torch.device, clock: Callable[[], int] = time.time_ns
    ) -> None:
        self.peer, self.leads, self.device, self.clock = peer, leads, device, clock
        self.ping = torch.zeros(1, device=device)
        self.buffer = torch.zeros(LARGEST[device.type], dtype=torch.uint8, device=device)

    def link(self, first: int, second: int) -> Link:
        """Measures as the first end, while the other one answers."""
        latency, offset = self.latency(), skew(self.exchanges())
        forward = self.send_messages()
        self.receive_messages()
        backward = torch.zeros(1, dtype=torch.float64)
        dist.recv(backward, self.peer)
        return Link(first, second, forward, backward.item(), latency, offset)

    def answer(self) -> None:
        """Takes part as the second end."""
        self.latency()
        self.exchanges()
        self.receive_messages()
        backward = self.send_messages()
        dist.send(torch.tensor([backward], dtype=torch.float64), self.peer)

    def latency(self) -> float:
        """Sends the smallest message to and fro; returns the median of half a round trip in s."""
        trips = []
        for _ in range(WARM_UP + PINGS):
            start = time.perf_counter()
            for sends in (self.leads, not self.leads):
                self._send(self.ping) if sends else self._receive(self.ping)
            trips.append(time.perf_counter() - start)
        return statistics.median(trips[WARM_UP:]) / 2

    def exchanges(self) -> list[Exchange]:
        """Sends times to and fro; returns the exchanges at the first end, nothing at the second.

        Times travel as host tensors, so by gloo: a GPU's queue would add to the round trip.
        """
        times, found = torch.zeros(2, dtype=torch.int64), []
        for _ in range(WARM_UP + PINGS):
            if self.leads:
                asked = self.clock()
                dist.send(times, self.peer)
                dist.recv(times, self.peer)
                returned = self.clock()
                received, answered = times.tolist()
                found.append(Exchange(asked, received, answered, returned))
            else:
                dist.recv(times, self.peer)
                times[0] = self.clock()
                times[1] = self.clock()
                dist.send(times, self.peer)
        return found[WARM_UP:]

    def send_messages(self) -> float:
        """Sends longer and longer messages until one takes long enough, and that one repeatedly.

        Returns:
            the median bandwidth in bytes per second.
        """
        size, limit = SMALLEST, len(self.buffer)
        while (seconds := self._message(size)) < ENOUGH and size < limit:
            size = min(limit, size * (4 if seconds < ENOUGH / 4 else 2))
        times: list[float] = []
        while len(times) < REPEATS and sum(times) < BUDGET:
            times.append(self._message(size))
        dist.send(torch.zeros(1, dtype=torch.int64), self.peer)  # the end
        return size / statistics.median(times)

    def receive_messages(self) -> None:
        """Receives messages, and answers each, until the other end says that it was the last."""
        size = torch.zeros(1, dtype=torch.int64)
        while dist.recv(size, self.peer) is not None and size.item():
            self._receive(self.buffer[: size.item()])
            self._send(self.ping)

    def _message(self, size: int) -> float:
        """Sends one message, and waits for the answer; returns the seconds."""
        dist.send(torch.tensor([size]), self.peer)  # so that the other end expects it
        start = time.perf_counter()
        self._send(self.buffer[:size])
        self._receive(self.ping)
        return time.perf_counter() - start

    def _send(self, tensor: torch.Tensor) -> None:
        self._transfer(dist.P2POp(dist.isend, tensor, self.peer))

    def _receive(self, tensor: torch.Tensor) -> None:
        self._transfer(dist.P2POp(dist.irecv, tensor, self.peer))

    def _transfer(self, operation: dist.P2POp) -> None:
        """Performs one transfer. Batched ones use the communicator of all ranks: by `dist.send`,
        NCCL would make one for each pair, with buffers of its own."""
        for work in dist.batch_isend_irecv([operation]):
            work.wait()
        synchronize(self.device)
