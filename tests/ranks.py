"""A pool of ranks: processes in one gloo group that live across tests and run what tests send.

results = pool(4).run(function, *args)  # function(rank, world_size, *args) on every rank
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.ranks import prepare_rank
from colonnade.parallel import mesh
from colonnade.parallel.world import open_world

T = TypeVar("T")

PRELOAD = [
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "colonnade.launcher.cluster.ranks",
    "colonnade.parallel.world",
]
GRACE = 2.0  # seconds that the other ranks have to report, once one has failed


class RankError(AssertionError):
    """A rank raised, died or was still running at the limit; the message has its traceback."""


class Ranks:
    """`size` ranks, started at the first `run` and again after a failure."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[ForkServerProcess] = []
        self._connections: list[Connection] = []
        self._store: dist.TCPStore | None = None
        self._asked = 0  # calls so far; an answer carries the number of its call

    def run(self, function: Callable[..., T], *args: object, limit: float = 120.0) -> list[T]:
        """Call `function(rank, size, *args)` on every rank and return the results by rank.

        `function` is one that can be imported by name; arguments and results are pickled. RankError
        if a rank raises, dies, or does not end in `limit` seconds: all ranks are then replaced, as
        they are when the call is interrupted.
        """
        call = pickle.dumps((function, args))
        self._asked += 1
        try:
            if not self._processes:
                self._start()
            for connection in self._connections:
                # test folders may have been added to the path since the start
                connection.send((self._asked, sys.path))
                connection.send_bytes(call)
            results, failures = self._collect(limit)
        except BaseException:  # Ctrl-C, a test's time-out: the ranks are in the middle of the call
            self._kill()
            raise
        if failures:
            self._kill()
            raise RankError("\n".join(f"rank {rank}: {failures[rank]}" for rank in failures))
        return [cast(T, results[rank]) for rank in range(self.size)]

    def close(self) -> None:
        """End the ranks in good order."""
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join(30)
        self._kill()

    def _start(self) -> None:
        # The fork server imports torch once for all ranks; a spawned rank would need seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, self._store.port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _collect(self, limit: float) -> tuple[dict[int, object], dict[int, str]]:
        """Results and failures by rank, in the order they came in."""
        results: dict[int, object] = {}
        failures: dict[int, str] = {}
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        start = time.monotonic()
        end = start + limit
        while waiting and (ready := wait(list(waiting), max(0.0, end - time.monotonic()))):
            for connection in cast("list[Connection]", ready):
                rank = waiting.pop(connection)
                try:
                    number = connection.recv()
                    succeeded, value = pickle.loads(connection.recv_bytes())
                    if number != self._asked:
                        succeeded, value = False, f"answered call {number}, not {self._asked}"
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(GRACE)
                    succeeded, value = False, f"died, exit code {self._processes[rank].exitcode}"
                if succeeded:
                    results[rank] = value
                else:
                    failures[rank] = value
                    end = min(end, time.monotonic() + GRACE)
        for rank in sorted(waiting.values()):
            failures[rank] = f"was still running after {time.monotonic() - start:.0f} s"
        return results, failures

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections, self._store = [], [], None


_pools: dict[int, Ranks] = {}


def pool(size: int) -> Ranks:
    """The pool of `size` ranks, one per size and session."""
    return _pools.setdefault(size, Ranks(size))


def _serve(rank: int, size: int, port: int, connection: Connection) -> None:
    """One rank: take calls until told to end."""
    device = prepare_rank(RankEnvironment.on_one_host(rank, size), threads=1)
    # Every group keeps threads, and DTensor's caches keep meshes: one of a shape serves all tests.
    mesh.init_device_mesh = functools.cache(init_device_mesh)
    mesh.split_group = functools.cache(mesh.split_group)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    with open_world(rank, size, device, store):
        gc.freeze()
        while (question := _next(connection)) is not None:
            number, sys.path[:] = question
            answer = _answer(rank, size, connection.recv_bytes())
            connection.send(number)
            connection.send_bytes(answer)
            gc.collect()  # what a test leaves in cycles, FSDP's too, is gone before the next


def _next(connection: Connection) -> tuple[int, list[str]] | None:
    """The number of the next call and the import path for it; None ends the rank."""
    with contextlib.suppress(EOFError):
        return cast("tuple[int, list[str]] | None", connection.recv())
    os._exit(1)  # the tests were killed: there is nobody to end in good order for


def _answer(rank: int, size: int, call: bytes) -> bytes:
    try:
        function, args = pickle.loads(call)
        return pickle.dumps((True, function(rank, size, *args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))
