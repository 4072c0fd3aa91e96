"""Attention for which every rank gathers all keys and values: one exchange, for short sequences.

It is under way while a rank attends to its own keys. It is done again in backward, so that between
the passes a rank keeps its own part alone.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.kernels.blockwise import AttendTiles, AttendTilesBackward
from colonnade.kernels.precision import wide_dtype
from colonnade.kernels.tiles import Tile
from colonnade.parallel.context.layout import SequenceSharding

c10d = torch.ops._c10d_functional


class Gathered:
    """The rank's queries over its own keys, and over all others before them; by position.

    `length` is that of a segment.
    """

    def __init__(self, cut: SequenceSharding, length: int, group: dist.ProcessGroup) -> None:
        self.cut, self.group = cut, group
        self.own: list[Tile] = []
        self.others: list[Tile] = []
        n = length
        for i, query in enumerate(cut.own):
            rows, next_key = slice(i * n, (i + 1) * n), 0
            for j, key in enumerate(cut.own[: i + 1]):
                self.own.append(Tile(rows, query * n, slice(j * n, (j + 1) * n), key * n))
                if key > next_key:
                    there = slice(next_key * n, key * n)
                    self.others.append(Tile(rows, query * n, there, there.start))
                next_key = key + 1

    def gather(self, kv: Tensor) -> Tensor:
        """All ranks' parts, launched: to be waited for by `arrived`."""
        return c10d.all_gather_into_tensor(kv, self.cut.ranks, self.group.group_name)

    def arrived(self, coming: Tensor) -> Tensor:
        """The same in the order of the sequence."""
        return self.cut.natural(c10d.wait_tensor(coming))

    def see(self, k: Tensor, v: Tensor, look: AttendTiles) -> None:
        """Have all keys and values looked at."""
        coming = self.gather(torch.cat([k, v], -1))
        look(k, v, self.own)
        keys, values = self.arrived(coming).split([k.shape[3], v.shape[3]], -1)
        look(keys, values, self.others)

    def back(self, k: Tensor, v: Tensor, look: AttendTilesBackward) -> tuple[Tensor, Tensor]:
        """The gradients of k and v, in at least fp32, that all ranks find."""
        widths, dtype = [k.shape[3], v.shape[3]], wide_dtype(k.dtype)
        coming = self.gather(torch.cat([k, v], -1))
        dk, dv = (torch.zeros_like(t, dtype=dtype) for t in (k, v))
        look(k, v, self.own, dk, dv)
        kv = self.arrived(coming)
        dkv = torch.zeros_like(kv, dtype=dtype)
        (keys, values), (dkeys, dvalues) = (t.split(widths, -1) for t in (kv, dkv))
        look(keys, values, self.others, dkeys, dvalues)
        parts = self.cut.by_rank(dkv), "sum", self.cut.ranks, self.group.group_name
        mine = c10d.wait_tensor(c10d.reduce_scatter_tensor(*parts))
        further = mine.split(widths, -1)
        return dk.add_(further[0]), dv.add_(further[1])
