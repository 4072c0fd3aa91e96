"""Items of a file, read when they are asked for: an array on disk that may change meanwhile."""

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from colonnade.launcher.errors import UserError


class FileArray:
    """The first `count` items of a file, as a one-dimensional array that is read by slices.

    A slice is read by `pread` into memory of its own. A memory map would be about as fast, but a
    file that is cut short under a map ends the process with SIGBUS; to compare sizes first leaves
    a moment in between. What the file no longer holds is a UserError. A file that is deleted or
    replaced stays readable, since it stays open.
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

    def __getitem__(self, index: slice) -> np.ndarray:
        """Items of a slice with step 1."""
        first, last, step = index.indices(self._count)
        assert step == 1
        return self.read(first, max(first, last))

    def read(self, first: int, last: int, into: np.ndarray | None = None) -> np.ndarray:
        """Items [first, last), in a new array or in a contiguous one of that size."""
        array = np.empty(last - first, self.dtype) if into is None else into
        view, size = array.view(np.uint8).data, self.dtype.itemsize
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._file, [view[done:]], first * size + done)
            except OSError as error:
                raise UserError(
                    f"cannot read {self.path}: {error.strerror}: mend the disk, then resume the run"
                ) from error
            if got == 0:
                raise UserError(
                    f"{self.path} was cut short while it was read: it holds "
                    f"{os.fstat(self._file).st_size} bytes of {self._count * size}: restore the "
                    "file, then resume the run"
                )
            done += got
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it, in memory."""
        return self[:].astype(dtype or self.dtype, copy=False)

    def tolist(self) -> list[int]:
        """All of it, as integers."""
        return self[:].tolist()
