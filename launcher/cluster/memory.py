"""Measures memory: the peak of a process, and what its host has available."""

import ctypes
import os
import platform
import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


def resident_mib() -> float:
    """The peak resident memory of this program so far, in MiB.

    On Linux it is read from /proc, because `ru_maxrss` is inherited through exec from the process
    that started this one.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 2**20 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak_gib(device: torch.device) -> float:
    """The peak memory of this rank so far, in GiB: on its GPU, or on CPU of the program."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resident_mib() / 1024


def available_bytes(root: Path = Path("/")) -> int:
    """The bytes that programs may still take of this host's memory: what the kernel says, and what
    the limits of this process's control groups leave. Without /proc it is all of the memory.

    Args:
        root: of the file system.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (line,) = (s for s in meminfo.read_text().splitlines() if s.startswith("MemAvailable:"))
    return max(0, min([int(line.split()[1]) * 1024, *below_limits(root)]))


def below_limits(root: Path) -> Iterator[int]:
    """Yields the bytes that each control group of this process with a limit has left, caches of
    files counting as free: of version 2, or of version 1 where that has the memory."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # within a container the path may be one of the host's, of which only the top is mounted
        folder = top / path.lstrip("/")
        for group in [folder, *folder.parents][: len(folder.relative_to(top).parts) + 1]:
            limit, usage, prefix = group / names[0], group / names[1], names[2]
            if limit.exists() and (text := limit.read_text().strip()) != "max":
                used = int(usage.read_text()) - cached_files(group / "memory.stat", prefix)
                yield int(text) - used


def cached_files(path: Path, prefix: str) -> int:
    """Returns the bytes of files that a control group's memory caches, by its statistics."""
    statistics = dict(line.split() for line in path.read_text().splitlines())
    return sum(int(statistics[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))


def host_id(root: Path = Path("/")) -> tuple[str, str]:
    """The name of this host, and what tells it from others of that name: the id of its kernel's
    start, where there is one."""
    boot = root / "proc/sys/kernel/random/boot_id"
    return socket.gethostname(), boot.read_text().strip() if boot.exists() else ""


def return_freed_memory() -> None:
    """Makes glibc return memory to the system that this program has freed, which it otherwise keeps
    (`ranks.settle_memory`)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
