"""A pool of worker processes that a benchmark calls, such as the ranks of a gloo group on one host.

The workers stay alive between calls, unlike the ranks that `launcher.cluster.ranks.start_ranks`
starts; they become ranks in the same way (`prepare_rank`, then the process group).
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, ClassVar, Self

import torch.distributed as dist

from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.ranks import prepare_rank
from colonnade.launcher.errors import UserError
from colonnade.parallel.world import open_world as open_world

EXIT_TIMEOUT = 10  # seconds for which the pool waits for workers to exit before it kills them


class Worker:
    """The object inside one process; subclasses add the methods that the benchmark calls."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.group = ExitStack()

    def join(self, size: int, store: dist.Store) -> None:
        """Becomes rank `index` of a gloo group of `size` ranks on this machine, with 1 thread."""
        device = prepare_rank(RankEnvironment.on_one_host(self.index, size), threads=1)
        self.world = self.group.enter_context(open_world(self.index, size, device, store))

    def close(self) -> None:
        """Leaves the group, if this process joined one, together with its other ranks."""
        self.group.close()


def worker_main(worker_type: type[Worker], label: str, index: int, pipe: Connection) -> None:
    """Runs in the worker's process: calls methods on request until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark's process handles Ctrl-C
    with suppress(BrokenPipeError):  # the benchmark's process has exited
        try:
            worker = worker_type(index)
            pipe.send(None)
            while (request := pipe.recv()) is not None:
                name, args = request
                pipe.send(getattr(worker, name)(*args))
            worker.close()
        except EOFError:
            os._exit(1)  # the benchmark's process died
        except UserError as mistake:
            pipe.send(mistake)
        except Exception:  # of any kind: the benchmark's process raises it
            pipe.send(RuntimeError(f"{label} {index}:\n{traceback.format_exc()}"))


class WorkerPool:
    """`size` worker processes, as a context manager that ends all of them however it is left."""

    label: ClassVar[str] = "process"  # what messages call a worker

    def __init__(self, worker_type: type[Worker], size: int) -> None:
        self.worker_type, self.size = worker_type, size
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, error_type: type[BaseException] | None, *error: object) -> None:
        if error_type is None:
            with suppress(OSError):
                for pipe in self.pipes:
                    pipe.send(None)
            for process in self.processes:
                process.join(EXIT_TIMEOUT)
        self.close()

    def start(self) -> None:
        """Starts the processes, and waits until every worker is constructed."""
        context = multiprocessing.get_context("spawn")
        for index in range(self.size):
            pipe, worker_pipe = context.Pipe()
            process = context.Process(
                target=worker_main,
                args=(self.worker_type, self.label, index, worker_pipe),
                daemon=True,
            )
            process.start()
            worker_pipe.close()  # so that a worker's death ends the pipe
            self.processes.append(process)
            self.pipes.append(pipe)
        self.collect()

    def close(self) -> None:
        """Kills all processes, and with them everything that they created."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()

    def call(self, name: str, *args: object) -> list[Any]:
        """Calls the method `name` on every worker; returns the results by worker."""
        for pipe in self.pipes:
            pipe.send((name, args))
        return self.collect()

    def collect(self, timeout: float = 600.0) -> list[Any]:
        """Receives one result from every worker.

        The first failure ends the wait, because the other workers may hang on the failed one.
        """
        results: dict[int, Any] = {}
        while len(results) < len(self.pipes):
            ready = wait([p for i, p in enumerate(self.pipes) if i not in results], timeout)
            if not ready:
                raise RuntimeError(f"no answer from a {self.label} in {timeout:.0f} s")
            for pipe in ready:
                index = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    results[index] = self.pipes[index].recv()
                except EOFError:
                    raise RuntimeError(f"{self.label} {index} died") from None
                if isinstance(results[index], Exception):
                    raise results[index]
        return [results[index] for index in range(len(self.pipes))]


class RankWorker(Worker):
    """One rank of a gloo group, which runs functions."""

    def open(self, size: int, port: int) -> None:
        """Joins the group, whose store listens on this port."""
        self.join(size, dist.TCPStore("127.0.0.1", port, is_master=False))

    def run(self, function: Callable[..., Any], *args: object) -> Any:
        """Calls `function(world, *args)`."""
        return function(self.world, *args)


class RankPool(WorkerPool):
    """`size` ranks on this host in one gloo group."""

    label = "rank"

    def __init__(self, size: int) -> None:
        super().__init__(RankWorker, size)

    def start(self) -> None:
        """Starts the ranks, and joins them to a group."""
        super().start()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.call("open", self.size, self.store.port)

    def run(self, function: Callable[..., Any], *args: object) -> list[Any]:
        """Calls `function(world, *args)` on every rank; returns the results by rank.

        Ranks import the function by name.
        """
        return self.call("run", function, *args)
