"""Documents of the files of a source, format by format, from any position on."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from colonnade.launcher.data.documents import Document, Fields, fields_of, option, text_of
from colonnade.launcher.data.files import (
    BOM,
    Content,
    library_root,
    settled,
    source_files,
    source_name,
    unreadable,
)
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import SourceConfig

_ROWS = 256  # of a parquet file, read at once
# Numbers of any length are read fast: what they are is of no interest.
_DECODER = json.JSONDecoder(parse_int=float)


class Place(NamedTuple):
    """Where a file is read on: how many records come before, and the first byte where known."""

    records: int = 0
    offset: int = 0


class Record(NamedTuple):
    """The texts of one record by column, the place behind it, and bytes of the file read so far."""

    texts: dict[str, str]
    after: Place
    read: int


Read = Callable[[Path, Fields, Place], Iterator[Record]]


class FileReader:
    """Documents of local files, in the order of their names.

    A position is where a document ends, so that reading goes on with the next one. It is
    JSON-able and says of which file it speaks.
    """

    def __init__(self, source: SourceConfig) -> None:
        self._source = settled(source)
        self._fields = fields_of(source)
        self._files = source_files(self._source)
        self._sizes = [file.stat().st_size for file in self._files]
        self._number, self._place, self._read = 0, Place(), 0

    def documents(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """Documents that hold any text, from a position on, or from the start.

        Raises UserError where a file cannot be read, or is not the one that `position` is of.
        """
        self._number, self._place, self._read = *self._resumed(position), 0
        index = 0
        for number in range(self._number, len(self._files)):
            path = self._files[number]
            begin = self._place if number == self._number else Place()
            self._number = number
            for record in self._records(path, begin):
                self._place, self._read = record.after, record.read
                document = self._document(path, index, record)
                index += 1
                if document.text:
                    yield document

    def position(self) -> dict[str, Any]:
        """Behind the last document handed out."""
        return {
            "files": len(self._files),
            "file": self._number,
            "name": self._files[self._number].name,
            "size": self._sizes[self._number],
            "records": self._place.records,
            "offset": self._place.offset,
        }

    def share(self) -> float:
        """The share of the files' bytes that has been read."""
        return (sum(self._sizes[: self._number]) + self._read) / max(sum(self._sizes), 1)

    def _resumed(self, position: dict[str, Any] | None) -> tuple[int, Place]:
        if position is None:
            return 0, Place()
        number = position.get("file", -1)
        self._number = number if 0 <= number < len(self._files) else 0
        same = ("files", "file", "name", "size")
        if any(position.get(key) != self.position()[key] for key in same):
            raise UserError(
                f"data.sources: {source_name(self._source)} is no longer what the run read when it "
                f"was saved (file {number + 1} of {position.get('files')}, "
                f"{position.get('name')} of {position.get('size')} bytes; now "
                f"{len(self._files)} files): restore the data, or start a new run"
            )
        return number, Place(position["records"], position["offset"])

    def _records(self, path: Path, begin: Place) -> Iterator[Record]:
        try:
            yield from _READERS[self._source.format](path, self._fields, begin)
        except UserError:
            raise
        except Exception as error:  # whatever the readers' libraries raise
            raise unreadable(str(path), error) from error

    def _document(self, path: Path, index: int, record: Record) -> Document:
        key = str(index)
        if self._source.format == "stdlib":
            key = path.relative_to(library_root()).as_posix()
        text, prompt = record.texts["text"], record.texts.get("prompt", "")
        return Document(key, text.removeprefix("\ufeff"), prompt.removeprefix("\ufeff"))


def _read_text(path: Path, fields: Fields, begin: Place) -> Iterator[Record]:
    """The whole file as one record, byte for byte."""
    if begin.records == 0:
        with Content(path) as content:
            data = content.stream.read()
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"data.sources: cannot read {path}: byte {error.start} is not utf-8 text: "
                    "save the file as utf-8, or correct the source's format or path"
                ) from error
            yield Record({"text": text}, Place(1), content.bytes_read())


def _read_code(path: Path, fields: Fields, begin: Place) -> Iterator[Record]:
    """As text; what is not utf-8 becomes U+FFFD."""
    if begin.records == 0:
        data = path.read_bytes()
        yield Record({"text": data.decode(errors="replace")}, Place(1), len(data))


def _read_lines(path: Path, fields: Fields, begin: Place) -> Iterator[Record]:
    """JSON objects, one a line; or, in a file that begins with `[`, one array of them."""
    with Content(path) as content:
        stream, offset = content.stream, 0
        if stream.peek(len(BOM)).startswith(BOM):
            offset = len(stream.read(len(BOM)))
        if stream.peek(64).lstrip()[:1] == b"[":
            yield from _read_array(path, fields, begin, content)
            return
        number = 0
        if begin.records and not content.compressed:
            number, offset = begin
            stream.seek(offset)
        for line in stream:
            number += 1
            offset += len(line)
            if number <= begin.records or not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                value = _DECODER.decode(line.decode().strip())
            except UnicodeDecodeError as error:
                raise UserError(
                    f"data.sources: cannot read {place}: byte {error.start} of it is not utf-8 "
                    "text: correct the line"
                ) from error
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"data.sources: cannot read {place}: it is not JSON ({error}): give one "
                    "object a line, or correct the source's format"
                ) from error
            yield Record(_texts(fields, value, place), Place(number, offset), content.bytes_read())


def _read_array(path: Path, fields: Fields, begin: Place, content: Content) -> Iterator[Record]:
    try:
        values = _DECODER.decode(content.stream.read().decode().strip())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"data.sources: cannot read {path}: it begins as an array and is not JSON ({error}): "
            "correct the file, or the source's format"
        ) from error
    for number, value in enumerate(values, start=1):
        if number > begin.records:
            texts = _texts(fields, value, f"{path}, entry {number}")
            yield Record(texts, Place(number), content.bytes_read())


def _texts(fields: Fields, value: object, place: str) -> dict[str, str]:
    """The texts of a JSON object."""
    if not isinstance(value, dict):
        raise UserError(
            f"data.sources: {place} holds no JSON object: give an object with the text in a column"
        )
    texts = {}
    for field, column in fields.items():
        texts[field] = text = text_of(field, column, value, place)
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(
                f"data.sources: {option(field)} = {column!r} of {place} holds half a surrogate "
                "pair, which is no text: correct the line"
            )
    return texts


def _read_parquet(path: Path, fields: Fields, begin: Place) -> Iterator[Record]:
    """The rows, of which no other column is read."""
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
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
                read = {field: batch.column(column) for field, column in fields.items()}
                for row in range(batch.num_rows):
                    number += 1
                    if number > begin.records:
                        texts = {field: values[row].as_py() or "" for field, values in read.items()}
                        yield Record(texts, Place(number), size * number // rows)


def _check_schema(path: Path, fields: Fields, schema: Any, pa: Any) -> None:
    for field, column in fields.items():
        if schema.names.count(column) != 1:
            text_of(field, column, dict.fromkeys(schema.names), str(path))  # says that it is absent
            raise UserError(f"data.sources: {path} has the column {column!r} twice: write it anew")
        kind = schema.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        if not pa.types.is_null(kind) and not any(test(kind) for test in is_text):
            raise UserError(
                f"data.sources: {option(field)} = {column!r} of {path} holds {kind}, not text: set "
                f"`{option(field)}` to a column of text"
            )


_READERS: dict[str, Read] = {
    "stdlib": _read_code,
    "text": _read_text,
    "jsonl": _read_lines,
    "parquet": _read_parquet,
}
