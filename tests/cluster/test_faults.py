"""What breaks in a job on two hosts: it goes on with the losses of an undisturbed run, or ends."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.hosts import Hosts, wait_until
from cluster.jobs import TrainingJob, run_command, trained_alone

from colonnade.launcher.checkpoint import folders, verify

FIELDS = [
    "train.steps=40", "checkpoint.every=5", "parallel.elastic=true", "parallel.timeout=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of an undisturbed run of one process."""
    return trained_alone(tmp_path_factory.mktemp("alone") / "run", *FIELDS)


@pytest.fixture
def job(hosts: Hosts, tmp_path: Path) -> Iterator[TrainingJob]:
    """An elastic job on n1, which has the store, and n2, after its first checkpoint."""
    job = TrainingJob(tmp_path / "run", *FIELDS, nodes="1:2", restarts=5)
    for host in hosts.others:
        job.start(host, store=hosts["n1"])
    job.wait_for_checkpoint()
    yield job
    for agent in job.agents.values():
        agent.kill()
        agent.wait()


def assert_undisturbed(job: TrainingJob, expected: dict[int, float], *hosts: str) -> None:
    """Asserts that the agents of these hosts end well, after the losses of one process."""
    ended = job.wait()
    assert {name: ended[name] for name in hosts} == dict.fromkeys(hosts, 0), job.output()
    assert job.losses() == pytest.approx(expected, rel=1e-9)
    for checkpoint in folders.checkpoints(job.run / "checkpoints"):
        verify(checkpoint)


def test_a_rank_is_killed(job: TrainingJob, expected: dict[int, float]) -> None:
    """All ranks start again, from the newest checkpoint; the damaged one before it is passed."""
    job.wait_for_checkpoint()  # a second one, to go back to the first
    newest = folders.newest(job.run / "checkpoints")
    assert newest is not None
    damage(newest)
    os.kill(job.ranks_by_number()[1], signal.SIGKILL)
    assert_all_steps(job, expected)
    assert "is damaged" in job.output() or f"{newest.name}.aside" in job.output()


def assert_all_steps(job: TrainingJob, expected: dict[int, float]) -> None:
    assert job.wait() == {"n1": 0, "n2": 0}, job.output()
    assert job.losses() == pytest.approx(expected, rel=1e-9)


def damage(checkpoint: Path) -> None:
    """Flips a bit in the middle of the largest file of a checkpoint."""
    path = max(checkpoint.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_an_agent_is_killed_and_comes_back(
    hosts: Hosts, job: TrainingJob, expected: dict[int, float]
) -> None:
    """Its ranks end with it; the other host goes on alone, and again with the new agent."""
    agent = job.agents["n2"]
    agent.kill()
    agent.wait()
    wait_until(lambda: len(job.ranks_by_number()) < 2, 200, "the ranks of a dead agent to end")
    job.wait_for_steps(2)
    assert set(job.ranks_by_number()) == {0}
    job.start(hosts["n2"], store=hosts["n1"])
    wait_until(lambda: len(job.ranks_by_number()) == 2, 300, "ranks on both hosts")
    assert_undisturbed(job, expected, "n1", "n2")


def test_a_host_is_lost(hosts: Hosts, job: TrainingJob, expected: dict[int, float]) -> None:
    """Its link goes down, and so it stays; the other host goes on alone."""
    hosts.cut(hosts["n2"])
    job.wait_for_steps(1)
    hosts["n2"].kill()
    assert_undisturbed(job, expected, "n1")


def test_the_host_of_the_store_is_lost(hosts: Hosts, job: TrainingJob) -> None:
    """Nobody can meet any more: the job ends, and what was saved is whole."""
    hosts["n1"].kill()
    assert job.agents["n2"].wait(300) != 0
    assert "left no record" in job.output() or "onnection" in job.output()
    for checkpoint in folders.checkpoints(job.run / "checkpoints"):
        verify(checkpoint)


def test_a_rank_that_hangs_is_named(tmp_path: Path, hosts: Hosts) -> None:
    """Without restarts the job ends, and says which rank did not reach which collective."""
    job = TrainingJob(tmp_path / "run", "train.steps=1000", "parallel.timeout=6", nodes="2")
    for host in hosts.others:
        job.start(host, store=hosts["n1"])
    job.wait_for_steps(3)
    stopped = job.ranks_by_number()[1]
    os.kill(stopped, signal.SIGSTOP)
    assert job.agents["n1"].wait(300) == 1
    os.kill(stopped, signal.SIGKILL)
    job.wait()
    (line,) = [
        text
        for text in job.output().splitlines()
        if "did not reach" in text and "colonnade:" in text
    ]
    assert "rank 1 on n2 did not reach" in line
    assert "for which rank 0 on n1 has waited" in line
    assert "sub-block" in line or "update" in line or "step" in line
    assert "rank 1 on n2 left no record" in line


def test_the_first_error_is_told_once(tmp_path: Path, hosts: Hosts) -> None:
    """The rank that failed first, with its host and its traceback; others only lost their peer."""
    broken = tmp_path / "sitecustomize.py"
    broken.write_text(BREAK_RANK_ONE, encoding="utf-8")
    job = TrainingJob(tmp_path / "jobs" / "run", "train.steps=1000", nodes="2")
    for host in hosts.others:
        job.start(host, store=hosts["n1"], PYTHONPATH=str(tmp_path))
    assert set(job.wait().values()) == {1}
    output = job.output()
    assert output.count("rank 1 on n2 failed first") >= 1
    assert output.count("\ncolonnade: rank 1 on n2 failed first (step 3, update") == 1
    assert output.count("Traceback (most recent call last)") <= 3  # ours once, and each agent's
    assert "ZeroDivisionError: planted" in output
    log = job.run / "logs" / "attempt-1" / "rank-1.log"
    assert "ZeroDivisionError: planted" in log.read_text()


# Makes the third update of rank 1 fail.
BREAK_RANK_ONE = """
import os, sys
if os.environ.get("RANK") == "1":
    import colonnade.parallel.engine as engine
    update, calls = engine.Engine.update, []
    def broken(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("planted")
        return update(*arguments)
    engine.Engine.update = broken
"""


def test_a_full_disk_ends_the_job_and_loses_nothing(
    tmp_path: Path, hosts: Hosts, expected: dict[int, float]
) -> None:
    """The disk of the run is full at its second checkpoint; the same command goes on later."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5000k", "tmpfs", str(disk)])
    assert mounted.returncode == 0
    try:
        job = TrainingJob(disk / "run", *FIELDS, nodes="2")
        job.log = lambda host: tmp_path / f"{host}.log"  # type: ignore[method-assign]
        for host in hosts.others:
            job.start(host, store=hosts["n1"])
        assert 0 not in job.wait().values()
        output = "".join(path.read_text() for path in tmp_path.glob("*.log"))
        assert "No space left on device" in output
        saved = folders.checkpoints(job.run / "checkpoints")
        assert saved
        for checkpoint in saved:
            verify(checkpoint)
        run_command(["mount", "-o", "remount,size=200m", str(disk)])
        for host in hosts.others:
            job.start(host, store=hosts["n1"])
        assert job.wait() == {"n1": 0, "n2": 0}
        assert job.losses() == pytest.approx(expected, rel=1e-9)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_second_job_in_the_same_folder_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    """On another host; the first one goes on."""
    job = TrainingJob(tmp_path / "run", "train.steps=100000", nodes="1")
    job.start(hosts["n1"], store=hosts["n1"])
    job.wait_for_steps(1)
    second = TrainingJob(job.run, *FIELDS, nodes="1")
    second.log = lambda host: job.run.with_name("second.log")  # type: ignore[method-assign]
    second.start(hosts["n2"], store=hosts["n2"])
    second.wait()
    assert "trains this run; wait for its end" in (job.run.with_name("second.log")).read_text()
    job.wait_for_steps(1)
    job.agents["n1"].terminate()
    job.wait()
    verify(folders.checkpoints(job.run / "checkpoints")[-1])
