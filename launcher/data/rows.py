"""Rows of tokens: fixed-length slices of concatenated documents, with document boundaries."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from colonnade.kernels.labels import IGNORED
from colonnade.launcher.data.content import FileContent
from colonnade.launcher.data.mixture import Permutation, locate, split_fractions
from colonnade.launcher.data.record import TokenFileRecord
from colonnade.launcher.data.tokenfile import FileArray
from colonnade.launcher.errors import UserError


class Batch(NamedTuple):
    """Rows of a step; four int32 tensors [B, S] in CPU memory.

    `labels` holds the next token, -100 where there is no loss: at a document's last token and
    where the loss mask is 0. `positions` count from 0 at every document and row start;
    `documents` number the documents within a row from 0.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor


class Rows(Protocol):
    """An endless sequence of rows, read by sample index."""

    @property
    def rows(self) -> int | None:
        """The number of distinct rows, after which they repeat; None if it is not known."""

    def batch(self, samples: Sequence[int]) -> Batch:
        """Reads the rows of these samples; raises UserError if an id is beyond the vocabulary.

        Indexed rows take any indices in any order. Streams take increasing ones.
        """

    def state(self) -> dict[str, Any]:
        """Returns a JSON-able state; any rank may load it to resume after the last batch."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Resumes from where `state` was taken; raises UserError if the data have changed."""

    def epochs(self, samples: int) -> float:
        """Returns how often so many samples read a row, of the source that is read the most; 0 for
        a stream, whose length is not known."""

    def describe(self) -> str:
        """Describes the data in lines of text."""


@dataclass(frozen=True)
class Tokens:
    """Concatenated documents. `name` is for messages.

    `tokens` is an integer array [T], in memory or on disk. `starts`, int64 and ascending, holds the
    index of the first token of each document that has any. `mask`, uint8 [T] or None for all ones,
    is 1 at the tokens that have a loss as labels. `record` describes the tokenizer that made the
    tokens, if it is known, and `files` the content of the files, if they were verified.
    """

    name: str
    tokens: np.ndarray | FileArray
    starts: np.ndarray
    mask: np.ndarray | FileArray | None = None
    record: TokenFileRecord | None = None
    files: tuple[FileContent, ...] | None = None

    @cached_property
    def content(self) -> str:
        """A hash that detects changed tokens: the record's, else of 64 blocks and all starts.

        States have held it before they held `files`, so that it must not change.
        """
        if self.record is not None:
            return self.record.content
        total = len(self.tokens)
        digest = hashlib.blake2b(f"{total}".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.starts, "<i8").data)
        for _, block in sampled_blocks(self.tokens):
            digest.update(np.ascontiguousarray(block).data)
        return digest.hexdigest()


def sampled_blocks(
    tokens: np.ndarray | FileArray, count: int = 64, size: int = 1 << 14
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (start, items) of `count` evenly spaced blocks of `size` items; all items if fewer."""
    total = len(tokens)
    if total <= count * size:
        yield from ((start, tokens[start : start + size]) for start in range(0, total, size))
        return
    for number in range(count):
        start = number * (total - size) // (count - 1)
        yield start, tokens[start : start + size]


def slice_rows(
    source: Tokens,
    offsets: Sequence[int],
    seq_len: int,
    vocab: int,
    tokenizer_size: int | None = None,
) -> Batch:
    """Slices one row of `seq_len` tokens at each offset; the token after a row must exist too."""
    count, end = len(offsets), len(offsets) * seq_len
    window = _windows(source.tokens, offsets, seq_len + 1)
    check_ids(source.name, window, vocab, tokenizer_size)
    tokens = window[:, :-1].astype(np.int32)
    labels = window[:, 1:].astype(np.int32)
    if source.mask is not None:
        labels[_windows(source.mask, offsets, seq_len + 1)[:, 1:] == 0] = IGNORED

    # The concatenated rows consist of fragments of documents: one begins at each row's begin and at
    # each document start in (offset, offset + S]. A start at offset + S makes an empty fragment,
    # but removes the row's last label as any other start removes the label before it.
    row_begins = np.arange(0, end, seq_len)
    row_offsets = np.asarray(offsets, dtype=np.int64)
    first_start = np.searchsorted(source.starts, row_offsets, "right")  # index into the starts
    counts = np.searchsorted(source.starts, row_offsets + seq_len, "right") - first_start + 1
    first_fragment = np.cumsum(counts) - counts  # of each row
    number = np.arange(int(counts.sum())) - np.repeat(first_fragment, counts)  # within the row
    begins = source.starts[np.repeat(first_start, counts) + number - 1]
    begins = begins + np.repeat(row_begins - row_offsets, counts)
    begins[first_fragment] = row_begins
    labels.reshape(-1)[begins[number > 0] - 1] = IGNORED

    lengths = np.append(begins[1:], end) - begins
    positions = np.arange(end, dtype=np.int32) - np.repeat(begins.astype(np.int32), lengths)
    documents = np.repeat(number.astype(np.int32), lengths)
    shape = (count, seq_len)
    arrays = (tokens, labels, positions.reshape(shape), documents.reshape(shape))
    return Batch(*(torch.from_numpy(a) for a in arrays))


def _windows(array: np.ndarray | FileArray, offsets: Sequence[int], length: int) -> np.ndarray:
    """Stacks `length` items from each offset: [offsets, length]."""
    if isinstance(array, np.ndarray):
        return np.stack([array[o : o + length] for o in offsets])
    windows = np.empty((len(offsets), length), array.dtype)
    for o, window in zip(offsets, windows, strict=True):
        array.read(o, o + length, out=window)
    return windows


def check_ids(name: str, window: np.ndarray, vocab: int, tokenizer_size: int | None = None) -> None:
    """Raises UserError if an id is negative, or beyond the model's or tokenizer's vocabulary."""
    largest = int(window.max())
    if largest >= vocab:
        raise UserError(
            f"{name} holds the token id {largest}, but model.vocab = {vocab}: set "
            f"model.vocab = {largest + 1} or more, or tokenise the text with the right tokenizer"
        )
    if tokenizer_size is not None and largest >= tokenizer_size:
        raise UserError(beyond_tokenizer_message(name, largest, tokenizer_size))
    if window.dtype.kind == "i" and (smallest := int(window.min())) < 0:
        raise UserError(f"{name} holds the negative token id {smallest}: tokenise the text again")


def beyond_tokenizer_message(name: str, largest: int, size: int) -> str:
    """Returns the message for tokens with an id that the tokenizer does not have."""
    return (
        f"{name} holds the token id {largest}, and data.tokenizer has {size} tokens: set "
        "data.tokenizer to the tokenizer that made them, or leave it out"
    )


def changed_tokens(saved: dict[str, Any], tokens: Tokens) -> str | None:
    """Says which parts of `tokens` differ from those of a saved state; None if none does."""
    parts = {".bin": "tokens", ".idx": "documents", ".mask": "loss masks"}
    if tokens.files is not None and "files" in saved:
        before = {name: (size, digest) for name, size, digest in saved["files"]}
        now = {file.name: (file.size, file.hash) for file in tokens.files}
        changed = [part for end, part in parts.items() if before.get(end) != now.get(end)]
        if changed or all(file.whole for file in tokens.files):
            return " and ".join(changed) or None
    return "tokens" if saved.get("content", tokens.content) != tokens.content else None


class IndexedRows:
    """Rows of a range [first, last) of `tokens`, in file order or shuffled by a seed.

    The order is a pure function of (seed, source, sample index) and differs between epochs. There
    are (tokens - 1) // S rows, since the last label needs one more token; raises UserError if there
    are none.
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
        """`token_range` is (first, last), by default all; `shuffle` keys the order: a seed, a
        source, and so on.

        `tokenizer_size` bounds the ids if the recipe names the tokenizer that made the tokens.
        """
        first, last = token_range or (0, len(tokens.tokens))
        size = last - first
        if size < 2:
            raise UserError(f"{tokens.name} is an empty corpus: give a source that holds text")
        if size <= seq_len:
            raise UserError(
                f"{tokens.name} has {size} tokens, too few for one row of train.seq_len = "
                f"{seq_len}: give more text, or set train.seq_len = {size - 1} or less"
            )
        rows = (size - 1) // seq_len
        self._init_rows(tokens, seq_len, vocab, (first, last), shuffle, tokenizer_size, rows)

    def _init_rows(
        self,
        tokens: Tokens,
        seq_len: int,
        vocab: int,
        token_range: tuple[int, int],
        shuffle: tuple[int, ...] | None,
        tokenizer_size: int | None,
        rows: int,
    ) -> None:
        """Sets the attributes that this class and its subclasses share."""
        self._tokens, self._seq_len, self._vocab = tokens, seq_len, vocab
        self._first, self._last = token_range
        self._shuffle, self._tokenizer_size, self.rows = shuffle, tokenizer_size, rows
        self._permutation = Permutation(rows)

    def _row_of(self, sample: int) -> int:
        """Returns the row of a sample, a pure function of the seed, source and sample index."""
        epoch, row = divmod(sample, self.rows)
        return row if self._shuffle is None else self._permutation(row, (*self._shuffle, epoch))

    def batch(self, samples: Sequence[int]) -> Batch:
        """See `Rows.batch`; any indices in any order."""
        offsets = [self._first + self._row_of(sample) * self._seq_len for sample in samples]
        return slice_rows(self._tokens, offsets, self._seq_len, self._vocab, self._tokenizer_size)

    def state(self) -> dict[str, Any]:
        """Returns the number of rows and hashes of data and tokenizer, which detect changes."""
        state: dict[str, Any] = {"rows": self.rows, "content": self._tokens.content}
        if self._tokens.record is not None:
            state["tokenizer"] = self._tokens.record.fingerprint
        if self._tokens.files is not None:
            state["files"] = [list(file) for file in self._tokens.files]
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores nothing; raises UserError if tokens, tokenizer, packing or rows changed.

        Older states lack `files`, `tokenizer` or `content`, which are then not compared.
        """
        current, record = self.state(), self._tokens.record
        if record and state.get("tokenizer", record.fingerprint) != record.fingerprint:
            raise UserError(
                f"{self._tokens.name} was tokenised by another tokenizer when the run was saved, "
                f"now by {record.name!r}: restore data.tokenizer (its path does not matter), or "
                "start a new run"
            )
        changed = changed_tokens(state, self._tokens)
        if changed and state.get("rows") == self.rows:
            raise UserError(
                f"{self._tokens.name} holds other {changed} than when the run was saved: restore "
                "the data and data.tokenizer (their paths do not matter), or start a new run"
            )
        if state.get("packing") != current.get("packing"):
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

    def epochs(self, samples: int) -> float:
        """See `Rows.epochs`."""
        return samples / self.rows

    def describe(self) -> str:
        """Returns name, rows, tokens and documents in one line."""
        starts = self._tokens.starts
        documents = np.searchsorted(starts, self._last) - np.searchsorted(starts, self._first)
        return (
            f"{self._tokens.name}: {self.rows:,} rows of {self._seq_len}, "
            f"{self._last - self._first:,} tokens in {documents:,} documents"
        )


class _CombinedRows(ABC):
    """Rows from several sources; `_locate` maps a sample to a row of a source."""

    def __init__(self, sources: Sequence[Rows]) -> None:
        self._sources = list(sources)
        counts = [source.rows for source in sources if source.rows is not None]
        self.rows = sum(counts) if len(counts) == len(self._sources) else None

    @abstractmethod
    def _locate(self, sample: int) -> tuple[int, int]:
        """Returns (source, sample index within that source)."""

    def batch(self, samples: Sequence[int]) -> Batch:
        """See `Rows.batch`."""
        indices: dict[int, list[int]] = {}  # by source, the samples to read from it
        batch_rows: dict[int, list[int]] = {}  # by source, the rows of the batch that they become
        for batch_row, sample in enumerate(samples):
            source, index = self._locate(sample)
            indices.setdefault(source, []).append(index)
            batch_rows.setdefault(source, []).append(batch_row)
        batches = [self._sources[source].batch(of_source) for source, of_source in indices.items()]
        if len(batches) == 1:
            return batches[0]
        # Concatenating the batches orders the rows by source: reorder them by row of the batch.
        order = [row for rows in batch_rows.values() for row in rows]
        inverse = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
        fields = zip(*batches, strict=True)
        return Batch(*(torch.cat(field).index_select(0, inverse) for field in fields))

    def state(self) -> dict[str, Any]:
        """Returns the states of the sources, in their order."""
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
        """Describes each source in one line."""
        return "\n".join(source.describe() for source in self._sources)


class MixtureRows(_CombinedRows):
    """A mixture of sources by weight; a closed formula maps samples to sources (`locate`)."""

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float]) -> None:
        super().__init__(sources)
        self._fractions = split_fractions(weights)
        self._shares = [weight / sum(weights) for weight in weights]

    def epochs(self, samples: int) -> float:
        """See `Rows.epochs`."""
        both = zip(self._sources, self._shares, strict=True)
        return max(source.epochs(int(samples * share)) for source, share in both)

    def _locate(self, sample: int) -> tuple[int, int]:
        return locate(sample, self._fractions)

    def describe(self) -> str:
        """Describes each source in one line, its share of the mixture first."""
        lines = zip(self._shares, self._sources, strict=True)
        return "\n".join(f"{share:6.2%} {source.describe()}" for share, source in lines)


class ChainedRows(_CombinedRows):
    """All rows of the first source, then all of the next, and so on; then repeats."""

    def epochs(self, samples: int) -> float:
        """See `Rows.epochs`."""
        return samples / self.rows if self.rows else 0.0

    def _locate(self, sample: int) -> tuple[int, int]:
        counts = [source.rows or 0 for source in self._sources]
        index = sample % sum(counts)
        for source, count in enumerate(counts):
            if index < count:
                return source, index
            index -= count
        raise AssertionError("unreachable: index < sum(counts)")
