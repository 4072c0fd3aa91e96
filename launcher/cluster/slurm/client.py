"""Calls SLURM's commands, and reads what `scontrol` prints."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from colonnade.launcher.errors import UserError

# A job in one of these states will not run (again); all others are on their way, or suspended.
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "TIMEOUT",
)  # fmt: skip
JOB_ID = r"\d+(_\d+)?"  # of a job, or of one of an array
UNKNOWN_JOB = "Invalid job id"  # in the message of scontrol
TIMEOUT = 60.0  # seconds: a controller that is down lets its commands wait much longer


def call(*words: str) -> str:
    """Runs a command of SLURM; returns what it printed.

    Raises:
        UserError: the command does not exist, does not answer, or refuses, with its own message.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT)
    except FileNotFoundError:
        raise UserError(
            f"{words[0]}: there is no such command on this host; run it on a host of a SLURM "
            "cluster, such as its login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{words[0]} has not answered for {TIMEOUT:g} s: SLURM's controller is down or "
            "overloaded; try again later"
        ) from None
    if done.returncode:
        message = (done.stderr.strip() or done.stdout.strip()).replace("\n", "; ")
        raise UserError(f"{words[0]} refused: {message or f'status {done.returncode}'}")
    return done.stdout


def submit(script: str) -> str:
    """Submits a script with sbatch; returns the number of the job. Raises UserError as `call`."""
    printed = call("sbatch", "--parsable", script).strip()
    number = printed.partition(";")[0]  # behind it comes the name of the cluster
    if not re.fullmatch(r"\d+", number):
        raise UserError(f"sbatch printed {printed!r}, which is no number of a job")
    return number


def hostnames(nodes: str) -> list[str]:
    """Returns the hosts of SLURM's notation, such as `n[1-3,7]`. Raises UserError as `call`."""
    return call("scontrol", "show", "hostnames", nodes).split()


def jobs(number: str) -> list[dict[str, str]]:
    """Returns what SLURM knows of a job, by the names of scontrol: one record, or one for each of
    an array; none if it does not know the job (any more).

    Raises:
        UserError: as `call`.
    """
    try:
        printed = call("scontrol", "show", "job", "--oneliner", number)
    except UserError as error:
        if UNKNOWN_JOB in str(error):
            return []
        raise
    return [parse_record(line) for line in printed.splitlines() if line.startswith("JobId=")]


def parse_record(line: str) -> dict[str, str]:
    """Parses `Name=value Name=value …`, as scontrol prints it; values may have spaces."""
    words = re.split(r"(?:^|\s+)([A-Z][A-Za-z0-9_:/]*)=", line.strip())
    return {name: value.strip() for name, value in zip(words[1::2], words[2::2], strict=True)}


def jobs_of_script(number: str, script: Path) -> list[dict[str, str]]:
    """Returns what SLURM knows of a job that was submitted with a script, as `jobs`; none if its
    number now means another job, as in another cluster. Raises UserError as `call`."""
    path = script.resolve()
    return [one for one in jobs(number) if Path(one.get("Command", "")).resolve() == path]


def has_ended(records: Sequence[dict[str, str]]) -> bool:
    """Whether all of these jobs have ended; so has a job that SLURM does not know any more."""
    return all(state_of(record) in ENDED for record in records)


def state_of(record: dict[str, str]) -> str:
    """The state of a job, such as RUNNING, without a remark behind it (`CANCELLED by 0`)."""
    return (record.get("JobState") or "UNKNOWN").split()[0]


def name_of(record: dict[str, str]) -> str:
    """The number of a job; of one of an array `ARRAY_TASK`."""
    if "ArrayTaskId" in record:
        return f"{record['ArrayJobId']}_{record['ArrayTaskId']}"
    return record["JobId"]
