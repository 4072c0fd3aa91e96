"""Files of a source: which there are, what format they have, and their bytes, decompressed."""

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import re
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import SourceConfig

BOM = b"\xef\xbb\xbf"

_ENDINGS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".txt", ".text", ".md"), "text"),
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
_FOREIGN = frozenset(
    [
        ".csv",
        ".tsv",
        ".arrow",
        ".feather",
        ".avro",
        ".orc",
        ".zip",
        ".tar",
        ".tgz",
        ".7z",
        ".rar",
        ".lz4",
        ".pdf",
        ".docx",
        ".xlsx",
        ".bin",
        ".idx",
        ".npy",
        ".npz",
        ".pt",
        ".safetensors",
    ]
)
_SNIFFED = 1 << 20  # bytes of a file that are looked at to tell its format
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def source_name(source: SourceConfig) -> str:
    """The source in messages."""
    if source.format == "stdlib":
        return "stdlib"
    return repr(source.path) if source.format == "auto" else f"{source.format} {source.path!r}"


def source_path(source: SourceConfig) -> Path:
    """The path as given, `~` expanded."""
    if source.path is None:
        raise UserError(f"data.sources: format = {source.format!r} needs a path: set `path`")
    return Path(source.path).expanduser()


def is_absent(source: SourceConfig) -> bool:
    """Whether nothing that a path names is on this machine; a source without files never is."""
    if source.format in ("stdlib", "hub"):
        return False
    path = source_path(source)
    if source.format == "tokens":
        return not any(Path(f"{path}{ending}").exists() for ending in (".bin", ".idx"))
    return not path.exists() and not glob.glob(str(path), recursive=True)


def settled(source: SourceConfig) -> SourceConfig:
    """The source with its format, which its files tell where no field does.

    The ending decides, in upper or lower case and before `.gz`, `.bz2`, `.xz` or `.zst`; a file
    with another ending is `parquet` or `jsonl` if its content is, else `text`. Raises UserError
    where files have several formats, or one that is not read.
    """
    if source.format != "auto":
        return source
    path = source_path(source)
    if not path.exists() and Path(f"{path}.bin").exists() and Path(f"{path}.idx").exists():
        raise UserError(
            f"data.sources: {source.path!r} is the prefix of a .bin and an .idx file: set "
            "`format` to tokens to train on them"
        )
    found: dict[str, list[Path]] = {}
    for file in _listed_files(source, path):
        found.setdefault(_format_of(file), []).append(file)
    if len(found) > 1:
        what = "; ".join(
            f"{len(files)} of {kind}, such as {files[0].name}"
            for kind, files in sorted(found.items())
        )
        raise UserError(
            f"data.sources: {source.path!r} holds files of several formats ({what}): set `format` "
            "to the one to read, or give a glob"
        )
    kind = next(iter(found), "text")
    if kind.startswith("."):
        raise UserError(
            f"data.sources: {found[kind][0]} ends in {kind}, which is not read: convert it to "
            "jsonl, parquet or text, or set `format` if it is one of them"
        )
    return source.model_copy(update={"format": kind})


def _ending(path: Path) -> str:
    """The ending in lower case, that of compression left out."""
    name = path.name.lower()
    for compressed in _COMPRESSED:
        name = name.removesuffix(compressed)
    return Path(name).suffix


def _format_of(path: Path) -> str:
    """The file's format, or the ending of a known format that is not read."""
    ending = _ending(path)
    if ending in _FOREIGN:
        return ending
    return _ENDINGS.get(ending) or _sniffed(path)


def _sniffed(path: Path) -> str:
    """The format that the content has."""
    try:
        with Content(path) as content:
            head = content.stream.read(_SNIFFED).removeprefix(BOM)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise unreadable(str(path), error) from error
    if head.startswith(b"PAR1"):
        return "parquet"
    line = head.lstrip().split(b"\n", 1)[0]
    if line.startswith(b"{"):
        try:
            json.loads(line)
            return "jsonl"
        except ValueError:
            pass  # text may begin with a brace
    return "text"


def source_files(source: SourceConfig) -> list[Path]:
    """The files of a source, sorted; none for a data set on the hub. UserError if there are none.

    In a folder, `text` takes every file, `jsonl` and `parquet` those of their format, at any
    depth, hidden files left out. Files without any content are left out everywhere.
    """
    if source.format == "stdlib":
        found = _library_files(library_root())
    else:
        source = settled(source)
        path = source_path(source)
        found = _listed_files(source, path)
        if path.is_dir() and source.format in ("jsonl", "parquet"):
            found = [file for file in found if _format_of(file) == source.format]
    if not found and source.format != "hub":
        raise UserError(
            f"data.sources: {source_name(source)} is an empty corpus, no file there holds any "
            "data: give a file, folder or glob that does"
        )
    return found


def _listed_files(source: SourceConfig, path: Path) -> list[Path]:
    found: Iterable[Path]
    if path.is_dir():
        found = (
            p
            for p in path.rglob("*")
            if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
        )
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
    filled = sorted(p.absolute() for p in found if p.stat().st_size > 0)
    for p in filled:
        if not os.access(p, os.R_OK):
            raise UserError(f"data.sources: cannot read {p}: permission denied: make it readable")
    return filled


def library_root() -> Path:
    """The folder of the Python standard library on this machine."""
    return Path(sysconfig.get_paths()["stdlib"])


def _library_files(root: Path) -> list[Path]:
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _NOT_LIBRARY]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(p for p in found if os.access(p, os.R_OK) and p.stat().st_size > 0)


def unreadable(what: str, error: Exception) -> UserError:
    """What to tell of a source that could not be read."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UserError(
        f"data.sources: cannot read {what}: {why or type(error).__name__}: correct the data, or "
        "the source's format, path, subset or split"
    )


def _zstandard(raw: BinaryIO) -> Any:
    try:
        import pyarrow  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(
            f"data.sources: {raw.name} is compressed with Zstandard, which needs the pyarrow "
            "library: pip install 'colonnade[text]'"
        ) from error
    return pyarrow.CompressedInputStream(raw, "zstd")


# What a compressed file begins with, and what reads it.
_COMPRESSIONS: tuple[tuple[re.Pattern[bytes], Callable[[BinaryIO], Any]], ...] = (
    (re.compile(rb"\x1f\x8b"), gzip.open),
    (re.compile(rb"BZh\d1AY&SY"), bz2.open),
    (re.compile(rb"\xfd7zXZ\x00"), lzma.open),
    (re.compile(rb"\x28\xb5\x2f\xfd"), _zstandard),
)


class Content:
    """A file's bytes as `stream`, decompressed if their first bytes say that they are compressed.

    A context manager that closes the file. Reads gzip, bzip2, xz and Zstandard.
    """

    def __init__(self, path: Path) -> None:
        self._raw = path.open("rb")
        head = self._raw.peek(10)
        if head.startswith(b"PK\x03\x04"):
            raise UserError(f"data.sources: {path} is a zip archive: unpack it")
        openers = [opener for magic, opener in _COMPRESSIONS if magic.match(head)]
        self.compressed = bool(openers)
        self.stream = self._raw
        if openers:
            self.stream = io.BufferedReader(openers[0](self._raw))

    def bytes_read(self) -> int:
        """How far the file on disk has been read, compressed as it is."""
        return self._raw.tell()

    def __enter__(self) -> "Content":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._raw.close()
