"""Where text comes from: files on disk, data sets, and the Python standard library's own source."""

import glob
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from colonnade.launcher.corpus.tokenizer import Tokenizer
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe import SourceConfig

_BUILDERS = {"text": "text", "jsonl": "json", "parquet": "parquet"}
_ENDINGS = {"jsonl": {".jsonl", ".json"}, "parquet": {".parquet"}}
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_CHUNK_DOCUMENTS = 256
_CHUNK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Document:
    """One text; `prompt` comes before it and carries no loss. `key` identifies it in its source."""

    key: str
    text: str
    prompt: str = ""


def source_name(source: SourceConfig) -> str:
    """The source in messages."""
    return "stdlib" if source.format == "stdlib" else f"{source.format} {source.path!r}"


def source_path(source: SourceConfig) -> Path:
    """The path as given, `~` expanded."""
    if source.path is None:
        raise UserError(f"data.sources: format = {source.format!r} needs a path: set `path`")
    return Path(source.path).expanduser()


def library_root() -> Path:
    """The folder of the Python standard library on this machine."""
    return Path(sysconfig.get_paths()["stdlib"])


def source_files(source: SourceConfig) -> list[Path]:
    """The files of a source, sorted; none for a data set on the hub. UserError if there are none.

    In a folder, `text` takes every file, `jsonl` those that end in .jsonl or .json and `parquet`
    in .parquet (compressed ones too), at any depth, hidden ones left out.
    """
    if source.format == "stdlib":
        found = _library_files(library_root())
    else:
        found = _listed_files(source, source_path(source))
    if not found and source.format != "hub":
        raise UserError(
            f"data.sources: {source_name(source)} is an empty corpus, no file there holds any "
            "data: give a file, folder or glob that does"
        )
    return found


def _listed_files(source: SourceConfig, path: Path) -> list[Path]:
    if path.is_dir():
        endings = _ENDINGS.get(source.format)
        found = [
            p
            for p in path.rglob("*")
            if p.is_file()
            and not any(part.startswith(".") for part in p.relative_to(path).parts)
            and (endings is None or endings & set(p.suffixes))
        ]
    elif path.is_file():
        found = [path]
    elif source.format == "hub":
        return []
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
        if not found:
            raise UserError(
                f"data.sources: cannot read {source_name(source)}: there is no such file or "
                "folder, and as a glob it matches none: correct `path`"
            )
    for p in found:
        if not os.access(p, os.R_OK):
            raise UserError(f"data.sources: cannot read {p}: permission denied: make it readable")
    # datasets stumbles over files without any content
    return sorted(p.absolute() for p in found if p.stat().st_size > 0)


def _library_files(root: Path) -> list[Path]:
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _NOT_LIBRARY]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(p for p in found if os.access(p, os.R_OK) and p.stat().st_size > 0)


def read_documents(source: SourceConfig) -> Iterator[Document]:
    """The documents of a source that hold any text, in order, read once."""
    if source.format == "stdlib":
        root = library_root()
        for path in source_files(source):
            try:
                content = path.read_bytes()
            except OSError as error:
                raise _unreadable(str(path), error) from error
            yield Document(path.relative_to(root).as_posix(), content.decode(errors="replace"))
        return
    # Local files are read once anyway: streaming saves the copy that datasets would keep of them.
    dataset = load_dataset(source, streaming=source.format != "hub")
    for index, example in enumerate(examples(source, dataset)):
        if (document := to_document(source, example, str(index))).text:
            yield document


def load_dataset(source: SourceConfig, streaming: bool) -> Any:
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
    arguments: dict[str, Any] = {"split": "train", "streaming": streaming}
    files = source_files(source)
    if source.format == "hub":
        arguments |= {"path": source.path, "name": source.subset, "split": source.split}
    else:
        patterns = [glob.escape(str(file)) for file in files]
        arguments |= {"path": _BUILDERS[source.format], "data_files": patterns}
    if source.format == "text":
        arguments |= {"sample_by": "document"}
    try:
        return datasets.load_dataset(**arguments)
    except Exception as error:  # whatever its readers raise
        raise _unreadable(source_name(source), error) from error


def examples(source: SourceConfig, dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a data set, from its state on; UserError where it cannot be read."""
    try:
        yield from dataset
    except Exception as error:  # whatever its readers raise
        raise _unreadable(_being_read(source, dataset), error) from error


def _unreadable(what: str, error: Exception) -> UserError:
    return UserError(
        f"data.sources: cannot read {what}: {error or type(error).__name__}: correct the data, or "
        "the source's format, path, subset or split"
    )


def _being_read(source: SourceConfig, dataset: Any) -> str:
    """The file that a streamed data set is in, as far as its state tells."""
    state: Any = getattr(dataset, "state_dict", dict)()
    while isinstance(state, dict) and "shard_idx" not in state:
        state = state.get("examples_iterable")
    if state is None or source.format == "hub":
        return source_name(source)
    return str(source_files(source)[state["shard_idx"]])


def to_document(source: SourceConfig, example: dict[str, Any], key: str) -> Document:
    """A row's text and prompt; a null counts as no text. UserError if a column is missing."""
    texts = []
    for field, column in (("column", source.column), ("prompt", source.prompt)):
        if column is None:
            texts.append("")
            continue
        if column not in example:
            raise UserError(
                f"data.sources: {field} = {column!r}, but {source_name(source)} has the columns "
                f"{', '.join(map(repr, example))}: set `{field}` to one of them"
            )
        text = example[column]
        if not isinstance(text, str | None):
            raise UserError(
                f"data.sources: {field} = {column!r} of {source_name(source)} holds "
                f"{type(text).__name__}, not text: set `{field}` to a column of text"
            )
        texts.append(text or "")
    return Document(key, *texts)


def chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of a size that is good to tokenise at once."""
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text) + len(document.prompt)
        if len(chunk) == _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def encode_documents(
    documents: list[Document], tokenizer: Tokenizer, masked: bool
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """(tokens [T] with the end-of-document token, mask uint8 [T] or None) of each document."""
    end = np.array([tokenizer.eod], np.int32)
    texts = tokenizer.arrays([document.text for document in documents])
    if not masked:
        return [(np.concatenate((text, end)), None) for text in texts]
    encoded: list[tuple[np.ndarray, np.ndarray | None]] = []
    prompts = tokenizer.arrays([document.prompt for document in documents])
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = np.concatenate((prompt, text, end))
        encoded.append((tokens, (np.arange(len(tokens)) >= len(prompt)).astype(np.uint8)))
    return encoded
