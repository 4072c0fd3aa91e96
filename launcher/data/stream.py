"""Rows of a stream: text is read, tokenised and packed while training, in stream order."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from colonnade.launcher.data.documents import chunks, encode_documents
from colonnade.launcher.data.files import source_name
from colonnade.launcher.data.rows import Batch, Tokens, cut
from colonnade.launcher.data.sources import open_reader
from colonnade.launcher.data.tokenizer import Tokenizer
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import SourceConfig

_FIRST = np.zeros(1, np.int64)  # the starts of a single document


@dataclass(frozen=True)
class _Chunk:
    """Tokenised documents, and the position from which they are read again."""

    before: dict[str, Any] | None
    documents: Tokens

    def __len__(self) -> int:
        return len(self.documents.tokens)


class StreamRows:
    """Rows of a data set that is read once through, then again from its start, without end.

    Each instance reads the whole stream and hands out the rows it is asked for, so sample indices
    must increase; rows between them are read and dropped. The documents of one pass follow
    those of the last in the same rows.

    The state is the reader's position before the chunk of documents that holds the next row,
    how many of that chunk's tokens come before the row, and the row's number: resuming
    tokenises that one chunk again. It is good for any rank that goes on with later rows.
    """

    rows = None

    def __init__(
        self, source: SourceConfig, tokenizer: Tokenizer, seq_len: int, vocab: int
    ) -> None:
        self._source, self._tokenizer = source, tokenizer
        self._seq_len, self._vocab = seq_len, vocab
        self._documents = open_reader(source, resumable=True)
        self.load_state({"stream": None, "skip": 0, "row": 0})

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on before the row where `state` was taken; UserError under another tokenizer."""
        if state.get("encoding", self._tokenizer.encoding) != self._tokenizer.encoding:
            raise UserError(
                f"{source_name(self._source)} was read by another tokenizer (data.tokenizer, "
                "data.eod, data.bos, data.special_tokens) when the run was saved: restore it, or "
                "start a new run"
            )
        self._row: int = state["row"]
        self._chunks: deque[_Chunk] = deque()
        self._held = 0  # tokens in the chunks
        self._skip: int = state["skip"]  # the first of them that precede the row
        self._position: dict[str, Any] | None = state["stream"]  # before the next chunk
        self._reader = self._read(self._position)

    def state(self) -> dict[str, Any]:
        """See the class; belongs to the row after the last one handed out."""
        stream = self._chunks[0].before if self._chunks else self._position
        return {
            "stream": stream,
            "skip": self._skip,
            "row": self._row,
            "encoding": self._tokenizer.encoding,
        }

    def batch(self, samples: Sequence[int]) -> Batch:
        """See `Rows.batch`; ValueError if the samples do not increase from call to call."""
        windows = []
        for sample in samples:
            if sample < self._row:
                raise ValueError(f"row {sample} of a stream that is at row {self._row} already")
            self._advance(sample - self._row)
            windows.append(self._window())
            self._advance(1)
        offsets = [i * (self._seq_len + 1) for i in range(len(windows))]
        return cut(_join(windows), offsets, self._seq_len, self._vocab)

    def describe(self) -> str:
        """Name, and that it is a stream."""
        return f"{source_name(self._source)}: a stream of rows of {self._seq_len}"

    def _advance(self, rows: int) -> None:
        self._row += rows
        self._skip += rows * self._seq_len
        while self._chunks and self._skip >= len(self._chunks[0]):
            gone = len(self._chunks.popleft())
            self._skip -= gone
            self._held -= gone

    def _window(self) -> Tokens:
        """The S + 1 tokens from the current row on."""
        length = self._seq_len + 1
        while self._held < self._skip + length:
            self._chunks.append(next(self._reader))
            self._held += len(self._chunks[-1])
            self._advance(0)
        parts = []
        begin = -self._skip  # where a chunk begins, counted from the row
        for chunk in self._chunks:
            if begin >= length:
                break
            parts.append(_slice(chunk.documents, max(-begin, 0), length - begin))
            begin += len(chunk)
        return _join(parts)

    def _read(self, position: dict[str, Any] | None) -> Iterator[_Chunk]:
        """Chunks from a position of the documents on; None is their start."""
        name, masked = source_name(self._source), self._source.prompt is not None
        while True:
            found = position is not None
            for documents in chunks(self._documents.documents(position)):
                found = True
                encoded = encode_documents(documents, self._tokenizer, masked)
                parts = [Tokens(name, tokens, _FIRST, mask) for tokens, mask in encoded]
                before, position = position, self._documents.position()
                self._position = position
                yield _Chunk(before, _join(parts))
            if not found:
                raise UserError(
                    f"data.sources: {name} is an empty corpus: give a source that holds text"
                )
            position = None


def _slice(whole: Tokens, first: int, last: int) -> Tokens:
    """Tokens [first, last), or as many of them as there are; the first counts as a start."""
    inner = whole.starts[(whole.starts > first) & (whole.starts < last)]
    mask = None if whole.mask is None else whole.mask[first:last]
    starts = np.concatenate((_FIRST, inner - first))
    return Tokens(whole.name, whole.tokens[first:last], starts, mask)


def _join(parts: list[Tokens]) -> Tokens:
    """The parts, of one source, one after the other."""
    ends = np.cumsum([len(part.tokens) for part in parts])
    begins = ends - [len(part.tokens) for part in parts]
    masks = [part.mask for part in parts if part.mask is not None]
    return Tokens(
        parts[0].name,
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.starts + begin for part, begin in zip(parts, begins, strict=True)]),
        np.concatenate(masks) if masks else None,
    )
