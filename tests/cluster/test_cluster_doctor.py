"""`doctor --cluster` on hosts of its own: it names what was made slow or different, and no more."""

import json
import os
import sys
from pathlib import Path

import pytest
from cluster.hosts import Host, Hosts, environment, missing_for_hosts, torchrun
from cluster.slurm_cluster import SlurmCluster

# Stands before all programs of a host: another numpy, and a clock that is 5 s ahead.
OTHER_HOST = """
import time
import numpy
numpy.__version__ = "1.0.0"
real = time.time_ns
time.time_ns = lambda: real() + 5_000_000_000
"""


def doctor(
    hosts: list[Host], report: Path, variables: dict[str, dict[str, str]]
) -> tuple[list[int], str]:
    """Runs the doctor on hosts, with variables by host; returns the statuses and the output."""
    agents = [
        torchrun(
            host,
            ["doctor", "--cluster", "--json", str(report)],
            nodes=str(len(hosts)),
            store=hosts[0],
            stdout=-1,
            stderr=-2,
            env=environment(**variables.get(host.name, {})),
        )
        for host in hosts
    ]
    output = "".join(agent.communicate(timeout=240)[0] for agent in agents)
    return [agent.returncode for agent in agents], output


def test_hosts_in_order_have_no_fault(hosts: Hosts, tmp_path: Path) -> None:
    """The own name of one of them has an address that others do not reach, as Debian's installer
    writes it: the interface that leads to rank 0 is used all the same."""
    names = f"127.0.0.1 localhost\n127.0.1.1 n2\n{hosts['n1'].address} n1\n"
    (hosts["n2"].folder / "hosts").write_text(names, encoding="utf-8")
    statuses, output = doctor(hosts.others, tmp_path / "report.json", {})
    assert statuses == [0, 0], output
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["faults"] == []
    assert report["notes"] == []
    assert [(h["host"], h["interface"], h["address"]) for h in report["hosts"]] == [
        (host.name, host.link, f"{host.address}/24") for host in hosts.others
    ]
    (link,) = report["links"]
    assert (link["first"], link["second"]) == ("n1", "n2")
    assert abs(link["skew_s"]) <= link["skew_bound_s"]  # both have this machine's clock


def test_a_slow_host_another_version_setting_and_clock_are_named(tmp_path: Path) -> None:
    if reason := missing_for_hosts():
        pytest.skip(reason)
    (tmp_path / "sitecustomize.py").write_text(OTHER_HOST, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with Hosts("n1", "n2", "n3") as hosts:
        hosts.limit(hosts["n2"], "200mbit")
        variables = {"n3": {"PYTHONPATH": path, "NCCL_ALGO": "Ring"}}
        statuses, output = doctor(hosts.others, tmp_path / "report.json", variables)
    assert statuses == [1, 1, 1], output
    faults = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["faults"]
    assert len(faults) == 4, faults
    version, setting, slow, clock = faults
    assert version.startswith("numpy differs: 1.0.0 on n3, ")
    assert setting.startswith("NCCL_ALGO differs: 'Ring' on n3, unset on n1 and n2;")
    assert slow.startswith("n2 is slow: 2"), slow  # 200 Mbit/s are 25 MB/s
    assert clock.startswith("the clock of n3 is 5.0 s (± ")
    assert "ahead of that of n" in clock


@pytest.mark.parametrize("case", ["loopback", "lost"])
def test_a_host_that_others_do_not_reach_is_named_before_gloo_waits(
    hosts: Hosts, tmp_path: Path, case: str
) -> None:
    two = hosts["n2"]
    if case == "loopback":
        variables = {"n2": {"GLOO_SOCKET_IFNAME": "lo"}}
        expected = "n2 uses lo (127.0.0.1/8), which no other host reaches"
    else:  # an interface that leads nowhere
        for words in (["add", "lost0", "type", "veth", "peer", "name", "lost1"],
                      ["set", "lost0", "up"], ["set", "lost1", "up"]):  # fmt: skip
            assert two.run("ip", "link", *words).returncode == 0
        assert two.run("ip", "addr", "add", "10.78.0.2/24", "dev", "lost0").returncode == 0
        variables = {"n2": {"GLOO_SOCKET_IFNAME": "lost0"}}
        expected = "n1 cannot reach n2 at 10.78.0.2"
    statuses, output = doctor(hosts.others, tmp_path / "report.json", variables)
    assert statuses == [1, 1], output
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert any(fault.startswith(expected) for fault in report["faults"]), report["faults"]
    assert report["links"] == []


def test_tasks_of_srun_are_examined(slurm: SlurmCluster, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "colonnade.launcher", "doctor", "--cluster"]
    slurm.call("srun", "--nodes=2", *command, "--json", str(report))
    hosts = json.loads(report.read_text(encoding="utf-8"))["hosts"]
    assert sorted(host["host"] for host in hosts) == ["n1", "n2"]
