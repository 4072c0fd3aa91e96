"""Writes safetensors files while their tensors are read; checks each while the next is written.

Three threads share the work: the caller reads tensors; one writes them, adds up checksums and waits
for the disk; one reads every file again. Tensors in between are bounded by their bytes, not by
those of a file, because the header of a file follows from names, shapes and dtypes alone.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from colonnade.launcher.checkpoint.manifest import FileRecord
from colonnade.launcher.weights.direct import DTYPES, Output, bytes_of
from colonnade.launcher.weights.target import Piece

Result = TypeVar("Result")
IN_FLIGHT = 3 * 10**8  # bytes of tensors between reading and writing, unless one is larger
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def in_order(pieces: Sequence[Piece]) -> list[Piece]:
    """Returns pieces in their order in a file: the widest elements first, so that all lie at
    multiples of their size, and a reader may use them where they are."""
    return sorted(pieces, key=lambda piece: -piece.dtype.itemsize)


def header_of(pieces: Sequence[Piece], metadata: Mapping[str, str] | None) -> bytes:
    """Returns what precedes the tensors of a safetensors file: the length of a JSON object, and the
    object with each tensor's dtype, shape and place."""
    fields: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.bytes
        fields[piece.key] = {
            "dtype": _NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Stream:
    """Writes files in one thread, and has each checked in another.

    An exception of these threads is raised by the next call, or at the end of the `with` block,
    which waits for all that was begun: files that are written are still checked.
    """

    def __init__(self) -> None:
        self.writer, self.checker = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.stack, self.room = ExitStack(), threading.Condition()
        self.in_flight = 0
        self.error: BaseException | None = None

    def write(
        self,
        path: Path,
        pieces: Sequence[Piece],
        metadata: Mapping[str, str] | None,
        finished: Callable[[FileRecord], None],
    ) -> None:
        """Reads pieces, while a thread writes them to a file; then has `finished` called with its
        record, while the next file is written."""
        pieces = in_order(pieces)
        output = self.later(lambda: self.opened(path))
        header = memoryview(header_of(pieces, metadata))
        self.later(lambda: output.result().append(header))
        for piece in pieces:
            self.acquire(piece.bytes)
            tensor = piece.read()
            if tuple(tensor.shape) != tuple(piece.shape):  # all that follow would be shifted
                raise RuntimeError(f"{piece.key} was read as {tuple(tensor.shape)}")
            self.append(output, tensor, piece.bytes)
        self.later(lambda: self.hand_on(output.result().finish(), finished))

    def opened(self, path: Path) -> Output:
        """Returns a new file, which is closed in the end in any case."""
        self.stack.callback((output := Output(path)).close)
        return output

    def append(self, output: Future[Output], tensor: Tensor, size: int) -> None:
        """Has a tensor written, and then forgotten."""
        held = [tensor]

        def write() -> None:
            output.result().append(bytes_of(held.pop()))
            with self.room:
                self.in_flight -= size
                self.room.notify_all()

        self.later(write)

    def hand_on(self, record: FileRecord, finished: Callable[[FileRecord], None]) -> None:
        """Has `finished` called in the other thread."""
        self.check(lambda: finished(record))

    def check(self, work: Callable[[], None]) -> None:
        """Has work done in the thread that checks."""
        self.checker.submit(self.noting_errors, work)

    def later(self, work: Callable[[], Result]) -> Future[Result]:
        """Has work done in the thread that writes, unless work before it failed."""

        def unless_failed() -> Result:
            if self.error is not None:
                raise self.error
            return self.noting_errors(work)

        if self.error is not None:
            raise self.error
        return self.writer.submit(unless_failed)

    def noting_errors(self, work: Callable[[], Result]) -> Result:
        """Does work; notes its exception, with which all else ends."""
        try:
            return work()
        except BaseException as error:
            with self.room:
                self.error = self.error or error
                self.room.notify_all()
            raise

    def acquire(self, size: int) -> None:
        """Waits until the tensors in between leave room for another one."""
        with self.room:
            self.room.wait_for(
                lambda: self.error or not self.in_flight or self.in_flight + size <= IN_FLIGHT
            )
            self.in_flight += size

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for all that was begun; raises the first exception of a thread."""
        self.error = self.error or error  # what waits to be written is left
        self.writer.shutdown()
        self.checker.shutdown()
        self.stack.close()
        if error is None and self.error is not None:
            raise self.error
