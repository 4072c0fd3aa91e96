"""Token files: reads and writes Megatron's `.bin` / `.idx`, and a `.mask` beside them.

`.idx`, little-endian: `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 sequences, u64 document
bounds; then i32 sequence lengths, i64 byte offsets, i64 document bounds, which start with 0 and
number one more than the documents. `.bin` holds the tokens without a header. `.mask`, an optional
file that Megatron does not have, holds one byte a token: 1 if it has a loss as a label, else 0.
"""

import dataclasses
import hashlib
import os
import struct
import uuid
from pathlib import Path
from types import TracebackType

import numpy as np

from colonnade.launcher.data.content import FileContent, hash_files, hashes_whole, read_contents
from colonnade.launcher.data.record import (
    DamagedTokensError,
    read_record,
    record_path,
    write_record,
)
from colonnade.launcher.data.rows import Tokens
from colonnade.launcher.data.tokenfile import FileArray
from colonnade.launcher.data.tokenizer import Tokenizer
from colonnade.launcher.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE: dict[int, str] = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_MAX_DOCUMENT_TOKENS = 2**31 - 1  # the .idx stores lengths as i32


def token_files(prefix: Path) -> tuple[Path, Path, Path]:
    """Returns the `.bin`, `.idx` and `.mask` of a prefix (which may itself contain dots)."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.mask")


def token_dtype(size: int) -> np.dtype:
    """Returns the dtype on disk for a tokenizer of `size` tokens: u16 if the ids fit, else i32."""
    return np.dtype("<u2" if size <= 2**16 else "<i4")


def _damaged(path: Path, problem: str) -> DamagedTokensError:
    """Returns the error for the file `path`; its message is the sentence "PATH PROBLEM"."""
    return DamagedTokensError(
        f"{path} {problem}", "copy the file again, or write it with `colonnade data`"
    )


def _file_size(path: Path) -> int:
    """Returns the bytes of a file; raises DamagedTokensError if it cannot be opened."""
    try:
        with path.open("rb"):
            return path.stat().st_size
    except OSError as error:
        raise DamagedTokensError(
            f"cannot read {path}: {error.strerror}",
            "give the prefix of a .bin and an .idx file, without the ending",
        ) from error


def read_indexed(prefix: Path, verify: bool = False) -> Tokens:
    """Opens `PREFIX.bin` (and `.mask`), keeping only the document starts in memory.

    With `verify`, hashes the files, and compares them with their record if they have one.
    Raises DamagedTokensError if a file is missing, truncated or not a token file, or if the files
    disagree; UserError if one cannot be opened.
    """
    bin_path, idx_path, mask_path = token_files(prefix)
    dtype, lengths, offsets, bounds = _read_index(idx_path)
    itemsize = np.dtype(dtype).itemsize
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if (lengths < 0).any() or not np.array_equal(offsets, (ends - lengths) * itemsize):
        raise _damaged(idx_path, "does not list its sequences one after the other without gaps")
    if bounds[0] != 0 or bounds[-1] != len(lengths) or (np.diff(bounds) < 0).any():
        raise _damaged(idx_path, f"has document bounds that do not cover {len(lengths)} sequences")
    if (size := _file_size(bin_path)) < total * itemsize:
        raise _damaged(bin_path, f"has {size} bytes where {idx_path.name} lists {total * itemsize}")
    # The index counts document bounds in sequences; convert them to tokens. Documents without
    # tokens have no start.
    token_bounds = np.concatenate(([0], ends))[bounds]
    starts = token_bounds[:-1][np.diff(token_bounds) > 0]
    mask = None
    if mask_path.exists():
        if (size := _file_size(mask_path)) != total:
            raise _damaged(mask_path, f"has {size} bytes for {total} tokens")
        mask = FileArray(mask_path, "u1", total)
    record = read_record(prefix, total)
    tokens = Tokens(str(bin_path), FileArray(bin_path, dtype, total), starts, mask, record)
    return _verified(prefix, tokens, lengths, bounds) if verify else tokens


def _verified(prefix: Path, tokens: Tokens, lengths: np.ndarray, bounds: np.ndarray) -> Tokens:
    """Returns `tokens` with the contents of their files, which match the record if there is one."""
    paths = [path for path in token_files(prefix) if path.suffix != ".mask" or path.exists()]
    files = [
        content._replace(name=path.suffix)
        for path, content in zip(paths, read_contents(paths), strict=True)
    ]
    for array in (tokens.tokens, tokens.mask):
        if isinstance(array, FileArray) and not array.is_current():
            raise _damaged(array.path, "was replaced while it was read")
    record = tokens.record
    if record is None:
        return dataclasses.replace(tokens, files=tuple(files))
    content = _content_hash(lengths, [file for file in files if file.name != ".idx"])
    # Records did not hold the hash of samples at first.
    expected = record.content if all(file.whole for file in files) else record.sampled or content
    # Every document of a file with a record is one sequence.
    if content != expected or not np.array_equal(bounds, np.arange(record.documents + 1)):
        raise DamagedTokensError(
            f"{prefix}.bin, .idx or .mask has changed since {record_path(prefix).name} was written "
            "beside it",
            "copy the files again, write them with `colonnade data`, or, if the change is "
            "intended, remove the record",
        )
    return dataclasses.replace(tokens, files=tuple(files))


def _content_hash(lengths: np.ndarray, files: list[FileContent]) -> str:
    """Hashes lengths and the contents of a `.bin` and perhaps a `.mask`, as records hold it."""
    content = hashlib.blake2b(np.ascontiguousarray(lengths, "<i4").data, digest_size=16)
    for file in files:
        content.update(file.digest)
    if len(files) == 1:
        content.update(hashlib.blake2b(digest_size=16).digest())  # of no mask
    return content.hexdigest()


def _read_index(path: Path) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """Reads an `.idx`: (token dtype, lengths i32, byte offsets i64, document bounds i64)."""
    size = _file_size(path)
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        if header[: len(_MAGIC)] != _MAGIC[: len(header)] or not header:
            raise _damaged(path, "is not a Megatron .idx file")
        if len(header) < _HEADER.size:
            raise _damaged(path, "is truncated within its header")
        _, version, code, sequences, bounds = _HEADER.unpack(header)
        if version != 1:
            raise _damaged(path, f"has the version {version}, not 1")
        if code not in _DTYPE_OF_CODE:
            raise _damaged(
                path, f"has the dtype code {code}, not an integer one {sorted(_DTYPE_OF_CODE)}"
            )
        if size < (needed := _HEADER.size + 12 * sequences + 8 * bounds) or bounds == 0:
            raise _damaged(path, f"is truncated: {size} bytes, and its header asks for {needed}")
        lengths = np.fromfile(file, "<i4", sequences)
        offsets = np.fromfile(file, "<i8", sequences)
        document_bounds = np.fromfile(file, "<i8", bounds)
    return _DTYPE_OF_CODE[code], lengths, offsets, document_bounds


class IndexedWriter:
    """Writes documents to `PREFIX.bin` and `.idx`, a `.mask` if `masked`, and their record.

    A context manager: the files are renamed to their final names when the block ends without an
    error, the `.idx` last; otherwise they are deleted. Each document is one sequence.
    """

    def __init__(
        self,
        prefix: Path,
        dtype: np.dtype,
        masked: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """With a `tokenizer`, the one that makes the tokens, also writes their record."""
        temporary = Path(f"{prefix}.{uuid.uuid4().hex[:8]}.tmp")
        # Paths of .bin, .idx, .mask and record.
        self._final = (*token_files(prefix), record_path(prefix))
        self._temporary = (*token_files(temporary), record_path(temporary))
        self._dtype, self._tokenizer = dtype, tokenizer
        self._lengths: list[int] = []
        self._largest_id = -1
        self._token_hash = hashlib.blake2b(digest_size=16)
        self._mask_hash = hashlib.blake2b(digest_size=16)
        self._bin = self._temporary[0].open("wb")
        self._mask = self._temporary[2].open("wb") if masked else None
        self.tokens = 0

    @property
    def documents(self) -> int:
        """The number of documents written so far."""
        return len(self._lengths)

    def add(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Appends one document: integer tokens [T]; mask uint8 [T], ones if None."""
        if len(tokens) > _MAX_DOCUMENT_TOKENS:
            raise UserError(
                f"a document of {len(tokens)} tokens does not fit an .idx file, whose lengths end "
                f"at {_MAX_DOCUMENT_TOKENS}: split its text"
            )
        stored = np.ascontiguousarray(tokens, self._dtype).data
        self._bin.write(stored)
        self._token_hash.update(stored)
        self._largest_id = max(self._largest_id, int(np.max(tokens)) if len(tokens) else -1)
        if self._mask is not None:
            mask = np.ones(len(tokens), np.uint8) if mask is None else mask
            stored_mask = np.ascontiguousarray(mask, np.uint8).data
            self._mask.write(stored_mask)
            self._mask_hash.update(stored_mask)
        self._lengths.append(len(tokens))
        self.tokens += len(tokens)

    def _write_index(self) -> None:
        """Writes the temporary `.idx`."""
        lengths = np.asarray(self._lengths, "<i4")
        ends = np.cumsum(lengths, dtype="<i8")
        code = next(c for c, name in _DTYPE_OF_CODE.items() if np.dtype(name) == self._dtype)
        documents = len(lengths)
        with self._temporary[1].open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, code, documents, documents + 1))
            file.write(lengths.data)
            file.write(((ends - lengths) * self._dtype.itemsize).astype("<i8").data)
            file.write(np.arange(documents + 1, dtype="<i8").data)

    def _write_record(self, tokenizer: Tokenizer) -> None:
        """Writes the temporary record; its content hash covers lengths, tokens and mask."""
        lengths = np.asarray(self._lengths, "<i4")
        whole = [
            FileContent("", 0, part.hexdigest()) for part in (self._token_hash, self._mask_hash)
        ]
        write_record(
            self._temporary[3],
            tokenizer,
            self.documents,
            self.tokens,
            self._largest_id,
            _content_hash(lengths, whole),
            self._sampled_hash(lengths),
        )

    def _sampled_hash(self, lengths: np.ndarray) -> str | None:
        """Hashes blocks of the written files as `_verified` does; None if it hashes them whole."""
        paths = [path for path in self._temporary[:3] if path.exists()]
        if hashes_whole(sum(path.stat().st_size for path in paths)):
            return None
        files = zip(paths, hash_files(paths), strict=True)
        return _content_hash(lengths, [file for path, file in files if path.suffix != ".idx"])

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
                # Delete the old index, mask and record before the new tokens replace the old ones,
                # and rename the new index last: a prefix with an index is then always consistent.
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
