"""Processes that a benchmark starts and calls, such as the ranks of a gloo group on this host.

They stay alive between calls, which ranks that `launcher.cluster.ranks.start_ranks` starts do not;
they become ranks in the same way (`prepare_rank`, then the process group).
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
from colonnade.parallel.world import open_world

TIDY = 10  # seconds that the processes have to end by themselves


class Member:
    """The object inside one process: subclasses add the methods that the benchmark calls."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.group = ExitStack()

    def join(self, size: int, store: dist.Store) -> None:
        """Becomes rank `number` of a gloo group of `size` ranks on this machine, with 1 thread."""
        device = prepare_rank(RankEnvironment.on_one_host(self.number, size), threads=1)
        self.world = self.group.enter_context(open_world(self.number, size, device, store))

    def close(self) -> None:
        """Leaves the group, if this process joined one, together with its other ranks."""
        self.group.close()


def serve(kind: type[Member], called: str, number: int, pipe: Connection) -> None:
    """The process of a member: calls methods on request until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other side's to handle
    with suppress(BrokenPipeError):  # the other side has gone
        try:
            member = kind(number)
            pipe.send(None)
            while (request := pipe.recv()) is not None:
                name, args = request
                pipe.send(getattr(member, name)(*args))
            member.close()
        except EOFError:
            os._exit(1)  # whoever asked is dead
        except UserError as mistake:
            pipe.send(mistake)
        except Exception:  # whatever it was, the other side raises it
            pipe.send(RuntimeError(f"{called} {number}:\n{traceback.format_exc()}"))


class Crew:
    """So many processes, as a context manager: however it ends, none of them is left behind."""

    called: ClassVar[str] = "process"  # in messages

    def __init__(self, kind: type[Member], size: int) -> None:
        self.kind, self.size = kind, size
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            with suppress(OSError):
                for pipe in self.pipes:
                    pipe.send(None)
            for process in self.processes:
                process.join(TIDY)
        self.close()

    def start(self) -> None:
        """Start the processes, and wait until all are there."""
        context = multiprocessing.get_context("spawn")
        for number in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(self.kind, self.called, number, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        self.answers()

    def close(self) -> None:
        """End all processes, and with them everything that was made."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()

    def call(self, name: str, *args: object) -> list[Any]:
        """Call a method on all, and return what each answers."""
        for pipe in self.pipes:
            pipe.send((name, args))
        return self.answers()

    def answers(self, limit: float = 600.0) -> list[Any]:
        """One answer of each; the first failure ends the wait, since the others may hang on it."""
        answers: dict[int, Any] = {}
        while len(answers) < len(self.pipes):
            ready = wait([p for i, p in enumerate(self.pipes) if i not in answers], limit)
            if not ready:
                raise RuntimeError(f"no answer from a {self.called} in {limit:.0f} s")
            for pipe in ready:
                number = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[number] = self.pipes[number].recv()
                except EOFError:
                    raise RuntimeError(f"{self.called} {number} died") from None
                if isinstance(answers[number], Exception):
                    raise answers[number]
        return [answers[number] for number in range(len(self.pipes))]


class Rank(Member):
    """One rank of a gloo group: runs functions."""

    def open(self, size: int, port: int) -> None:
        """Joins the other ranks, which meet at the store on this port."""
        self.join(size, dist.TCPStore("127.0.0.1", port, is_master=False))

    def run(self, function: Callable[..., Any], *args: object) -> Any:
        """Calls `function(world, *args)`."""
        return function(self.world, *args)


class Ranks(Crew):
    """`size` ranks of this host in one gloo group."""

    called = "rank"

    def __init__(self, size: int) -> None:
        super().__init__(Rank, size)

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
