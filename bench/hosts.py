"""Simulates two hosts on one machine: two processes in separate network namespaces, joined by a
rate-limited link.

A namespace has no name and lives as long as its process, and so does the link: however a run ends,
Ctrl-C and SIGKILL included, nothing remains.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

from colonnade.bench.worker_pool import Worker, WorkerPool
from colonnade.launcher.errors import UserError

INTERFACE = "wire"  # the name of the link's interface on either host
ADDRESS_PREFIX = "fd00::"  # of the hosts' IPv6 addresses
# Bytes of the largest packet. A network card would segment it; a namespace has no card, so every
# packet costs processor time.
MAX_PACKET = 256 * 1024
BURST = 2 * MAX_PACKET  # bytes that may pass at once
QUEUE_LATENCY = 400  # ms for which a packet may queue
CLONE_NEWNET = 0x40000000  # sched.h
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}  # bits, by capability.h
UNSUPPORTED = "cannot simulate two hosts on this machine"


def unsupported_reason() -> str | None:
    """Why this machine cannot simulate two hosts; None if no obstacle shows before the attempt."""
    if sys.platform != "linux":
        return "network namespaces exist on Linux only"
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (effective,) = (int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    missing = [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        return f"run it as root (this process lacks {' and '.join(missing)})"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed (package iproute2)"
    return None


def run_command(*words: object) -> None:
    """Runs a command-line tool.

    Raises:
        UserError: the command fails, for instance because the kernel lacks a module.
    """
    command = [str(word) for word in words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"{UNSUPPORTED}: `{' '.join(command)}`: {result.stderr.strip()}")


class Host(Worker):
    """The process of one host, in its own network namespace."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):
            reason = os.strerror(ctypes.get_errno())
            raise UserError(f"{UNSUPPORTED}: unshare: {reason}")

    @property
    def address(self) -> str:
        """The IPv6 address of this host on the link."""
        return f"{ADDRESS_PREFIX}{self.index + 1}"

    def open(self) -> None:
        """Brings up the link."""
        sizes = ("gso_max_size", MAX_PACKET, "gro_max_size", MAX_PACKET)
        run_command("ip", "link", "set", "dev", INTERFACE, *sizes)
        run_command("ip", "addr", "add", f"{self.address}/64", "dev", INTERFACE, "nodad")
        for interface in ("lo", INTERFACE):
            run_command("ip", "link", "set", interface, "up")

    def limit(self, rate: float) -> None:
        """Limits what this host sends to `rate` bytes per second from now on."""
        bucket = ("rate", f"{round(8 * rate)}bit", "burst", BURST, "latency", f"{QUEUE_LATENCY}ms")
        run_command("tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *bucket)

    def bytes_sent(self) -> int:
        """Bytes sent over the link so far, headers included."""
        rows = Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()[2:]
        (counts,) = (row.split(":")[1] for row in rows if row.split(":")[0].strip() == INTERFACE)
        return int(counts.split()[8])


class Hosts(WorkerPool):
    """Both hosts, as a context manager.

    Raises:
        UserError: this machine cannot simulate two hosts.
    """

    label = "host"

    def __init__(self, host_type: type[Host]) -> None:
        super().__init__(host_type, 2)

    def start(self) -> None:
        """Starts both hosts, and connects them by the link."""
        reason = unsupported_reason()
        if reason is not None:
            raise UserError(f"{UNSUPPORTED}: {reason}")
        # Addresses on the link have no host names, about which c10d would warn.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        super().start()
        first, second = (process.pid for process in self.processes)
        one_end = ("name", INTERFACE, "netns", first)
        other_end = ("name", INTERFACE, "netns", second)
        run_command("ip", "link", "add", *one_end, "type", "veth", "peer", *other_end)
        self.call("open")
