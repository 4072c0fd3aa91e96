"""How much memory a process has used at most."""

import resource
import sys
from pathlib import Path

import torch


def resident_mib() -> float:
    """Largest resident memory of this program so far, in MiB.

    On Linux `ru_maxrss` is inherited from the process that started this one, through exec.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 2**20 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak_gib(device: torch.device) -> float:
    """Largest memory of this rank so far, in GiB: its GPU's, or on CPU the program's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resident_mib() / 1024
