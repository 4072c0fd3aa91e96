"""Rows of tokens: cuts fixed-length rows out of concatenated documents, boundaries kept."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from colonnade.kernels.loss import IGNORED
from colonnade.launcher.data.mixture import Permutation, locate, split_fractions
from colonnade.launcher.data.record import Record
from colonnade.launcher.data.tokenfile import FileArray
from colonnade.launcher.errors import UserError


class Batch(NamedTuple):
    """Rows of a step; four int32 tensors [B, S] in CPU memory.

    `labels` holds the next token, -100 where there is no loss: at a document's last token and
    where the loss mask says so. `positions` count from 0 at every document and row start;
    `documents` number the documents within a row from 0.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor


class Rows(Protocol):
    """An endless list of rows, read by sample index."""

    @property
    def rows(self) -> int | None:
        """Different rows there are, after which they repeat; None where that is not known."""

    def batch(self, samples: Sequence[int]) -> Batch:
        """The rows with these sample indices; UserError if one holds an id beyond the vocabulary.

        Indexed rows take any indices in any order. Streams take increasing ones.
        """

    def state(self) -> dict[str, Any]:
        """JSON-able; what `load_state` needs to go on after the last batch, on any rank."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; UserError if the data are no longer the same."""

    def describe(self) -> str:
        """What is read, in lines for people."""


@dataclass(frozen=True)
class Tokens:
    """Concatenated documents. `name` is for messages.

    `tokens` is an integer array [T], in memory or on disk, `starts` int64, ascending: the first
    token of each document that has any. `mask`, uint8 [T] or None for all ones, is 1 at the tokens
    to be predicted. `record` says what made them, where that is known.
    """

    name: str
    tokens: np.ndarray | FileArray
    starts: np.ndarray
    mask: np.ndarray | FileArray | None = None
    record: Record | None = None

    @cached_property
    def content(self) -> str:
        """A hash by which other tokens are noticed: the record's, else of 64 blocks and all starts.

        (To read a corpus of terabytes for it would take hours.)
        """
        if self.record is not None:
            return self.record.content
        total = len(self.tokens)
        found = hashlib.blake2b(f"{total}".encode(), digest_size=16)
        found.update(np.ascontiguousarray(self.starts, "<i8").data)
        for _, block in sampled_blocks(self.tokens):
            found.update(np.ascontiguousarray(block).data)
        return found.hexdigest()


def sampled_blocks(
    tokens: np.ndarray | FileArray, count: int = 64, size: int = 1 << 14
) -> Iterator[tuple[int, np.ndarray]]:
    """(start, items) of up to `count` blocks of up to `size` items, spread evenly; all if few."""
    total = len(tokens)
    if total <= count * size:
        yield from ((start, tokens[start : start + size]) for start in range(0, total, size))
        return
    for number in range(count):
        start = number * (total - size) // (count - 1)
        yield start, tokens[start : start + size]


def cut(
    source: Tokens, offsets: Sequence[int], seq_len: int, vocab: int, known: int | None = None
) -> Batch:
    """One row of `seq_len` tokens from each offset; the token after a row must exist too."""
    count, end = len(offsets), len(offsets) * seq_len
    window = _windows(source.tokens, offsets, seq_len + 1)
    check_ids(source.name, window, vocab, known)
    tokens = window[:, :-1].astype(np.int32)
    labels = window[:, 1:].astype(np.int32)
    if source.mask is not None:
        labels[_windows(source.mask, offsets, seq_len + 1)[:, 1:] == 0] = IGNORED

    # Rows laid end to end fall into segments: one begins at each row and at each document start
    # in (offset, offset + S]. A start at offset + S makes a segment of no tokens, but takes away
    # the row's last label like any other.
    row_begins = np.arange(0, end, seq_len)
    at = np.asarray(offsets, dtype=np.int64)
    first = np.searchsorted(source.starts, at, "right")
    counts = np.searchsorted(source.starts, at + seq_len, "right") - first + 1
    opening = np.cumsum(counts) - counts  # each row's first segment
    number = np.arange(int(counts.sum())) - np.repeat(opening, counts)
    begins = source.starts[np.repeat(first, counts) + number - 1]
    begins = begins + np.repeat(row_begins - at, counts)
    begins[opening] = row_begins
    labels.reshape(-1)[begins[number > 0] - 1] = IGNORED

    lengths = np.append(begins[1:], end) - begins
    positions = np.arange(end, dtype=np.int32) - np.repeat(begins.astype(np.int32), lengths)
    documents = np.repeat(number.astype(np.int32), lengths)
    shape = (count, seq_len)
    arrays = (tokens, labels, positions.reshape(shape), documents.reshape(shape))
    return Batch(*(torch.from_numpy(a) for a in arrays))


def _windows(array: np.ndarray | FileArray, offsets: Sequence[int], length: int) -> np.ndarray:
    """`length` items from each offset, stacked."""
    if isinstance(array, np.ndarray):
        return np.stack([array[o : o + length] for o in offsets])
    windows = np.empty((len(offsets), length), array.dtype)
    for o, window in zip(offsets, windows, strict=True):
        array.read(o, o + length, into=window)
    return windows


def check_ids(name: str, window: np.ndarray, vocab: int, known: int | None = None) -> None:
    """UserError if ids are negative, beyond the vocabulary or a tokenizer of size `known`."""
    largest = int(window.max())
    if largest >= vocab:
        raise UserError(
            f"{name} holds the token id {largest}, but model.vocab = {vocab}: set "
            f"model.vocab = {largest + 1} or more, or tokenise the text with the right tokenizer"
        )
    if known is not None and largest >= known:
        raise UserError(beyond_tokenizer(name, largest, known))
    if window.dtype.kind == "i" and (smallest := int(window.min())) < 0:
        raise UserError(f"{name} holds the negative token id {smallest}: tokenise the text again")


def beyond_tokenizer(name: str, largest: int, size: int) -> str:
    """What to tell of tokens that a tokenizer did not make."""
    return (
        f"{name} holds the token id {largest}, and data.tokenizer has {size} tokens: set "
        "data.tokenizer to what made the tokens, or leave it out"
    )


class IndexedRows:
    """Rows of a token range [first, last) of `tokens`, in file order or shuffled by a seed.

    The order is a pure function of (seed, source, sample index); each epoch has its own. There
    are (tokens - 1) // S rows, since the last label needs one more token; UserError if none.
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
        """`span` is (first, last), by default all; `shuffle` is (seed, source index).

        `known` is the size of the tokenizer that is said to have made the tokens.
        """
        first, last = span or (0, len(tokens.tokens))
        size = last - first
        if size < 2:
            raise UserError(f"{tokens.name} is an empty corpus: give a source that holds text")
        if size <= seq_len:
            raise UserError(
                f"{tokens.name} has {size} tokens, too few for one row of train.seq_len = "
                f"{seq_len}: give more text, or set train.seq_len = {size - 1} or less"
            )
        rows = (size - 1) // seq_len
        self._set(tokens, seq_len, vocab, (first, last), shuffle, known, rows)

    def _set(
        self,
        tokens: Tokens,
        seq_len: int,
        vocab: int,
        span: tuple[int, int],
        shuffle: tuple[int, int] | None,
        known: int | None,
        rows: int,
    ) -> None:
        self._tokens, self._seq_len, self._vocab = tokens, seq_len, vocab
        self._first, self._last = span
        self._shuffle, self._known, self.rows = shuffle, known, rows
        self._permutation = Permutation(rows)

    def _row(self, sample: int) -> int:
        """The row that a sample is, a pure function of the seed and the sample."""
        epoch, row = divmod(sample, self.rows)
        return row if self._shuffle is None else self._permutation(row, (*self._shuffle, epoch))

    def batch(self, samples: Sequence[int]) -> Batch:
        """See `Rows.batch`; any indices in any order."""
        offsets = [self._first + self._row(sample) * self._seq_len for sample in samples]
        return cut(self._tokens, offsets, self._seq_len, self._vocab, self._known)

    def state(self) -> dict[str, Any]:
        """The number of rows and a hash of the tokens, by which other data are noticed."""
        return {"rows": self.rows, "content": self._tokens.content}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to restore; UserError if the number of rows or the tokens have changed."""
        here = self.state()
        if state.get("content", here["content"]) != here["content"] and state["rows"] == self.rows:
            raise UserError(
                f"{self._tokens.name} holds other tokens than when the run was saved: restore the "
                "data and data.tokenizer (where they lie does not matter), or start a new run"
            )
        if state.get("packing") != here.get("packing"):
            raise UserError(
                f"{self._tokens.name} was read with data.packing = "
                f"{state.get('packing', 'stream')!r} when the run was saved: set it to that, or "
                "start a new run"
            )
        if state.get("rows") != self.rows:
            raise UserError(
                f"{self._tokens.name} gives {self.rows} rows, but {state.get('rows')} when the "
                "run was saved, so their order would differ: restore the data, train.seq_len and "
                "data.validation, or start a new run"
            )

    def describe(self) -> str:
        """Name, rows, tokens and documents in one line."""
        starts = self._tokens.starts
        documents = np.searchsorted(starts, self._last) - np.searchsorted(starts, self._first)
        return (
            f"{self._tokens.name}: {self.rows:,} rows of {self._seq_len}, "
            f"{self._last - self._first:,} tokens in {documents:,} documents"
        )


class _Joined(ABC):
    """Rows from several sources; `_locate` says which row of which source a sample is."""

    def __init__(self, sources: Sequence[Rows]) -> None:
        self._sources = list(sources)
        known = [source.rows for source in sources if source.rows is not None]
        self.rows = sum(known) if len(known) == len(self._sources) else None

    @abstractmethod
    def _locate(self, sample: int) -> tuple[int, int]:
        """(source, row of that source)."""

    def batch(self, samples: Sequence[int]) -> Batch:
        """See `Rows.batch`."""
        asked: dict[int, list[int]] = {}
        order: dict[int, list[int]] = {}
        for place, sample in enumerate(samples):
            source, index = self._locate(sample)
            asked.setdefault(source, []).append(index)
            order.setdefault(source, []).append(place)
        parts = [self._sources[source].batch(indices) for source, indices in asked.items()]
        if len(parts) == 1:
            return parts[0]
        places = [place for part in order.values() for place in part]
        back = torch.tensor(sorted(range(len(places)), key=places.__getitem__))
        fields = zip(*parts, strict=True)
        return Batch(*(torch.cat(field).index_select(0, back) for field in fields))

    def state(self) -> dict[str, Any]:
        """The states of the sources, in their order."""
        return {"sources": [source.state() for source in self._sources]}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Rows.load_state`."""
        states = state.get("sources", [state])
        if len(states) != len(self._sources):
            raise UserError(
                f"the run was saved with {len(states)} data sources and data.sources has "
                f"{len(self._sources)} now: restore them, or start a new run"
            )
        for source, saved in zip(self._sources, states, strict=True):
            source.load_state(saved)

    def describe(self) -> str:
        """One line a source."""
        return "\n".join(source.describe() for source in self._sources)


class MixtureRows(_Joined):
    """A mixture of sources by weight; which sample comes from which is a closed formula."""

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float]) -> None:
        super().__init__(sources)
        self._fractions = split_fractions(weights)
        self._shares = [weight / sum(weights) for weight in weights]

    def _locate(self, sample: int) -> tuple[int, int]:
        return locate(sample, self._fractions)

    def describe(self) -> str:
        """One line a source, its share first."""
        lines = zip(self._shares, self._sources, strict=True)
        return "\n".join(f"{share:6.2%} {source.describe()}" for share, source in lines)


class ChainedRows(_Joined):
    """All rows of the first source, then all of the next; then from the start again."""

    def _locate(self, sample: int) -> tuple[int, int]:
        counts = [source.rows or 0 for source in self._sources]
        index = sample % sum(counts)
        for source, count in enumerate(counts):
            if index < count:
                return source, index
            index -= count
        raise AssertionError("unreachable: index < sum(counts)")
