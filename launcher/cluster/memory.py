"""Measures the peak memory of a process."""

import resource
import sys
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
