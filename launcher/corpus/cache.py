"""Tokenised sources on disk: text to `.bin` / `.idx`, once, in a folder keyed by what went in."""

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

from colonnade.launcher.corpus.documents import Document, chunks, encode_documents
from colonnade.launcher.corpus.files import settled, source_files, source_name
from colonnade.launcher.corpus.indexed import IndexedWriter, token_dtype, token_files
from colonnade.launcher.corpus.sources import read_documents
from colonnade.launcher.corpus.tokenizer import Tokenizer, open_tokenizer
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe import DataConfig, SourceConfig

_FORMAT = 2  # counts up whenever the same text would be written differently


@dataclass(frozen=True)
class Summary:
    """What was written; `tokens` counts the end of each document too."""

    documents: int
    tokens: int


def tokenise(
    source: SourceConfig, destination: Path, tokenizer: str | Tokenizer, overwrite: bool = False
) -> Summary:
    """Writes `DESTINATION.bin` and `.idx`, and `.mask` if the source has a prompt column.

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
        with IndexedWriter(destination, token_dtype(loaded.size), masked) as writer:
            _write(source, loaded, lambda document: writer)
            _refuse_empty(source, writer)
    return Summary(writer.documents, writer.tokens)


def cached_tokens(source: SourceConfig, data: DataConfig, tokenizer: Tokenizer) -> Path:
    """The cache's folder for a source: token files `train` and `validation`, written if missing.

    Whole documents go to validation, by a hash of the document's index or file name; the first
    never does, so that a single document trains. Callers at the same time may do the work
    twice, but the folder appears complete or not at all.
    """
    root = _cache_root(data)
    key = _cache_key(source, data, tokenizer)
    entry = root / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    if entry.exists():
        return entry
    begin = time.monotonic()
    print(f"tokenising {source_name(source)} into {entry}", file=sys.stderr, flush=True)
    temporary = root / f"{entry.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with _writing(temporary, "set data.cache to a folder with room"):
            temporary.mkdir(parents=True)
            summary = _write_split(source, data.validation, tokenizer, temporary)
            (temporary / "source.json").write_text(key)
            try:
                os.rename(temporary, entry)
            except OSError:
                if not entry.exists():  # else another process was quicker, with the same files
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(
        f"{summary.documents:,} documents, {summary.tokens:,} tokens "
        f"in {time.monotonic() - begin:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    return entry


def _write_split(source: SourceConfig, share: float, tokenizer: Tokenizer, folder: Path) -> Summary:
    dtype, masked = token_dtype(tokenizer.size), source.prompt is not None
    with (
        IndexedWriter(folder / "train", dtype, masked) as train,
        IndexedWriter(folder / "validation", dtype, masked) as validation,
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
    for chunk in chunks(read_documents(source)):
        encoded = encode_documents(chunk, tokenizer, source.prompt is not None)
        for document, (tokens, mask) in zip(chunk, encoded, strict=True):
            pick(document).add(tokens, mask)


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
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "colonnade"


def _cache_key(source: SourceConfig, data: DataConfig, tokenizer: Tokenizer) -> str:
    """Everything that decides what the token files hold, as JSON."""
    files = [(str(p), p.stat()) for p in source_files(source)]
    key = {
        "format": _FORMAT,
        "source": settled(source).model_dump(exclude={"weight", "stream"}),
        "files": [(path, stat.st_size, stat.st_mtime_ns) for path, stat in files],
        "encoding": tokenizer.encoding,
        "validation": data.validation,
    }
    return json.dumps(key, indent=1)
