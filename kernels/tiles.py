"""What attention computes of a region of the scores: pieces, and masks where they need one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # queries at a time where there is a mask, or scores are at hand


@dataclass(frozen=True)
class Rule:
    """How scores become weights; see `kernels.attention.attention`."""

    scale: float
    window: int | None = None
    cap: float | None = None
    clip: tuple[float, float] | None = None


class Region(NamedTuple):
    """Queries `rows` of a tensor, which stand at positions from `at` on, over the keys `keys` of
    another one, which stand at positions from `seen` on."""

    rows: slice
    at: int
    keys: slice
    seen: int


class Piece(NamedTuple):
    """A part of a region that one operator computes."""

    rows: slice
    keys: slice
    causal: bool = False  # the first query sees the first key, the second the first two, ...
    visible: Tensor | None = None  # [B or 1, 1, queries, keys]; None: all


class Packing:
    """Document numbers `[S, B]` by position.

    `earliest` and `latest` say of a position where the documents there begin: of all samples the
    first and the last.
    """

    def __init__(self, documents: Tensor) -> None:
        self.documents = documents
        opens = torch.ones_like(documents, dtype=torch.bool)
        opens[1:] = documents[1:] != documents[:-1]
        place = torch.arange(len(documents), device=documents.device)[:, None]
        starts = torch.where(opens, place, 0).cummax(0).values
        earliest, latest = starts.aminmax(dim=1)
        self.earliest: list[int] = earliest.tolist()
        self.latest: list[int] = latest.tolist()

    def visible(self, at: slice, seen: slice) -> Tensor:
        """Which queries and keys are of one document, `[B, queries, keys]`."""
        return self.documents[at].T[:, :, None] == self.documents[seen].T[:, None]


def pieces(region: Region, rule: Rule, packing: Packing | None, fused: bool) -> Iterator[Piece]:
    """What there is to compute in a region: nothing that no query sees, and masks where needed.

    `fused` says that an operator keeps no scores, so that pieces without a mask may be of any size.
    """
    rows, at, keys, seen = region
    queries, count = rows.stop - rows.start, keys.stop - keys.start
    within = rule.window is None or at + queries - rule.window <= seen
    if fused and packing is None and within:
        before = min(count, at - seen)
        if before == count:
            yield Piece(rows, keys)
            return
        if before >= 0 and count - before == queries:  # the last keys are the queries' own
            if before:
                yield Piece(rows, slice(keys.start, keys.start + before))
            yield Piece(rows, slice(keys.start + before, keys.stop), causal=True)
            return
    for start in range(at, at + queries, BLOCK):
        block = slice(start, min(start + BLOCK, at + queries))
        for here, there in _spans(block, slice(seen, seen + count), rule, packing):
            yield Piece(
                _moved(here, rows.start - at),
                _moved(there, keys.start - seen),
                visible=_visible(here, there, rule, packing),
            )


def _moved(positions: slice, by: int) -> slice:
    return slice(positions.start + by, positions.stop + by)


def _spans(
    at: slice, seen: slice, rule: Rule, packing: Packing | None
) -> Iterator[tuple[slice, slice]]:
    """Queries and the keys before them, and beside them, that one of them may see; by position."""
    first, stop = seen.start, min(seen.stop, at.stop)
    if rule.window is not None:
        first = max(first, at.start - rule.window + 1)
    if packing is not None:
        first = max(first, packing.earliest[at.start])
    if first < min(stop, at.start):
        yield at, slice(first, min(stop, at.start))
    if (first := max(first, at.start)) < stop:
        yield at, slice(first, stop)


def _visible(at: slice, seen: slice, rule: Rule, packing: Packing | None) -> Tensor | None:
    """Which of the keys each query sees, `[B or 1, 1, queries, keys]`; None: all."""
    before = seen.stop <= at.start + 1
    inside = rule.window is None or at.stop - rule.window <= seen.start
    together = packing is None or packing.latest[at.stop - 1] <= seen.start
    if before and inside and together:
        return None
    device = None if packing is None else packing.documents.device
    query = torch.arange(at.start, at.stop, device=device)[:, None]
    key = torch.arange(seen.start, seen.stop, device=device)
    visible = key <= query
    if rule.window is not None:
        visible &= key > query - rule.window
    if packing is not None and not together:
        visible = visible & packing.visible(at, seen)
    return visible.view(-1, 1, *visible.shape[-2:])
