"""Tries whether the hosts of a job can connect to each other, before gloo would wait for them."""

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from colonnade.launcher.cluster.facts import enumerated
from colonnade.launcher.cluster.gather import StoreGather
from colonnade.launcher.errors import UserError

SECONDS = 5.0  # that a connection may take
THREADS = 64  # connections that a host opens at once

Address = tuple[str, int]  # IP address and port


def unreachable(addresses: Mapping[str, str], host: str | None, gather: StoreGather) -> list[str]:
    """Connects every host with every other one; says, a sentence each, who is not reached.

    Args:
        addresses: the IP address of each host.
        host: the one that this rank stands for; None: another rank of its host does.
        gather: of all ranks, which all call this function.

    Raises:
        UserError: a host cannot listen on its address.
    """
    if host is None:
        gather(lambda: None)
        found = gather(lambda: None)
    else:
        with closing(listening_socket(addresses[host], len(addresses))) as server:
            port = server.getsockname()[1]
            told = gather(lambda: [host, port])
            ports = dict(filter(None, told))
            targets = {h: (addresses[h], ports[h]) for h in addresses if h != host}
            found = gather(lambda: [host, failures(targets)])
    return sentences(addresses, dict(filter(None, found)))


def listening_socket(address: str, backlog: int) -> socket.socket:
    """Listens on a free port of an address. The system itself accepts up to `backlog` connections.

    Raises:
        UserError: the system refuses.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, 0), family=family, backlog=max(backlog, 16))
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} cannot listen on its address {address}: {error.strerror}"
        ) from None


def failures(targets: Mapping[str, Address], seconds: float = SECONDS) -> dict[str, str]:
    """Connects to each target, many at once; returns why it failed, by the name of the target."""

    def attempt(target: Address) -> str:
        try:
            socket.create_connection(target, timeout=seconds).close()
        except OSError as error:
            return error.strerror or str(error)
        return ""

    if not targets:
        return {}
    with ThreadPoolExecutor(min(THREADS, len(targets))) as threads:
        reasons = dict(zip(targets, threads.map(attempt, targets.values()), strict=True))
    return {name: reason for name, reason in reasons.items() if reason}


def sentences(addresses: Mapping[str, str], found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Says which host is not reached by which others; `found`: reasons by host and target."""
    said = []
    for target, address in addresses.items():
        without: dict[str, str] = {h: found[h][target] for h in found if target in found[h]}
        if not without:
            continue
        hosts = list(without)
        reasons = ", ".join(sorted(set(without.values())))
        several = len(hosts) > 1 and len(hosts) == len(addresses) - 1
        subject = "no other host reaches" if several else f"{enumerated(hosts)} cannot reach"
        said.append(
            f"{subject} {target} at {address} ({reasons}): a firewall, a link that is down, or the "
            "wrong interface (GLOO_SOCKET_IFNAME)"
        )
    return said


def addresses_of(hosts: Mapping[str, Sequence]) -> dict[str, str]:
    """The IP address that gloo uses on each host, of the facts of its ranks."""
    return {host: group[0].network.used.ip for host, group in hosts.items()}
