"""What a job of SLURM is submitted with, and which values of it are sound."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from colonnade.launcher.errors import UserError
from colonnade.launcher.run_files import HOSTS, job_log

LONGEST_NOTICE = 65535  # seconds: SLURM's limit of --signal
TIME = r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})"  # SLURM's notations of a time limit
NAME = r"[\w.+@:,/-]+"  # of a job, account, partition or service
MEMORY = r"\d+[KMGT]?"
# What a template sets by itself; another value would contradict what was checked.
SET_BY_TEMPLATES = {
    "--nodes": "--nodes", "-N": "--nodes", "--ntasks": "--ranks-per-node",
    "-n": "--ranks-per-node", "--ntasks-per-node": "--ranks-per-node",
    "--gpus-per-node": "--gpus-per-node", "--cpus-per-task": "--cpus-per-task",
    "-c": "--cpus-per-task", "--array": "--sweep", "-a": "--sweep", "--job-name": "--name",
    "-J": "--name", "--output": "--run", "-o": "--run", "--signal": "--signal-before",
    "--time": "--time", "-t": "--time", "--mem": "--mem", "--account": "--account",
    "-A": "--account", "--partition": "--partition", "-p": "--partition", "--qos": "--qos",
    "-q": "--qos",
}  # fmt: skip


@dataclass(frozen=True)
class JobOptions:
    """What a template is filled with.

    Attributes:
        name: of the job.
        recipe: the name of a shipped one, or a path.
        overrides: `table.field=value`.
        run: the run's folder; of a sweep the folder of its runs' folders.
        folder: in which the training runs, so that relative paths of a recipe hold.
        python: the interpreter that has this package.
        nodes: the number of nodes.
        min_nodes: of an elastic job: with how many SLURM may start it; None: with all.
        smallest: of an elastic job: on how many nodes it goes on after others were lost.
        ranks_per_node: ranks of every node.
        gpus_per_node: to ask for; None: none.
        cpus_per_rank: processor cores to ask for; None: the cluster's default.
        mem, time, account, partition, qos: as sbatch takes them; None: the cluster's default.
        container: an image; None: none.
        modules: names for `module load`.
        lines: of shell, before the training.
        sbatch: further options of sbatch.
        points: of a sweep: the overrides of each of its runs.
        at_once: of a sweep: how many of its jobs may run at once; None: all.
        signal_before: seconds before the time limit at which the run saves and stops.
        max_failures: starts in a row that fail and get no further, after which the job stops.
        max_restarts: of an elastic job, inside the allocation.
        since: when the job was submitted, in Unix seconds: earlier failures do not count.
    """

    name: str
    recipe: str
    run: Path
    folder: Path
    python: str
    nodes: int
    since: int
    overrides: Sequence[str] = ()
    min_nodes: int | None = None
    smallest: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int | None = None
    cpus_per_rank: int | None = None
    mem: str | None = None
    time: str | None = None
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    container: str | None = None
    modules: Sequence[str] = ()
    lines: Sequence[str] = ()
    sbatch: Sequence[str] = ()
    points: Sequence[Sequence[str]] = ()
    at_once: int | None = None
    signal_before: int = 120
    max_failures: int = 3
    max_restarts: int = 3

    @property
    def node_range(self) -> str:
        """How many nodes the job takes, as sbatch's --nodes."""
        fewer = self.min_nodes is not None and self.min_nodes < self.nodes
        return f"{self.min_nodes}-{self.nodes}" if fewer else str(self.nodes)

    @property
    def container_kind(self) -> str | None:
        """`apptainer` for a file or folder with an image, `pyxis` for the name of one."""
        if self.container is None:
            return None
        is_file = self.container.endswith(".sif") or Path(self.container).is_dir()
        return "apptainer" if is_file else "pyxis"

    @property
    def log(self) -> str:
        """The name of the job's output, in sbatch's notation."""
        return job_log("%A_%a" if self.points else "%j")

    @property
    def hosts_file(self) -> str:
        """The name of the file that lists the hosts of all tasks."""
        return HOSTS


def check_options(job: JobOptions) -> None:
    """Refuses options that SLURM would refuse, or that would not have their effect.

    Raises:
        UserError: names all of them, with their values and remedies.
    """
    faults = list(_faults(job))
    if faults:
        raise UserError("\n".join(faults))


def _faults(job: JobOptions) -> list[str]:
    """Returns all faults of a job's options."""
    named: Mapping[str, str | None] = {
        "--name": job.name, "--account": job.account, "--partition": job.partition,
        "--qos": job.qos,
    }  # fmt: skip
    faults = [
        f"{option} {value!r}: give a name without spaces and quotation marks"
        for option, value in named.items()
        if value is not None and not re.fullmatch(NAME, value)
    ]
    if re.search(r"[%\"'\\\n]", str(job.run)):
        faults.append(f"--run {job.run}: SLURM reads % \" ' \\ in a path otherwise; name another")
    if job.mem is not None and not re.fullmatch(MEMORY, job.mem):
        faults.append(f"--mem {job.mem!r}: give MiB, or a number with K, M, G or T, such as 64G")
    faults += _faults_of_time(job)
    if job.min_nodes is not None and job.min_nodes > job.nodes:
        faults.append(f"--min-nodes {job.min_nodes}: more than --nodes {job.nodes}; lower it")
    if job.gpus_per_node is not None and job.ranks_per_node > job.gpus_per_node:
        faults.append(
            f"--ranks-per-node {job.ranks_per_node}: more than --gpus-per-node "
            f"{job.gpus_per_node}, and a GPU has one rank; lower it"
        )
    for line in job.lines:
        if "\n" in line:
            faults.append(f"--line {line!r}: give one line; the option may come several times")
    for option in job.sbatch:
        faults += _faults_of_sbatch(option)
    return faults


def _faults_of_time(job: JobOptions) -> list[str]:
    """Returns the faults of the time limit and of the notice before it."""
    if not 1 <= job.signal_before <= LONGEST_NOTICE:
        return [f"--signal-before {job.signal_before}: give 1 to {LONGEST_NOTICE} seconds"]
    if job.time is None:
        return []
    limit = seconds(job.time)
    if limit is None:
        return [f"--time {job.time!r}: give minutes, H:MM:SS, D-H or D-H:MM:SS, such as 12:00:00"]
    if job.signal_before >= limit:
        return [
            f"--signal-before {job.signal_before}: the time limit is {limit} s (--time "
            f"{job.time}), so training would stop at once; lower it, or raise --time"
        ]
    return []


def seconds(time: str) -> int | None:
    """Returns the seconds of a time limit in SLURM's notation; None if it is none.

    The notations are M, M:S, H:M:S, D-H, D-H:M and D-H:M:S.
    """
    found = re.fullmatch(TIME, time)
    if found is None:
        return None
    parts = [int(part) for part in found["clock"].split(":")]
    if found["days"] is not None:
        hours, minutes, rest = [*parts, 0, 0][:3]
        return int(found["days"]) * 86400 + hours * 3600 + minutes * 60 + rest
    if len(parts) < 3:
        parts = [0, *parts, 0][:3]
    hours, minutes, rest = parts
    return hours * 3600 + minutes * 60 + rest


def _faults_of_sbatch(option: str) -> list[str]:
    """Returns the faults of a further option of sbatch."""
    if not re.fullmatch(r"-[^\n]+", option):
        return [
            f"--sbatch {option!r}: give an option as sbatch takes it: --sbatch=--constraint=a100"
        ]
    name = re.split(r"[=\s]", option, maxsplit=1)[0]
    if (known := SET_BY_TEMPLATES.get(name)) is not None:
        return [f"--sbatch {option}: the script has this option already; give {known} to submit"]
    return []
