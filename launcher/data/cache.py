"""Tokenised sources on disk: text to `.bin` / `.idx`, once, in a folder keyed by what went in."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colonnade.launcher.cluster.environment import cache_folder
from colonnade.launcher.data.documents import Document, chunks, encode_documents
from colonnade.launcher.data.files import library_root, settled, source_files, source_name
from colonnade.launcher.data.indexed import IndexedWriter, token_dtype, token_files
from colonnade.launcher.data.sources import open_reader
from colonnade.launcher.data.tokenizer import Tokenizer, open_tokenizer
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import DataConfig, SourceConfig

_FORMAT = 2  # counts up whenever the same text would be written differently
_TELL_EVERY = 5.0  # seconds between lines of progress


@dataclass(frozen=True)
class Summary:
    """What was written; `tokens` counts the end of each document too."""

    documents: int
    tokens: int


def tokenise(
    source: SourceConfig, destination: Path, tokenizer: str | Tokenizer, overwrite: bool = False
) -> Summary:
    """Writes `DESTINATION.bin` and `.idx`, `.mask` if the source has a prompt column, and a record.

    Raises UserError if the source is empty or cannot be read, or if the files exist already.
    """
    if source.format == "tokens":
        raise UserError(f"{source_name(source)} is tokenised already: use it as it is")
    existing = [path for path in token_files(destination) if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists: give another destination, or ask to overwrite it")
    loaded = open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    masked = source.prompt is not None
    with _writing(destination, "give another destination"):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with IndexedWriter(destination, token_dtype(loaded.size), masked, loaded) as writer:
            _write(source, loaded, lambda document: writer)
            _refuse_empty(source, writer)
    return Summary(writer.documents, writer.tokens)


def cached_tokens(source: SourceConfig, data: DataConfig, tokenizer: Tokenizer) -> Path:
    """The cache's folder for a source: token files `train` and `validation`, written if missing.

    Whole documents go to validation, by a hash of the document's index or file name; the first
    never does, so that a single document trains.

    The folder is keyed by the content of the files, wherever they lie. To hash them takes about a
    second a gigabyte, a hundredth of what tokenising takes; files whose path, size and time of
    change are known are not hashed again. Of several processes on a host that ask at the same time
    one does the work, and the others wait; the folder appears complete or not at all.
    """
    source = settled(source)
    root, files = _cache_root(data), source_files(source)
    known = root / "known" / _digest(_quick_key(source, data, tokenizer, files))
    if (entry := _known_entry(root, known)) is not None:
        return entry
    with _writing(root, "set data.cache to a folder with room"):
        known.parent.mkdir(parents=True, exist_ok=True)
        with _locked(Path(f"{known}.lock"), source):
            if (entry := _known_entry(root, known)) is not None:
                return entry
            key = _content_key(source, data, tokenizer, files)
            entry = root / _digest(key)
            if not entry.exists():
                _fill(entry, source, data, tokenizer, key)
            temporary = Path(f"{known}.{uuid.uuid4().hex[:8]}.tmp")
            temporary.write_text(entry.name)
            os.replace(temporary, known)
    return entry


def _known_entry(root: Path, known: Path) -> Path | None:
    """The folder that a note in the cache leads to, if both exist."""
    if not known.exists():
        return None
    entry = root / known.read_text()
    return entry if entry.exists() else None


@contextmanager
def _locked(path: Path, source: SourceConfig) -> Iterator[None]:
    """Holds a lock that one process of the host can hold; waits for it, and says so."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _tell(f"waiting for another process that tokenises {source_name(source)}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(
    entry: Path, source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, key: dict[str, Any]
) -> None:
    """Tokenises a source into its folder, which then appears."""
    begin = time.monotonic()
    _tell(f"tokenising {source_name(source)} into {entry}")
    temporary = Path(f"{entry}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        summary = _write_split(source, data.validation, tokenizer, temporary)
        (temporary / "source.json").write_text(json.dumps(key, indent=1))
        try:
            os.rename(temporary, entry)
        except OSError:
            if not entry.exists():  # else the same content at another path was quicker
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    seconds = time.monotonic() - begin
    _tell(f"{summary.documents:,} documents, {summary.tokens:,} tokens in {seconds:.1f} s")


def _write_split(source: SourceConfig, share: float, tokenizer: Tokenizer, folder: Path) -> Summary:
    options = (token_dtype(tokenizer.size), source.prompt is not None, tokenizer)
    with (
        IndexedWriter(folder / "train", *options) as train,
        IndexedWriter(folder / "validation", *options) as validation,
    ):

        def pick(document: Document) -> IndexedWriter:
            held_out = train.documents > 0 and _hash(document.key) < share
            return validation if held_out else train

        _write(source, tokenizer, pick)
        _refuse_empty(source, train)
    return Summary(train.documents + validation.documents, train.tokens + validation.tokens)


def _write(
    source: SourceConfig, tokenizer: Tokenizer, pick: Callable[[Document], IndexedWriter]
) -> None:
    reader = open_reader(source)
    begin = told = time.monotonic()
    documents = written = 0
    for chunk in chunks(reader.documents()):
        encoded = encode_documents(chunk, tokenizer, source.prompt is not None)
        for document, (tokens, mask) in zip(chunk, encoded, strict=True):
            pick(document).add(tokens, mask)
            written += len(tokens)
        documents += len(chunk)
        if (now := time.monotonic()) - told >= _TELL_EVERY:
            told, share = now, reader.share()
            rest = "" if share is None else f", {share:.0%}"
            _tell(
                f"tokenising {source_name(source)}: {documents:,} documents, {written:,} tokens, "
                f"{written / (now - begin):,.0f} tokens/s{rest}"
            )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _refuse_empty(source: SourceConfig, writer: IndexedWriter) -> None:
    if writer.tokens == 0:
        raise UserError(
            f"data.sources: {source_name(source)} is an empty corpus: give a source that holds text"
        )


def _hash(key: str) -> float:
    """A number in [0, 1) that depends on nothing but the key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest()) / 2**48


@contextmanager
def _writing(path: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}: {remedy}") from error


def _cache_root(data: DataConfig) -> Path:
    if data.cache is not None:
        return Path(data.cache).expanduser()
    return cache_folder()


def _digest(key: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()


def _quick_key(
    source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, files: list[Path]
) -> dict[str, Any]:
    """By which files that were seen before are known: where they lie, sizes, times of change."""
    stats = [(str(path), path.stat()) for path in files]
    return {
        "format": _FORMAT,
        "source": source.model_dump(exclude={"weight", "stream"}),
        "files": [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats],
        "encoding": tokenizer.encoding,
        "validation": data.validation,
    }


def _content_key(
    source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, files: list[Path]
) -> dict[str, Any]:
    """Everything that decides what the token files hold."""
    return {
        "format": _FORMAT,
        **_content(source, files),
        "encoding": tokenizer.encoding,
        "validation": data.validation,
    }


def _content(source: SourceConfig, files: list[Path]) -> dict[str, Any]:
    """What is read, wherever it lies: hashes of the files in their order, and fields."""
    hashes = []
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()
        # The split goes by the names of the standard library's files, and by numbers else.
        named = source.format == "stdlib"
        hashes.append((path.relative_to(library_root()).as_posix() if named else "", digest))
    local = {"path"} if files else set()  # a data set of the hub is known by its name
    fields = source.model_dump(exclude={"weight", "stream", *local})
    return {"source": fields, "files": hashes}


def source_fingerprint(source: SourceConfig) -> str:
    """A hash of all that a source of text reads, the same wherever its files lie."""
    source = settled(source)
    return _digest(_content(source, source_files(source)))
