"""Reads the documents of a source's files, by format, from the start or from a saved position."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from colonnade.launcher.data.content import FileContent, read_contents
from colonnade.launcher.data.documents import Document, Fields, fields_of, option_name, text_of
from colonnade.launcher.data.files import (
    BOM,
    DecompressedFile,
    read_error,
    resolve_format,
    source_files,
    source_name,
    stdlib_folder,
)
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import SourceConfig

_PARQUET_BATCH_ROWS = 256  # rows of a parquet file that are read at a time
# Integers of any length parse fast as floats; their values are not used.
_DECODER = json.JSONDecoder(parse_int=float)


class FilePosition(NamedTuple):
    """Where to resume a file: after `records` records; for lines also their end's byte `offset`."""

    records: int = 0
    offset: int = 0


class SourceRecord(NamedTuple):
    """One record: texts by field, the position after it, and the bytes of the file read so far."""

    texts: dict[str, str]
    end: FilePosition
    bytes_read: int


ReadFile = Callable[[Path, Fields, FilePosition], Iterator[SourceRecord]]


class FileReader:
    """Reads the documents of local files, in the order of the files' paths.

    `position` is the end of the last document read, so that reading resumes with the next one. It
    is JSON-able and identifies its file by number, name and size.
    """

    def __init__(self, source: SourceConfig) -> None:
        self._source = resolve_format(source)
        self._fields = fields_of(source)
        self._files = source_files(self._source)
        self._sizes = [file.stat().st_size for file in self._files]
        # The current file, the position in it, and how many of its bytes have been read.
        self._file_index, self._position, self._bytes_read = 0, FilePosition(), 0

    def documents(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """Yields the documents that hold any text, after a saved position, or from the start.

        Raises UserError if a file cannot be read, or is not the file of `position`.
        """
        self._file_index, self._position = self._check_position(position)
        self._bytes_read = 0
        index = 0
        for file_index in range(self._file_index, len(self._files)):
            path = self._files[file_index]
            begin = self._position if file_index == self._file_index else FilePosition()
            self._file_index = file_index
            for record in self._records(path, begin):
                # Before the yield: the caller asks for the position after this document.
                self._position, self._bytes_read = record.end, record.bytes_read
                document = self._document(path, index, record)
                index += 1
                if document.text:
                    yield document

    def position(self) -> dict[str, Any]:
        """Returns the position after the last document yielded, JSON-able."""
        return {
            "files": len(self._files),
            "file": self._file_index,
            "name": self._files[self._file_index].name,
            "size": self._sizes[self._file_index],
            "records": self._position.records,
            "offset": self._position.offset,
        }

    def contents(self) -> list[FileContent]:
        """Returns the contents of all files, in order, by their path below the folder of all."""
        folder = os.path.commonpath([file.parent for file in self._files])
        return [
            content._replace(name=file.relative_to(folder).as_posix())
            for file, content in zip(self._files, read_contents(self._files), strict=True)
        ]

    def progress(self) -> float:
        """Returns the fraction of the files' bytes that has been read."""
        bytes_read = sum(self._sizes[: self._file_index]) + self._bytes_read
        return bytes_read / max(sum(self._sizes), 1)

    def _check_position(self, position: dict[str, Any] | None) -> tuple[int, FilePosition]:
        """Returns the file index and position in it; raises UserError if the files have changed."""
        if position is None:
            return 0, FilePosition()
        file_index = position.get("file", -1)
        self._file_index = file_index if 0 <= file_index < len(self._files) else 0
        identity = ("files", "file", "name", "size")
        if any(position.get(key) != self.position()[key] for key in identity):
            raise UserError(
                f"data.sources: {source_name(self._source)} is no longer what the run read when it "
                f"was saved (file {file_index + 1} of {position.get('files')}, "
                f"{position.get('name')} of {position.get('size')} bytes; now "
                f"{len(self._files)} files): restore the data, or start a new run"
            )
        return file_index, FilePosition(position["records"], position["offset"])

    def _records(self, path: Path, begin: FilePosition) -> Iterator[SourceRecord]:
        """Yields the records of a file after `begin`; raises UserError if it cannot be read."""
        try:
            yield from _READERS[self._source.format](path, self._fields, begin)
        except UserError:
            raise
        except Exception as error:  # pyarrow and decompressors raise classes of their own
            raise read_error(str(path), error) from error

    def _document(self, path: Path, index: int, record: SourceRecord) -> Document:
        """Makes a document of a record, without byte order marks."""
        key = str(index)
        if self._source.format == "stdlib":
            key = path.relative_to(stdlib_folder()).as_posix()
        text, prompt = record.texts["text"], record.texts.get("prompt", "")
        return Document(key, text.removeprefix("\ufeff"), prompt.removeprefix("\ufeff"))


def _read_text(path: Path, fields: Fields, begin: FilePosition) -> Iterator[SourceRecord]:
    """Yields the file as one record, byte for byte."""
    if begin.records == 0:
        with closing(DecompressedFile(path)) as file:
            data = file.stream.read()
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"data.sources: cannot read {path}: byte {error.start} is not utf-8 text: "
                    "save the file as utf-8, or correct the source's format or path"
                ) from error
            yield SourceRecord({"text": text}, FilePosition(1), file.bytes_read())


def _read_code(path: Path, fields: Fields, begin: FilePosition) -> Iterator[SourceRecord]:
    """Yields the file as one record; bytes that are not utf-8 become U+FFFD."""
    if begin.records == 0:
        data = path.read_bytes()
        yield SourceRecord({"text": data.decode(errors="replace")}, FilePosition(1), len(data))


def _read_lines(path: Path, fields: Fields, begin: FilePosition) -> Iterator[SourceRecord]:
    """Yields the JSON objects of a file: one a line, or an array of them if it begins with `[`."""
    with closing(DecompressedFile(path)) as file:
        stream, offset = file.stream, 0
        if stream.peek(len(BOM)).startswith(BOM):
            offset = len(stream.read(len(BOM)))
        if stream.peek(64).lstrip()[:1] == b"[":
            yield from _read_array(path, fields, begin, file)
            return
        number = 0  # of the last line read; blank lines count
        if begin.records and not file.compressed:
            number, offset = begin
            stream.seek(offset)  # a compressed stream is read from its start and skipped instead
        for line in stream:
            number += 1
            offset += len(line)
            if number <= begin.records or not line.strip():
                continue
            location = f"{path}, line {number}"
            try:
                value = _DECODER.decode(line.decode().strip())
            except UnicodeDecodeError as error:
                raise UserError(
                    f"data.sources: cannot read {location}: byte {error.start} of it is not utf-8 "
                    "text: correct the line"
                ) from error
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"data.sources: cannot read {location}: it is not JSON ({error}): give one "
                    "object a line, or correct the source's format"
                ) from error
            texts = _texts(fields, value, location)
            yield SourceRecord(texts, FilePosition(number, offset), file.bytes_read())


def _read_array(
    path: Path, fields: Fields, begin: FilePosition, file: DecompressedFile
) -> Iterator[SourceRecord]:
    """Yields the objects of a file that is one JSON array."""
    try:
        values = _DECODER.decode(file.stream.read().decode().strip())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"data.sources: cannot read {path}: it begins as an array and is not JSON ({error}): "
            "correct the file, or the source's format"
        ) from error
    for number, value in enumerate(values, start=1):
        if number > begin.records:
            texts = _texts(fields, value, f"{path}, entry {number}")
            yield SourceRecord(texts, FilePosition(number), file.bytes_read())


def _texts(fields: Fields, value: object, location: str) -> dict[str, str]:
    """Returns the texts of a JSON object by field; raises UserError, naming `location`, if none."""
    if not isinstance(value, dict):
        raise UserError(
            f"data.sources: {location} holds no JSON object: give an object with the text in a "
            "column"
        )
    texts = {}
    for field, column in fields.items():
        texts[field] = text = text_of(field, column, value, location)
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(
                f"data.sources: {option_name(field)} = {column!r} of {location} holds half a "
                "surrogate pair, which is no text: correct the line"
            )
    return texts


def _read_parquet(path: Path, fields: Fields, begin: FilePosition) -> Iterator[SourceRecord]:
    """Yields the rows of a parquet file; reads only the columns of `fields`."""
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(
            f"data.sources: {path} needs the pyarrow library: pip install 'colonnade[text]'"
        ) from error
    with pq.ParquetFile(path) as file:
        rows, number, size = file.metadata.num_rows, 0, path.stat().st_size
        if rows == 0:
            return
        _check_schema(path, fields, file.schema_arrow, pa)
        for group in range(file.num_row_groups):
            if number + file.metadata.row_group(group).num_rows <= begin.records:
                number += file.metadata.row_group(group).num_rows
                continue
            columns = sorted(set(fields.values()))
            for batch in file.iter_batches(
                _PARQUET_BATCH_ROWS, row_groups=[group], columns=columns
            ):
                values = {field: batch.column(column) for field, column in fields.items()}
                for row in range(batch.num_rows):
                    number += 1
                    if number > begin.records:
                        texts = {field: v[row].as_py() or "" for field, v in values.items()}
                        yield SourceRecord(texts, FilePosition(number), size * number // rows)


def _check_schema(path: Path, fields: Fields, schema: Any, pa: Any) -> None:
    """Raises UserError unless the schema has each column of `fields` once, and as text."""
    for field, column in fields.items():
        if schema.names.count(column) != 1:
            text_of(field, column, dict.fromkeys(schema.names), str(path))  # raises if absent
            raise UserError(
                f"data.sources: {path} has the column {column!r} twice: write it again with one"
            )
        column_type = schema.field(column).type
        if pa.types.is_dictionary(column_type):
            column_type = column_type.value_type
        is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        if not pa.types.is_null(column_type) and not any(test(column_type) for test in is_text):
            raise UserError(
                f"data.sources: {option_name(field)} = {column!r} of {path} holds {column_type}, "
                f"not text: set `{option_name(field)}` to a column of text"
            )


_READERS: dict[str, ReadFile] = {
    "stdlib": _read_code,
    "text": _read_text,
    "jsonl": _read_lines,
    "parquet": _read_parquet,
}
