"""Attention over all-gathered keys and values: one all-gather over the context group, which suits
short sequences.

The all-gather is in flight while a rank attends to its own keys. Backward does it again, so that
between the passes a rank keeps only its own shard, and reduce-scatters the gradients.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from colonnade.kernels.blockwise import AttendTiles, AttendTilesBackward
from colonnade.kernels.precision import wide_dtype
from colonnade.kernels.tiles import Tile
from colonnade.parallel.context.layout import SequenceSharding

c10d = torch.ops._c10d_functional


class AllGather:
    """The tiles of a rank's queries over its local keys, and over all earlier keys of other ranks.

    Local keys are rows of the rank's shard; remote keys are rows of the all-gathered sequence.
    """

    def __init__(self, sharding: SequenceSharding, length: int, group: dist.ProcessGroup) -> None:
        """`length` is that of a segment."""
        self.sharding, self.group = sharding, group
        self.local_tiles: list[Tile] = []
        self.remote_tiles: list[Tile] = []
        n, segments = length, sharding.local_segments
        for i, query in enumerate(segments):
            rows, next_key = slice(i * n, (i + 1) * n), 0
            for j, key in enumerate(segments[: i + 1]):
                self.local_tiles.append(Tile(rows, query * n, slice(j * n, (j + 1) * n), key * n))
                if key > next_key:  # other ranks hold the segments between two local ones
                    keys = slice(next_key * n, key * n)
                    self.remote_tiles.append(Tile(rows, query * n, keys, keys.start))
                next_key = key + 1

    def launch_all_gather(self, kv: Tensor) -> Tensor:
        """Launches the all-gather of all ranks' shards; `wait` completes it."""
        return c10d.all_gather_into_tensor(kv, self.sharding.size, self.group.group_name)

    def wait(self, launched: Tensor) -> Tensor:
        """Waits for the all-gather, and returns the full sequence in order."""
        return self.sharding.in_sequence_order(c10d.wait_tensor(launched))

    def visit_keys(self, k: Tensor, v: Tensor, attend_tiles: AttendTiles) -> None:
        """Calls `attend_tiles` with all keys and values: all-gathers them over the group."""
        launched = self.launch_all_gather(torch.cat([k, v], -1))
        attend_tiles(k, v, self.local_tiles)
        keys, values = self.wait(launched).split([k.shape[3], v.shape[3]], -1)
        attend_tiles(keys, values, self.remote_tiles)

    def visit_keys_backward(
        self, k: Tensor, v: Tensor, attend_tiles: AttendTilesBackward
    ) -> tuple[Tensor, Tensor]:
        """Calls `attend_tiles` with all keys and values, and returns the gradients of `k` and `v`
        summed over all ranks, in at least fp32.

        All-gathers keys and values, and reduce-scatters their gradients, over the context group.
        """
        widths, dtype = [k.shape[3], v.shape[3]], wide_dtype(k.dtype)
        launched = self.launch_all_gather(torch.cat([k, v], -1))
        dk, dv = (torch.zeros_like(t, dtype=dtype) for t in (k, v))
        attend_tiles(k, v, self.local_tiles, dk, dv)
        kv = self.wait(launched)
        dkv = torch.zeros_like(kv, dtype=dtype)
        (keys, values), (dkeys, dvalues) = (t.split(widths, -1) for t in (kv, dkv))
        attend_tiles(keys, values, self.remote_tiles, dkeys, dvalues)
        in_rank_order = self.sharding.in_rank_order(dkv)
        local_dkv = c10d.wait_tensor(
            c10d.reduce_scatter_tensor(
                in_rank_order, "sum", self.sharding.size, self.group.group_name
            )
        )
        remote_dk, remote_dv = local_dkv.split(widths, -1)  # from other ranks' queries
        return dk.add_(remote_dk), dv.add_(remote_dv)
