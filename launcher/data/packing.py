"""Rows that keep documents whole: which documents lie in which row, by best fit."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from colonnade.kernels.loss import IGNORED
from colonnade.launcher.data.rows import Batch, IndexedRows, Tokens, check_ids
from colonnade.launcher.errors import UserError

_PADDING = 0  # the token of places behind a row's last document


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each item, int64 [n]; the largest come first, each into the fullest that fits it.

    Best-fit decreasing, over all items at once ("Fewer Truncations Improve Language Modeling",
    arXiv:2404.10830, section 3). Items of one size and rows with one amount of room are taken
    together: whatever row takes an item has the least room that fits, and after it less, so it
    takes as many more of that size as fit. Sizes are from 1 to `capacity`.
    """
    rows = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    begins = np.flatnonzero(np.diff(sizes[order], prepend=0))
    open_rows: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # by the room they have
    has_room = np.zeros(capacity + 1, bool)
    count = 0
    for items in np.split(order, begins[1:]):
        size = int(sizes[items[0]]) if len(items) else 0
        while len(items):
            room = size + int(has_room[size:].argmax())
            if has_room[room]:
                chosen = open_rows[room].pop()
            else:
                room = capacity
                chosen = count + np.arange(-(-len(items) // (capacity // size)))
                count += len(chosen)
            each = room // size
            needed = -(-len(items) // each)
            if len(chosen) > needed:
                open_rows[room].append(chosen[needed:])
                chosen = chosen[:needed]
            has_room[room] = bool(open_rows[room])
            taken = min(len(items), len(chosen) * each)
            rows[items[:taken]] = np.repeat(chosen, each)[:taken]
            for part, left in (
                (chosen[: taken // each], room - each * size),
                (chosen[taken // each :], room - (taken % each) * size),
            ):
                if len(part) and left:
                    open_rows[left].append(part)
                    has_room[left] = True
            items = items[taken:]
    return rows


class PackedRows(IndexedRows):
    """Rows of whole documents: each begins in the row that it ends in, and padding fills the rest.

    A document of T tokens takes T - 1 places, since its last token predicts nothing. One that is
    longer than a row is split into rows, as in pretraining nothing should be lost; if it has a loss
    mask it is cut behind a row instead, as an answer is never trained without its prompt, and left
    out if nothing of it is trained before that. `describe` tells how many.

    Which documents share a row depends on their lengths alone; the order of the rows is that of
    `IndexedRows`. Padding is token 0 without loss, as a document of its own.
    """

    def __init__(
        self,
        tokens: Tokens,
        seq_len: int,
        vocab: int,
        span: tuple[int, int] | None = None,
        shuffle: tuple[int, int] | None = None,
        known: int | None = None,
    ) -> None:
        """See `IndexedRows`; UserError if no document predicts anything."""
        first, last = span or (0, len(tokens.tokens))
        starts = tokens.starts[(tokens.starts >= first) & (tokens.starts < last)]
        sizes = np.diff(starts, append=last) - 1
        starts, sizes = starts[sizes > 0], sizes[sizes > 0]
        self._long = int((sizes > seq_len).sum())
        self._lost = 0  # documents of which nothing is trained
        if tokens.mask is None:
            starts, sizes = _split(starts, sizes, seq_len)
        else:
            long = np.flatnonzero(sizes > seq_len)
            trained = [tokens.mask[s + 1 : s + seq_len + 1].any() for s in starts[long].tolist()]
            lost = long[~np.array(trained, bool)]
            starts, sizes = np.delete(starts, lost), np.delete(sizes, lost)
            self._lost, sizes = len(lost), np.minimum(sizes, seq_len)
        if len(sizes) == 0:
            raise UserError(
                f"{tokens.name} has no document that trains anything within train.seq_len = "
                f"{seq_len}: give more text, or set train.seq_len higher"
            )
        rows = best_fit(sizes, seq_len)
        order = np.argsort(rows, kind="stable")
        self._starts, self._sizes = starts[order], sizes[order]
        self._bounds = np.searchsorted(rows[order], np.arange(rows.max() + 2))
        self._set(tokens, seq_len, vocab, (first, last), shuffle, known, len(self._bounds) - 1)

    def batch(self, samples: Sequence[int]) -> Batch:
        """See `Rows.batch`; any indices in any order."""
        shape = (len(samples), self._seq_len)
        tokens = np.full(shape, _PADDING, np.int32)
        labels = np.full(shape, IGNORED, np.int32)
        positions, documents = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for place, sample in enumerate(samples):
            row, at = self._row(sample), 0
            first, last = self._bounds[row : row + 2].tolist()
            items = zip(self._starts[first:last], self._sizes[first:last], strict=True)
            for number, (start, size) in enumerate(items):
                inside = slice(at, at + int(size))
                window = self._tokens.tokens[int(start) : int(start + size) + 1]
                check_ids(self._tokens.name, window, self._vocab, self._known)
                tokens[place, inside], labels[place, inside] = window[:-1], window[1:]
                if self._tokens.mask is not None:
                    trained = self._tokens.mask[int(start) + 1 : int(start + size) + 1]
                    labels[place, inside][trained == 0] = IGNORED
                positions[place, inside], documents[place, inside] = np.arange(size), number
                at += int(size)
            positions[place, at:] = np.arange(self._seq_len - at)
            documents[place, at:] = last - first
        return Batch(*(torch.from_numpy(a) for a in (tokens, labels, positions, documents)))

    def state(self) -> dict[str, Any]:
        """As of `IndexedRows`, and that documents are whole."""
        return {**super().state(), "packing": "whole"}

    def padding(self) -> float:
        """The share of all places that hold no document."""
        return 1 - int(self._sizes.sum()) / (self.rows * self._seq_len)

    def describe(self) -> str:
        """As of `IndexedRows`, with the share of padding and what became of long documents."""
        text = f"{super().describe()}, kept whole with {self.padding():.1%} padding"
        if self._long and self._tokens.mask is None:
            text += f"; {self._long:,} longer than a row are split"
        elif self._long:
            text += f"; {self._long - self._lost:,} longer than a row are cut"
            text += f", {self._lost:,} whose prompt fills a row are left out"
        return text


def _split(starts: np.ndarray, sizes: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and sizes of pieces of at most a row."""
    pieces = -(-sizes // seq_len)
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offsets = number * seq_len
    return np.repeat(starts, pieces) + offsets, np.minimum(
        np.repeat(sizes, pieces) - offsets, seq_len
    )
