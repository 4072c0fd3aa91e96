"""Connects the ranks of a job: chooses the network interface, opens the store, compares hosts."""

import socket
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from colonnade.launcher.cluster.environment import (
    RankEnvironment,
    gloo_interface,
    master_address,
    settle_gloo_interface,
)
from colonnade.launcher.cluster.facts import (
    Facts,
    differences,
    facts_of_this_rank,
    hosts_of,
    version_differences,
)
from colonnade.launcher.cluster.gather import StoreGather
from colonnade.launcher.cluster.interfaces import (
    Interface,
    interface_of,
    interface_towards,
    interfaces,
)
from colonnade.launcher.cluster.network import loopback_faults
from colonnade.launcher.errors import UserError

PATIENCE = 600.0  # seconds in which all ranks of a job must have started
PROGRAM = ("colonnade", "torch")  # whose versions are the same on all ranks
ANYWHERE = "192.0.2.1"  # of no host (RFC 5737): the way to it is the default route


def connect(environment: RankEnvironment, device: torch.device) -> dist.Store | None:
    """Opens the job's store, and compares the ranks where there are several hosts. Collective.

    Rank 0 prints what differs between ranks and may be intended.

    Returns:
        the store; None of a job of one rank.

    Raises:
        UserError: on all ranks, ranks are missing, have other versions of the program, or use an
            interface that no other host reaches; on one, no way leads to the host of rank 0.
    """
    if environment.size == 1:
        return None
    store = open_store(environment)
    if environment.size == environment.local_size:
        return store
    gather = StoreGather(
        dist.PrefixStore("connect", store), environment.rank, environment.size, PATIENCE
    )
    told = gather(lambda: facts_of_this_rank(environment, device).to_json())
    facts = [Facts.from_json(value) for value in told]
    hosts = hosts_of(facts)
    faults = version_differences(facts, PROGRAM)
    faults += loopback_faults({host: group[0].network for host, group in hosts.items()})
    if faults:
        raise UserError("\n".join(faults))
    if environment.rank == 0 and (notes := differences(facts)):
        print("\n".join(f"colonnade: {note}" for note in notes), file=sys.stderr, flush=True)
    return store


def open_store(environment: RankEnvironment) -> dist.Store:
    """Chooses gloo's interface, and connects to the store of the job's ranks.

    Raises:
        UserError: no interface leads to the host of rank 0, or its store does not answer.
    """
    several_hosts = environment.size > environment.local_size
    if gloo_interface() is None:
        settle_gloo_interface(interface_to_master() if several_hosts else loopback_interface())
    rank, size = environment.rank, environment.size
    limit = timedelta(seconds=PATIENCE)
    try:
        return next(rendezvous("env://", rank, size, timeout=limit))[0]
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        host, port = master_address()
        if rank == 0:
            raise UserError(
                f"rank 0 cannot open the store of the job's ranks at {host}, port {port}: "
                f"{str(error).partition('. ')[0]}; set MASTER_PORT to a free port of this host"
            ) from error
        raise UserError(
            f"rank {rank} on {socket.gethostname()} does not reach the store of rank 0 at {host}, "
            f"port {port}, through {gloo_interface()}: {str(error).partition('. ')[0]}; see "
            "whether rank 0 has started and that port is open (MASTER_ADDR, MASTER_PORT)"
        ) from error


def interface_to_master() -> str:
    """Returns the name of the interface that leads to the host of rank 0. On that host itself,
    where its name is an address that no other host reaches (127.0.1.1), that of the default route,
    or the only other one.

    Raises:
        UserError: there is none, or several.
    """
    name, address = interface_towards(master_address()[0])
    found = interface_of(address)
    if found is not None and not found.loopback:
        return name
    usable = [one for one in interfaces() if one.up and not one.loopback and one.addresses]
    if not usable:
        return name  # agents of one host
    if len(usable) == 1:
        return usable[0].name
    try:
        name, _ = interface_towards(ANYWHERE)
    except UserError:
        name = ""
    if any(one.name == name for one in usable):
        return name
    raise UserError(
        f"{socket.gethostname()}: {master_address()[0]} (MASTER_ADDR) is its own address, which no "
        f"other host reaches, and it has {listed(usable)}: name one of them, GLOO_SOCKET_IFNAME"
    )


def loopback_interface() -> str | None:
    """Returns the name of the interface by which ranks of one host reach each other; None: it is
    down."""
    return next((one.name for one in interfaces() if one.up and one.loopback), None)


def listed(found: list[Interface]) -> str:
    """Writes the names of interfaces, with an address of each."""
    if not found:
        return "no interface that is up"
    return ", ".join(f"{one.name} ({one.addresses[0]})" for one in found)
