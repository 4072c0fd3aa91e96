"""Packing: rows of unsplit documents, assigned to rows by best-fit decreasing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from colonnade.kernels.labels import IGNORED
from colonnade.launcher.data.rows import Batch, IndexedRows, Tokens, check_ids
from colonnade.launcher.errors import UserError

_PADDING_TOKEN = 0  # fills a row after its last document


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Assigns each item, largest first, to the fullest row that fits it: rows, int64 [n].

    Best-fit decreasing, over all items at once ("Fewer Truncations Improve Language Modeling",
    arXiv:2404.10830, section 3). Items of one size and rows with the same room are handled
    together: the row that takes an item has the least room that fits, and less room afterwards, so
    it takes as many more items of that size as fit. Sizes are from 1 to `capacity`.
    """
    rows = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    begins = np.flatnonzero(np.diff(sizes[order], prepend=0))  # of each run of equal sizes
    open_rows: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # by their room
    has_room = np.zeros(capacity + 1, bool)
    count = 0
    for items in np.split(order, begins[1:]):
        size = int(sizes[items[0]]) if len(items) else 0
        while len(items):
            room = size + int(has_room[size:].argmax())
            if has_room[room]:
                chosen = open_rows[room].pop()
            else:  # no open row fits the size: open as many new rows as the items need
                room = capacity
                chosen = count + np.arange(-(-len(items) // (capacity // size)))
                count += len(chosen)
            per_row = room // size
            needed = -(-len(items) // per_row)
            if len(chosen) > needed:
                open_rows[room].append(chosen[needed:])
                chosen = chosen[:needed]
            has_room[room] = bool(open_rows[room])
            assigned = min(len(items), len(chosen) * per_row)
            rows[items[:assigned]] = np.repeat(chosen, per_row)[:assigned]
            # All chosen rows take `per_row` items, but the last may take fewer.
            for filled, remaining in (
                (chosen[: assigned // per_row], room - per_row * size),
                (chosen[assigned // per_row :], room - (assigned % per_row) * size),
            ):
                if len(filled) and remaining:
                    open_rows[remaining].append(filled)
                    has_room[remaining] = True
            items = items[assigned:]
    return rows


class PackedRows(IndexedRows):
    """Rows of unsplit documents: each lies within one row, and padding fills the rest of the row.

    A document of T tokens takes T - 1 positions, since its last token predicts nothing. A document
    longer than a row is split into fragments of at most a row, so that pretraining loses no tokens.
    If the tokens have a loss mask it is truncated to a row instead, so that an answer is never
    trained without its prompt, and dropped if the row has no token with a loss. `describe` counts
    both.

    The assignment of documents to rows depends on their lengths alone; the order of the rows is
    that of `IndexedRows`. Padding is token 0 without loss, numbered as a document of its own.
    """

    def __init__(
        self,
        tokens: Tokens,
        seq_len: int,
        vocab: int,
        token_range: tuple[int, int] | None = None,
        shuffle: tuple[int, ...] | None = None,
        tokenizer_size: int | None = None,
    ) -> None:
        """See `IndexedRows`; raises UserError if no document has a token with a loss."""
        first, last = token_range or (0, len(tokens.tokens))
        starts = tokens.starts[(tokens.starts >= first) & (tokens.starts < last)]
        sizes = np.diff(starts, append=last) - 1
        starts, sizes = starts[sizes > 0], sizes[sizes > 0]
        self._long = int((sizes > seq_len).sum())  # documents longer than a row
        self._dropped = 0  # of those, documents without any loss in their first row
        if tokens.mask is None:
            starts, sizes = _split_long(starts, sizes, seq_len)
        else:
            long = np.flatnonzero(sizes > seq_len)
            trained = [tokens.mask[s + 1 : s + seq_len + 1].any() for s in starts[long].tolist()]
            dropped = long[~np.array(trained, bool)]
            starts, sizes = np.delete(starts, dropped), np.delete(sizes, dropped)
            self._dropped, sizes = len(dropped), np.minimum(sizes, seq_len)
        if len(sizes) == 0:
            raise UserError(
                f"{tokens.name} has no document that trains anything within train.seq_len = "
                f"{seq_len}: give more text, or set train.seq_len higher"
            )
        rows = best_fit(sizes, seq_len)
        order = np.argsort(rows, kind="stable")
        self._starts, self._sizes = starts[order], sizes[order]
        # Row r holds the documents _bounds[r] to _bounds[r + 1] of _starts and _sizes.
        self._bounds = np.searchsorted(rows[order], np.arange(rows.max() + 2))
        count = len(self._bounds) - 1
        self._init_rows(tokens, seq_len, vocab, (first, last), shuffle, tokenizer_size, count)

    def batch(self, samples: Sequence[int]) -> Batch:
        """See `Rows.batch`; any indices in any order."""
        shape = (len(samples), self._seq_len)
        tokens = np.full(shape, _PADDING_TOKEN, np.int32)
        labels = np.full(shape, IGNORED, np.int32)
        positions, documents = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for index, sample in enumerate(samples):
            row, offset = self._row_of(sample), 0
            first, last = self._bounds[row : row + 2].tolist()
            items = zip(self._starts[first:last], self._sizes[first:last], strict=True)
            for number, (start, size) in enumerate(items):
                columns = slice(offset, offset + int(size))
                window = self._tokens.tokens[int(start) : int(start + size) + 1]
                check_ids(self._tokens.name, window, self._vocab, self._tokenizer_size)
                tokens[index, columns], labels[index, columns] = window[:-1], window[1:]
                if self._tokens.mask is not None:
                    mask = self._tokens.mask[int(start) + 1 : int(start + size) + 1]
                    labels[index, columns][mask == 0] = IGNORED
                positions[index, columns], documents[index, columns] = np.arange(size), number
                offset += int(size)
            positions[index, offset:] = np.arange(self._seq_len - offset)
            documents[index, offset:] = last - first
        return Batch(*(torch.from_numpy(a) for a in (tokens, labels, positions, documents)))

    def state(self) -> dict[str, Any]:
        """Returns the state of `IndexedRows` and the packing."""
        return {**super().state(), "packing": "whole"}

    def padding(self) -> float:
        """Returns the fraction of all positions that is padding."""
        return 1 - int(self._sizes.sum()) / (self.rows * self._seq_len)

    def describe(self) -> str:
        """Adds the padding and the number of long documents to `IndexedRows.describe`."""
        text = f"{super().describe()}, kept whole with {self.padding():.1%} padding"
        if self._long and self._tokens.mask is None:
            text += f"; {self._long:,} longer than a row are split"
        elif self._long:
            text += f"; {self._long - self._dropped:,} longer than a row are cut"
            text += f", {self._dropped:,} whose prompt fills a row are left out"
        return text


def _split_long(
    starts: np.ndarray, sizes: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits documents into fragments of at most `seq_len`; returns their starts and sizes."""
    counts = -(-sizes // seq_len)  # fragments of each document
    number = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = number * seq_len
    fragment_sizes = np.minimum(np.repeat(sizes, counts) - offsets, seq_len)
    return np.repeat(starts, counts) + offsets, fragment_sizes
