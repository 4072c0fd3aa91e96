"""Files of a source: lists them, detects their format, and reads their bytes, decompressed."""

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
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import SourceConfig

BOM = b"\xef\xbb\xbf"

_FORMAT_OF_ENDING = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".txt", ".text", ".md"), "text"),
}
_COMPRESSION_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zstd")
_UNSUPPORTED_ENDINGS = frozenset({
    ".csv", ".tsv", ".arrow", ".feather", ".avro", ".orc", ".zip", ".tar", ".tgz", ".7z",
    ".rar", ".lz4", ".pdf", ".docx", ".xlsx", ".bin", ".idx", ".npy", ".npz", ".pt",
    ".safetensors",
})  # fmt: skip
_SNIFF_BYTES = 1 << 20  # at the start of a file, from which its format is detected
_SKIPPED_STDLIB_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def source_name(source: SourceConfig) -> str:
    """Returns how messages name the source."""
    if source.format == "stdlib":
        return "stdlib"
    return repr(source.path) if source.format == "auto" else f"{source.format} {source.path!r}"


def source_path(source: SourceConfig) -> Path:
    """Returns the source's path with `~` expanded; raises UserError if it has none."""
    if source.path is None:
        raise UserError(f"data.sources: format = {source.format!r} needs a path: set `path`")
    return Path(source.path).expanduser()


def is_absent(source: SourceConfig) -> bool:
    """Returns whether no file of the source is on this machine; False for `stdlib` and `hub`."""
    if source.format in ("stdlib", "hub"):
        return False
    path = source_path(source)
    if source.format == "tokens":
        return not any(Path(f"{path}{ending}").exists() for ending in (".bin", ".idx"))
    return not path.exists() and not glob.glob(str(path), recursive=True)


def resolve_format(source: SourceConfig) -> SourceConfig:
    """Replaces the format `auto` of a source by the format of its files.

    A file's ending determines its format, in upper or lower case and before `.gz`, `.bz2`, `.xz` or
    `.zst`; a file with an unknown ending is `parquet` or `jsonl` if its content is, else `text`.
    Raises UserError if files have several formats, or one that is not supported.
    """
    if source.format != "auto":
        return source
    path = source_path(source)
    if not path.exists() and Path(f"{path}.bin").exists() and Path(f"{path}.idx").exists():
        raise UserError(
            f"data.sources: {source.path!r} is the prefix of a .bin and an .idx file: set "
            "`format` to tokens to train on them"
        )
    by_format: dict[str, list[Path]] = {}
    for file in _list_files(source, path):
        by_format.setdefault(_format_of(file), []).append(file)
    if len(by_format) > 1:
        formats = "; ".join(
            f"{len(files)} of {file_format}, such as {files[0].name}"
            for file_format, files in sorted(by_format.items())
        )
        raise UserError(
            f"data.sources: {source.path!r} holds files of several formats ({formats}): set "
            "`format` to the one to read, or give a glob"
        )
    file_format = next(iter(by_format), "text")
    if file_format.startswith("."):
        raise UserError(
            f"data.sources: {by_format[file_format][0]} ends in {file_format}, which is not read: "
            "convert it to jsonl, parquet or text, or set `format` if it is one of them"
        )
    return source.model_copy(update={"format": file_format})


def _ending(path: Path) -> str:
    """Returns the file's ending in lower case, without that of a compression."""
    name = path.name.lower()
    for ending in _COMPRESSION_ENDINGS:
        name = name.removesuffix(ending)
    return Path(name).suffix


def _format_of(path: Path) -> str:
    """Returns the file's format, or its ending (with the dot) if that is not supported."""
    ending = _ending(path)
    if ending in _UNSUPPORTED_ENDINGS:
        return ending
    return _FORMAT_OF_ENDING.get(ending) or _sniff_format(path)


def _sniff_format(path: Path) -> str:
    """Detects the format from the start of the file's content."""
    try:
        with closing(DecompressedFile(path)) as file:
            head = file.stream.read(_SNIFF_BYTES).removeprefix(BOM)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise read_error(str(path), error) from error
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
    """Lists the files of a source, sorted; none for a data set on the hub.

    In a folder, `text` takes every file, `jsonl` and `parquet` those of their format, at any
    depth, without hidden files. Empty files are always skipped. Raises UserError if a source other
    than the hub has no files.
    """
    if source.format == "stdlib":
        files = _stdlib_files(stdlib_folder())
    else:
        source = resolve_format(source)
        path = source_path(source)
        files = _list_files(source, path)
        if path.is_dir() and source.format in ("jsonl", "parquet"):
            files = [file for file in files if _format_of(file) == source.format]
    if not files and source.format != "hub":
        raise UserError(
            f"data.sources: {source_name(source)} is an empty corpus, no file there holds any "
            "data: give a file, folder or glob that does"
        )
    return files


def _list_files(source: SourceConfig, path: Path) -> list[Path]:
    """Lists the files of a file, folder or glob that are not empty; raises UserError if none is."""
    matches: Iterable[Path]
    if path.is_dir():
        matches = (
            p
            for p in path.rglob("*")
            if p.is_file() and not any(name.startswith(".") for name in p.relative_to(path).parts)
        )
    elif path.is_file():
        matches = [path]
    elif source.format == "hub":
        return []
    else:
        matches = [Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
        if not matches:
            raise UserError(
                f"data.sources: cannot read {source_name(source)}: there is no such file or "
                "folder, and as a glob it matches none: correct `path`"
            )
    files = sorted(p.absolute() for p in matches if p.stat().st_size > 0)
    for p in files:
        if not os.access(p, os.R_OK):
            raise UserError(f"data.sources: cannot read {p}: permission denied: make it readable")
    return files


def stdlib_folder() -> Path:
    """Returns the folder of the Python standard library on this machine."""
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib_files(root: Path) -> list[Path]:
    """Lists the readable, not empty Python files under `root`, without tests and site-packages."""
    files = []
    for folder, subfolders, names in os.walk(root):
        # Editing the list in place keeps os.walk out of the skipped folders.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_STDLIB_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(p for p in files if os.access(p, os.R_OK) and p.stat().st_size > 0)


def read_error(name: str, error: Exception) -> UserError:
    """Returns the UserError for a file or source `name` that could not be read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UserError(
        f"data.sources: cannot read {name}: {reason or type(error).__name__}: correct the data, or "
        "the source's format, path, subset or split"
    )


def _open_zstandard(raw: BinaryIO) -> Any:
    """Opens a decompressing stream; raises UserError if pyarrow is not installed."""
    try:
        import pyarrow  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(
            f"data.sources: {raw.name} is compressed with Zstandard, which needs the pyarrow "
            "library: pip install 'colonnade[text]'"
        ) from error
    return pyarrow.CompressedInputStream(raw, "zstd")


# The magic bytes that a compressed file begins with, and the function that opens it.
_COMPRESSIONS: tuple[tuple[re.Pattern[bytes], Callable[[BinaryIO], Any]], ...] = (
    (re.compile(rb"\x1f\x8b"), gzip.open),
    (re.compile(rb"BZh\d1AY&SY"), bz2.open),
    (re.compile(rb"\xfd7zXZ\x00"), lzma.open),
    (re.compile(rb"\x28\xb5\x2f\xfd"), _open_zstandard),
)


class DecompressedFile:
    """A file's bytes as `stream`, decompressed if the file begins with a compression's magic bytes.

    Reads gzip, bzip2, xz and Zstandard.
    """

    def __init__(self, path: Path) -> None:
        self._raw = path.open("rb")
        head = self._raw.peek(10)
        if head.startswith(b"PK\x03\x04"):
            self._raw.close()
            raise UserError(f"data.sources: {path} is a zip archive: unpack it")
        openers = [opener for magic, opener in _COMPRESSIONS if magic.match(head)]
        self.compressed = bool(openers)
        self.stream = self._raw
        if openers:
            self.stream = io.BufferedReader(openers[0](self._raw))

    def bytes_read(self) -> int:
        """Returns the bytes of the file on disk, before decompression, that have been read."""
        return self._raw.tell()

    def close(self) -> None:
        """Closes the file."""
        self._raw.close()
