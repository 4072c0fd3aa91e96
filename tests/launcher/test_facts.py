"""What ranks tell of themselves, what differs between them, and interfaces that are wrong."""

import json
from dataclasses import replace
from ipaddress import ip_interface

import pytest
import torch

from colonnade.launcher.cluster import network as network_module
from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.facts import (
    Facts,
    differences,
    enumerated,
    facts_of_this_rank,
    hosts_of,
)
from colonnade.launcher.cluster.interfaces import Interface
from colonnade.launcher.cluster.network import (
    Attachment,
    Network,
    network_findings,
    network_of_this_host,
)
from colonnade.launcher.errors import UserError

ETH = {number: Attachment("eth0", f"10.0.0.{number}/24", 1000) for number in range(1, 5)}
IB = {number: Attachment("ib0", f"10.5.0.{number}/16", 200_000) for number in range(1, 5)}
DOCKER = Attachment("docker0", "172.17.0.1/16", 10_000)


def facts_of(hosts: int, ranks: int = 2) -> list[Facts]:
    """Facts of ranks on hosts n1, n2, …, which are all alike."""
    return [
        Facts(
            rank=rank,
            local_rank=rank % ranks,
            host=f"n{rank // ranks + 1}",
            host_id=f"boot{rank // ranks}",
            device="H100",
            device_type="cuda",
            network=Network(Attachment("eth0", f"10.0.0.{rank // ranks + 1}/24", None)),
            versions={"torch": "2.13.0", "NCCL": "2.27"},
            settings={"OMP_NUM_THREADS": "1"},
        )
        for rank in range(hosts * ranks)
    ]


def test_facts_survive_json_and_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    facts = facts_of_this_rank(RankEnvironment(3, 8, 1, 2), torch.device("cpu"))
    assert Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    assert (facts.rank, facts.local_rank) == (3, 1)
    assert facts.versions["torch"] == torch.__version__
    assert facts.settings["NCCL_DEBUG"] == "INFO"
    assert "secret" not in json.dumps(facts.to_json())


def test_ranks_that_are_alike_differ_in_nothing() -> None:
    assert differences(facts_of(4)) == []


def test_a_version_that_differs_is_said_with_its_hosts() -> None:
    facts = facts_of(4)
    for rank in (2, 3, 6):  # n2, and one rank of n4
        facts[rank] = replace(facts[rank], versions={"torch": "2.12.0", "NCCL": "2.27"})
    facts[7] = replace(facts[7], versions={"torch": "2.13.0"})
    assert differences(facts) == [
        "torch differs: 2.12.0 on n2 and rank 6 of n4, 2.13.0 on n1, n3 and rank 7 of n4; install "
        "one version on all hosts",
        "NCCL differs: none on rank 7 of n4, 2.27 on n1, n2, n3 and rank 6 of n4; install one "
        "version on all hosts",
    ]


def test_a_setting_that_differs_is_said_but_interfaces_have_names_of_their_own() -> None:
    facts = facts_of(2, ranks=1)
    facts[0] = replace(facts[0], settings={"NCCL_ALGO": "Ring", "NCCL_SOCKET_IFNAME": "eth0"})
    facts[1] = replace(facts[1], settings={"NCCL_SOCKET_IFNAME": "ens1"})
    assert differences(facts) == [
        "NCCL_ALGO differs: 'Ring' on n1, unset on n2; set it alike on all hosts"
    ]
    facts[1] = replace(facts[1], settings={"NCCL_ALGO": "Ring"})
    assert differences(facts) == [
        "NCCL_SOCKET_IFNAME differs: set on n1, unset on n2; set it alike on all hosts"
    ]


def test_devices_that_differ_are_said() -> None:
    facts = facts_of(3, ranks=1)
    facts[1] = replace(facts[1], device="A100")
    assert differences(facts)[0].startswith("devices differ: A100 on n2, H100 on n1 and n3;")


def test_hosts_of_one_name_are_told_apart() -> None:
    facts = [replace(fact, host="node") for fact in facts_of(2)]
    groups = hosts_of(facts)
    assert list(groups) == ["node (10.0.0.1)", "node (10.0.0.2)"]
    assert [[fact.rank for fact in group] for group in groups.values()] == [[0, 1], [2, 3]]
    shared = facts[0].network
    groups = hosts_of([replace(fact, network=shared) for fact in facts])
    assert list(groups) == ["node (10.0.0.1)", "node (rank 2)"]


def test_long_lists_are_cut() -> None:
    assert enumerated(["a"]) == "a"
    assert (
        enumerated([f"n{n}" for n in range(20)]) == "n0, n1, n2, n3, n4, n5, n6, n7 and 12 others"
    )


@pytest.fixture
def two_interfaces(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A host with a loopback, two interfaces, and one that is down."""
    made = [
        Interface(name, up, name == "lo", tuple(map(ip_interface, addresses)), 1000)
        for name, up, addresses in (
            ("lo", True, ["127.0.0.1/8"]),
            ("eth0", True, ["10.0.0.1/24", "fe80::1/64"]),
            ("eth1", True, ["10.1.0.1/24"]),
            ("eth2", False, ["10.2.0.1/24"]),
        )
    ]
    monkeypatch.setattr(network_module, "interfaces", lambda: made)
    by_address = {str(a.ip): interface for interface in made for a in interface.addresses}
    monkeypatch.setattr(network_module, "interface_of", by_address.get)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    return monkeypatch


def test_gloo_uses_the_named_interface_or_the_address_of_the_name(
    two_interfaces: pytest.MonkeyPatch,
) -> None:
    for address, expected in {
        "10.0.0.1": "eth0",
        "127.0.1.1": "lo",  # of Debian's /etc/hosts, which no interface has
        None: "lo",
    }.items():
        two_interfaces.setattr(network_module, "address_of_host_name", lambda a=address: a)
        used = network_of_this_host().used
        assert (used.interface, used.ip) == (expected, address or "127.0.0.1")
        assert used.is_loopback == (expected == "lo")
    two_interfaces.setenv("GLOO_SOCKET_IFNAME", "eth1,eth0")
    network = network_of_this_host()
    assert str(network.used) == "eth1 (10.1.0.1/24, 1 Gbit/s)"
    assert [other.address for other in network.others] == ["10.0.0.1/24"]
    two_interfaces.setenv("GLOO_SOCKET_IFNAME", "eth2")
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME = eth2: .* has lo, eth0, eth1"):
        network_of_this_host()


def test_a_faster_interface_that_reaches_other_hosts_is_named() -> None:
    networks = {f"n{n}": Network(IB[n], (ETH[n], DOCKER)) for n in (1, 2)}
    assert network_findings(networks) == ([], [])
    # docker0 is faster than eth0, but connects no hosts
    networks = {f"n{n}": Network(ETH[n], (DOCKER,)) for n in (1, 2)}
    assert network_findings(networks) == ([], [])
    networks["n3"] = Network(ETH[3], (IB[3],))
    assert network_findings(networks) == ([], [])  # nobody else has ib0
    networks["n2"] = Network(ETH[2], (IB[2],))
    faults, notes = network_findings(networks)
    assert not notes
    assert [fault.split()[0] for fault in faults] == ["n2", "n3"]
    assert "ib0 (10.5.0.2/16, 200 Gbit/s) is faster" in faults[0]
    assert "GLOO_SOCKET_IFNAME=ib0" in faults[0]


def test_different_subnets_are_a_fault_where_a_common_one_exists() -> None:
    slow = Attachment("eth1", "10.9.0.3/24", 1000)
    networks = {"n1": Network(ETH[1]), "n2": Network(ETH[2]), "n3": Network(slow, (ETH[3],))}
    faults, notes = network_findings(networks)
    assert len(faults) == 1
    assert "n1, n2 on 10.0.0.0/24; n3 on 10.9.0.0/24" in faults[0]
    assert "all have an interface on 10.0.0.0/24" in faults[0]
    assert not notes
    networks["n3"] = Network(slow)
    faults, notes = network_findings(networks)
    assert not faults
    assert "something routes" in notes[0]
    clouds = {f"n{n}": Network(Attachment("ens4", f"10.128.0.{n}/32", None)) for n in (1, 2)}
    assert network_findings(clouds) == ([], [])
    assert network_findings(clouds | {"n3": Network(ETH[3])}) == ([], [])
