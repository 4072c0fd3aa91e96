"""`status` and `logs` of submitted jobs."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_commands import SlurmCommands

from colonnade.launcher.cli import main
from colonnade.launcher.cluster.slurm.client import parse_record
from colonnade.launcher.errors import UserError
from colonnade.launcher.jobs import logs as module
from colonnade.launcher.jobs.logs import followed, logs
from colonnade.launcher.jobs.record import JobRecord
from colonnade.launcher.jobs.status import status
from colonnade.launcher.recipe.load import dump_recipe, load_recipe
from colonnade.launcher.run_files import EVENTS, HEARTBEAT, JOB_SCRIPT, METRICS, RECIPE, job_log


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "POLL", 0.01)
    monkeypatch.setattr(module, "ASK", 0.02)


def submitted(
    name: str, *jobs: str, points: tuple[tuple[str, ...], ...] = (), time: int = 1
) -> Path:
    """Makes the folder of a run that was submitted."""
    run = Path("runs", name).absolute()
    run.mkdir(parents=True)
    lists = [list(point) for point in points]
    JobRecord(list(jobs), "preemptible", time, 2, 4, lists).write(run)
    return run


def trained(run: Path) -> None:
    """Writes what training has written: two starts, the second at step 3 of 240."""
    run.mkdir(exist_ok=True)
    (run / RECIPE).write_text(dump_recipe(load_recipe("quickstart")))
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    events = [
        {"time": 1, "event": "start", "attempt": 1, "step": 0},
        {"time": 2, "event": "stop", "attempt": 1, "step": 2, "reason": "SIGUSR1"},
        {"time": 3, "event": "restart", "attempt": 2, "step": 2},
    ]
    (run / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in events))
    row = {"step": 3, "attempt": 2, "loss": 2.5, "tokens_per_s": 1234.5}
    (run / METRICS).write_text(json.dumps(row) + "\n")


def test_status_joins_what_slurm_and_the_run_know(
    slurm: SlurmCommands, capfd: pytest.CaptureFixture[str]
) -> None:
    run = submitted("one", "7")
    trained(run)
    slurm.know("7", run / JOB_SCRIPT, JobState="PENDING", Reason="BeginTime", Restarts="1")
    expected = {
        "job": "7", "state": "PENDING", "reason": "BeginTime", "nodes": "n[1-2]", "requeues": 1,
        "step": 3, "steps": 240, "loss": 2.5, "tokens_per_s": 1234.5, "checkpoint": 2,
        "restarts": 1, "run": str(run),
    }  # fmt: skip
    for targets in ([], ["7"], [str(run)]):
        (row,) = status(targets)
        assert expected.items() <= (row | {"run": str(Path(row["run"]).absolute())}).items()
    assert main(["status"]) == 0
    cells = capfd.readouterr().out.splitlines()[1].split()
    assert cells[:-1] == [
        "7", "PENDING", "BeginTime", "n[1-2]", "3/240", "2.5000", "1,234", "2", "1",
    ]  # fmt: skip
    assert main(["status", "--json", "-"]) == 0
    assert json.loads(capfd.readouterr().out)["jobs"][0]["loss"] == 2.5


def test_a_job_that_slurm_forgot_is_found_by_the_record(slurm: SlurmCommands) -> None:
    trained(submitted("one", "7"))
    (row,) = status(["7"])
    assert (row["state"], row["step"]) == ("ENDED", 3)


def test_a_number_that_means_another_job_now(slurm: SlurmCommands) -> None:
    submitted("one", "7")
    other = submitted("two", "7", time=2)
    slurm.know("7", other / JOB_SCRIPT)
    (row,) = status(["7"])
    assert row["run"] == str(other)
    assert [(Path(row["run"]).name, row["state"]) for row in status()] == [
        ("one", "ENDED"), ("two", "RUNNING"),
    ]  # fmt: skip


def test_a_job_that_was_not_submitted_by_us_has_no_run(slurm: SlurmCommands) -> None:
    slurm.know("7", "/home/job.sh")
    (row,) = status(["7"])
    assert (row["state"], row["run"]) == ("RUNNING", None)


def test_a_sweep_has_a_line_for_each_run(
    slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted("one", "7", points=(("train.seed=1",), ("train.seed=2",)))
    trained(run / "1")
    for job in ("7", "7_0", "7_1"):
        slurm.know(job, run / JOB_SCRIPT)
    assert [(row["job"], row["step"]) for row in status(["7"])] == [("7_0", 0), ("7_1", 3)]
    assert [row["job"] for row in status(["7_1"])] == ["7_1"]
    assert main(["logs", "7"]) == 2
    assert "name one of 7_0, 7_1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "message"), [("9", "SLURM does not know it"), ("nowhere", "nor the folder of a run")]
)
def test_unknown_targets(target: str, message: str, slurm: SlurmCommands) -> None:
    for verb in (lambda: status([target]), lambda: list(logs(target))):
        with pytest.raises(UserError, match=message):
            verb()


def test_no_jobs(slurm: SlurmCommands) -> None:
    with pytest.raises(UserError, match="no run in it was submitted"):
        status()


def test_records_of_scontrol_are_parsed() -> None:
    """Values have spaces and `=`; names have colons and slashes."""
    line = "JobId=7 JobName=a b Reason=None CPUs/Task=1 ReqB:S:C:T=0:0:*:* TRES=cpu=2,node=2 Power="
    assert parse_record(line) == {
        "JobId": "7", "JobName": "a b", "Reason": "None", "CPUs/Task": "1",
        "ReqB:S:C:T": "0:0:*:*", "TRES": "cpu=2,node=2", "Power": "",
    }  # fmt: skip


def test_logs_prints_the_last_lines(
    slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted("one", "7", "8")
    assert main(["logs", "runs/one"]) == 2
    assert "job 7 is unknown to SLURM, and has written nothing yet" in capsys.readouterr().err
    (run / job_log("7")).write_text("a\nb\nc\n")
    assert main(["logs", "7", "--lines", "2"]) == 0
    assert capsys.readouterr().out == "b\nc\n"
    (run / job_log("8")).write_text("d\n")  # of a chain the newest
    assert main(["logs", "runs/one"]) == 0
    assert capsys.readouterr().out == "d\n"


def wait_for(text: bytes, stream: Iterator[bytes], seen: bytes = b"") -> None:
    """Reads a stream until it has given a text."""
    for piece in stream:
        seen += piece
        if text in seen:
            return
    raise AssertionError(f"{text!r} is missing in {seen!r}")


def test_logs_follow_over_requeues_and_end_with_the_job(slurm: SlurmCommands) -> None:
    run = submitted("one", "7")
    slurm.know("7", run / JOB_SCRIPT, JobState="PENDING")
    stream = logs("7", follow=True)
    threading.Timer(0.1, (run / job_log("7")).write_text, ["first\n"]).start()
    wait_for(b"first\n", stream)
    for state in ("RUNNING", "COMPLETING", "PENDING", "RUNNING"):
        slurm.know("7", run / JOB_SCRIPT, JobState=state)
        with (run / job_log("7")).open("a") as file:
            file.write(f"{state}\n")
        wait_for(state.encode(), stream)
    with (run / job_log("7")).open("a") as file:
        file.write("last\n")
    slurm.know("7", run / JOB_SCRIPT, JobState="COMPLETED")
    assert b"".join(stream).endswith(b"last\n")


@pytest.mark.parametrize("how", ["replaced", "cut off"])
def test_logs_follow_a_file_that_is_rotated(how: str, tmp_path: Path) -> None:
    path, ended = tmp_path / "log", threading.Event()
    path.write_text("1\n2\n3\n")
    stream = followed(path, 2, ended.is_set)
    assert next(stream) == b"2\n3\n"
    if how == "replaced":
        path.rename(tmp_path / "log.1")
    path.write_text("4\n")
    wait_for(b"4\n", stream)
    ended.set()
    assert b"".join(stream) == b""


def test_a_running_job_shows_its_last_sign_of_progress(
    slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted("one", "7")
    trained(run)
    (run / HEARTBEAT).write_text(json.dumps({"step": 3, "phase": "validation"}))
    an_hour_ago = (run / HEARTBEAT).stat().st_mtime - 3600
    os.utime(run / HEARTBEAT, (an_hour_ago, an_hour_ago))
    slurm.know("7", run / JOB_SCRIPT)
    assert main(["status"]) == 0
    assert "RUNNING  validation, 360" in capsys.readouterr().out
    slurm.know("7", run / JOB_SCRIPT, JobState="PENDING", Reason="BeginTime")
    assert main(["status"]) == 0
    assert "validation" not in capsys.readouterr().out
