"""Two hosts on one machine: processes in network namespaces of their own, joined by a slow link.

A namespace has no name and lives as long as its process, and the link with it: however a run ends,
Ctrl-C and SIGKILL included, nothing is left behind.
"""

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from colonnade.launcher.errors import UserError

LINK, NETWORK = "wire", "fd00::"  # the interface, and what its addresses begin with
# Bytes of the largest packet: a network card would cut it up, here each costs the processor time.
PACKET = 256 * 1024
BURST, LATENCY = 2 * PACKET, 400  # bytes that pass at once, ms that a packet may queue
CLONE_NEWNET = 0x40000000  # sched.h
NEEDED = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}  # capability.h
TIDY = 10  # seconds that the processes have to end by themselves


def why_not() -> str | None:
    """Why this machine cannot play two hosts; None if it can, as far as can be told beforehand."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (held,) = (int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    lacking = [name for name, bit in NEEDED.items() if not held >> bit & 1]
    if lacking:
        return f"run it as root (this process lacks {' and '.join(lacking)})"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed (package iproute2)"
    return None


def command(*words: object) -> None:
    """Run a tool.

    Raises:
        UserError: it fails, as where the kernel lacks a module.
    """
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(str(w) for w in words)
        raise UserError(
            f"two hosts cannot be played on this machine: `{said}`: {done.stderr.strip()}"
        )


class Host:
    """What runs inside one of the two: subclasses add what the other side may call."""

    def __init__(self, number: int) -> None:
        self.number = number
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):
            reason = os.strerror(ctypes.get_errno())
            raise UserError(f"two hosts cannot be played on this machine: unshare: {reason}")

    @property
    def address(self) -> str:
        """Where the other host finds this one."""
        return f"{NETWORK}{self.number + 1}"

    def open(self) -> None:
        """Bring up the link."""
        sizes = ("gso_max_size", PACKET, "gro_max_size", PACKET)
        command("ip", "link", "set", "dev", LINK, *sizes)
        command("ip", "addr", "add", f"{self.address}/64", "dev", LINK, "nodad")
        for interface in ("lo", LINK):
            command("ip", "link", "set", interface, "up")

    def close(self) -> None:
        """End in good order, while the other does the same."""

    def limit(self, rate: float) -> None:
        """Send at most `rate` bytes per second from now on."""
        bucket = ("rate", f"{round(8 * rate)}bit", "burst", BURST, "latency", f"{LATENCY}ms")
        command("tc", "qdisc", "replace", "dev", LINK, "root", "tbf", *bucket)

    def sent(self) -> int:
        """Bytes sent over the link so far, headers included."""
        rows = Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()[2:]
        (counts,) = (row.split(":")[1] for row in rows if row.split(":")[0].strip() == LINK)
        return int(counts.split()[8])


def serve(kind: type[Host], number: int, pipe: Connection) -> None:
    """The process of a host: calls methods on request until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other side's to handle
    with suppress(BrokenPipeError):  # the other side has gone
        try:
            host = kind(number)
            pipe.send(None)
            while (request := pipe.recv()) is not None:
                name, args = request
                pipe.send(getattr(host, name)(*args))
            host.close()
        except EOFError:
            os._exit(1)  # whoever asked is dead
        except UserError as mistake:
            pipe.send(mistake)
        except Exception:
            pipe.send(RuntimeError(f"host {number}:\n{traceback.format_exc()}"))


class Hosts:
    """Both hosts, as a context manager.

    Raises:
        UserError: this machine cannot play two hosts.
    """

    def __init__(self, kind: type[Host]) -> None:
        self.kind = kind
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def __enter__(self) -> "Hosts":
        reason = why_not()
        if reason is not None:
            raise UserError(f"two hosts cannot be played on this machine: {reason}")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the addresses have no names
        context = multiprocessing.get_context("spawn")
        try:
            for number in range(2):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=serve, args=(self.kind, number, theirs), daemon=True
                )
                process.start()
                theirs.close()
                self.processes.append(process)
                self.pipes.append(ours)
            self.answers()
            one, two = (process.pid for process in self.processes)
            ends = ("name", LINK, "netns", one, "type", "veth", "peer", "name", LINK, "netns", two)
            command("ip", "link", "add", *ends)
            self.call("open")
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

    def close(self) -> None:
        """End both processes, and with them everything that was made."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()

    def call(self, name: str, *args: object) -> list[Any]:
        """Call a method on both, and return what each answers."""
        for pipe in self.pipes:
            pipe.send((name, args))
        return self.answers()

    def answers(self, limit: float = 600.0) -> list[Any]:
        """One answer of each; the first failure ends the wait, since the other may hang on it."""
        answers: dict[int, Any] = {}
        while len(answers) < len(self.pipes):
            ready = wait([p for i, p in enumerate(self.pipes) if i not in answers], limit)
            if not ready:
                raise RuntimeError(f"no answer from the hosts in {limit:.0f} s")
            for pipe in ready:
                number = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[number] = self.pipes[number].recv()
                except EOFError:
                    raise RuntimeError(f"host {number} died") from None
                if isinstance(answers[number], Exception):
                    raise answers[number]
        return [answers[number] for number in range(len(self.pipes))]
