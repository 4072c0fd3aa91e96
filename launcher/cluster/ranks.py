"""Starts ranks on this host through torchrun, and prepares a process to be a rank.

`start_ranks` runs a function on every rank; `run_as_rank` is what each of these processes does. A
process that takes part as a rank, whoever started it, calls `prepare_rank` (device, threads,
memory), and then opens the process group with `colonnade.parallel.world.world`.
"""

import ctypes
import importlib
import json
import logging
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import torch

from colonnade.launcher.cluster.compiler import check_compiling
from colonnade.launcher.cluster.environment import (
    USER_MISTAKE,
    RankEnvironment,
    cores,
    requested_threads,
    settle_flight_recorder,
    settle_restarts,
)
from colonnade.launcher.cluster.signals import signal_handler
from colonnade.launcher.errors import UserError

SAVE_TIMEOUT = 3600  # seconds for which the launcher waits for stopping ranks to save

SINGLE_PROCESS = RankEnvironment.on_one_host(0, 1)


def prepare_rank(
    environment: RankEnvironment,
    device: str = "cpu",
    compiled: bool = False,
    threads: int | None = None,
) -> torch.device:
    """Sets the threads and the memory allocator of this rank's process, and returns its device.

    Args:
        environment: the rank, and the number of ranks on this host.
        device: `train.device`, as for `choose_device`.
        compiled: `train.compile`, as for `choose_device`.
        threads: of this rank; None: those of OMP_NUM_THREADS, or this rank's share of the cores.

    Raises:
        UserError: as `choose_device`.
    """
    settle_flight_recorder()
    if threads is None:
        settle_threads(environment)
    else:
        torch.set_num_threads(threads)
    chosen = choose_device(device, environment, compiled)
    settle_memory(chosen)
    return chosen


def choose_device(
    wanted: str, environment: RankEnvironment, compiled: bool = False
) -> torch.device:
    """The device of this rank: with `auto` a GPU if this host has one for each rank, else the CPU.

    Args:
        wanted: `auto`, `cpu` or `cuda`.
        environment: the rank, and the number of ranks on this host.
        compiled: sub-blocks are to be compiled on the device.

    Raises:
        UserError: `cuda` with fewer GPUs than ranks, or compilation on a CPU without its compiler.
    """
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= environment.local_size
    if wanted == "cuda" and not enough:
        raise UserError(
            f"train.device = 'cuda': this host has {torch.cuda.device_count()} usable GPUs for "
            f"{environment.local_size} ranks; lower --nproc, or set train.device = 'auto'"
        )
    use_gpu = enough and wanted != "cpu"
    device = torch.device("cuda", environment.local_rank) if use_gpu else torch.device("cpu")
    check_compiling(compiled, device)
    return device


def settle_threads(environment: RankEnvironment) -> None:
    """Sets this rank's threads: those of OMP_NUM_THREADS, or its share of the host's cores."""
    torch.set_num_threads(requested_threads() or threads_per_rank(environment.local_size))


def threads_per_rank(ranks: int) -> int:
    """The number of threads of each rank when `ranks` share this host's cores."""
    return max(1, cores() // ranks)


def settle_memory(device: torch.device) -> None:
    """On CPU, makes glibc keep all freed memory: mapping it again in every step is slow."""
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(trim, -1)  # never
    if not libc.mallopt(mmap, 1 << 30):  # more than older versions of glibc take
        libc.mallopt(mmap, 32 << 20)


def settle_determinism(deterministic: bool) -> None:
    """Allows only deterministic operators, if asked for; cuBLAS then needs a fixed workspace."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def end_with_launcher() -> None:
    """Makes the kernel kill this process when the process that started it ends, in any way."""
    if platform.system() == "Linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl.h
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def run_as_rank(function: str, arguments: str) -> None:
    """Calls the function that `start_ranks` named, in a process that torchrun started for it.

    Args:
        function: its name, as `module:function`, of this package.
        arguments: its keyword arguments, as JSON.
    """
    end_with_launcher()
    module, _, name = function.partition(":")
    if not module.startswith("colonnade."):
        raise ValueError(f"{function}: a rank runs functions of colonnade alone")
    getattr(importlib.import_module(module), name)(**json.loads(arguments))


def start_ranks(
    function: Callable[..., None] | str,
    arguments: Mapping[str, object],
    nproc: int,
    on_usr1: Callable[[], object] | None = None,
    restarts: int = 0,
) -> int:
    """Calls `function(**arguments)` on `nproc` ranks of this host through torchrun; waits for them.

    Every rank is a new process, `python -m colonnade.launcher _rank`, which finds its rank in the
    environment (`RankEnvironment`).

    Args:
        function: a function of a module, which ranks import by name; or that, `module:function`,
            for one that this process need not import.
        arguments: its keyword arguments; JSON can represent them.
        nproc: the number of ranks.
        on_usr1: what SIGUSR1 does; None: it ends the job like other signals.
        restarts: how often all ranks are started again after one of them has failed.

    Returns:
        0, or 128 + the signal that ended the job.

    Raises:
        UserError: the ranks reported it as a user's mistake.
        SystemExit: a rank failed otherwise, and has printed its traceback.
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
        max_restarts=restarts,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )
    if hasattr(config, "shutdown_timeout"):  # not in PyTorch 2.11
        config.shutdown_timeout = SAVE_TIMEOUT
    # torchrun needs one signal to handle; `torchrun_agent` handles the others
    config.signals_to_handle = "SIGQUIT"
    command = ["-u", "-m", "colonnade.launcher", "_rank"]
    name = function if isinstance(function, str) else f"{function.__module__}:{function.__name__}"
    command += [name, json.dumps(arguments)]
    try:
        with torchrun_agent(nproc, on_usr1):
            elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        mistakes = {f.message for f in error.failures.values() if f.exitcode == USER_MISTAKE}
        if mistakes:
            raise UserError("\n".join(sorted(mistakes))) from None
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        reason = f"signal {-code}" if code < 0 else f"status {code}"
        print(f"colonnade: rank {rank} ended first, with {reason}", file=sys.stderr)
        raise SystemExit(1) from None
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


@contextmanager
def torchrun_agent(nproc: int, on_usr1: Callable[[], object] | None = None) -> Iterator[None]:
    """Prepares this process to be torchrun's agent of `nproc` ranks; afterwards undoes it all.

    The first signal of `SAVE_FIRST` raises torchrun's exception; the agent then sends the signal to
    its ranks and waits for them. Later signals raise nothing: an exception would end that wait.
    torchrun does not remove its own handlers, which would turn every later signal of this process
    into an exception. `on_usr1` as in `start_ranks`.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    received: list[int] = []

    def raise_first(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1 and on_usr1 is not None:
            on_usr1()
            return
        received.append(number)
        if len(received) == 1:
            raise SignalException(f"signal {number}", signal.Signals(number))

    in_main_thread = threading.current_thread() is threading.main_thread()
    quit_handler = signal.getsignal(signal.SIGQUIT)
    threads = os.environ.get("OMP_NUM_THREADS")
    # without it torchrun sets 1 thread for each rank
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(nproc)))
    settle_restarts()
    logging.disable(logging.ERROR)  # torchrun logs failures that our own messages report
    try:
        saving = () if on_usr1 is None else (signal.SIGUSR1,)
        with signal_handler(raise_first, announce=True, saving=saving):
            yield
    finally:
        logging.disable(logging.NOTSET)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        if in_main_thread:
            signal.signal(signal.SIGQUIT, quit_handler)
