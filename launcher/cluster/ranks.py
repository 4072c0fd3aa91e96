"""What a rank settles on its host (device, threads, memory), and how we start ranks of our own."""

import ctypes
import logging
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from colonnade.launcher.cluster.environment import (
    USER_MISTAKE,
    RankEnvironment,
    chosen_threads,
    cores,
)
from colonnade.launcher.cluster.signals import handled
from colonnade.launcher.errors import UserError

SAVING = 3600  # seconds that stopping ranks are given to save

ALONE = RankEnvironment(0, 1, 0, 1)


def choose_device(wanted: str, place: RankEnvironment) -> torch.device:
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


def settle_threads(place: RankEnvironment) -> None:
    """Share this host's cores among its ranks, unless OMP_NUM_THREADS says how many each takes."""
    torch.set_num_threads(chosen_threads() or share_of_cores(place.local_size))


def share_of_cores(ranks: int) -> int:
    """Threads of each of so many ranks on this host."""
    return max(1, cores() // ranks)


def settle_memory(device: torch.device) -> None:
    """On CPU, have glibc keep all freed memory: to fetch it anew every step is slow."""
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(trim, -1)  # never
    if not libc.mallopt(mmap, 1 << 30):  # more than older versions of glibc take
        libc.mallopt(mmap, 32 << 20)


def settle_determinism(deterministic: bool) -> None:
    """Only deterministic operators; cuBLAS wants a fixed workspace for that."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def end_with_launcher() -> None:
    """Have the kernel end this rank when the process that started it ends, however that ends."""
    if platform.system() == "Linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl.h
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


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
    config.signals_to_handle = "SIGQUIT"  # it wants one; `as_agent` has the others
    command = [sys.executable, "-u", "-m", "colonnade.launcher", *arguments]
    try:
        with as_agent(nproc):
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
    return 0


@contextmanager
def as_agent(nproc: int) -> Iterator[None]:
    """Be torchrun's agent of `nproc` ranks, and leave nothing of it in this process.

    The first signal of `SAVE_FIRST` is raised as torchrun's exception, upon which the agent sends
    it to its ranks and waits for them. Later ones are not: they would end the wait. torchrun's own
    handlers, which stay, would make every later signal of this process an ordinary exception.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    raised: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        raised.append(number)
        if len(raised) == 1:
            raise SignalException(f"signal {number}", signal.Signals(number))

    in_main_thread = threading.current_thread() is threading.main_thread()
    quit_handler = signal.getsignal(signal.SIGQUIT)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(share_of_cores(nproc)))  # or torchrun takes 1
    logging.disable(logging.ERROR)  # torchrun's log of what we tell in our own words
    try:
        with handled(pass_on, answers=True):
            yield
    finally:
        logging.disable(logging.NOTSET)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        if in_main_thread:
            signal.signal(signal.SIGQUIT, quit_handler)
