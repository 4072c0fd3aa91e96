"""Lists the network interfaces of this host, and finds the one that leads to an address.

This file does not import torch, and reads no environment variables.
"""

import ctypes
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface
from pathlib import Path

from colonnade.launcher.errors import UserError

UP, LOOPBACK = 0x1, 0x8  # IFF_UP and IFF_LOOPBACK of net/if.h
# Where a socket address holds its IP address: bytes behind its begin, and the number of bytes.
PLACES = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}


@dataclass(frozen=True)
class Interface:
    """A network interface of this host.

    Attributes:
        name: such as eth0.
        up: it is switched on.
        loopback: it reaches this host alone.
        addresses: its IP addresses with their subnets, in the system's order.
        speed: of its link in Mbit/s, as its driver reports it; None where it does not.
    """

    name: str
    up: bool
    loopback: bool
    addresses: tuple[IPv4Interface | IPv6Interface, ...]
    speed: int | None = None


class _IfAddrs(ctypes.Structure):
    """`struct ifaddrs` of ifaddrs.h up to the field that is read last."""


_IfAddrs._fields_ = [
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
]


def interfaces() -> list[Interface]:
    """Returns all network interfaces of this host, also those that are down or without address.

    Raises:
        OSError: the system does not list them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_IfAddrs)()
    if libc.getifaddrs(ctypes.byref(first)):
        number = ctypes.get_errno()
        raise OSError(number, f"getifaddrs: {os.strerror(number)}")
    try:
        flags: dict[str, int] = {}
        addresses: dict[str, list[IPv4Interface | IPv6Interface]] = {}
        for entry in _entries(first):
            name = entry.name.decode().partition(":")[0]  # eth0:1 is a label of eth0
            flags.setdefault(name, entry.flags)
            known = addresses.setdefault(name, [])
            if (address := _ip_bytes(entry.address)) is not None:
                mask = int.from_bytes(_ip_bytes(entry.netmask) or b"\xff" * len(address), "big")
                known.append(ip_interface((address, mask.bit_count())))
    finally:
        libc.freeifaddrs(first)
    return [
        Interface(
            name, bool(flag & UP), bool(flag & LOOPBACK), tuple(addresses[name]), link_speed(name)
        )
        for name, flag in flags.items()
    ]


def link_speed(name: str) -> int | None:
    """The speed of an interface's link in Mbit/s as its driver reports it; None: it does not."""
    try:
        speed = int(Path(f"/sys/class/net/{name}/speed").read_text(encoding="ascii"))
    except (OSError, ValueError):  # the loopback, one that is down, and systems without /sys
        return None
    return speed if speed > 0 else None


def interface_of(address: str) -> Interface | None:
    """The interface of this host that has this IP address; None: none has."""
    wanted = ip_address(address.partition("%")[0])
    for interface in interfaces():
        if any(own.ip == wanted for own in interface.addresses):
            return interface
    return None


def interface_towards(host: str) -> tuple[str, str]:
    """Finds the interface through which this host sends to another one. It sends nothing.

    Args:
        host: the name or IP address of the other host; of this host itself, the interface that has
            the address is returned.

    Returns:
        the name of the interface, and this host's own IP address on it.

    Raises:
        UserError: the name is unknown, or there is no route to it.
    """
    try:
        candidates = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{host}: this host does not know its address ({reason}); name it by an IP address, or "
            "add it to DNS or /etc/hosts"
        ) from None
    reason = ""
    for family, kind, protocol, _, target in candidates:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(target)  # of a datagram socket: looks up the route alone
            except OSError as error:
                reason = error.strerror or str(error)
                continue
            own = probe.getsockname()[0].partition("%")[0]
        if (interface := interface_of(own)) is not None:
            return interface.name, own
        reason = f"no interface has the address {own}"
    raise UserError(
        f"{host}: no network interface of this host leads to it ({reason}); see `ip route get`"
    )


def address_of_host_name() -> str | None:
    """The IP address that this host's own name has and on which it can listen; None: it has none.

    gloo listens on it unless it is told an interface, and on 127.0.0.1 if there is none.
    """
    try:
        candidates = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in candidates:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return str(address[0]).partition("%")[0]
    return None


def _entries(first: "ctypes._Pointer[_IfAddrs]") -> Iterator[_IfAddrs]:
    """Yields the entries of the list of getifaddrs: one for each address, and some without."""
    while first:
        yield first.contents
        first = first.contents.next


def _ip_bytes(pointer: int | None) -> bytes | None:
    """Reads the IP address out of a socket address; None for one of another family."""
    if not pointer:
        return None
    raw = ctypes.string_at(pointer, 2)  # Linux: the family in two bytes; BSD: length, then family
    family = int.from_bytes(raw, sys.byteorder) if sys.platform == "linux" else raw[1]
    if family not in PLACES:
        return None
    begin, length = PLACES[socket.AddressFamily(family)]
    return ctypes.string_at(pointer + begin, length)
