"""Runs that are submitted to a real SLURM: signals, requeues, chains, sweeps, failures, racks."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster.hosts import wait_until
from cluster.slurm_cluster import SlurmCluster

import colonnade
from colonnade.launcher.jobs.history import read_ends
from colonnade.launcher.run_files import METRICS
from colonnade.launcher.train.events import read_events
from colonnade.launcher.train.metrics import read_metrics

STEPS = 60
RECIPE = [
    "quickstart", "model.pattern=*-", "model.repeat=1", "model.hidden=16", "model.heads=2",
    "model.kv_heads=1", "model.ffn=16", "train.global_batch=4", "train.micro_batch=2",
    "train.seq_len=32", "train.precision=fp64", "train.validate_every=", "train.validate_rows=",
    "train.sample=0", "optimizer.warmup=1", "data.sources.0.format=text", "data.validation=0",
    f"train.steps={STEPS}", "model.residual=standard",
]  # fmt: skip
Submit = Callable[..., dict[str, Any]]
# Each rank sleeps after every step, so that a signal comes while the run trains.
SLOWED = """
import sys, time
from colonnade.launcher.train import loop
plain = loop.report_step
def report_step(job, *others):
    time.sleep(0.1)
    return plain(job, *others)
loop.report_step = report_step
from colonnade.launcher.cli import main
sys.exit(main())
"""
# The run dies in its fourth step, whenever it starts.
DYING = """
import os, sys
from colonnade.launcher.train import loop
plain = loop.train_step
def train_step(engine, batches, samples, stage, step, *others):
    if step == 3:
        os._exit(1)
    return plain(engine, batches, samples, stage, step, *others)
loop.train_step = train_step
from colonnade.launcher.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def folder(slurm: SlurmCluster) -> Path:
    """A folder that every node sees, with a text to train on."""
    folder = slurm.folder / "work"
    folder.mkdir()
    (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return folder


@pytest.fixture(scope="module")
def submit(slurm: SlurmCluster, folder: Path) -> Submit:
    """Submits the recipe as a user does, on the head; returns the report. `program` replaces the
    program that the tasks run, in a template of the user's own."""
    rooms = str(Path(colonnade.__file__).parent.parent)
    variables = {"XDG_CACHE_HOME": str(folder / "cache"), "MPLCONFIGDIR": str(folder / "fonts")}
    slurm.environment |= {"PYTHONPATH": rooms} | variables
    templates = Path(__file__).parents[2] / "slurm"

    def submit(name: str, template: str, *words: str, program: str | None = None) -> dict[str, Any]:
        if program is not None:
            (folder / f"{name}.py").write_text(program)
            text = (templates / f"{template}.sbatch").read_text()
            plain = '-m colonnade.launcher "${train[@]}"'
            assert plain in text
            path = folder / f"{name}.sbatch"
            path.write_text(text.replace(plain, f'{folder}/{name}.py "${{train[@]}}"'))
            template = str(path)
        data = f"data.sources.0.path={folder / 'corpus.txt'}"
        printed = slurm.call(
            sys.executable, "-m", "colonnade.launcher", "submit", *RECIPE, data, "--run",
            str(folder / name), "--template", template, "--time", "10:00", *words, "--json", "-",
            cwd=folder,
        )  # fmt: skip
        return json.loads(printed)

    return submit


def steps_of(run: str | Path, superseded: bool = False) -> list[dict[str, Any]]:
    """The rows of the steps of a run."""
    rows = read_metrics(Path(run) / METRICS, superseded)
    return [row for row in rows if "loss" in row]


def losses(run: str | Path) -> list[float]:
    """The loss of each step of a run."""
    return [row["loss"] for row in steps_of(run)]


@pytest.fixture(scope="module")
def undisturbed(submit: Submit, slurm: SlurmCluster) -> list[float]:
    """The losses of a run on two nodes that nothing interrupts."""
    report = submit("undisturbed", "single", "--nodes", "2")
    assert slurm.wait(report["jobs"][0], "COMPLETED", "FAILED") == "COMPLETED"
    found = losses(report["run"])
    assert len(found) == STEPS
    return found


def steps_since(run: str, count: int) -> Callable[[], bool]:
    """A condition: the run has made `count` steps from now on."""
    before = len(steps_of(run, superseded=True))
    return lambda: len(steps_of(run, superseded=True)) >= before + count


def start_again(slurm: SlurmCluster, job: str, restarts: int) -> None:
    """Waits until a job is requeued, and starts it soon: SLURM would wait for two minutes, and a
    node refuses a job in the second in which it has ended it («Job credential revoked»)."""

    def requeued() -> bool:
        shown = slurm.call("scontrol", "show", "job", "--oneliner", job)
        assert "JobState=FAILED" not in shown
        return f"Restarts={restarts} " in shown and "JobState=PENDING" in shown

    wait_until(requeued, 120, f"requeue {restarts} of job {job}")
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")


def output(report: dict[str, Any], job: str | None = None) -> str:
    return (Path(report["run"]) / f"slurm-{job or report['jobs'][0]}.out").read_text()


def test_requeued_three_times_it_is_one_run(
    submit: Submit, slurm: SlurmCluster, undisturbed: list[float]
) -> None:
    report = submit("requeued", "preemptible", "--nodes", "2", program=SLOWED)
    (job,), run = report["jobs"], report["run"]
    for restarts in (1, 2, 3):
        wait_until(steps_since(run, 5), 120, "steps")
        shell = ["--batch"] if restarts == 2 else []  # as SLURM's notice: the shell passes it on
        slurm.call("scancel", "--signal=USR1", *shell, job)
        start_again(slurm, job, restarts)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert losses(run) == undisturbed
    assert [end.word for end in read_ends(Path(run))] == ["requeue"] * 3 + ["finished"]
    status = slurm.call(sys.executable, "-m", "colonnade.launcher", "status", run)
    assert status.splitlines()[1].split()[:2] == [job, "COMPLETED"]
    followed = slurm.call(
        sys.executable, "-m", "colonnade.launcher", "logs", run, "--follow", "--lines", "9999"
    )
    assert followed.count("requeue: SIGUSR1 stopped the run") == 3


def test_a_cancelled_job_saves_and_stays_cancelled(submit: Submit, slurm: SlurmCluster) -> None:
    """Its script still runs while the tasks save, and must not requeue it."""
    report = submit("cancelled", "preemptible", "--nodes", "1", program=SLOWED)
    (job,), run = report["jobs"], report["run"]
    wait_until(steps_since(run, 3), 120, "steps")
    slurm.call("scancel", job)
    wait_until(lambda: read_ends(Path(run)), 60, "the decision of the script")
    assert slurm.wait(job, "CANCELLED", "PENDING") == "CANCELLED"
    assert "stop: SLURM has ended this job" in output(report)
    assert len(list(Path(run, "checkpoints").glob("step-*"))) == 1


def test_a_job_that_may_not_be_requeued_ends_saved(submit: Submit, slurm: SlurmCluster) -> None:
    """How a user stops a run for good, with as much time to save as it takes."""
    report = submit("stopped", "preemptible", "--nodes", "1", program=SLOWED)
    (job,), run = report["jobs"], report["run"]
    wait_until(steps_since(run, 3), 120, "steps")
    slurm.call("scontrol", "update", f"JobId={job}", "Requeue=0")
    slurm.call("scancel", "--signal=USR1", job)
    assert slurm.wait(job, "FAILED", "PENDING", "COMPLETED") == "FAILED"
    assert "not requeued" in output(report)
    assert len(list(Path(run, "checkpoints").glob("step-*"))) == 1


def test_three_failures_at_one_step_stop_with_a_history(
    submit: Submit, slurm: SlurmCluster
) -> None:
    report = submit("dying", "preemptible", "--nodes", "1", "checkpoint.every=2", program=DYING)
    (job,), run = report["jobs"], report["run"]
    for restarts in (1, 2):
        start_again(slurm, job, restarts)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "FAILED"
    assert [end.word for end in read_ends(Path(run))] == ["requeue", "requeue", "stop"]
    log = output(report)
    assert "stop: the last 3 starts failed, and got no further" in log
    history = [line.split() for line in log.partition("ended by\n")[2].splitlines()[:3]]
    assert [(line[0], line[3], line[4], line[5]) for line in history] == [
        ("1", "n1", "0", "3"), ("2", "n1", "2", "3"), ("3", "n1", "2", "3"),
    ]  # fmt: skip


def test_a_chain_goes_on_where_the_job_before_stopped(submit: Submit, slurm: SlurmCluster) -> None:
    report = submit("chain", "chain", "--nodes", "1", "--jobs", "2", program=SLOWED)
    first, second = report["jobs"]
    wait_until(steps_since(report["run"], 5), 120, "steps")
    assert slurm.state(second) == "PENDING"
    slurm.call("scancel", "--signal=USR1", first)
    assert slurm.wait(first, "COMPLETED", "FAILED") == "COMPLETED"
    assert slurm.wait(second, "COMPLETED", "FAILED") == "COMPLETED"
    rows = steps_of(report["run"], superseded=True)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {row["attempt"] for row in rows} == {1, 2}


def test_a_sweep_trains_each_point_in_its_own_folder(submit: Submit, slurm: SlurmCluster) -> None:
    words = ["--nodes", "1", "train.steps=3", "--sweep", "optimizer.lr=1e-3,2e-3"]
    report = submit("sweep", "sweep", *words)
    (job,), run = report["jobs"], Path(report["run"])
    for index in (0, 1):
        assert slurm.wait(f"{job}_{index}", "COMPLETED", "FAILED") == "COMPLETED"
        assert "finished" in output(report, f"{job}_{index}")
    first, second = losses(run / "0"), losses(run / "1")
    assert len(first) == len(second) == 3
    assert first[0] == second[0]
    assert first[2] != second[2]


def test_a_mistake_stops_the_job_at_once(submit: Submit, slurm: SlurmCluster, folder: Path) -> None:
    report = submit("mistaken", "preemptible", "--nodes", "1", "data.sources.0.path=gone.txt")
    assert slurm.wait(report["jobs"][0], "FAILED", "COMPLETED") == "FAILED"
    assert "stop: the training was refused (status 2)" in output(report)


def test_an_elastic_job_restarts_a_killed_rank_inside_the_allocation(
    submit: Submit, slurm: SlurmCluster, undisturbed: list[float]
) -> None:
    report = submit("elastic", "elastic", "--nodes", "2", "checkpoint.every=5")
    (job,), run = report["jobs"], report["run"]
    wait_until(steps_since(run, 8), 120, "steps")
    kill_a_rank(slurm, run)
    assert slurm.wait(job, "COMPLETED", "FAILED", "PENDING") == "COMPLETED"
    assert losses(run) == undisturbed
    assert [event["event"] for event in read_events(Path(run))].count("restart") == 1
    assert [end.status for end in read_ends(Path(run))] == [0]  # the job was not requeued


def kill_a_rank(slurm: SlurmCluster, run: str) -> None:
    """Kills a rank of a run on the second node."""
    for pid in slurm.hosts["n2"].processes():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        if run in words and "\0LOCAL_RANK=0\0" in variables:
            slurm.hosts["n2"].run("kill", "-9", str(pid))
            return
    raise AssertionError("no rank runs on n2")
