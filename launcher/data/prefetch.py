"""Reads the next batches in a background thread while the current batch trains."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from colonnade.launcher.data.rows import Batch, Rows
from colonnade.launcher.errors import UserError


class Prefetcher:
    """Iterates over the batches of `plan`, lists of sample indices, reading at least one ahead.

    `__next__` raises an exception of the thread when it reaches that batch; `upcoming_error`
    returns it earlier. `close` waits for the batch that is being read.
    """

    def __init__(self, rows: Rows, plan: Iterator[list[int]]) -> None:
        self._rows, self._plan = rows, plan
        self._state = rows.state()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._pending: deque[Future[tuple[Batch, dict[str, Any]]]] = deque()
        self._depth = 1  # batches to read ahead
        self._submit()

    def _submit(self) -> None:
        """Submits batches until `_depth` are pending or the plan ends."""
        for samples in islice(self._plan, max(self._depth - len(self._pending), 0)):
            self._pending.append(self._thread.submit(self._read, samples))

    def _read(self, samples: list[int]) -> tuple[Batch, dict[str, Any]]:
        """Reads a batch and the rows' state after it, in the thread."""
        return self._rows.batch(samples), self._rows.state()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Batch:
        if not self._pending:
            raise StopIteration
        future = self._pending.popleft()
        try:
            batch, self._state = future.result()
        except BaseException:
            self._stop()
            raise
        self._submit()
        return batch

    def upcoming_error(self, count: int) -> UserError | None:
        """Waits for the next `count` batches; returns the first UserError of reading them, if any.

        From then on at least `count` batches are read ahead.
        """
        self._depth = max(self._depth, count)
        self._submit()
        for future in islice(self._pending, count):
            if isinstance(error := future.exception(), UserError):
                return error
        return None

    def _stop(self) -> None:
        """Cancels pending batches and ends the plan."""
        for future in self._pending:
            future.cancel()
        self._pending.clear()
        self._plan = iter(())

    def state(self) -> dict[str, Any]:
        """Returns the rows' state after the last batch returned, not after those read ahead."""
        return self._state

    def close(self) -> None:
        """Ends the thread and the iteration."""
        self._stop()
        self._thread.shutdown(wait=True, cancel_futures=True)
