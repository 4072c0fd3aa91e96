"""`manifest.json` lists the files of a checkpoint with their sizes and checksums.

A file has a CRC-32 for each of its blocks of 64 MiB, so that all ranks, and the threads of each,
check a checkpoint together, and damage is named with its place. CRC-32 finds every change of up to
32 adjacent bits, and misses one in 2^32 of others. The manifest's last field is the CRC-32 of the
text before it.
"""

import errno
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ValidationError, field_validator, model_validator

from colonnade.launcher.checkpoint.folders import (
    MANIFEST,
    STATE,
    TENSORS,
    damaged_error,
    missing_error,
    unreadable_error,
    write_durably,
)
from colonnade.launcher.cluster.environment import cores
from colonnade.launcher.errors import UserError

# Format 1 named tensors by their modules, format 2 had no checksums.
FORMAT: Literal[3] = 3
BLOCK = 64 << 20  # bytes
PIECE = 1 << 20  # bytes read at once: they stay in a core's cache


class FileRecord(BaseModel, frozen=True, extra="forbid"):
    """A file: its bytes, and the CRC-32 of each block of `BLOCK` bytes; the last may be shorter."""

    size: int
    crc32: tuple[int, ...]

    @model_validator(mode="after")
    def _has_all_checksums(self) -> "FileRecord":
        """Refuses a record without a checksum for each block."""
        if len(self.crc32) != -(-self.size // BLOCK):
            raise ValueError("a block has no checksum")
        return self


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """The content of `manifest.json`.

    Attributes:
        format: of the checkpoint.
        about: what the writer says of it, for people: layout, ranks, versions.
        files: all other files of the folder, by name.
    """

    format: Literal[3] = FORMAT
    about: dict[str, Any]
    files: dict[str, FileRecord]

    @field_validator("files")
    @classmethod
    def _lists_own_files(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        """Refuses files of other folders, and a list without catalog or state."""
        if any(Path(name).name != name for name in files) or not {TENSORS, STATE} <= set(files):
            raise ValueError("not the files of a checkpoint")
        return files

    def text(self) -> str:
        """Returns the file's text, which ends with the checksum of what comes before."""
        body = json.dumps(self.model_dump(mode="json"), indent=1)[:-2]
        return f'{body},\n "crc32": {zlib.crc32(body.encode())}\n}}\n'


class Block(NamedTuple):
    """A block of a file, and the CRC-32 that it should have."""

    name: str
    start: int
    size: int
    crc32: int


def write_manifest(folder: Path, about: dict[str, Any], files: dict[str, FileRecord]) -> None:
    """Writes the manifest of `folder`, and waits until it is on the disk."""
    write_durably(folder / MANIFEST, Manifest(about=about, files=files).text())


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a checkpoint.

    Raises:
        UserError: there is none, it is of another format, or any bit of it has changed.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise _error_without_manifest(folder) from None
    except UnicodeDecodeError as error:
        raise damaged_error(path, str(error)) from None
    except OSError as error:
        raise damaged_error(path, reason_of(path, error)) from None
    try:
        fields = json.loads(text)
        fields.pop("crc32")
        found = fields["format"]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise damaged_error(path, "it is no manifest") from None
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        if found != FORMAT and isinstance(found, int) and not _is_altered(text):
            raise other_format_error(folder, found) from None
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise damaged_error(path, f"{field} is missing, or is not what it should be") from None
    if manifest.text() != text:
        raise damaged_error(path, "its checksum differs")
    return manifest


def _error_without_manifest(folder: Path) -> UserError:
    """Returns the error for a checkpoint without manifest: older formats had none."""
    try:
        found = json.loads((folder / TENSORS).read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, TypeError, KeyError):  # no file of an older format
        return missing_error(folder)
    return other_format_error(folder, found)


def _is_altered(text: str) -> bool:
    """Whether the text of a manifest of any format does not have the checksum at its end."""
    body, _, end = text.rpartition(',\n "crc32": ')
    return end != f"{zlib.crc32(body.encode())}\n}}\n"


def other_format_error(folder: Path, found: int) -> UserError:
    """Returns the error for a checkpoint of another format."""
    remedy = "update colonnade" if found > FORMAT else "read it with the version that wrote it"
    return UserError(
        f"checkpoint {folder} has format {found}, and this version of colonnade reads format "
        f"{FORMAT}: {remedy}"
    )


def checksums(path: Path) -> FileRecord:
    """Reads a file, and returns its record."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        crcs = tuple(_crc_of(file.fileno(), start, size) for start in range(0, size, BLOCK))
    return FileRecord(size=size, crc32=crcs)


def _crc_of(descriptor: int, start: int, size: int) -> int:
    """Returns the CRC-32 of the block that begins at `start` of an open file of `size` bytes."""
    crc, position, end = 0, start, min(start + BLOCK, size)
    buffer = memoryview(bytearray(min(PIECE, end - start)))
    while position < end:
        count = os.preadv(descriptor, [buffer[: end - position]], position)
        if count == 0:
            raise OSError("it ends early")
        crc = zlib.crc32(buffer[:count], crc)
        position += count
    return crc


def blocks(manifest: Manifest) -> Iterator[Block]:
    """Yields the blocks of all files."""
    for name, record in manifest.files.items():
        for number, crc in enumerate(record.crc32):
            start = number * BLOCK
            yield Block(name, start, min(BLOCK, record.size - start), crc)


def size_faults(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yields the files that are missing, too short or too long, each with the reason."""
    for name, record in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            yield name, reason_of(folder / name, error)
            continue
        if size != record.size:
            yield name, f"{size:,} bytes instead of {record.size:,}"


def reason_of(path: Path, error: OSError) -> str:
    """Returns why a file that cannot be read is damaged; raises UserError where it may be whole,
    as without permission."""
    if error.errno not in (errno.ENOENT, errno.EIO):
        raise unreadable_error(path, error)
    return error.strerror or str(error)


def block_faults(
    folder: Path, share: Sequence[Block], threads: int | None = None
) -> Iterator[tuple[str, str]]:
    """Reads blocks of files; yields the files with a block that differs or cannot be read, each
    with the reason.

    Args:
        folder: the checkpoint.
        share: the blocks that this rank checks.
        threads: which share them; None: one for each core.
    """

    def fault(block: Block) -> str | None:
        try:
            with (folder / block.name).open("rb", buffering=0) as file:
                crc = _crc_of(file.fileno(), block.start, block.start + block.size)
        except OSError as error:
            return reason_of(folder / block.name, error)
        if crc == block.crc32:
            return None
        end = block.start + block.size
        return f"its checksum differs, between bytes {block.start:,} and {end:,}"

    with ThreadPoolExecutor(max_workers=threads or cores()) as pool:
        for block, reason in zip(share, pool.map(fault, share), strict=True):
            if reason is not None:
                yield block.name, reason


def raise_first(folder: Path, faults: Iterable[tuple[str, str]]) -> None:
    """Raises UserError for the first of the faults of a checkpoint's files, if there is one."""
    for name, reason in faults:
        raise damaged_error(folder / name, reason)
