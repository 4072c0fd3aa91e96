"""What the environment says: a process's rank (from torchrun, or from SLURM's srun), and folders.

The only file that reads it. It imports no torch: whatever refuses a recipe
does so before a second has passed.
"""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from colonnade.launcher.errors import UserError

USER_MISTAKE = 2  # exit status
SPECIAL_STEPS = 0xFFFFFFF0  # SLURM numbers the steps of batch scripts and shells from here on


@dataclass(frozen=True)
class RankEnvironment:
    """One process among those that torchrun or srun started."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    from_srun: bool = False

    @classmethod
    def from_environment(cls) -> "RankEnvironment | None":
        """This process's place, or None if no launcher started it.

        Raises:
            UserError: srun started it, and the environment does not say how ranks meet.
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
        """The place of a task among several of one step; None outside of such a step."""
        environment = os.environ
        size = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1)
        step = environment.get("SLURM_STEP_ID", "")
        if size == 1 or not step.isdecimal() or int(step) >= SPECIAL_STEPS:
            return None
        place = cls(
            rank=int(environment["SLURM_PROCID"]),
            size=size,
            local_rank=int(environment["SLURM_LOCALID"]),
            local_size=_tasks_of_this_node(size),
            from_srun=True,
        )
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = _first_node(environment.get("SLURM_STEP_NODELIST"))
        if "MASTER_PORT" not in environment:  # the same on all hosts, another one for each step
            number = int(environment.get("SLURM_JOB_ID", 0)) * 64 + int(step)
            environment["MASTER_PORT"] = str(20000 + number % 20000)
        return place


def _tasks_of_this_node(size: int) -> int:
    """SLURM writes tasks per node as `2(x3),1`: two on each of three nodes, one on the fourth."""
    environment = os.environ
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    text = next((environment[name] for name in names if name in environment), str(size))
    counts: list[int] = []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(nodes or 1)
    return counts[min(int(environment.get("SLURM_NODEID", 0)), len(counts) - 1)]


def _first_node(nodes: str | None) -> str:
    """The host on which rank 0 runs, which the others connect to."""
    if nodes and "[" not in nodes and "," not in nodes:
        return nodes
    command = ["scontrol", "show", "hostnames", *([nodes] if nodes else [])]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        return shown.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            "srun started several tasks, and scontrol does not tell the name of the first host: "
            "set MASTER_ADDR to it (and MASTER_PORT to a free port), or start the ranks by torchrun"
        ) from None


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen_threads() -> int | None:
    """Threads that the user asks for by OMP_NUM_THREADS; None leaves it to us."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(text) if text.isdecimal() and int(text) > 0 else None


def cache_folder() -> Path:
    """Where tokenised data and measurements are kept for later runs of this user."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "colonnade"


def instruction_limits() -> str:
    """What the user allows the libraries of products of the processor's instructions."""
    names = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    return " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


def report_failure(message: str, started: bool) -> None:
    """Say a mistake, or hand it to the launcher that `started` this rank, which says it for all."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        text = json.dumps({"message": message, "timestamp": int(time.time())})
        Path(path).write_text(text, encoding="utf-8")
    if not started:
        print(f"colonnade: {message}", file=sys.stderr, flush=True)
