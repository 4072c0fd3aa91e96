"""Readers of text: local files and data sets of the hub, behind one interface."""

import sys
from collections.abc import Iterator
from typing import Any, Protocol

from colonnade.launcher.data.content import FileContent, read_contents
from colonnade.launcher.data.documents import Document, fields_of, text_of
from colonnade.launcher.data.files import read_error, source_files, source_name
from colonnade.launcher.data.readers import FileReader
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import SourceConfig


class Reader(Protocol):
    """Reads the documents of a source in order."""

    def documents(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """Yields the documents that hold any text, after a saved position, or from the start."""

    def position(self) -> dict[str, Any]:
        """Returns the position after the last document yielded; JSON-able."""

    def contents(self) -> list[FileContent]:
        """Returns the contents of the files that it reads; none for files of the hub."""

    def progress(self) -> float | None:
        """Returns the fraction of the source that has been read; None if that is unknown."""


def open_reader(source: SourceConfig, resumable: bool = False) -> Reader:
    """Opens the reader of a source.

    `position` and resuming work for a data set of the hub only if `resumable`, which streams it.
    """
    return HubReader(source, resumable) if source.format == "hub" else FileReader(source)


def read_documents(source: SourceConfig) -> Iterator[Document]:
    """Yields the documents of a source that hold any text, in order, once."""
    return open_reader(source).documents()


class HubReader:
    """Reads the documents of a data set of the hub with the datasets library."""

    def __init__(self, source: SourceConfig, streaming: bool) -> None:
        self._source, self._streaming = source, streaming
        self._dataset = _load(source, streaming)
        columns = set(fields_of(source).values())
        # If a column is missing, reading the first record raises and lists the existing columns.
        if columns <= set(self._dataset.column_names or ()):
            self._dataset = self._dataset.select_columns(sorted(columns))
        self._examples_read = 0

    def documents(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """See `Reader.documents`."""
        if self._streaming:
            self._dataset.load_state_dict(position)
        self._examples_read = 0
        name, fields = source_name(self._source), fields_of(self._source)
        for index, example in enumerate(_examples(self._source, self._dataset)):
            self._examples_read = index + 1
            texts = {
                field: text_of(field, column, example, name).removeprefix("\ufeff")
                for field, column in fields.items()
            }
            if texts["text"]:
                yield Document(str(index), **texts)

    def position(self) -> dict[str, Any]:
        """See `Reader.position`."""
        return self._dataset.state_dict()

    def contents(self) -> list[FileContent]:
        """See `Reader.contents`; the files of a local folder have some."""
        return read_contents(source_files(self._source))

    def progress(self) -> float | None:
        """See `Reader.progress`."""
        return None if self._streaming else self._examples_read / max(len(self._dataset), 1)


def _load(source: SourceConfig, streaming: bool) -> Any:
    """Loads a datasets.Dataset, or IterableDataset if streaming; raises UserError if it cannot."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data.sources: {source_name(source)} needs the datasets library: "
            "pip install 'colonnade[text]'"
        ) from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised instead
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    source_files(source)  # if the name is a local folder, checks that its files are readable
    try:
        return datasets.load_dataset(
            source.path, name=source.subset, split=source.split, streaming=streaming
        )
    except Exception as error:  # its readers raise classes of their own
        raise read_error(source_name(source), error) from error


def _examples(source: SourceConfig, dataset: Any) -> Iterator[dict[str, Any]]:
    """Yields the examples of a data set after its current state; raises UserError if it cannot."""
    try:
        yield from dataset
    except Exception as error:  # its readers raise classes of their own
        raise read_error(source_name(source), error) from error
