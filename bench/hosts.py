"""Two hosts on one machine: processes in network namespaces of their own, joined by a slow link.

A namespace has no name and lives as long as its process, and the link with it: however a run ends,
Ctrl-C and SIGKILL included, nothing is left behind.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

from colonnade.bench.crew import Crew, Member
from colonnade.launcher.errors import UserError

LINK, NETWORK = "wire", "fd00::"  # the interface, and what its addresses begin with
# Bytes of the largest packet: a network card would cut it up, here each costs the processor time.
PACKET = 256 * 1024
BURST, LATENCY = 2 * PACKET, 400  # bytes that pass at once, ms that a packet may queue
CLONE_NEWNET = 0x40000000  # sched.h
NEEDED = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}  # capability.h


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


class Host(Member):
    """What runs inside one of the two."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
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

    def limit(self, rate: float) -> None:
        """Send at most `rate` bytes per second from now on."""
        bucket = ("rate", f"{round(8 * rate)}bit", "burst", BURST, "latency", f"{LATENCY}ms")
        command("tc", "qdisc", "replace", "dev", LINK, "root", "tbf", *bucket)

    def sent(self) -> int:
        """Bytes sent over the link so far, headers included."""
        rows = Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()[2:]
        (counts,) = (row.split(":")[1] for row in rows if row.split(":")[0].strip() == LINK)
        return int(counts.split()[8])


class Hosts(Crew):
    """Both hosts, as a context manager.

    Raises:
        UserError: this machine cannot play two hosts.
    """

    called = "host"

    def __init__(self, kind: type[Host]) -> None:
        super().__init__(kind, 2)

    def start(self) -> None:
        """Start both, and join them by the link."""
        reason = why_not()
        if reason is not None:
            raise UserError(f"two hosts cannot be played on this machine: {reason}")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the addresses have no names
        super().start()
        one, two = (process.pid for process in self.processes)
        ends = ("name", LINK, "netns", one, "type", "veth", "peer", "name", LINK, "netns", two)
        command("ip", "link", "add", *ends)
        self.call("open")
