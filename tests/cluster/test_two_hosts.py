"""torchrun over two hosts, each layout across them against one process."""

from pathlib import Path

import pytest
from cluster.hosts import Hosts
from cluster.jobs import TrainingJob, trained_alone

STEPS = "train.steps=6"
LAYOUTS = {
    "tp inside, dp across": ["parallel.tp=2"],
    "tp inside, pp across": ["parallel.tp=2", "parallel.pp=2"],
    "dp inside and across, elastic": ["parallel.elastic=true", "train.micro_batch=4"],
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one process."""
    return trained_alone(tmp_path_factory.mktemp("alone") / "run", STEPS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_hosts_train_as_one_process(
    hosts: Hosts, tmp_path: Path, expected: dict[int, float], layout: str
) -> None:
    job = TrainingJob(tmp_path / "run", STEPS, *LAYOUTS[layout], nodes="2", ranks=2)
    for host in hosts.others:
        job.start(host, store=hosts["n1"])
    assert job.wait() == {"n1": 0, "n2": 0}, job.output()
    assert job.losses() == pytest.approx(expected, rel=1e-9)


def test_a_host_with_another_interface_and_no_name_trains(hosts: Hosts, tmp_path: Path) -> None:
    """Each host's name is an address of its own, which no other host reaches."""
    for host in hosts.others:
        (host.folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n")
    job = TrainingJob(tmp_path / "run", STEPS, nodes="2")
    for host in hosts.others:
        job.start(host, store=hosts["n1"])
    assert job.wait() == {"n1": 0, "n2": 0}, job.output()


def test_an_interface_that_no_other_host_reaches_is_named(hosts: Hosts, tmp_path: Path) -> None:
    job = TrainingJob(tmp_path / "run", STEPS, nodes="2")
    for host in hosts.others:
        job.start(host, store=hosts["n1"], GLOO_SOCKET_IFNAME="lo")
    assert set(job.wait().values()) == {1}, job.output()
    assert "n1 uses lo (127.0.0.1/8), which no other host reaches" in job.output()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
