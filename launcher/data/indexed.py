"""Tokens on disk: reads and writes Megatron's `.bin` / `.idx`, and a `.mask` beside them.

`.idx`, little-endian: `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 sequences, u64 document
bounds; then i32 sequence lengths, i64 byte offsets, i64 document bounds, which start with 0 and
number one more than the documents. `.bin` is the tokens without a header. `.mask`, which is ours
and optional, has one byte a token: 1 where it is to be predicted, 0 where it carries no loss.
"""

import hashlib
import os
import struct
import uuid
from pathlib import Path
from types import TracebackType

import numpy as np

from colonnade.launcher.data.record import read_record, record_file, write_record
from colonnade.launcher.data.rows import Tokens
from colonnade.launcher.data.tokenfile import FileArray
from colonnade.launcher.data.tokenizer import Tokenizer
from colonnade.launcher.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[int, str] = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LONGEST = 2**31 - 1  # tokens; lengths are i32


def token_files(prefix: Path) -> tuple[Path, Path, Path]:
    """The `.bin`, `.idx` and `.mask` of a prefix (which may itself contain dots)."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.mask")


def token_dtype(size: int) -> np.dtype:
    """The dtype on disk for a tokenizer of this size: u16 if the ids fit, else i32."""
    return np.dtype("<u2" if size <= 2**16 else "<i4")


def _broken(path: Path, fault: str) -> UserError:
    return UserError(f"{path} {fault}: copy the file again, or write it with `colonnade data`")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}: give the prefix of a .bin and an .idx file, "
            "without the ending"
        ) from error


def read_indexed(prefix: Path) -> Tokens:
    """Opens `PREFIX.bin` (and `.mask`); only the document starts are held in memory.

    Raises UserError if a file is missing, truncated, no token file, or if the two disagree.
    """
    bin_path, idx_path, mask_path = token_files(prefix)
    dtype, lengths, offsets, bounds = _read_index(idx_path)
    itemsize = np.dtype(dtype).itemsize
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if (lengths < 0).any() or not np.array_equal(offsets, (ends - lengths) * itemsize):
        raise _broken(idx_path, "does not list its sequences one after the other without gaps")
    if bounds[0] != 0 or bounds[-1] != len(lengths) or (np.diff(bounds) < 0).any():
        raise _broken(idx_path, f"has document bounds that do not cover {len(lengths)} sequences")
    if (held := _size(bin_path)) < total * itemsize:
        raise _broken(bin_path, f"has {held} bytes where {idx_path.name} lists {total * itemsize}")
    at = np.concatenate(([0], ends))[bounds]  # in tokens
    starts = at[:-1][np.diff(at) > 0]
    mask = None
    if mask_path.exists():
        if (held := _size(mask_path)) != total:
            raise _broken(mask_path, f"has {held} bytes for {total} tokens")
        mask = FileArray(mask_path, "u1", total)
    record = read_record(prefix, total)
    return Tokens(str(bin_path), FileArray(bin_path, dtype, total), starts, mask, record)


def _read_index(path: Path) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """(token dtype, lengths i32, byte offsets i64, document bounds i64)."""
    size = _size(path)
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        if header[: len(_MAGIC)] != _MAGIC[: len(header)] or not header:
            raise _broken(path, "is not a Megatron .idx file")
        if len(header) < _HEADER.size:
            raise _broken(path, "is truncated within its header")
        _, version, code, sequences, bounds = _HEADER.unpack(header)
        if version != 1:
            raise _broken(path, f"has the version {version}, not 1")
        if code not in _CODES:
            raise _broken(path, f"has the dtype code {code}, not an integer one {sorted(_CODES)}")
        if size < (needed := _HEADER.size + 12 * sequences + 8 * bounds) or bounds == 0:
            raise _broken(path, f"is truncated: {size} bytes, and its header asks for {needed}")
        read = [
            np.fromfile(file, dtype, count)
            for dtype, count in (("<i4", sequences), ("<i8", sequences), ("<i8", bounds))
        ]
    return _CODES[code], read[0], read[1], read[2]


class IndexedWriter:
    """Writes documents to `PREFIX.bin`, `.idx`, if `masked` `.mask`, and their record.

    A context manager: the files get their names when the block ends without an error, the `.idx`
    last; else they vanish. One sequence a document.
    """

    def __init__(
        self,
        prefix: Path,
        dtype: np.dtype,
        masked: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """`tokenizer` is what makes the tokens; a record of it is then written beside them."""
        temporary = Path(f"{prefix}.{uuid.uuid4().hex[:8]}.tmp")
        self._final = (*token_files(prefix), record_file(prefix))
        self._temporary = (*token_files(temporary), record_file(temporary))
        self._dtype, self._tokenizer = dtype, tokenizer
        self._lengths: list[int] = []
        self._largest, self._content = -1, [hashlib.blake2b(digest_size=16) for _ in range(2)]
        self._bin = self._temporary[0].open("wb")
        self._mask = self._temporary[2].open("wb") if masked else None
        self.tokens = 0

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    def add(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Appends one document: integer tokens [T]; mask uint8 [T], ones if None."""
        if len(tokens) > _LONGEST:
            raise UserError(
                f"a document of {len(tokens)} tokens does not fit an .idx file, whose lengths end "
                f"at {_LONGEST}: split its text"
            )
        stored = np.ascontiguousarray(tokens, self._dtype).data
        self._bin.write(stored)
        self._content[0].update(stored)
        self._largest = max(self._largest, int(np.max(tokens)) if len(tokens) else -1)
        if self._mask is not None:
            ones = np.ones(len(tokens), np.uint8) if mask is None else mask
            trained = np.ascontiguousarray(ones, np.uint8).data
            self._mask.write(trained)
            self._content[1].update(trained)
        self._lengths.append(len(tokens))
        self.tokens += len(tokens)

    def _write_index(self) -> None:
        lengths = np.asarray(self._lengths, "<i4")
        ends = np.cumsum(lengths, dtype="<i8")
        code = next(c for c, name in _CODES.items() if np.dtype(name) == self._dtype)
        documents = len(lengths)
        with self._temporary[1].open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, code, documents, documents + 1))
            file.write(lengths.data)
            file.write(((ends - lengths) * self._dtype.itemsize).astype("<i8").data)
            file.write(np.arange(documents + 1, dtype="<i8").data)

    def _write_record(self, tokenizer: Tokenizer) -> None:
        content = hashlib.blake2b(np.asarray(self._lengths, "<i4").data, digest_size=16)
        for part in self._content:
            content.update(part.digest())
        write_record(
            self._temporary[3],
            tokenizer,
            self.documents,
            self.tokens,
            self._largest,
            content.hexdigest(),
        )

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        temporary_bin, temporary_idx, temporary_mask, temporary_record = self._temporary
        try:
            self._bin.close()
            if self._mask is not None:
                self._mask.close()
            if kind is None:
                self._write_index()
                if self._tokenizer is not None:
                    self._write_record(self._tokenizer)
                # An old index must not stand beside new tokens, nor an old mask or record.
                for path in self._final[1:]:
                    path.unlink(missing_ok=True)
                os.replace(temporary_bin, self._final[0])
                if self._mask is not None:
                    os.replace(temporary_mask, self._final[2])
                if self._tokenizer is not None:
                    os.replace(temporary_record, self._final[3])
                os.replace(temporary_idx, self._final[1])
        finally:
            for path in self._temporary:
                path.unlink(missing_ok=True)
