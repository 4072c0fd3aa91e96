"""Hashes the content of files, and remembers the hashes until a file's size or times change."""

import hashlib
import json
import os
import sys
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from colonnade.launcher.cluster.environment import cache_folder
from colonnade.launcher.errors import UserError

# Files of up to so many bytes in all are hashed whole, at one or two seconds a gigabyte; of the
# files of a larger corpus, which may have terabytes, blocks are hashed.
_WHOLE_BYTES = 8 << 30
_BLOCKS, _BLOCK_BYTES = 64, 1 << 16  # of each file of a larger corpus
# Hashing fewer bytes than this takes as long as looking up their hash, which is not kept.
_REMEMBERED_BYTES = 16 << 20
_ANNOUNCED_BYTES = 1 << 30  # hashing more than this prints a line first
_THREADS = 4
_CLOCK_TICK = 0.02  # seconds within which two changes of a file may get the same time
_VERSION = 1  # of the remembered hashes

_SAMPLED = "sampled-"  # begins the hash of blocks


class FileContent(NamedTuple):
    """The name of a file, its bytes, and their hash; JSON holds it as a list of the three."""

    name: str
    size: int
    hash: str

    @property
    def whole(self) -> bool:
        """Whether the hash covers every byte."""
        return not self.hash.startswith(_SAMPLED)

    @property
    def digest(self) -> bytes:
        """The 16 bytes of the hash: of a whole file, blake2b of its bytes."""
        return bytes.fromhex(self.hash.removeprefix(_SAMPLED))


def print_progress(line: str) -> None:
    """Prints a line to stderr at once; stdout is for reports."""
    print(line, file=sys.stderr, flush=True)


def read_contents(paths: Sequence[Path]) -> list[FileContent]:
    """Returns the contents of the files of a source, in their order.

    The user's cache folder holds the hashes of files by path, size, inode and times of change, so
    that unchanged files are hashed once. Nothing is locked: processes that ask at the same time
    each hash, and write the same. The time of the last change of status (ctime) cannot be set, so
    that a change is seen even if the modification time is restored. Raises UserError if a file
    cannot be read.
    """
    stats = [_file_stat(path) for path in paths]
    if sum(stat.st_size for stat in stats) < _REMEMBERED_BYTES:
        return hash_files(paths)
    memo = cache_folder() / "contents" / _memo_name(paths, stats)
    if (contents := _recall(memo, len(paths))) is not None:
        return contents
    # A later change must get another time than the files have now, or it would not be seen.
    if abs(time.time() - max(stat.st_ctime for stat in stats)) < _CLOCK_TICK:
        time.sleep(_CLOCK_TICK)
    contents = hash_files(paths)
    _remember(memo, contents)
    return contents


def hashes_whole(total: int) -> bool:
    """Returns whether files of `total` bytes in all are hashed whole, not in blocks."""
    return total <= _WHOLE_BYTES


def hash_files(paths: Sequence[Path]) -> list[FileContent]:
    """Hashes files whole, or blocks of each if they have more than `_WHOLE_BYTES` in all."""
    sizes = [_file_stat(path).st_size for path in paths]
    total, whole = sum(sizes), hashes_whole(sum(sizes))
    if total > _ANNOUNCED_BYTES:
        part = "" if whole else "samples of "
        named = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more files"
        print_progress(f"hashing {part}the {total:,} bytes of {named}")

    def hash_file(path: Path, size: int) -> FileContent:
        try:
            return FileContent(path.name, size, _hash_file(path, size, whole))
        except OSError as error:
            raise _unreadable(path, error) from error

    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(hash_file, paths, sizes))


def _hash_file(path: Path, size: int, whole: bool) -> str:
    """Hashes a file of `size` bytes; without `whole`, only its size and evenly spaced blocks."""
    with path.open("rb", buffering=0) as file:
        if whole or size <= _BLOCKS * _BLOCK_BYTES:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        digest = hashlib.blake2b(f"{size}".encode(), digest_size=16)
        for number in range(_BLOCKS):
            offset = number * (size - _BLOCK_BYTES) // (_BLOCKS - 1)
            digest.update(os.pread(file.fileno(), _BLOCK_BYTES, offset))
    return _SAMPLED + digest.hexdigest()


def _file_stat(path: Path) -> os.stat_result:
    """Returns the file's status; raises UserError if there is no such file."""
    try:
        return path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    """Returns the error for a file that cannot be read."""
    return UserError(f"cannot read {path}: {error.strerror}: restore the file, or make it readable")


def _memo_name(paths: Sequence[Path], stats: Sequence[os.stat_result]) -> str:
    """Returns the name of the file that holds the hashes of files with these paths and stats."""
    identities = [
        (str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        for path, stat in zip(paths, stats, strict=True)
    ]
    key = json.dumps([_VERSION, _WHOLE_BYTES, _BLOCKS, _BLOCK_BYTES, identities])
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _recall(memo: Path, count: int) -> list[FileContent] | None:
    """Reads remembered hashes of `count` files; None if there are none, or they are damaged."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        contents = [FileContent(*fields) for fields in json.loads(memo.read_text())]
        if len(contents) == count and all(len(content.digest) == 16 for content in contents):
            return contents
    return None


def _remember(memo: Path, contents: list[FileContent]) -> None:
    """Writes hashes for `_recall`; a cache folder that cannot be written costs hashing again."""
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(f"{memo}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.write_text(json.dumps(contents))
        os.replace(temporary, memo)


def file_change(saved: Sequence[Sequence[Any]], current: Sequence[FileContent]) -> str | None:
    """Says in a phrase which files differ from those that a state lists; None if none does."""
    if len(saved) != len(current):
        return f"{len(saved)} files then, {len(current)} now"
    changes = []
    for (name, size, digest), now in zip(saved, current, strict=True):
        if name != now.name:
            changes.append(f"{name} then, {now.name} now")
        elif size != now.size:
            changes.append(f"{name} had {size} bytes then, {now.size} now")
        elif digest != now.hash:
            changes.append(f"{name} has other content of the same {size} bytes")
    if len(changes) > 1:
        return f"{changes[0]}, and {len(changes) - 1} more changed"
    return changes[0] if changes else None
