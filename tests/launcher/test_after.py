"""What follows after the end of a job: the table of decisions, and the history of a run."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from colonnade.launcher.cli import main
from colonnade.launcher.jobs.after import Decision, JobEnd, after, decide, stuck
from colonnade.launcher.jobs.history import Attempt, history_of, read_ends, table
from colonnade.launcher.run_files import EVENTS, METRICS

USR1, TERM, KILL = 128 + signal.SIGUSR1, 128 + signal.SIGTERM, 128 + signal.SIGKILL


def attempt(
    reason: str | None, reached: int = 5, number: int | None = 1, message: str = ""
) -> Attempt:
    return Attempt(number, 0.0, "n1", 0, reached, None, reason, message)


FAILED, KILLED = attempt("error", message="it broke"), attempt(None)
SAVED, FINISHED = attempt("SIGUSR1"), attempt("finished", 9)


@pytest.mark.parametrize(
    ("attempts", "end", "expected"),
    [
        # before the training starts
        ([], JobEnd(), "requeue"),
        ([FAILED], JobEnd(), "requeue"),
        ([SAVED], JobEnd(), "requeue"),
        ([FINISHED], JobEnd(), "finished"),
        ([FAILED] * 3, JobEnd(), "stop"),
        # it is finished
        ([FINISHED], JobEnd(0), "finished"),
        ([FINISHED], JobEnd(1), "finished"),  # the last step was saved before a fault
        ([FINISHED], JobEnd(TERM, taken=True), "finished"),
        ([attempt("until")], JobEnd(0), "finished"),
        # a signal has stopped it
        ([SAVED], JobEnd(USR1), "requeue"),
        ([SAVED], JobEnd(1), "requeue"),  # of torchrun's agent, whatever ended its ranks
        ([attempt("SIGTERM")], JobEnd(TERM), "requeue"),
        ([], JobEnd(USR1, recorded=False), "requeue"),  # while Python started
        ([FAILED] * 2 + [SAVED], JobEnd(USR1), "requeue"),
        ([SAVED], JobEnd(USR1, taken=True), "stop"),
        # a user's mistake
        ([], JobEnd(2, recorded=False), "stop"),
        ([FAILED], JobEnd(2), "stop"),
        # it failed
        ([FAILED], JobEnd(1), "requeue"),
        ([KILLED], JobEnd(KILL), "requeue"),
        ([FAILED] * 2, JobEnd(1), "requeue"),
        ([FAILED, KILLED, FAILED], JobEnd(1), "stop"),
        ([KILLED], JobEnd(KILL, taken=True), "stop"),
        # an attempt of an earlier job says nothing of this one
        ([FINISHED], JobEnd(1, recorded=False), "requeue"),
    ],
)
def test_decisions(attempts: list[Attempt], end: JobEnd, expected: str) -> None:
    assert decide(attempts, end, max_failures=3).word == expected


@pytest.mark.parametrize(
    ("reached", "expected"),
    [
        ([5, 5, 5], True),
        ([7, 5, 5], True),  # the later ones came less far
        ([5, 5, 6], False),
        ([5, 6, 6], False),
        ([5, 6, 6, 6], True),
        ([5, 5], False),
    ],
)
def test_a_run_that_gets_further_goes_on(reached: list[int], expected: bool) -> None:
    assert stuck([attempt("error", step) for step in reached], 3) is expected


def test_a_start_on_request_between_failures_counts() -> None:
    assert not stuck([FAILED, FAILED, SAVED, FAILED, FAILED], 3)
    assert stuck([SAVED, FAILED, FAILED, FAILED], 3)


def write_run(run: Path, *events: dict[str, Any], rows: tuple[tuple[int, int], ...] = ()) -> None:
    """Writes a run's events, and rows of (attempt, step)."""
    run.mkdir(exist_ok=True)
    with (run / EVENTS).open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    with (run / METRICS).open("a") as file:
        for number, step in rows:
            file.write(json.dumps({"step": step, "attempt": number, "loss": 1.0}) + "\n")


def event(name: str, number: int, step: int, time: float, **fields: Any) -> dict[str, Any]:
    return {"time": time, "event": name, "attempt": number, "step": step, **fields}


def test_history_is_read_from_events_metrics_and_ends(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        event("start", 1, 0, 10.0, host="n1"),
        event("save", 1, 4, 11.0),
        event("restart", 2, 4, 20.0, host="n2", checkpoint="step-4"),
        event("stop", 2, 6, 21.0, reason="error", message="it broke"),
        rows=((1, 4), (1, 5), (2, 5), (2, 6)),
    )
    assert history_of(tmp_path, 0) == [
        Attempt(1, 10.0, "n1", 0, 5, 4, None),  # it was killed
        Attempt(2, 20.0, "n2", 4, 6, None, "error", "it broke"),
    ]
    assert [a.number for a in history_of(tmp_path, 15.0)] == [2]
    shown = table(history_of(tmp_path, 0)).splitlines()
    head = shown[0].replace("from step", "from").replace("ended by", "ended").split()
    assert head == ["attempt", "began", "host", "from", "reached", "checkpoint", "ended"]
    assert shown[1].endswith("n1    0          5        4           killed")
    assert shown[2].endswith("n2    4          6        -           error: it broke")


def run_after(run: Path, status: int | None, facts: str = "JobState=RUNNING", **given: Any) -> str:
    return after(
        run, status, **{"job": "7", "facts": facts, "since": 0, "max_failures": 3, **given}
    )


def test_starts_that_record_nothing_count_as_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a module that is missing on a node: without a limit they would repeat for ever."""
    words = [run_after(tmp_path, 1) for _ in range(3)]
    assert words == ["requeue", "requeue", "stop"]
    error = capsys.readouterr().err
    assert error.count("status 1 before the start of training") == 3
    assert "submit the run again" in error
    assert [end.word for end in read_ends(tmp_path)] == words


def test_a_new_submission_counts_anew(tmp_path: Path) -> None:
    for _ in range(3):
        last = run_after(tmp_path, 1)
    assert last == "stop"
    since = read_ends(tmp_path)[-1].time + 0.001
    assert run_after(tmp_path, None, since=since) == "requeue"
    assert run_after(tmp_path, None, since=0) == "stop"


def test_each_start_is_judged_by_its_own_attempt(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        event("start", 1, 0, 10.0),
        event("stop", 1, 3, 11.0, reason="SIGUSR1"),
        rows=((1, 3),),
    )
    assert run_after(tmp_path, USR1) == "requeue"
    # the next start fails before it records anything: the signal before it says nothing of it
    assert [run_after(tmp_path, 1) for _ in range(3)] == ["requeue", "requeue", "stop"]
    write_run(tmp_path, event("restart", 2, 3, 30.0), event("stop", 2, 9, 31.0, reason="finished"))
    assert run_after(tmp_path, 0) == "finished"


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ("JobId=7 JobState=RUNNING Reason=None", "requeue"),
        ("JobId=7 JobState=COMPLETING Reason=None", "stop"),  # scancel
        ("JobId=7 JobState=CANCELLED by 0 Reason=None", "stop"),
        ("JobId=7 JobState=COMPLETING PreemptTime=None", "stop"),
        ("JobId=7 JobState=COMPLETING PreemptTime=2026-01-01T00:00:00", "requeue"),
        ("", "requeue"),  # scontrol has failed
    ],
)
def test_a_job_that_slurm_has_ended_is_not_requeued(
    facts: str, expected: str, tmp_path: Path
) -> None:
    write_run(tmp_path, event("start", 1, 0, 10.0), event("stop", 1, 3, 11.0, reason="SIGTERM"))
    assert run_after(tmp_path, TERM, facts) == expected


def test_the_script_gets_one_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = "JobId=7 JobState=RUNNING"
    assert main(["_after", str(tmp_path), "138", "--job", "7", "--facts", facts]) == 0
    printed = capsys.readouterr()
    assert printed.out == "requeue\n"
    assert printed.err.startswith("colonnade: requeue: ")


def test_files_that_cannot_be_read_stop_the_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / EVENTS).write_text("nonsense\n")
    assert main(["_after", str(tmp_path), "1", "--job", "7"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert EVENTS in printed.err


def test_the_reason_names_step_and_message() -> None:
    assert decide([FAILED], JobEnd(1), 3) == Decision(
        "requeue", "the run failed after step 5: it broke"
    )
