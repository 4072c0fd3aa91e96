"""Ring attention: send/recv moves keys and values around the context group, a rank at a time.

Exact and blockwise, with outputs merged by their LSE (arXiv:2310.01889), on the zigzag sharding.
With n = 3 ranks, so segments 0 to 5, the keys and values at each rank are those of the segments

                queries of    step 0     step 1     step 2
    rank 0      0, 5          0, 5       2, 3       1, 4        At each step a rank sends what it
    rank 1      1, 4          1, 4       0, 5       2, 3        has to rank + 1 and receives from
    rank 2      2, 3          2, 3       1, 4       0, 5        rank - 1.

and a rank computes the tiles in which its queries come after these keys (`kernels.tiles` draws
them). The send/recv of the next step is in flight while this step computes. Backward sends the keys
and values around again, and behind them their gradients, in at least fp32, which have returned to
their owner after n sends.

Where a window reaches fewer than n segments back, keys and values are only sent from segment to
segment, as far as it reaches, and their gradients back along the same route: at step i each local
segment s has the keys and values of segment s - i.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.kernels.blockwise import AttendTiles, AttendTilesBackward
from colonnade.kernels.precision import wide_dtype
from colonnade.kernels.tiles import ScoreOptions, Tile
from colonnade.parallel.context.layout import SequenceSharding
from colonnade.parallel.context.p2p import launch_send_recv, next_segment_route, ring_route


class Ring:
    """Which keys and values a rank has at each step of the ring, and the tiles it then computes."""

    def __init__(
        self,
        sharding: SequenceSharding,
        length: int,
        score_options: ScoreOptions,
        packed: bool,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """`length` is that of a segment; `packed` says that tiles need masks between documents."""
        self.sharding, self.length, self.group = sharding, length, group
        window = score_options.window
        self.masked = packed or window is not None
        # How many segments back the window reaches.
        reach = sharding.segments if window is None else -(-(window - 1) // length)
        self.window_limited = reach < sharding.size
        self.steps = reach + 1 if self.window_limited else sharding.size
        route = next_segment_route if self.window_limited else ring_route
        self.route = route(sharding)

    def key_segments(self, step: int) -> list[int | None]:
        """The segments whose keys and values this rank has at a step; None: zeros, of none."""
        if self.window_limited:
            return [s - step if s >= step else None for s in self.sharding.local_segments]
        return [*self.sharding.segments_of((self.sharding.rank - step) % self.sharding.size)]

    def tiles(self, step: int) -> list[Tile]:
        """The tiles that this rank computes at a step: its queries, and keys of `key_segments`.

        Without masks only the order of positions counts, and neighbouring query segments that see
        the same keys are one tile.
        """
        key_segments, n = self.key_segments(step), self.length
        query_segments = self.sharding.local_segments
        if self.masked:
            # From segment to segment, the keys at index i came for query segment i alone (i == j):
            # the other one gets the same keys at another step, and must not count them twice.
            return [
                Tile(_rows(i, n), query * n, _rows(j, n), key * n)
                for i, query in enumerate(query_segments)
                for j, key in enumerate(key_segments)
                if key is not None and key <= query and (i == j or not self.window_limited)
            ]
        all_rows = self.sharding.segments_per_rank * n
        if step == 0:
            # Local segments ascend, so one causal mask over all of them is right.
            return [Tile(slice(0, all_rows), 0, slice(0, all_rows), 0)]
        # The first `count` key segments, which ascend, come before these query segments.
        queries_by_count: dict[int, list[int]] = {}
        for i, query in enumerate(query_segments):
            count = sum(key < query for key in key_segments if key is not None)
            queries_by_count.setdefault(count, []).append(i)
        # A query start of `all_rows`, behind every key, says that no mask is needed.
        return [
            Tile(slice(queries[0] * n, (queries[-1] + 1) * n), all_rows, slice(0, count * n), 0)
            for count, queries in queries_by_count.items()
            if count
        ]

    def rotate(self, t: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields each step with the segments that this rank then has,
        `[segments_per_rank, length, ...]`.

        Before it yields a step, it launches the send/recv of the next one.
        """
        assert self.group is not None
        for step in range(self.steps):
            last = step + 1 == self.steps
            wait = None if last else launch_send_recv(t, self.route, self.group)
            yield step, t
            if wait is not None:
                t = wait()

    def visit_keys(self, k: Tensor, v: Tensor, attend_tiles: AttendTiles) -> None:
        """Calls `attend_tiles` with all keys and values; send/recv over the context group."""
        for step, kv in self.rotate(self.pack(k, v)):
            attend_tiles(*unpack(kv, k), self.tiles(step))

    def visit_keys_backward(
        self, k: Tensor, v: Tensor, attend_tiles: AttendTilesBackward
    ) -> tuple[Tensor, Tensor]:
        """Calls `attend_tiles` with all ranks' keys and values, and returns the gradients of `k`
        and `v` summed over all ranks, in at least fp32; send/recv over the context group."""

        def step_grads(step: int, kv: Tensor) -> Tensor:
            dkv = torch.zeros_like(kv, dtype=wide_dtype(kv.dtype))
            attend_tiles(*unpack(kv, k), self.tiles(step), *unpack(dkv, k))
            return dkv

        return_grads = self.send_grads_back if self.window_limited else self.send_grads_around
        return unpack(
            return_grads(step_grads(step, kv) for step, kv in self.rotate(self.pack(k, v))), k
        )

    def send_grads_around(self, steps: Iterator[Tensor]) -> Tensor:
        """Sends gradients around the ring one step behind their keys and values, and adds each
        rank's to them, until they are back at the rank that owns the keys."""
        assert self.group is not None
        wait = launch_send_recv(next(steps), self.route, self.group)
        for grads in steps:
            wait = launch_send_recv(grads.add_(wait()), self.route, self.group)
        return wait()

    def send_grads_back(self, steps: Iterator[Tensor]) -> Tensor:
        """Sends gradients back along the route of their keys and values, the farthest segment's
        first, and adds each step's to them."""
        assert self.group is not None
        remaining = [*steps]
        total = remaining.pop()
        while remaining:
            wait = launch_send_recv(total, self.route.reversed(), self.group)
            total = wait().add_(remaining.pop())
        return total

    def pack(self, k: Tensor, v: Tensor) -> Tensor:
        """Concatenates keys and values: `[segments_per_rank, length, B, K, P + V]`."""
        return torch.cat([k, v], -1).unflatten(0, (self.sharding.segments_per_rank, -1))

    def score_count(self, step: int) -> float:
        """Scores computed at a step, per head and sample, without window and documents."""
        total = 0.0
        for rows, query_start, keys, key_start in self.tiles(step):
            area = (rows.stop - rows.start) * (keys.stop - keys.start)
            total += area / (2 if query_start == key_start else 1)
        return total


def _rows(i: int, length: int) -> slice:
    """The rows of the local segment with index `i`."""
    return slice(i * length, (i + 1) * length)


def unpack(kv: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a tensor that `Ring.pack` made, in the shapes of `k` and of `v`."""
    width = k.shape[3]
    keys, values = kv.flatten(0, 1).split([width, kv.shape[-1] - width], -1)
    return keys, values
