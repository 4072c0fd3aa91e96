"""Reads the environment variables: the rank of a process (from torchrun or srun), and settings.

No other file reads them. This file does not import torch, so that a mistake in a recipe is reported
within a second.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from colonnade.launcher.errors import UserError

USER_MISTAKE = 2  # exit status
SPECIAL_STEPS = 0xFFFFFFF0  # SLURM gives batch scripts and shells step numbers from this one on
# The only variables that a run's folder records. Each is a number, a switch, or a name of a device,
# a host or a job: a variable that may hold a secret has no place among them.
RECORDED = (
    "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_CLUSTER_NAME", "SLURM_CPUS_ON_NODE",
    "SLURM_CPUS_PER_TASK", "SLURM_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE",
    "SLURM_GPUS_PER_TASK", "SLURM_JOB_END_TIME", "SLURM_JOB_ID", "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES", "SLURM_JOB_PARTITION", "SLURM_JOB_QOS", "SLURM_JOB_START_TIME",
    "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_RESTART_COUNT", "SLURM_STEP_ID",
    "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_TASKS_PER_NODE",
    "SLURM_TOPOLOGY_ADDR", "NCCL_ALGO", "NCCL_BUFFSIZE", "NCCL_CROSS_NIC", "NCCL_CUMEM_ENABLE",
    "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_IB_GID_INDEX", "NCCL_IB_HCA",
    "NCCL_IB_QPS_PER_CONNECTION", "NCCL_IB_RETRY_CNT", "NCCL_IB_SL", "NCCL_IB_TC",
    "NCCL_IB_TIMEOUT", "NCCL_MAX_CTAS", "NCCL_MAX_NCHANNELS", "NCCL_MIN_CTAS",
    "NCCL_MIN_NCHANNELS", "NCCL_NET", "NCCL_NET_GDR_LEVEL", "NCCL_NVLS_ENABLE",
    "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_PROTO", "NCCL_SHM_DISABLE",
    "NCCL_SOCKET_FAMILY", "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_NTHREADS", "NCCL_TOPO_FILE",
    "GLOO_SOCKET_IFNAME", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT",
    "TORCH_CPP_LOG_LEVEL", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_DISTRIBUTED_DEBUG",
    "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_NCCL_AVOID_RECORD_STREAMS", "TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_DUMP_ON_TIMEOUT",
    "TORCH_NCCL_ENABLE_MONITORING", "TORCH_NCCL_ENABLE_TIMING",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "TORCH_NCCL_HIGH_PRIORITY",
    "TORCH_NCCL_TRACE_BUFFER_SIZE", "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING", "CUDA_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "ATEN_CPU_CAPABILITY", "MKL_NUM_THREADS",
    "OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS",
)  # fmt: skip


@dataclass(frozen=True)
class RankEnvironment:
    """The rank of a process among those that torchrun or srun started.

    Attributes:
        rank: index of this process among all ranks.
        size: the number of all ranks (the world size).
        local_rank: index of this process among the ranks of its host.
        local_size: the number of ranks on its host.
        from_srun: srun started the process, not torchrun.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    from_srun: bool = False

    @classmethod
    def on_one_host(cls, rank: int, size: int) -> "RankEnvironment":
        """A rank of a job whose `size` ranks all run on this host."""
        return cls(rank, size, rank, size)

    @classmethod
    def from_environment(cls) -> "RankEnvironment | None":
        """Reads the rank of this process; None if neither torchrun nor srun started it.

        Raises:
            UserError: srun started the process, and the host of rank 0 is unknown.
        """
        environment = os.environ
        if "RANK" in environment and "WORLD_SIZE" in environment:
            return cls(
                rank=int(environment["RANK"]),
                size=int(environment["WORLD_SIZE"]),
                local_rank=int(environment.get("LOCAL_RANK", 0)),
                local_size=int(environment.get("LOCAL_WORLD_SIZE", 1)),
            )
        return cls._from_srun()

    @classmethod
    def _from_srun(cls) -> "RankEnvironment | None":
        """Reads the rank of a task of a SLURM step; None outside of a step of several tasks.

        Sets MASTER_ADDR and MASTER_PORT, which the rendezvous reads, where they are not set.
        """
        environment = os.environ
        size = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1)
        step = environment.get("SLURM_STEP_ID", "")
        if size == 1 or not step.isdecimal() or int(step) >= SPECIAL_STEPS:
            return None
        rank_environment = cls(
            rank=int(environment["SLURM_PROCID"]),
            size=size,
            local_rank=int(environment["SLURM_LOCALID"]),
            local_size=_tasks_on_this_node(size),
            from_srun=True,
        )
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = _first_node(environment.get("SLURM_STEP_NODELIST"))
        if (
            "MASTER_PORT" not in environment
        ):  # the same on all hosts, and a different one for each step
            number = int(environment.get("SLURM_JOB_ID", 0)) * 64 + int(step)
            environment["MASTER_PORT"] = str(20000 + number % 20000)
        return rank_environment


def restart_count() -> int:
    """How often torchrun, or SLURM by a requeue, has started this job again."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return sum(int(os.environ.get(name) or 0) for name in names)


OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # a new store for the ranks of every start


def settle_restarts() -> None:
    """Makes torchrun's agent give the ranks a new store at every start. Its own, which they share
    otherwise, keeps the addresses of ranks that are dead, and gloo tries to connect to them
    (https://github.com/pytorch/pytorch/issues/135712)."""
    os.environ.setdefault(OWN_STORE, "1")


def advice_on_restarts() -> str | None:
    """What a user who has started torchrun must know of its restarts; None: nothing."""
    can_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0
    if not has_agent() or not can_restart or os.environ.get(OWN_STORE) == "1":
        return None
    return (
        "torchrun may restart these ranks, and gloo cannot connect them again unless "
        f"{OWN_STORE}=1 is in the environment of torchrun on every host"
    )


def has_agent() -> bool:
    """Whether an agent of torchrun started this process, and so is its parent."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def scheduler_job() -> str | None:
    """The scheduler's number of this job, as `SLURM job 123`; None without a scheduler."""
    number = os.environ.get("SLURM_JOB_ID")
    return f"SLURM job {number}" if number else None


def job_nodes() -> str | None:
    """The nodes of this job of SLURM, in its notation, such as `n[1-3]`; None outside of a job."""
    return os.environ.get("SLURM_JOB_NODELIST")


def recorded_variables() -> dict[str, str]:
    """The variables of `RECORDED` that are set, by name."""
    return {name: os.environ[name] for name in RECORDED if name in os.environ}


def time_collectives() -> None:
    """Makes NCCL record how long its collectives take, unless the user has decided otherwise.

    It has an effect on process groups that are opened afterwards.
    """
    os.environ.setdefault("TORCH_NCCL_ENABLE_TIMING", "1")


def _tasks_on_this_node(size: int) -> int:
    """The number of tasks of this SLURM step that run on this node.

    SLURM writes tasks per node as `2(x3),1`: two on each of three nodes, one on the fourth.
    """
    environment = os.environ
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    text = next((environment[name] for name in names if name in environment), str(size))
    counts: list[int] = []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(nodes or 1)
    return counts[min(int(environment.get("SLURM_NODEID", 0)), len(counts) - 1)]


def _first_node(nodes: str | None) -> str:
    """The name of the first host of a node list: rank 0 runs there, and all ranks connect to it.

    Where the name has no address, the address that SLURM itself uses.
    """
    if nodes and "[" not in nodes and "," not in nodes:
        return nodes if has_address(nodes) else _slurm_address(nodes)
    command = ["scontrol", "show", "hostnames", *([nodes] if nodes else [])]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
        first = finished.stdout.split()[0]
        return first if has_address(first) else _slurm_address(first)
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            "srun started several tasks, and scontrol does not tell the name of the first host: "
            "set MASTER_ADDR to it (and MASTER_PORT to a free port), or start the ranks by torchrun"
        ) from None


def has_address(host: str) -> bool:
    """Whether this host knows an address of another one."""
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def _slurm_address(node: str) -> str:
    """The address by which SLURM reaches a node; its name where scontrol does not tell."""
    command = ["scontrol", "show", "node", "--oneliner", node]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return node
    found = re.search(r"\bNodeAddr=(\S+)", finished.stdout)
    return found[1] if found else node


def cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def requested_threads() -> int | None:
    """The number of threads that OMP_NUM_THREADS requests; None if it is unset or no number."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(text) if text.isdecimal() and int(text) > 0 else None


def cache_folder() -> Path:
    """The folder in which tokenised data and measurements are cached for this user's later runs."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "colonnade"


def settle_flight_recorder() -> None:
    """Makes PyTorch remember the last collectives of each process group, from which a failure is
    explained, unless the user has set how many."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def instruction_limits() -> str:
    """The variables by which the user limits the instruction sets of oneDNN and MKL, as text."""
    names = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    return " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


# What changes how ranks communicate or compute: names, and begins of names. None is a secret.
SETTINGS = (
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_MAX_CONNECTIONS",
    "MKL_ENABLE_INSTRUCTIONS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip
SETTINGS_PREFIXES = ("GLOO_", "NCCL_", "TORCH_GLOO_", "TORCH_NCCL_")


def communication_settings() -> dict[str, str]:
    """The environment variables that change how ranks communicate or compute, by name."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name in SETTINGS or name.startswith(SETTINGS_PREFIXES)
    }


def gloo_interface() -> str | None:
    """The network interface that the user wants gloo to use (the first of several); None: unset."""
    return os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0] or None


def settle_gloo_interface(name: str | None) -> None:
    """Makes gloo use this interface, unless the user has named one; None changes nothing."""
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def master_address() -> tuple[str, str]:
    """The host and the port of the store of a job's ranks, as a launcher has set them.

    Raises:
        UserError: they are not set.
    """
    found = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if None in found:
        raise UserError(
            "RANK is set, and MASTER_ADDR or MASTER_PORT is not: start ranks by torchrun or srun, "
            "or set both to the host of rank 0 and a free port of it"
        )
    return cast("tuple[str, str]", found)


def report_failure(message: str, started: bool) -> None:
    """Prints a user's mistake, and writes it to torchrun's error file where there is one.

    `started` says that our launcher started this rank: the launcher reads the error file and prints
    the message once for all ranks, so the rank itself prints nothing.
    """
    write_error_file(message)
    if not started:
        print(f"colonnade: {message}", file=sys.stderr, flush=True)


def write_error_file(message: str) -> None:
    """Writes why this rank ends to torchrun's error file, where there is one: its agent prints it
    in its last lines."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        text = json.dumps({"message": message, "timestamp": int(time.time())})
        Path(path).write_text(text, encoding="utf-8")
