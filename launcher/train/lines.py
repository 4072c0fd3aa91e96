"""Appends to files of one JSON object per line and reads them; names the disk's errors."""

import json
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from colonnade.launcher.errors import UserError


class Lines:
    """A file that is open to append objects to, each a line, from any thread.

    What a crash left of a last line is cut off: it never was a whole object.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file. Raises OSError."""
        self.lock = threading.Lock()
        self.file = path.open("ab", buffering=0)  # every write reaches the file at once
        with path.open("rb") as written:
            end = length_of_lines(written.read())
        if end < self.file.tell():
            self.file.truncate(end)

    def append(self, row: dict[str, Any]) -> None:
        """Writes an object of finite numbers; a disk that refuses a part of it gets none of it.

        Raises OSError.
        """
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with self.lock:
            end = self.file.seek(0, 2)
            try:
                while line:
                    line = line[self.file.write(line) :]
            except OSError:
                with suppress(OSError):
                    self.file.truncate(end)
                raise

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row with null for numbers that are not finite, which JSON does not have."""
    bad = (name for name, v in row.items() if isinstance(v, float) and not math.isfinite(v))
    return row | dict.fromkeys(bad)


def length_of_lines(text: bytes) -> int:
    """The bytes of all lines that end with a newline."""
    return text.rfind(b"\n") + 1


def read_lines(path: Path, *names: str) -> list[dict[str, Any]]:
    """Returns all complete lines of a file, without a last line that a crash truncated; none if
    there is no file.

    Raises:
        UserError: a line is no object with these names.
    """
    if not path.exists():
        return []
    text, rows = path.read_bytes(), []
    for number, line in enumerate(text[: length_of_lines(text)].split(b"\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or any(name not in row for name in names):
            raise UserError(
                f"{path}, line {number}: not an object with {', '.join(names)}; mend or remove "
                "that line"
            )
        rows.append(row)
    return rows


def write_below(path: Path, action: Callable[[], object]) -> None:
    """Runs `action`, which writes below `path`; raises UserError where that raises OSError."""
    try:
        action()
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or path}: {error.strerror}; free space or repair "
            f"the disk of {path.absolute()}, then resume the run"
        ) from error
