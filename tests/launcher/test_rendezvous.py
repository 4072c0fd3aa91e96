"""How ranks connect: the interface they choose, and hosts that do not match."""

import dataclasses
import os
import stat
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from colonnade.launcher.cluster import environment, rendezvous
from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.facts import Facts, facts_of_this_rank
from colonnade.launcher.cluster.interfaces import Interface
from colonnade.launcher.cluster.network import Attachment, Network
from colonnade.launcher.errors import UserError

CPU = torch.device("cpu")


def connect_with(
    monkeypatch: pytest.MonkeyPatch, **differences: Any
) -> tuple[RankEnvironment, dist.Store]:
    """Makes `connect` see this rank on n1, and one on n2 with other facts."""
    rank = RankEnvironment(0, 2, 0, 1)
    network = Network(Attachment("eth0", "10.0.0.1/24", None))
    own = dataclasses.replace(facts_of_this_rank(rank, CPU), network=network, host="n1")
    other = dataclasses.replace(own, rank=1, host="n2", host_id="other", **differences)

    def gather(*arguments: object) -> Any:
        return lambda action: [own.to_json(), other.to_json()]

    store = dist.HashStore()
    monkeypatch.setattr(rendezvous, "open_store", lambda environment: store)
    monkeypatch.setattr(rendezvous, "StoreGather", gather)
    return rank, store


def versions_with(**changed: str) -> dict[str, str]:
    facts: Facts = facts_of_this_rank(RankEnvironment(0, 2, 0, 1), CPU)
    return {**facts.versions, **changed}


def test_another_version_of_the_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rank, _ = connect_with(monkeypatch, versions=versions_with(torch="1.0", numpy="1.0"))
    with pytest.raises(UserError, match=r"torch differs: .*1\.0 on n2") as refused:
        rendezvous.connect(rank, CPU)
    assert "numpy" not in str(refused.value)


def test_other_differences_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rank, store = connect_with(monkeypatch, versions=versions_with(numpy="1.0"))
    assert rendezvous.connect(rank, CPU) is store
    assert "colonnade: numpy differs: " in capsys.readouterr().err


def test_an_interface_of_one_host_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lonely = Network(Attachment("lo", "127.0.0.1/8", None))
    rank, _ = connect_with(monkeypatch, network=lonely)
    with pytest.raises(UserError, match=r"n2 uses lo .*no other host reaches"):
        rendezvous.connect(rank, CPU)


def test_a_job_of_one_rank_has_no_store() -> None:
    assert rendezvous.connect(RankEnvironment.on_one_host(0, 1), CPU) is None


LO = Interface("lo", True, True, (ip_interface("127.0.0.1/8"),))
ETH0 = Interface("eth0", True, False, (ip_interface("10.0.0.1/24"),))
IB0 = Interface("ib0", True, False, (ip_interface("10.1.0.1/24"),))
DOWN = Interface("eth9", False, False, (ip_interface("10.9.0.1/24"),))


def choose(
    monkeypatch: pytest.MonkeyPatch,
    to_master: Interface,
    default: Interface | None,
    *all_: Interface,
) -> str:
    """The interface that is chosen where this one leads to rank 0, and this one to anywhere."""

    def towards(host: str) -> tuple[str, str]:
        found = default if host == rendezvous.ANYWHERE else to_master
        if found is None:
            raise UserError("no route")
        return found.name, str(found.addresses[0].ip)

    monkeypatch.setattr(rendezvous, "interface_towards", towards)
    monkeypatch.setattr(rendezvous, "interface_of", lambda address: to_master)
    monkeypatch.setattr(rendezvous, "interfaces", lambda: list(all_))
    monkeypatch.setattr(rendezvous, "master_address", lambda: ("n1", "29500"))
    return rendezvous.interface_to_master()


def test_the_interface_that_leads_to_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, ETH0, IB0, LO, ETH0, IB0) == "eth0"
    # on the host of rank 0, whose name is an address of its own:
    assert choose(monkeypatch, LO, None, LO, IB0, DOWN) == "ib0"
    assert choose(monkeypatch, LO, ETH0, LO, IB0, ETH0) == "eth0"
    assert choose(monkeypatch, LO, None, LO, DOWN) == "lo"  # agents of one host
    with pytest.raises(UserError, match=r"it has eth0 \(10\.0\.0\.1/24\), ib0"):
        choose(monkeypatch, LO, None, LO, ETH0, IB0)


@pytest.mark.parametrize(
    ("rank", "text"), [(0, "set MASTER_PORT to a free port"), (1, "does not reach the store")]
)
def test_a_store_that_does_not_open(monkeypatch: pytest.MonkeyPatch, rank: int, text: str) -> None:
    def refuse(*arguments: object, **options: object) -> Any:
        raise dist.DistNetworkError("The server socket has failed to listen. EADDRINUSE")

    monkeypatch.setattr(rendezvous, "rendezvous", refuse)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match=text):
        rendezvous.open_store(RankEnvironment(rank, 2, 0, 1))


def test_a_node_without_a_known_name_is_reached_by_slurms_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$4 Arch=x NodeAddr=10.9.8.7 CPUTot=8"\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(environment, "has_address", lambda host: False)
    assert environment._first_node("n1") == "10.9.8.7"
    monkeypatch.setattr(environment, "has_address", lambda host: True)
    assert environment._first_node("n1") == "n1"
