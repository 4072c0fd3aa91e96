"""The starts of a run: from which step each went to which, what it saved, and why it ended."""

import signal
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colonnade.launcher.cluster.columns import aligned
from colonnade.launcher.cluster.signals import SAVE_FIRST
from colonnade.launcher.run_files import JOB_ENDS, METRICS
from colonnade.launcher.train.events import STARTS, read_events
from colonnade.launcher.train.lines import read_lines
from colonnade.launcher.train.metrics import attempt_of, read_metrics

FINISHED = "finished"
SIGNALS = tuple(number.name for number in map(signal.Signals, SAVE_FIRST))


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        number: of the attempt; None: it failed before training could begin to be recorded.
        time: of its first event, in Unix seconds.
        host: of rank 0; None where it is not known.
        first: the step after which it began.
        reached: the last step that it completed.
        checkpoint: the step of the last checkpoint that it saved; None: none.
        reason: why it ended, as in `events.jsonl`; None: it was killed.
        message: of an error, or how a job ended that recorded nothing.
    """

    number: int | None
    time: float
    host: str | None
    first: int
    reached: int
    checkpoint: int | None
    reason: str | None
    message: str = ""

    @property
    def failed(self) -> bool:
        """Whether it neither finished nor was stopped on request."""
        return self.reason is None or self.reason == "error"

    @property
    def saved_by_signal(self) -> bool:
        """Whether a signal stopped it, after it had saved."""
        return self.reason in SIGNALS


@dataclass(frozen=True)
class End:
    """The end of one start of a job, as its script saw it.

    Attributes:
        time: in Unix seconds.
        job: its number.
        status: of the training.
        attempts: the number of the newest attempt of the run at that time; 0: none.
        host: that ran the script.
        word: what followed.
    """

    time: float
    job: str
    status: int
    attempts: int
    host: str
    word: str


def read_ends(run: Path) -> list[End]:
    """Returns the ends of the jobs of a run, in order. Raises UserError as `read_lines`."""
    names = list(End.__dataclass_fields__)
    rows = read_lines(run / JOB_ENDS, *names)
    return [End(**{name: row[name] for name in names}) for row in rows]


def attempts_of(run: Path) -> list[Attempt]:
    """Returns the starts of a run that it recorded, in order."""
    events: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in read_events(run):
        events[attempt_of(event)].append(event)
    steps: dict[int, int] = defaultdict(int)  # the last one with a row
    for row in read_metrics(run / METRICS, superseded=True):
        steps[attempt_of(row)] = max(steps[attempt_of(row)], int(row["step"]))
    return [_attempt(number, events[number], steps[number]) for number in sorted(events)]


def _attempt(number: int, events: Sequence[dict[str, Any]], last_row: int) -> Attempt:
    """Returns an attempt by its events, and the step of its last row in the metrics."""
    start: dict[str, Any] = next((e for e in events if e["event"] in STARTS), {})
    stop: dict[str, Any] = next((e for e in events if e["event"] == "stop"), {})
    saved = [event["step"] for event in events if event["event"] == "save"]
    return Attempt(
        number=number,
        time=events[0]["time"],
        host=start.get("host"),
        first=start.get("step", events[0]["step"]),
        reached=max(last_row, *(event["step"] for event in events)),
        checkpoint=max(saved, default=None),
        reason=stop.get("reason"),
        message=stop.get("message", ""),
    )


def history_of(run: Path, since: float) -> list[Attempt]:
    """Returns the starts of a run since a moment, with those that failed before they could record
    anything, in order."""
    recorded = attempts_of(run)
    attempts = [attempt for attempt in recorded if attempt.time >= since]
    number = max((a.number or 0 for a in recorded if a.time < since), default=0)
    for end in read_ends(run):
        if end.time >= since and end.status and end.attempts <= number:
            attempts.append(unrecorded(end))
        number = max(number, end.attempts)
    return sorted(attempts, key=lambda attempt: attempt.time)


def unrecorded(end: End) -> Attempt:
    """Returns the start of a job that ended before it recorded an attempt of the run."""
    number = end.status - 128
    by_signal = number in {*map(int, SAVE_FIRST)}
    reason = signal.Signals(number).name if by_signal else "error"
    message = f"status {end.status} before the start of training; see the job's output"
    return Attempt(None, end.time, end.host, 0, 0, None, reason, message)


def table(attempts: Sequence[Attempt]) -> str:
    """Returns the starts of a run as a table."""
    rows = [("attempt", "began", "host", "from step", "reached", "checkpoint", "ended by")]
    for attempt in attempts:
        reason = attempt.reason or "killed"
        rows.append(
            (
                str(attempt.number or "-"),
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.time)),
                attempt.host or "-",
                str(attempt.first),
                str(attempt.reached),
                str(attempt.checkpoint or "-"),
                f"{reason}: {attempt.message}" if attempt.message else reason,
            )
        )
    return aligned(rows)
