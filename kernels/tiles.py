"""Tiles of attention's score matrix: which ones a kernel computes, and the masks that they need.

A tile has queries as rows and keys as columns. A rank of zigzag context parallelism holds segments
r and 2n - 1 - r of the sequence, so the tiles that it computes are (n = 2 ranks, segments 0 to 3):

              key segment
              0  1  2  3              #  computed without a mask
    query 0   c  .  .  .    rank 0    c  computed under the causal mask
          1   #  c  .  .    rank 1    .  not computed: the keys come later
          2   #  #  c  .    rank 1
          3   #  #  #  c    rank 0    Both ranks compute three # and two c.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # queries at a time where a tile needs a mask, or an operator keeps its scores


@dataclass(frozen=True)
class ScoreOptions:
    """How scores become weights; see `kernels.attention.attention`."""

    scale: float
    window: int | None = None
    cap: float | None = None
    clip: tuple[float, float] | None = None


class Tile(NamedTuple):
    """A rectangle of the score matrix.

    Attributes:
        rows: the queries, a range of a tensor's rows.
        query_start: the position in the sequence of the first of these queries.
        keys: the keys, a range of another tensor's rows.
        key_start: the position in the sequence of the first of these keys.
    """

    rows: slice
    query_start: int
    keys: slice
    key_start: int


class MaskedTile(NamedTuple):
    """A part of a tile that one call of an operator computes, with its mask."""

    rows: slice
    keys: slice
    causal: bool = False  # the first query sees the first key, the second the first two, ...
    visible: Tensor | None = None  # [B or 1, 1, queries, keys] bool; None: all (if not causal)


class DocumentStarts:
    """Document numbers `[S, B]`, and where the document at each position starts.

    `earliest[p]` and `latest[p]` are the first and the last, over all samples, of the positions at
    which the documents that position p belongs to start.
    """

    def __init__(self, documents: Tensor) -> None:
        self.documents = documents
        opens = torch.ones_like(documents, dtype=torch.bool)
        opens[1:] = documents[1:] != documents[:-1]
        position = torch.arange(len(documents), device=documents.device)[:, None]
        starts = torch.where(opens, position, 0).cummax(0).values
        earliest, latest = starts.aminmax(dim=1)
        self.earliest: list[int] = earliest.tolist()
        self.latest: list[int] = latest.tolist()

    def same_document(self, queries: slice, keys: slice) -> Tensor:
        """Which queries and keys are of one document, by position: `[B, queries, keys]` bool."""
        return self.documents[queries].T[:, :, None] == self.documents[keys].T[:, None]


def masked_tiles(
    tile: Tile, options: ScoreOptions, starts: DocumentStarts | None, fused: bool
) -> Iterator[MaskedTile]:
    """Divides a tile into parts to compute: leaves out keys that no query sees, adds masks.

    `fused` says that an operator keeps no scores, so that parts without a mask may be of any size.
    """
    rows, query_start, keys, key_start = tile
    queries, key_count = rows.stop - rows.start, keys.stop - keys.start
    in_window = options.window is None or query_start + queries - options.window <= key_start
    if fused and starts is None and in_window:
        before = min(key_count, query_start - key_start)  # keys before the first query
        if before == key_count:
            yield MaskedTile(rows, keys)
            return
        if before >= 0 and key_count - before == queries:  # the last keys are the queries' own
            if before:
                yield MaskedTile(rows, slice(keys.start, keys.start + before))
            yield MaskedTile(rows, slice(keys.start + before, keys.stop), causal=True)
            return
    key_positions = slice(key_start, key_start + key_count)
    for start in range(query_start, query_start + queries, BLOCK):
        block = slice(start, min(start + BLOCK, query_start + queries))
        for query_range, key_range in _visible_ranges(block, key_positions, options, starts):
            yield MaskedTile(
                _shifted(query_range, rows.start - query_start),
                _shifted(key_range, keys.start - key_start),
                visible=_mask(query_range, key_range, options, starts),
            )


def _shifted(positions: slice, offset: int) -> slice:
    return slice(positions.start + offset, positions.stop + offset)


def _visible_ranges(
    queries: slice, keys: slice, options: ScoreOptions, starts: DocumentStarts | None
) -> Iterator[tuple[slice, slice]]:
    """Yields the queries with the keys that at least one of them may see, all by position: first
    the keys before the queries, then those at the queries' own positions."""
    first, stop = keys.start, min(keys.stop, queries.stop)
    if options.window is not None:
        first = max(first, queries.start - options.window + 1)
    if starts is not None:
        first = max(first, starts.earliest[queries.start])
    if first < min(stop, queries.start):
        yield queries, slice(first, min(stop, queries.start))
    if (first := max(first, queries.start)) < stop:
        yield queries, slice(first, stop)


def _mask(
    queries: slice, keys: slice, options: ScoreOptions, starts: DocumentStarts | None
) -> Tensor | None:
    """Which of the keys each query sees, `[B or 1, 1, queries, keys]` bool; None: all."""
    all_earlier = keys.stop <= queries.start + 1
    in_window = options.window is None or queries.stop - options.window <= keys.start
    in_document = starts is None or starts.latest[queries.stop - 1] <= keys.start
    if all_earlier and in_window and in_document:
        return None
    device = None if starts is None else starts.documents.device
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)
    visible = key <= query
    if options.window is not None:
        visible &= key > query - options.window
    if starts is not None and not in_document:
        visible = visible & starts.same_document(queries, keys)
    return visible.view(-1, 1, *visible.shape[-2:])
