"""Where text comes from: local files, or a data set of the hub; both are read alike."""

import sys
from collections.abc import Iterator
from typing import Any, Protocol

from colonnade.launcher.data.documents import Document, fields_of, text_of
from colonnade.launcher.data.files import source_files, source_name, unreadable
from colonnade.launcher.data.readers import FileReader
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import SourceConfig


class Reader(Protocol):
    """Reads the documents of a source in order."""

    def documents(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """Documents that hold any text, from a position on, or from the start."""

    def position(self) -> dict[str, Any]:
        """Behind the last document handed out; JSON-able."""

    def share(self) -> float | None:
        """The share of the source that has been read, where that is known."""


def open_reader(source: SourceConfig, resumable: bool = False) -> Reader:
    """The reader of a source; positions only if `resumable`, for which the hub is streamed."""
    return HubReader(source, resumable) if source.format == "hub" else FileReader(source)


def read_documents(source: SourceConfig) -> Iterator[Document]:
    """The documents of a source that hold any text, in order, read once."""
    return open_reader(source).documents()


class HubReader:
    """Documents of a data set of the hub, through the datasets library."""

    def __init__(self, source: SourceConfig, streaming: bool) -> None:
        self._source, self._streaming = source, streaming
        self._dataset = _load(source, streaming)
        fields = set(fields_of(source).values())
        if fields <= set(self._dataset.column_names or ()):  # else reading names those there are
            self._dataset = self._dataset.select_columns(sorted(fields))
        self._read = 0

    def documents(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """See `Reader.documents`."""
        if self._streaming:
            self._dataset.load_state_dict(position)
        self._read = 0
        name, fields = source_name(self._source), fields_of(self._source)
        for index, example in enumerate(_examples(self._source, self._dataset)):
            self._read = index + 1
            texts = {
                field: text_of(field, column, example, name).removeprefix("\ufeff")
                for field, column in fields.items()
            }
            if texts["text"]:
                yield Document(str(index), **texts)

    def position(self) -> dict[str, Any]:
        """See `Reader.position`."""
        return self._dataset.state_dict()

    def share(self) -> float | None:
        """See `Reader.share`."""
        return None if self._streaming else self._read / max(len(self._dataset), 1)


def _load(source: SourceConfig, streaming: bool) -> Any:
    """The source as a datasets.Dataset, or IterableDataset if streaming; else UserError."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data.sources: {source_name(source)} needs the datasets library: "
            "pip install 'colonnade[text]'"
        ) from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, we raise
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    source_files(source)  # a folder may stand for a data set; its files have to be readable
    try:
        return datasets.load_dataset(
            source.path, name=source.subset, split=source.split, streaming=streaming
        )
    except Exception as error:  # whatever its readers raise
        raise unreadable(source_name(source), error) from error


def _examples(source: SourceConfig, dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a data set, from its state on; UserError where it cannot be read."""
    try:
        yield from dataset
    except Exception as error:  # whatever its readers raise
        raise unreadable(source_name(source), error) from error
