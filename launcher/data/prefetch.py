"""Prepares the next batches in a background thread while the current one trains."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Any

from colonnade.launcher.data.rows import Batch, Rows
from colonnade.launcher.errors import UserError


class Prefetcher:
    """Iterates over the batches of `plan`, lists of sample indices, one or more batches ahead.

    An exception of the thread is raised where its batch is asked for; `fault` tells of it before.
    `close` waits for the batch under way; a `with` block does it.
    """

    def __init__(self, rows: Rows, plan: Iterator[list[int]]) -> None:
        self._rows, self._plan = rows, plan
        self._state = rows.state()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._coming: deque[Future[tuple[Batch, dict[str, Any]]]] = deque()
        self._ahead = 1
        self._submit()

    def _submit(self) -> None:
        for samples in islice(self._plan, max(self._ahead - len(self._coming), 0)):
            self._coming.append(self._thread.submit(self._prepare, samples))

    def _prepare(self, samples: list[int]) -> tuple[Batch, dict[str, Any]]:
        return self._rows.batch(samples), self._rows.state()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Batch:
        if not self._coming:
            raise StopIteration
        coming = self._coming.popleft()
        try:
            batch, self._state = coming.result()
        except BaseException:
            self._stop()
            raise
        self._submit()
        return batch

    def fault(self, count: int) -> UserError | None:
        """Waits for the next `count` batches and returns why one of them cannot be read, if so.

        As many are read ahead from then on.
        """
        self._ahead = max(self._ahead, count)
        self._submit()
        for coming in islice(self._coming, count):
            if isinstance(error := coming.exception(), UserError):
                return error
        return None

    def _stop(self) -> None:
        for coming in self._coming:
            coming.cancel()
        self._coming.clear()
        self._plan = iter(())

    def state(self) -> dict[str, Any]:
        """The rows' state after the last batch handed out, whatever has been read ahead."""
        return self._state

    def close(self) -> None:
        """Ends the thread; the iterator is then at its end."""
        self._stop()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
