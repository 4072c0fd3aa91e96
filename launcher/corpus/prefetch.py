"""Prepares the next batch in a background thread while the current one trains."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from colonnade.launcher.corpus.rows import Batch, Rows


class Prefetcher:
    """Iterates over the batches of `plan`, lists of sample indices, one batch ahead.

    An exception of the thread is raised where its batch is asked for. `close` waits for the
    batch under way; a `with` block does it.
    """

    def __init__(self, rows: Rows, plan: Iterator[list[int]]) -> None:
        self._rows, self._plan = rows, plan
        self._state = rows.state()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._next = self._submit()

    def _submit(self) -> Future[tuple[Batch, dict[str, Any]]] | None:
        samples = next(self._plan, None)
        return None if samples is None else self._thread.submit(self._prepare, samples)

    def _prepare(self, samples: list[int]) -> tuple[Batch, dict[str, Any]]:
        return self._rows.batch(samples), self._rows.state()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Batch:
        if self._next is None:
            raise StopIteration
        coming, self._next = self._next, None
        batch, self._state = coming.result()
        self._next = self._submit()
        return batch

    def state(self) -> dict[str, Any]:
        """The rows' state after the last batch handed out, whatever has been read ahead."""
        return self._state

    def close(self) -> None:
        """Ends the thread; the iterator is then at its end."""
        self._next = None
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
