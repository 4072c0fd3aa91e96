"""The network of a rank: the interface and address that gloo uses, and what is wrong with them.

This file does not import torch.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from ipaddress import ip_interface
from typing import Any

from colonnade.launcher.cluster.environment import gloo_interface
from colonnade.launcher.cluster.interfaces import (
    Interface,
    address_of_host_name,
    interface_of,
    interfaces,
)
from colonnade.launcher.errors import UserError

LOCALHOST = "127.0.0.1"  # where gloo listens if the host's own name has no address


@dataclass(frozen=True)
class Attachment:
    """One address of one interface of a host, and through it a subnet.

    Attributes:
        interface: its name.
        address: IP address with the length of the subnet's prefix, such as 10.0.0.1/24.
        speed: of the link in Mbit/s, as the driver reports it; None where it does not.
    """

    interface: str
    address: str
    speed: int | None

    @property
    def ip(self) -> str:
        """The IP address without the subnet."""
        return str(ip_interface(self.address).ip)

    @property
    def subnet(self) -> str | None:
        """The subnet; None of an address that is alone in it, as clouds give them out."""
        network = ip_interface(self.address).network
        return str(network) if network.num_addresses > 1 else None

    @property
    def is_loopback(self) -> bool:
        """Whether the address reaches its own host alone."""
        return ip_interface(self.address).is_loopback

    def __str__(self) -> str:
        speed = f", {self.speed / 1000:g} Gbit/s" if self.speed else ""
        return f"{self.interface} ({self.address}{speed})"


@dataclass(frozen=True)
class Network:
    """How a host is attached to networks.

    Attributes:
        used: the attachment that gloo uses on it.
        others: what else it could use: interfaces that are up, and not the loopback.
    """

    used: Attachment
    others: tuple[Attachment, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The network as plain objects."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Network":
        """The network that `to_json` wrote."""
        others = tuple(Attachment(**other) for other in value["others"])
        return cls(Attachment(**value["used"]), others)


def network_of_this_host() -> Network:
    """Finds what gloo uses on this host: GLOO_SOCKET_IFNAME, or the address of the host's own name.

    Raises:
        UserError: GLOO_SOCKET_IFNAME names no interface with an address.
    """
    every = [a for interface in interfaces() if interface.up for a in _attachments(interface)]
    if (name := gloo_interface()) is not None:
        used = next((a for a in every if a.interface == name), None)
        if used is None:
            names = ", ".join(dict.fromkeys(a.interface for a in every))
            raise UserError(
                f"GLOO_SOCKET_IFNAME = {name}: no interface of this name is up and has an address; "
                f"this host has {names}"
            )
    else:
        address = address_of_host_name() or LOCALHOST
        interface = interface_of(address)
        if interface is None:  # 127.0.1.1 of /etc/hosts, for example: lo has 127.0.0.1/8
            used = Attachment("lo", f"{address}/32", None)
        else:
            used = next(a for a in _attachments(interface) if a.ip == address)
    others = (a for a in every if a != used and not a.is_loopback)
    return Network(used, tuple(a for a in others if not ip_interface(a.address).is_link_local))


def _attachments(interface: Interface) -> list[Attachment]:
    """The attachments of an interface, one for each address."""
    return [Attachment(interface.name, str(a), interface.speed) for a in interface.addresses]


def loopback_faults(networks: Mapping[str, Network]) -> list[str]:
    """Names hosts, of several, that use an address which no other host reaches."""
    return [
        f"{host} uses {network.used}, which no other host reaches: let its own name have the "
        "address of its network in /etc/hosts or DNS, or set GLOO_SOCKET_IFNAME"
        for host, network in networks.items()
        if len(networks) > 1 and network.used.is_loopback
    ]


def network_findings(networks: Mapping[str, Network]) -> tuple[list[str], list[str]]:
    """Says what is wrong with the interfaces that hosts use, by host.

    An interface is an alternative for a host only where another host has one on the same subnet.

    Returns:
        faults, and notes of what may be intended.
    """
    faults: list[str] = []
    notes: list[str] = []
    if len(networks) < 2 or loopback_faults(networks):  # which are told by themselves
        return faults, notes
    shared = shared_subnets(networks)
    for host, network in networks.items():
        used = network.used
        faster = [
            other
            for other in network.others
            if used.speed and other.speed and other.speed > used.speed and other.subnet in shared
        ]
        if faster:
            best = max(faster, key=lambda other: other.speed or 0)
            faults.append(
                f"{host} uses {used}, and {best} is faster and reaches other hosts: set "
                f"GLOO_SOCKET_IFNAME={best.interface} (NCCL_SOCKET_IFNAME for NCCL)"
            )
    by_subnet: dict[str | None, list[str]] = defaultdict(list)
    for host, network in networks.items():
        by_subnet[network.used.subnet].append(host)
    if len(by_subnet) > 1 and None not in by_subnet:
        places = "; ".join(f"{', '.join(hosts[:8])} on {s}" for s, hosts in by_subnet.items())
        common = [s for s, hosts in shared.items() if len(hosts) == len(networks)]
        if common:
            faults.append(
                f"hosts use different subnets ({places}), although all have an interface on "
                f"{common[0]}: set GLOO_SOCKET_IFNAME to it on every host"
            )
        else:
            notes.append(f"hosts use different subnets, between which something routes: {places}")
    return faults, notes


def shared_subnets(networks: Mapping[str, Network]) -> dict[str, set[str]]:
    """The subnets on which several hosts have different addresses, with these hosts.

    Bridges of containers have the same address on every host: they connect no hosts.
    """
    hosts: dict[str, set[str]] = defaultdict(set)
    addresses: dict[str, set[str]] = defaultdict(set)
    for host, network in networks.items():
        for attachment in (network.used, *network.others):
            if attachment.subnet is not None and not attachment.is_loopback:
                hosts[attachment.subnet].add(host)
                addresses[attachment.subnet].add(attachment.ip)
    return {
        subnet: names
        for subnet, names in hosts.items()
        if len(names) > 1 and len(addresses[subnet]) >= len(names)
    }
