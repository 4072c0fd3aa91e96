"""Rows of a stream: reads, tokenises and concatenates text while training, in stream order."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from colonnade.launcher.data.content import file_change
from colonnade.launcher.data.documents import document_chunks, encode_documents
from colonnade.launcher.data.files import source_name
from colonnade.launcher.data.rows import Batch, Tokens, slice_rows
from colonnade.launcher.data.sources import open_reader
from colonnade.launcher.data.tokenizer import Tokenizer
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import SourceConfig

_SINGLE_START = np.zeros(1, np.int64)  # the `starts` of a single document


@dataclass(frozen=True)
class _Chunk:
    """Tokenised documents, and the reader's position before them (None is the source's start)."""

    position: dict[str, Any] | None
    documents: Tokens

    def __len__(self) -> int:
        return len(self.documents.tokens)


class StreamRows:
    """Rows of a source that is read from start to end, and then repeatedly from its start.

    Each instance reads the entire stream and returns the rows it is asked for, so sample indices
    must increase; the rows between them are read and dropped. Documents of consecutive passes are
    concatenated and may share a row.

    The state holds the reader's position before the chunk of documents in which the next row
    begins, the number of that chunk's tokens before the row, and the row's index: resuming
    tokenises that one chunk again. Any rank may resume from the state with later rows. It also
    holds the contents that all files had when the stream was opened, and the tokenizer's encoding.
    """

    rows = None

    def __init__(
        self, source: SourceConfig, tokenizer: Tokenizer, seq_len: int, vocab: int
    ) -> None:
        self._source, self._tokenizer = source, tokenizer
        self._seq_len, self._vocab = seq_len, vocab
        self._reader = open_reader(source, resumable=True)
        self._contents = self._reader.contents()
        self._files = [list(content) for content in self._contents]  # as JSON holds them
        self.load_state({"stream": None, "skip": 0, "row": 0})

    def load_state(self, state: dict[str, Any]) -> None:
        """Resumes from the row where `state` was taken.

        Raises UserError if the tokenizer or any file has changed, also a file that was read to its
        end or is still to come. Older states lack `files` or `encoding`, which are then not
        compared; when reading begins, their position compares the current file's name and size.
        """
        self._check_tokenizer(state.get("encoding", self._tokenizer.encoding))
        if change := file_change(state.get("files", self._files), self._contents):
            raise UserError(
                f"data.sources: {source_name(self._source)} is no longer what the run read when it "
                f"was saved ({change}): restore the data, or start a new run"
            )
        self._row: int = state["row"]
        self._chunks: deque[_Chunk] = deque()
        self._buffered = 0  # tokens in the chunks
        self._skip: int = state["skip"]  # how many of them precede the current row
        self._position: dict[str, Any] | None = state["stream"]  # before the next chunk
        self._chunk_iterator = self._read(self._position)

    def _check_tokenizer(self, saved: dict[str, Any]) -> None:
        """Raises UserError if the encoding of a state is not that of the tokenizer."""
        current = self._tokenizer.encoding
        if saved == current:
            return
        read = f"the one that read {source_name(self._source)} when the run was saved"
        if saved.get("tokenizer") != current["tokenizer"]:
            raise UserError(
                f"data.tokenizer = {self._tokenizer.name!r} has other content than {read}: restore "
                "it (its path does not matter), or start a new run"
            )
        fields = [key for key in current if saved.get(key) != current[key]]
        values = ", ".join(f"{key} {saved.get(key)} then, {current[key]} now" for key in fields)
        raise UserError(
            f"data.{fields[0]} of data.tokenizer = {self._tokenizer.name!r} differs from that of "
            f"{read} ({values}): restore it, or start a new run"
        )

    def state(self) -> dict[str, Any]:
        """Returns the state, described at the class, of the row after the last one returned."""
        stream = self._chunks[0].position if self._chunks else self._position
        return {
            "stream": stream,
            "skip": self._skip,
            "row": self._row,
            "encoding": self._tokenizer.encoding,
            "files": self._files,
        }

    def batch(self, samples: Sequence[int]) -> Batch:
        """See `Rows.batch`; raises ValueError if samples do not increase, also between calls."""
        windows = []
        for sample in samples:
            if sample < self._row:
                raise ValueError(f"row {sample} of a stream that is at row {self._row} already")
            self._advance(sample - self._row)
            windows.append(self._window())
            self._advance(1)
        offsets = [i * (self._seq_len + 1) for i in range(len(windows))]
        return slice_rows(_concatenate(windows), offsets, self._seq_len, self._vocab)

    def epochs(self, samples: int) -> float:
        """See `Rows.epochs`."""
        return 0.0

    def describe(self) -> str:
        """Returns the source's name and that it is a stream."""
        return f"{source_name(self._source)}: a stream of rows of {self._seq_len}"

    def _advance(self, rows: int) -> None:
        """Moves the current row forward and drops the chunks that end before it."""
        self._row += rows
        self._skip += rows * self._seq_len
        while self._chunks and self._skip >= len(self._chunks[0]):
            dropped = len(self._chunks.popleft())
            self._skip -= dropped
            self._buffered -= dropped

    def _window(self) -> Tokens:
        """Returns the current row's S tokens and the token after them, its last label."""
        length = self._seq_len + 1
        while self._buffered < self._skip + length:
            self._chunks.append(next(self._chunk_iterator))
            self._buffered += len(self._chunks[-1])
            # Drops the chunk if it ends before the row: a long skip must not fill the memory.
            self._advance(0)
        slices = []
        begin = -self._skip  # of a chunk, relative to the row
        for chunk in self._chunks:
            if begin >= length:
                break
            slices.append(_slice(chunk.documents, max(-begin, 0), length - begin))
            begin += len(chunk)
        return _concatenate(slices)

    def _read(self, position: dict[str, Any] | None) -> Iterator[_Chunk]:
        """Yields chunks after a position, pass after pass, without end; None is the start."""
        name, masked = source_name(self._source), self._source.prompt is not None
        while True:
            # A resumed pass may have no more documents; a full pass must have some.
            has_documents = position is not None
            for documents in document_chunks(self._reader.documents(position)):
                has_documents = True
                encoded = encode_documents(documents, self._tokenizer, masked)
                single = [Tokens(name, tokens, _SINGLE_START, mask) for tokens, mask in encoded]
                before, position = position, self._reader.position()
                self._position = position
                yield _Chunk(before, _concatenate(single))
            if not has_documents:
                raise UserError(
                    f"data.sources: {name} is an empty corpus: give a source that holds text"
                )
            position = None


def _slice(tokens: Tokens, first: int, last: int) -> Tokens:
    """Returns tokens [first, last), or fewer if there are fewer; the first counts as a start."""
    inner = tokens.starts[(tokens.starts > first) & (tokens.starts < last)]
    mask = None if tokens.mask is None else tokens.mask[first:last]
    starts = np.concatenate((_SINGLE_START, inner - first))
    return Tokens(tokens.name, tokens.tokens[first:last], starts, mask)


def _concatenate(items: list[Tokens]) -> Tokens:
    """Concatenates tokens of one source."""
    ends = np.cumsum([len(item.tokens) for item in items])
    begins = ends - [len(item.tokens) for item in items]
    masks = [item.mask for item in items if item.mask is not None]
    return Tokens(
        items[0].name,
        np.concatenate([item.tokens for item in items]),
        np.concatenate([item.starts + begin for item, begin in zip(items, begins, strict=True)]),
        np.concatenate(masks) if masks else None,
    )
