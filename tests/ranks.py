"""A pool of ranks: processes in one gloo group that serve all tests and run functions they send.

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
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.ranks import prepare_rank
from colonnade.parallel import mesh
from colonnade.parallel.world import World, open_world

T = TypeVar("T")

PRELOAD = [
    "pytest",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "colonnade.launcher.cluster.ranks",
    "colonnade.launcher.verify.run",
    "colonnade.parallel.world",
]
GRACE = 2.0  # seconds that the other ranks have to report after one has failed


def preloaded_context() -> ForkServerContext:
    """Starts processes from the fork server, which imports torch once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class RankError(AssertionError):
    """A rank raised, died or was still running at the limit; the message has its traceback."""


class Ranks:
    """A pool of `size` ranks, started at the first `run` and again after a failure."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[ForkServerProcess] = []
        self._connections: list[Connection] = []
        self._store: dist.TCPStore | None = None
        self._call_count = 0  # calls until now; a reply carries the number of its call

    def run(self, function: Callable[..., T], *args: object, limit: float = 120.0) -> list[T]:
        """Calls `function(rank, size, *args)` on every rank and returns the results by rank.

        `function` must be importable by name; arguments and results are pickled. When a call fails
        or is interrupted, all ranks are replaced.

        Raises:
            RankError: a rank raised, died, or did not return within `limit` seconds.
        """
        call = pickle.dumps((function, args))
        self._call_count += 1
        try:
            if not self._processes:
                self._start()
            for connection in self._connections:
                # test folders may have been added to the path since the start
                connection.send((self._call_count, sys.path))
                connection.send_bytes(call)
            results, failures = self._collect(limit)
        except BaseException:  # Ctrl-C or a test's time-out, while the ranks still run the call
            self._kill()
            raise
        if failures:
            self._kill()
            raise RankError("\n".join(f"rank {rank}: {failures[rank]}" for rank in failures))
        return [cast(T, results[rank]) for rank in range(self.size)]

    def close(self) -> None:
        """Asks the ranks to exit, waits for them, and kills those that do not."""
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join(30)
        self._kill()

    def _start(self) -> None:
        # a spawned rank would need seconds
        context = preloaded_context()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.size):
            connection, rank_connection = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.size, self._store.port, rank_connection),
                daemon=True,
            )
            process.start()
            # the rank has its own copy; with this one open, its death would not close the pipe
            rank_connection.close()
            self._processes.append(process)
            self._connections.append(connection)

    def _collect(self, limit: float) -> tuple[dict[int, object], dict[int, str]]:
        """Receives results and failures, by rank, in the order of their arrival."""
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
                    if number != self._call_count:
                        succeeded, value = False, f"answered call {number}, not {self._call_count}"
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
    """The pool of `size` ranks; one pool per size serves the session."""
    return _pools.setdefault(size, Ranks(size))


def one_per_shape(
    mesh_of: Callable[[dict[str, int], World], DeviceMesh],
) -> Callable[[dict[str, int], World], DeviceMesh]:
    """Makes `mesh_of` return one mesh for each shape, whatever the world."""
    meshes: dict[tuple[tuple[str, int], ...], DeviceMesh] = {}

    def cached(degrees: dict[str, int], world: World) -> DeviceMesh:
        key = tuple(degrees.items())
        if key not in meshes:
            meshes[key] = mesh_of(degrees, world)
        return meshes[key]

    return cached


def _serve(rank: int, size: int, port: int, connection: Connection) -> None:
    """Runs one rank: answers calls until the pool asks it to exit."""
    device = prepare_rank(RankEnvironment.on_one_host(rank, size), threads=1)
    # Groups hold threads, and DTensor's caches hold meshes, so all tests share one mesh per shape.
    mesh.mesh_of = one_per_shape(mesh.mesh_of)
    mesh.new_group = functools.cache(mesh.new_group)
    mesh.split_group = functools.cache(mesh.split_group)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    with open_world(rank, size, device, store):
        gc.freeze()
        while (header := _receive_header(connection)) is not None:
            number, sys.path[:] = header
            reply = _run_call(rank, size, connection.recv_bytes())
            connection.send(number)
            connection.send_bytes(reply)
            gc.collect()  # frees a test's reference cycles, FSDP's among them, before the next test
            gc.freeze()  # what is left, modules and caches, need not be looked at again


def _receive_header(connection: Connection) -> tuple[int, list[str]] | None:
    """Receives the number of the next call and its import path, or None to exit the rank."""
    with contextlib.suppress(EOFError):
        return cast("tuple[int, list[str]] | None", connection.recv())
    os._exit(1)  # the test process was killed, and nothing waits for a regular exit


def _run_call(rank: int, size: int, call: bytes) -> bytes:
    """Runs a pickled call; returns, pickled, whether it succeeded, and its result or traceback."""
    try:
        function, args = pickle.loads(call)
        return pickle.dumps((True, function(rank, size, *args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))
