"""Small training jobs on several hosts: their commands, their ranks, their losses."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.hosts import Host, environment, torchrun, wait_until

from colonnade.launcher.train.metrics import read_metrics

# fp64, so that the losses of all layouts are equal to 1e-9.
SMALL = [
    "quickstart", "model.repeat=1", "model.hidden=32", "model.heads=2", "model.kv_heads=2",
    "train.seq_len=32", "train.precision=fp64", "train.validate_rows=0", "train.sample=0",
    "train.global_batch=8", "train.micro_batch=1", "checkpoint.keep=100",
]  # fmt: skip
THREADS = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class TrainingJob:
    """A run that agents of torchrun on several hosts train.

    Attributes:
        run: its folder.
        agents: by the name of the host.
    """

    def __init__(
        self, run: Path, *fields: str, nodes: str, ranks: int = 1, restarts: int = 0
    ) -> None:
        self.run, self.nodes, self.ranks, self.restarts = run, nodes, ranks, restarts
        self.arguments = ["train", *SMALL, *fields, "--run-dir", str(run), "--resume", "auto"]
        self.agents: dict[str, subprocess.Popen[str]] = {}

    def start(self, host: Host, store: Host, **variables: str) -> None:
        """Starts an agent on a host; what it and its ranks print goes into `HOST.log`."""
        self.run.parent.mkdir(exist_ok=True)
        with self.log(host.name).open("a") as log:
            self.agents[host.name] = torchrun(
                host, self.arguments, nodes=self.nodes, store=store, ranks=self.ranks,
                restarts=self.restarts, env=environment(**THREADS | variables), stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def log(self, host: str) -> Path:
        """Returns the file of a host's output."""
        return self.run.with_name(f"{self.run.name}-{host}.log")

    def output(self) -> str:
        """Returns what all hosts have printed."""
        return "\n".join(path.read_text() for path in self.run.parent.glob("*.log"))

    def wait(self, seconds: float = 600) -> dict[str, int]:
        """Waits for all agents; returns their exit statuses by host."""
        try:
            return {name: agent.wait(seconds) for name, agent in self.agents.items()}
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job has not ended:\n{self.output()}") from None

    def rows(self) -> int:
        """Returns how many steps were recorded, repeated ones included."""
        path = self.run / "metrics.jsonl"
        return sum("loss" in row for row in read_metrics(path, superseded=True))

    def wait_for_steps(self, count: int, seconds: float = 400) -> None:
        """Waits until so many more steps are recorded."""
        goal = self.rows() + count
        try:
            wait_until(lambda: self.rows() >= goal, seconds, f"{count} more steps")
        except TimeoutError as late:
            raise AssertionError(f"{late}:\n{self.output()}") from None

    def wait_for_checkpoint(self, seconds: float = 400) -> None:
        """Waits until another checkpoint is complete."""
        known = set((self.run / "checkpoints").glob("step-*"))

        def another() -> bool:
            found = set((self.run / "checkpoints").glob("step-????????"))
            return bool(found - known)

        wait_until(another, seconds, "another checkpoint")

    def losses(self) -> dict[int, float]:
        """Returns the loss of every step of the run as it is now."""
        rows = read_metrics(self.run / "metrics.jsonl")
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    def ranks_by_number(self) -> dict[int, int]:
        """Returns the process of every rank that runs."""
        return ranks_of(self.run)


def ranks_of(run: Path) -> dict[int, int]:
    """Returns the processes of the ranks that train a run, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        variables = read_variables(process)
        if "LOCAL_RANK" in variables and str(run) in read_command(process):
            found[int(variables["RANK"])] = int(process.name)
    return found


def read_variables(process: Path) -> Mapping[str, str]:
    """Returns the environment of a process; empty if it has ended."""
    try:
        text = (process / "environ").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    pairs = (entry.partition("=") for entry in text.split("\0"))
    return {name: value for name, _, value in pairs}


def read_command(process: Path) -> str:
    """Returns the command line of a process; empty if it has ended."""
    try:
        return (process / "cmdline").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def trained_alone(run: Path, *fields: str) -> dict[int, float]:
    """Trains the run in one process; returns the loss of every step."""
    command = [sys.executable, "-m", "colonnade.launcher", "train", *SMALL, *fields]
    done = run_command([*command, "--run", str(run)])
    assert done.returncode == 0, done.stderr
    rows = read_metrics(run / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def run_command(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """Runs a command on this machine, and waits for it."""
    variables = environment(**THREADS)
    return subprocess.run(command, capture_output=True, text=True, env=variables, **options)
