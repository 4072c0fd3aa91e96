"""Tokenised sources on disk: tokenises text once into a cache folder keyed by its content."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colonnade.launcher.cluster.environment import cache_folder
from colonnade.launcher.data.content import print_progress
from colonnade.launcher.data.documents import Document, document_chunks, encode_documents
from colonnade.launcher.data.files import (
    resolve_format,
    source_files,
    source_name,
    stdlib_folder,
)
from colonnade.launcher.data.indexed import IndexedWriter, read_indexed, token_dtype, token_files
from colonnade.launcher.data.record import DamagedTokensError, record_path
from colonnade.launcher.data.rows import Tokens
from colonnade.launcher.data.sources import open_reader
from colonnade.launcher.data.tokenizer import Tokenizer, open_tokenizer
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import DataConfig, SourceConfig

_FORMAT_VERSION = 2  # increased whenever the same text would be written differently
_CACHE_REMEDY = "remove the folder, which is then written again"
_REPLACED_AGE = 30 * 24 * 3600  # seconds after which a damaged folder is deleted
_PROGRESS_INTERVAL = 5.0  # seconds between lines of progress


@dataclass(frozen=True)
class Summary:
    """Counts what was written; `tokens` includes the end-of-document tokens."""

    documents: int
    tokens: int


def tokenise(
    source: SourceConfig, destination: Path, tokenizer: str | Tokenizer, overwrite: bool = False
) -> Summary:
    """Writes `DESTINATION.bin` and `.idx`, `.mask` if the source has a prompt column, and a record.

    Raises UserError if the source is empty or cannot be read, or if a file exists already and
    `overwrite` is false.
    """
    if source.format == "tokens":
        raise UserError(f"{source_name(source)} is tokenised already: use it as it is")
    existing = [path for path in token_files(destination) if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists: give another destination, or ask to overwrite it")
    loaded = open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    masked = source.prompt is not None
    with _write_errors_as_user_errors(destination, "give another destination"):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with IndexedWriter(destination, token_dtype(loaded.size), masked, loaded) as writer:
            _write_documents(source, loaded, lambda document: writer)
            _refuse_empty(source, writer)
    return Summary(writer.documents, writer.tokens)


def cached_tokens(
    source: SourceConfig, data: DataConfig, tokenizer: Tokenizer
) -> tuple[Tokens, Tokens]:
    """Opens a source's tokens to train and to validate on; writes them if the cache lacks them.

    A hash of the document's index or file name selects the documents held out for validation. The
    first document always trains, so that a source of a single document trains at all.

    The folder is keyed by the content of the files, whatever their paths. Hashing takes about a
    second a gigabyte, a hundredth of the time that tokenising takes; files whose path, size, inode
    and times of change are unchanged are not hashed again. If several processes of a host ask at
    the same time, one tokenises and the others wait; the folder appears complete or not at all.

    A folder whose files are missing or changed is written again, after a line that says so.
    """
    source = resolve_format(source)
    root, files = _cache_root(data), source_files(source)
    # A small file, keyed by paths, sizes and times, that holds the name of the source's folder.
    pointer = root / "known" / _digest(_stat_key(source, data, tokenizer, files))
    if (tokens := _pointed_tokens(root, pointer)) is not None:
        return tokens
    with _write_errors_as_user_errors(root, "set data.cache to a folder with room"):
        pointer.parent.mkdir(parents=True, exist_ok=True)
        with _host_lock(Path(f"{pointer}.lock"), source):
            # Another process may have written it while this one waited for the lock.
            if (tokens := _pointed_tokens(root, pointer)) is not None:
                return tokens
            key = _content_key(source, data, tokenizer, files)
            entry = root / _digest(key)
            # Processes that read the same content at other paths hold other locks than this one.
            with _host_lock(pointer.with_name(f"{entry.name}.entry.lock"), source):
                tokens = _open_or_write(entry, source, data, tokenizer, key)
            temporary = Path(f"{pointer}.{uuid.uuid4().hex[:8]}.tmp")
            temporary.write_text(entry.name)
            os.replace(temporary, pointer)
    return tokens


def _pointed_tokens(root: Path, pointer: Path) -> tuple[Tokens, Tokens] | None:
    """Opens the folder whose name the file `pointer` holds; None if one is missing or damaged."""
    try:
        name = pointer.read_text(errors="replace")
        return _open_entry(root / name) if re.fullmatch("[0-9a-f]{32}", name) else None
    except (FileNotFoundError, DamagedTokensError):
        return None


def _open_or_write(
    entry: Path, source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, key: dict[str, Any]
) -> tuple[Tokens, Tokens]:
    """Opens an entry's tokens; writes them first if it is missing or damaged."""
    if entry.exists():
        try:
            return _open_entry(entry)
        except DamagedTokensError as error:
            print_progress(
                f"the cache of {source_name(source)} is damaged and is made again: {error.problem}"
            )
    _write_entry(entry, source, data, tokenizer, key)
    return _open_entry(entry)


def _open_entry(entry: Path) -> tuple[Tokens, Tokens]:
    """Opens and verifies an entry's `train` and `validation`; raises DamagedTokensError."""
    try:
        key = json.loads((entry / "source.json").read_text())
    except (OSError, ValueError):
        key = None
    if key is None or _digest(key) != entry.name:
        raise DamagedTokensError(f"{entry / 'source.json'} is missing or changed", _CACHE_REMEDY)
    splits = []
    for split in ("train", "validation"):
        try:
            tokens = read_indexed(entry / split, verify=True)
        except DamagedTokensError:
            raise
        except (OSError, UserError) as error:  # another process may have renamed the folder
            raise DamagedTokensError(str(error), _CACHE_REMEDY) from error
        if tokens.record is None or tokens.record.fingerprint != key["encoding"]["tokenizer"]:
            path = record_path(entry / split)
            raise DamagedTokensError(f"{path} is missing or changed", _CACHE_REMEDY)
        splits.append(tokens)
    return splits[0], splits[1]


@contextmanager
def _host_lock(path: Path, source: SourceConfig) -> Iterator[None]:
    """Holds a lock file exclusively among the host's processes; prints a line if it must wait."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_progress(f"waiting for another process that tokenises {source_name(source)}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_entry(
    entry: Path, source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, key: dict[str, Any]
) -> None:
    """Tokenises a source into a temporary folder and renames it to `entry`.

    A folder that is there already is renamed, and deleted a month later: another process may read
    it, perhaps over a network, where an open file is lost if another host deletes it.
    """
    begin = time.monotonic()
    print_progress(f"tokenising {source_name(source)} into {entry}")
    temporary = Path(f"{entry}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        summary = _write_split(source, data.validation, tokenizer, temporary)
        (temporary / "source.json").write_text(json.dumps(key, indent=1))
        _replace_entry(entry, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    seconds = time.monotonic() - begin
    print_progress(f"{summary.documents:,} documents, {summary.tokens:,} tokens in {seconds:.1f} s")


def _replace_entry(entry: Path, temporary: Path) -> None:
    """Renames `temporary` to `entry`, and an `entry` that exists to a name of its own."""
    for old in entry.parent.glob("*.damaged"):
        with suppress(FileNotFoundError):  # another host may have deleted it
            if time.time() - old.stat().st_mtime > _REPLACED_AGE:
                shutil.rmtree(old, ignore_errors=True)
    if entry.exists():
        os.utime(entry)  # its age counts from now
        os.rename(entry, f"{entry}.{uuid.uuid4().hex[:8]}.damaged")
    try:
        os.rename(temporary, entry)
    except OSError:
        # A process of another host, where it does not see the lock, may have written it first.
        if not entry.exists():
            raise


def _write_split(
    source: SourceConfig, validation_share: float, tokenizer: Tokenizer, folder: Path
) -> Summary:
    """Tokenises a source into `train` and `validation` token files in `folder`."""
    options = (token_dtype(tokenizer.size), source.prompt is not None, tokenizer)
    with (
        IndexedWriter(folder / "train", *options) as train,
        IndexedWriter(folder / "validation", *options) as validation,
    ):

        def writer_for(document: Document) -> IndexedWriter:
            held_out = train.documents > 0 and _unit_hash(document.key) < validation_share
            return validation if held_out else train

        _write_documents(source, tokenizer, writer_for)
        _refuse_empty(source, train)
    return Summary(train.documents + validation.documents, train.tokens + validation.tokens)


def _write_documents(
    source: SourceConfig, tokenizer: Tokenizer, writer_for: Callable[[Document], IndexedWriter]
) -> None:
    """Tokenises a source, adds each document to its writer, and prints progress."""
    reader = open_reader(source)
    begin = last_print = time.monotonic()
    document_count = token_count = 0
    for chunk in document_chunks(reader.documents()):
        encoded = encode_documents(chunk, tokenizer, source.prompt is not None)
        for document, (tokens, mask) in zip(chunk, encoded, strict=True):
            writer_for(document).add(tokens, mask)
            token_count += len(tokens)
        document_count += len(chunk)
        if (now := time.monotonic()) - last_print >= _PROGRESS_INTERVAL:
            last_print, progress = now, reader.progress()
            percent = "" if progress is None else f", {progress:.0%}"
            print_progress(
                f"tokenising {source_name(source)}: {document_count:,} documents, "
                f"{token_count:,} tokens, {token_count / (now - begin):,.0f} tokens/s{percent}"
            )


def _refuse_empty(source: SourceConfig, writer: IndexedWriter) -> None:
    """Raises UserError if no token was written."""
    if writer.tokens == 0:
        raise UserError(
            f"data.sources: {source_name(source)} is an empty corpus: give a source that holds text"
        )


def _unit_hash(key: str) -> float:
    """Hashes a key to a number in [0, 1), the same in every process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest()) / 2**48


@contextmanager
def _write_errors_as_user_errors(path: Path, remedy: str) -> Iterator[None]:
    """Converts an OSError of the block to a UserError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}: {remedy}") from error


def _cache_root(data: DataConfig) -> Path:
    """Returns `data.cache`, or the user's default cache folder."""
    if data.cache is not None:
        return Path(data.cache).expanduser()
    return cache_folder()


def _digest(key: object) -> str:
    """Hashes JSON-able values to a file name."""
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()


def _stat_key(
    source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, files: list[Path]
) -> dict[str, Any]:
    """Returns a key of the files' paths, sizes and times of change, found without reading them."""
    stats = [(str(path), path.stat()) for path in files]
    return {
        "format": _FORMAT_VERSION,
        "source": source.model_dump(exclude={"weight", "stream"}),
        "files": [
            (path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            for path, stat in stats
        ],
        "encoding": tokenizer.encoding,
        "validation": data.validation,
    }


def _content_key(
    source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, files: list[Path]
) -> dict[str, Any]:
    """Returns a key of all that determines the content of the token files."""
    return {
        "format": _FORMAT_VERSION,
        **_source_content(source, files),
        "encoding": tokenizer.encoding,
        "validation": data.validation,
    }


def _source_content(source: SourceConfig, files: list[Path]) -> dict[str, Any]:
    """Returns hashes of the files, in order, and the source's fields, without the files' paths."""
    hashes = []
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()
        # The validation split hashes file names for the standard library, else document numbers.
        named = source.format == "stdlib"
        hashes.append((path.relative_to(stdlib_folder()).as_posix() if named else "", digest))
    excluded = {"path"} if files else set()  # a hub data set has no files: its path identifies it
    fields = source.model_dump(exclude={"weight", "stream", *excluded})
    return {"source": fields, "files": hashes}


def source_fingerprint(source: SourceConfig) -> str:
    """Hashes the content and fields of a text source, independently of its files' paths."""
    source = resolve_format(source)
    return _digest(_source_content(source, source_files(source)))
