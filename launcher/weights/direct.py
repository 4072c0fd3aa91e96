"""Reads and writes safetensors files past the system's cache, in large pieces.

A conversion reads and writes every byte once, so the cache would only copy it. Where a file system
knows no O_DIRECT, the same calls go through the cache.
"""

import errno
import json
import mmap
import os
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colonnade.launcher.checkpoint.folders import damaged_error
from colonnade.launcher.checkpoint.manifest import BLOCK, FileRecord
from colonnade.launcher.errors import UserError

PAGE = mmap.PAGESIZE  # O_DIRECT takes places, lengths and addresses that are multiples of it
POOLED, FREE = 1 << 20, 1 << 29  # bytes: of the smallest memory to use again, of all that is free
KEPT_BLOCKS = 4  # that several tensors share, in memory
# safetensors' names of dtypes
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_direct(path: Path, flags: int) -> int:
    """Opens a file with O_DIRECT, or without it where the file system refuses; returns its
    descriptor."""
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def pages(size: int) -> int:
    """Returns the bytes of the pages that hold `size` bytes."""
    return -(-size // PAGE) * PAGE


def memory(size: int) -> Tensor:
    """Returns bytes that begin at a page and end with one; at least one page."""
    return torch.frombuffer(mapped(size), dtype=torch.uint8)


def mapped(size: int) -> mmap.mmap:
    """Returns memory of the system in whole pages, at least one."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    buffer = mmap.mmap(-1, max(PAGE, pages(size)), flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


class Pool:
    """Memory for tensors, which returns when its tensor is gone: new pages cost the system as much
    as reading them."""

    def __init__(self) -> None:
        self.free: list[mmap.mmap] = []

    def memory(self, size: int) -> Tensor:
        """Returns as `memory` does, where it can what an earlier tensor had."""
        if size < POOLED:
            return memory(size)
        buffer = next((b for b in self.free if size <= len(b) <= 2 * size), None)
        if buffer is None:
            buffer = mapped(size)
        else:
            self.free.remove(buffer)
        while sum(map(len, self.free)) > FREE:
            self.free.pop(0)
        view = memoryview(buffer)  # the tensor keeps it, not its buffer
        weakref.finalize(view, self.free.append, buffer)
        return torch.frombuffer(view, dtype=torch.uint8)[: pages(size)]


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor, which share its memory."""
    buffer: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(buffer)


def read_into(descriptor: int, target: memoryview, start: int, stop: int) -> None:
    """Reads bytes `start` to `stop` of a file to the beginning of whole pages of memory."""
    position = start
    while position < stop:
        count = os.preadv(descriptor, [target[position - start :]], position)
        if count == 0:
            raise OSError(errno.EIO, "it ends early")
        position += count


def checksums(path: Path) -> FileRecord:
    """Reads a file from the disk; returns its record."""
    size, view = path.stat().st_size, bytes_of(memory(BLOCK))
    descriptor, crcs = open_direct(path, os.O_RDONLY), []
    try:
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            read_into(descriptor, view[: pages(stop - start)], start, stop)
            crcs.append(zlib.crc32(view[: stop - start]))
    finally:
        os.close(descriptor)
    return FileRecord(size=size, crc32=tuple(crcs))


class Files:
    """The safetensors files of a folder, which are read from the disk.

    Args:
        folder: of the files.
        records: of each file, with which every block is compared when it is read; None: of none.
    """

    def __init__(self, folder: Path, records: Mapping[str, FileRecord] | None = None) -> None:
        self.folder, self.records = folder, records
        self.pool = Pool()
        self.descriptors: dict[str, int] = {}
        self.headers: dict[str, tuple[int, dict[str, Any]]] = {}
        self.blocks: OrderedDict[tuple[str, int], memoryview] = OrderedDict()

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self.descriptors.values():
            os.close(descriptor)

    def boxes(self, file: str, key: str) -> "Boxes":
        """Returns what gives boxes of a tensor."""
        if file not in self.headers:
            length = int.from_bytes(bytes(bytes_of(self.read(file, 0, 8))), "little")
            text = bytes(bytes_of(self.read(file, 8, 8 + length)))
            self.headers[file] = 8 + length, json.loads(text)
        begin, header = self.headers[file]
        return Boxes(self, file, begin, header[key])

    def read(self, file: str, start: int, stop: int) -> Tensor:
        """Returns bytes `start` to `stop` of a file.

        Raises:
            UserError: a block is not what its record says, or cannot be read.
        """
        if file not in self.descriptors:
            self.descriptors[file] = self.opened(file)
        first = start // PAGE * PAGE
        found = self.pool.memory(stop - first)
        view = bytes_of(found)
        if self.records is None:
            try:
                read_into(self.descriptors[file], view, first, stop)
            except OSError as error:
                raise self.unreadable(file, error) from error
        else:
            self.read_checked(file, self.records[file], view, first, start, stop)
        return found[start - first : stop - first]

    def opened(self, file: str) -> int:
        """Opens a file; returns its descriptor."""
        try:
            return open_direct(self.folder / file, os.O_RDONLY)
        except OSError as error:
            raise self.unreadable(file, error) from error

    def unreadable(self, file: str, error: OSError) -> UserError:
        """Returns the error for a file of the source that cannot be read."""
        reason = error.strerror or error
        return UserError(f"{self.folder / file} cannot be read ({reason}); fetch it again")

    def read_checked(
        self, file: str, record: FileRecord, view: memoryview, first: int, start: int, stop: int
    ) -> None:
        """Reads bytes `start` to `stop` to their places behind `first`, by whole blocks; those
        that reach beyond are kept for the next tensor."""
        for number in range(start // BLOCK, -(-stop // BLOCK)):
            begin, end = number * BLOCK, min((number + 1) * BLOCK, record.size)
            if start <= begin and end <= stop:
                target = view[begin - first :]
                self.read_block(file, record, number, target)
                continue
            if (file, number) not in self.blocks:
                target = bytes_of(memory(end - begin))
                self.read_block(file, record, number, target)
                self.blocks[file, number] = target
                if len(self.blocks) > KEPT_BLOCKS:
                    self.blocks.popitem(last=False)
            a, b = max(start, begin), min(stop, end)
            view[a - first : b - first] = self.blocks[file, number][a - begin : b - begin]

    def read_block(self, file: str, record: FileRecord, number: int, target: memoryview) -> None:
        """Reads a block, and compares its checksum."""
        start, stop = number * BLOCK, min((number + 1) * BLOCK, record.size)
        try:
            read_into(self.descriptors[file], target[: pages(stop - start)], start, stop)
        except OSError as error:
            raise damaged_error(self.folder / file, error.strerror or str(error)) from error
        if zlib.crc32(target[: stop - start]) != record.crc32[number]:
            reason = f"its checksum differs, between bytes {start:,} and {stop:,}"
            raise damaged_error(self.folder / file, reason)


class Boxes:
    """A tensor in a file, which gives boxes as safetensors' slices do."""

    def __init__(self, files: Files, file: str, begin: int, fields: Mapping[str, Any]) -> None:
        self.files, self.file = files, file
        start, stop = fields["data_offsets"]
        self.start, self.size = begin + start, stop - start
        self.shape: list[int] = fields["shape"]
        self.dtype = DTYPES[fields["dtype"]]

    def __getitem__(self, box: tuple[slice, ...]) -> Tensor:
        """Returns a box; reads its rows, from the first to the last."""
        if self.size == 0:
            return torch.empty(self.shape, dtype=self.dtype)[box]
        first, last, _ = box[0].indices(self.shape[0]) if self.shape else (0, 1, 1)
        row = self.size // (self.shape[0] if self.shape else 1)
        data = self.files.read(self.file, self.start + first * row, self.start + last * row)
        if data.storage_offset() % self.dtype.itemsize:
            data = data.clone()  # a file that does not align its tensors
        rows = data.view(self.dtype).reshape(last - first, *self.shape[1:])
        return rows[(slice(None), *box[1:])] if self.shape else rows.reshape(())


class Output:
    """A file that is being written, with the checksums of what has been."""

    def __init__(self, path: Path) -> None:
        self.descriptor = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.block = bytes_of(memory(BLOCK))
        self.filled, self.size = 0, 0
        self.crcs: list[int] = []

    def append(self, data: memoryview) -> None:
        """Takes bytes, and writes each block that is complete."""
        while data:
            count = min(len(data), BLOCK - self.filled)
            self.block[self.filled : self.filled + count] = data[:count]
            self.filled, data = self.filled + count, data[count:]
            if self.filled == BLOCK:
                self.write()

    def write(self) -> None:
        """Writes the block, in whole pages."""
        self.crcs.append(zlib.crc32(self.block[: self.filled]))
        rest = self.block[: pages(self.filled)]
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]
        self.size, self.filled = self.size + self.filled, 0

    def finish(self) -> FileRecord:
        """Writes what is left, waits for the disk and closes the file; returns its record."""
        if self.filled:
            self.write()
            os.ftruncate(self.descriptor, self.size)
        os.fsync(self.descriptor)
        self.close()
        return FileRecord(size=self.size, crc32=tuple(self.crcs))

    def close(self) -> None:
        """Closes the file, if it is open."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
