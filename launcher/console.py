"""Standard streams that survive their reader: a command goes on when its pipe or tty closes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


class DisconnectTolerantStream:
    """Wraps a text stream; once its pipe or terminal is closed, it discards all output."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes to the stream as `TextIO.write` does; discards the text if the reader is gone."""
        try:
            return self._stream.write(text)
        except OSError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        """Flushes the stream as `TextIO.flush` does; discards the buffer if the reader is gone."""
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def _discard(self) -> None:
        """Redirects the file descriptor to /dev/null, for buffered text and for all later text."""
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self._stream.fileno())
        os.close(devnull)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerate_closed_streams() -> Iterator[None]:
    """Wraps stdout and stderr in `DisconnectTolerantStream` for the duration of the block."""
    originals = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, DisconnectTolerantStream(s)) for s in originals)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # still wrapped: a closed pipe must not raise here either
        sys.stdout, sys.stderr = originals
