"""Ring attention: keys and values go from rank to rank while each attends to those it has.

Exact, blockwise, with outputs merged by their LSE (arXiv:2310.01889), on a zigzag cut. The keys and
values of the next step are under way while this one computes. Backward sends them round again, and
with them their gradients, in at least fp32, which come home after a full round. Where a window is
shorter than the way round, keys and values only go from segment to segment, as far as the window
reaches, and their gradients back.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.kernels.blockwise import AttendTiles, AttendTilesBackward
from colonnade.kernels.precision import wide_dtype
from colonnade.kernels.tiles import ScoreOptions, Tile
from colonnade.parallel.context.hops import along, round_ring, send
from colonnade.parallel.context.layout import SequenceSharding


class Ring:
    """What a rank has at hand at each step, and which of its queries look at it.

    `length` is that of a segment; `packed` says that there are documents to tell apart.
    """

    def __init__(
        self,
        cut: SequenceSharding,
        length: int,
        rule: ScoreOptions,
        packed: bool,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.cut, self.length, self.group = cut, length, group
        self.masked = packed or rule.window is not None
        reach = cut.segments if rule.window is None else -(-(rule.window - 1) // length)
        self.short = reach < cut.ranks
        self.steps = reach + 1 if self.short else cut.ranks
        self.hop = along(cut) if self.short else round_ring(cut)

    def held(self, step: int) -> list[int | None]:
        """The segments at hand."""
        if self.short:
            return [s - step if s >= step else None for s in self.cut.own]
        return [*self.cut.of((self.cut.rank - step) % self.cut.ranks)]

    def regions(self, step: int) -> list[Tile]:
        """What is computed: rows of the rank's queries, keys of those at hand.

        Without masks only the order counts, and segments that see as much are taken together.
        """
        held, n = self.held(step), self.length
        if self.masked:
            return [
                Tile(_part(i, n), query * n, _part(j, n), key * n)
                for i, query in enumerate(self.cut.own)
                for j, key in enumerate(held)
                if key is not None and key <= query and (i == j or not self.short)
            ]
        all_rows = self.cut.parts * n
        if step == 0:
            return [Tile(slice(0, all_rows), 0, slice(0, all_rows), 0)]
        seen: dict[int, list[int]] = {}  # how many of those at hand: which queries see them
        for i, query in enumerate(self.cut.own):
            seen.setdefault(sum(k < query for k in held if k is not None), []).append(i)
        return [
            Tile(slice(which[0] * n, (which[-1] + 1) * n), all_rows, slice(0, count * n), 0)
            for count, which in seen.items()
            if count
        ]

    def travel(self, t: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each step with what is at hand, `[parts, length, ...]`; the next is then on its way."""
        assert self.group is not None
        for step in range(self.steps):
            arrived = send(t, self.hop, self.group) if step + 1 < self.steps else None
            yield step, t
            if arrived is not None:
                t = arrived()

    def see(self, k: Tensor, v: Tensor, look: AttendTiles) -> None:
        """Have all keys and values looked at."""
        for step, kv in self.travel(self.paired(k, v)):
            look(*apart(kv, k), self.regions(step))

    def back(self, k: Tensor, v: Tensor, look: AttendTilesBackward) -> tuple[Tensor, Tensor]:
        """The gradients of k and v, in at least fp32, that all ranks find."""
        kv = self.paired(k, v)

        def found(step: int, kv: Tensor) -> Tensor:
            dkv = torch.zeros_like(kv, dtype=wide_dtype(kv.dtype))
            look(*apart(kv, k), self.regions(step), *apart(dkv, k))
            return dkv

        home = self.send_back if self.short else self.send_round
        return apart(home(found(step, here) for step, here in self.travel(kv)), k)

    def send_round(self, steps: Iterator[Tensor]) -> Tensor:
        """Gradients go with their keys and values, one step behind, until they are home."""
        assert self.group is not None
        total = next(steps)
        coming = send(total, self.hop, self.group)
        for found in steps:
            coming = send(found.add_(coming()), self.hop, self.group)
        return coming()

    def send_back(self, steps: Iterator[Tensor]) -> Tensor:
        """Gradients go back the way that their keys and values came, from the farthest on."""
        assert self.group is not None
        found = [*steps]
        total = found.pop()
        while found:
            total = send(total, self.hop.back(), self.group)().add_(found.pop())
        return total

    def paired(self, k: Tensor, v: Tensor) -> Tensor:
        """Keys beside values, by segment: `[parts, length, B, K, P + V]`."""
        return torch.cat([k, v], -1).unflatten(0, (self.cut.parts, -1))

    def scores(self, step: int) -> float:
        """Scores that are computed at a step, per head and sample, without window and documents."""
        area = 0.0
        for rows, at, keys, seen in self.regions(step):
            area += (rows.stop - rows.start) * (keys.stop - keys.start) / (2 if at == seen else 1)
        return area


def _part(i: int, length: int) -> slice:
    return slice(i * length, (i + 1) * length)


def apart(kv: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Views of what `paired` made, like `k` and v."""
    width = k.shape[3]
    keys, values = kv.flatten(0, 1).split([width, kv.shape[-1] - width], -1)
    return keys, values
