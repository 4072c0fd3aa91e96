"""An array on disk whose slices are read on demand; the file may change while it is open."""

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from colonnade.launcher.errors import UserError


class FileArray:
    """The first `count` items of a file, as a one-dimensional array that is read by slices.

    `preadv` copies a slice into memory. A memory map would be about as fast, but a file that is
    truncated under a map ends the process with SIGBUS, and comparing sizes first leaves a race.
    Reading items that the file no longer holds raises UserError. A file that is deleted or
    replaced stays readable, since its descriptor stays open.
    """

    def __init__(self, path: Path, dtype: str, count: int) -> None:
        self.path, self.dtype, self._count = path, np.dtype(dtype), count
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self._count

    def is_current(self) -> bool:
        """Returns whether the open file is still the one at its path, not replaced or removed."""
        try:
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        except FileNotFoundError:
            return False

    def __getitem__(self, index: slice) -> np.ndarray:
        """Reads the items of a slice with step 1."""
        first, last, step = index.indices(self._count)
        assert step == 1
        return self.read(first, max(first, last))

    def read(self, first: int, last: int, out: np.ndarray | None = None) -> np.ndarray:
        """Reads items [first, last) into `out`, contiguous and of that size, or a new array."""
        array = np.empty(last - first, self.dtype) if out is None else out
        view, itemsize = array.view(np.uint8).data, self.dtype.itemsize
        filled = 0
        while filled < len(view):  # preadv may read fewer bytes than were asked for
            try:
                count = os.preadv(self._file, [view[filled:]], first * itemsize + filled)
            except OSError as error:
                raise UserError(
                    f"cannot read {self.path}: {error.strerror}: repair the disk, then "
                    "resume the run"
                ) from error
            if count == 0:
                raise UserError(
                    f"{self.path} was cut short while it was read: it holds "
                    f"{os.fstat(self._file).st_size} bytes of {self._count * itemsize}: restore "
                    "the file, then resume the run"
                )
            filled += count
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads all items into memory."""
        return self[:].astype(dtype or self.dtype, copy=False)

    def tolist(self) -> list[int]:
        """Reads all items as a list of integers."""
        return self[:].tolist()
