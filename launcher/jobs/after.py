"""Decides what follows after the end of a job: its script calls `colonnade _after`."""

import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from colonnade.launcher.cluster.environment import USER_MISTAKE
from colonnade.launcher.cluster.signals import SAVE_FIRST
from colonnade.launcher.cluster.slurm.client import ENDED, parse_record, state_of
from colonnade.launcher.jobs.history import (
    FINISHED,
    Attempt,
    End,
    attempts_of,
    history_of,
    read_ends,
    table,
    unrecorded,
)
from colonnade.launcher.run_files import JOB_ENDS
from colonnade.launcher.train.lines import Lines, write_below

Word = Literal["finished", "requeue", "stop"]


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Attributes:
        status: of the training; None: it has not started yet.
        taken: SLURM itself ends the job (scancel, its time limit) or requeues it (a lost node).
        recorded: the newest attempt of the run is one of this start of the job.
    """

    status: int | None = None
    taken: bool = False
    recorded: bool = True


@dataclass(frozen=True)
class Decision:
    """What follows for a run.

    Attributes:
        word: `finished`, `requeue` (the run needs another job), or `stop`.
        reason: for people.
        history: the starts of the run tell the reason.
    """

    word: Word
    reason: str
    history: bool = False


def decide(attempts: Sequence[Attempt], end: JobEnd, max_failures: int) -> Decision:
    """Decides what follows.

    Args:
        attempts: of the run, since it was submitted.
        end: of the job.
        max_failures: starts in a row that fail and get no further, after which the run stops.
    """
    last = attempts[-1] if attempts and end.recorded else None
    if last is not None and last.reason == FINISHED:
        return Decision("finished", f"the run is finished: step {last.reached}")
    if end.status == 0:
        return Decision("finished", "the training ended with status 0")
    if end.taken:
        return Decision("stop", "SLURM has ended this job (scancel, time limit, or a lost node)")
    if end.status == USER_MISTAKE:
        return Decision("stop", "the training was refused (status 2): see the message above")
    signalled = end.status is not None and end.status - 128 in {*map(int, SAVE_FIRST)}
    if not (signalled or (last is not None and last.saved_by_signal)) and stuck(
        attempts, max_failures
    ):
        count = "the last start" if max_failures == 1 else f"the last {max_failures} starts"
        return Decision("stop", f"{count} failed, and got no further:", history=True)
    if end.status is None:
        return Decision("requeue", "the run is not finished")
    if last is not None and last.saved_by_signal:
        return Decision(
            "requeue", f"{last.reason} stopped the run, saved after step {last.reached}"
        )
    if last is None:
        return Decision("requeue", f"the start failed with status {end.status}")
    reason = last.message or last.reason or "it was killed"
    return Decision("requeue", f"the run failed after step {last.reached}: {reason}")


def stuck(attempts: Sequence[Attempt], count: int) -> bool:
    """Whether the last `count` attempts failed, and none of them reached a later step than the
    attempts up to the first of them."""
    last, before = attempts[-count:], attempts[: len(attempts) - count + 1]
    if len(last) < count or not all(attempt.failed for attempt in last):
        return False
    reached = max(attempt.reached for attempt in before)
    return all(attempt.reached <= reached for attempt in last)


def after(
    run: Path, status: int | None, *, job: str, facts: str, since: float, max_failures: int
) -> Word:
    """Decides what follows for a run, prints the reason to stderr, and records the job's end.

    Args:
        run: its folder.
        status: of the training; None: it has not started yet.
        job: its number.
        facts: what scontrol prints of the job, on one line.
        since: when it was submitted, in Unix seconds.
        max_failures: as for `decide`.

    Raises:
        UserError: the record cannot be written, or files of the run cannot be read.
    """
    ends, record = read_ends(run), parse_record(facts)
    newest = max((attempt.number or 0 for attempt in attempts_of(run)), default=0)
    before = ends[-1].attempts if ends else 0
    attempts = history_of(run, since)
    recorded = status is None or newest > before
    if status and not recorded:  # the history has this start as well
        attempts.append(unrecorded(End(time.time(), job, status, newest, socket.gethostname(), "")))
    end = JobEnd(
        status=status,
        taken=is_taken(record),
        recorded=recorded,
    )
    decision = decide(attempts, end, max_failures)
    print(f"colonnade: {decision.word}: {decision.reason}", file=sys.stderr)
    if decision.history:
        print(table(attempts), file=sys.stderr)
        print(
            "colonnade: remove the cause, and submit the run again: colonnade submit … --run "
            f"{run}",
            file=sys.stderr,
        )
    if status is not None:
        host = socket.gethostname()
        this = End(round(time.time(), 3), job, status, newest, host, decision.word)
        write_below(run, lambda: append(run / JOB_ENDS, this))
    return decision.word


def is_taken(record: dict[str, str]) -> bool:
    """Whether SLURM has ended a job whose script still runs. The script must not requeue that: it
    would undo a scancel. A job that was preempted is to be requeued."""
    preempted = record.get("PreemptTime", "None") not in ("None", "Unknown")
    return state_of(record) in (*ENDED, "COMPLETING") and not preempted


def append(path: Path, end: End) -> None:
    """Appends the end of a job to a file. Raises OSError."""
    lines = Lines(path)
    try:
        lines.append(asdict(end))
    finally:
        lines.close()
