"""How a process learns its rank, and how ranks are started: torchrun, or our own call of it.

The only file that reads the environment of a job.
"""

import ctypes
import json
import logging
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from colonnade.launcher.errors import UserError

USER_MISTAKE = 2  # exit status
SAVING = 3600  # seconds that stopping ranks are given to save


@dataclass(frozen=True)
class Place:
    """One process among those that torchrun started."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls) -> "Place | None":
        """This process's place, or None if no launcher started it."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return None
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size, local_rank, local_size = (
            int(os.environ.get(name, default)) for name, default in zip(names, "0101", strict=True)
        )
        return cls(rank, size, local_rank, local_size)


ALONE = Place(0, 1, 0, 1)


def choose_device(wanted: str, place: Place) -> torch.device:
    """The device of this rank: `auto` is a GPU each where there are enough, else the CPU."""
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= place.local_size
    if wanted == "cuda" and not enough:
        raise UserError(
            f"train.device = 'cuda': this host has {torch.cuda.device_count()} usable GPUs for "
            f"{place.local_size} ranks; lower --nproc, or set train.device = 'auto'"
        )
    return (
        torch.device("cuda", place.local_rank)
        if enough and wanted != "cpu"
        else torch.device("cpu")
    )


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settle_threads(place: Place) -> None:
    """Share this host's cores among its ranks."""
    torch.set_num_threads(max(1, cores() // place.local_size))


def settle_memory(device: torch.device) -> None:
    """On CPU, have glibc keep all freed memory: to fetch it anew every step is slow."""
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(trim, -1)  # never
    libc.mallopt(mmap, 1 << 30)


def settle_determinism(deterministic: bool) -> None:
    """Only deterministic operators; cuBLAS wants a fixed workspace for that."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def report_failure(message: str, started: bool) -> None:
    """Say a mistake, or hand it to the launcher that `started` this rank, which says it for all."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        text = json.dumps({"message": message, "timestamp": int(time.time())})
        Path(path).write_text(text, encoding="utf-8")
    if not started:
        print(f"colonnade: {message}", file=sys.stderr, flush=True)


def start_ranks(arguments: list[str], nproc: int) -> int:
    """Run `python -m colonnade.launcher ARGUMENTS` on `nproc` ranks of this host through torchrun.

    Returns:
        0, or 128 + the signal that ended the job.

    Raises:
        UserError: what the ranks reported as a user's mistake.
        SystemExit: another failure, whose traceback the rank has printed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=f"colonnade-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )
    if hasattr(config, "shutdown_timeout"):  # not in PyTorch 2.11
        config.shutdown_timeout = SAVING
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks choose theirs; torchrun would warn
    logging.disable(logging.ERROR)  # torchrun's log of what we tell in our own words
    command = [sys.executable, "-u", "-m", "colonnade.launcher", *arguments]
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        mistakes = {f.message for f in error.failures.values() if f.exitcode == USER_MISTAKE}
        if mistakes:
            raise UserError("\n".join(sorted(mistakes))) from None
        rank, failure = error.get_first_failure()
        ended = (
            f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"status {failure.exitcode}"
        )
        print(f"colonnade: rank {rank} failed first, with {ended}", file=sys.stderr)
        raise SystemExit(1) from None
    except SignalException as stop:
        return 128 + int(stop.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0
