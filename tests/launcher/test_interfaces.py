"""Network interfaces: as iproute2 lists them, and as the kernel routes."""

import json
import shutil
import socket
import subprocess
import sys
from ipaddress import ip_interface

import pytest

from colonnade.launcher.cluster import interfaces as module
from colonnade.launcher.cluster.interfaces import (
    address_of_host_name,
    interface_of,
    interface_towards,
    interfaces,
)
from colonnade.launcher.errors import UserError

SETUP = """
ip link set lo up
ip link add first type veth peer name first2 && ip link add second type veth peer name second2
ip addr add 10.91.0.1/24 dev first && ip addr add 10.91.1.1/24 dev first label first:x
ip addr add 10.92.0.1/20 dev second && ip -6 addr add fd92::1/64 dev second nodad
for name in first first2 second second2; do ip link set $name up; done
ip link add unused type veth peer name unused2
"""
PROGRAM = """
import json
from colonnade.launcher.cluster.interfaces import interface_towards, interfaces
print(json.dumps({
    "listed": [[i.name, i.up, i.loopback, [str(a) for a in i.addresses]] for i in interfaces()],
    "towards": {host: interface_towards(host) for host in
        ("10.91.0.9", "10.91.1.9", "10.92.15.9", "fd92::9", "127.0.0.1", "10.92.0.1")},
}))
"""


@pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed")
def test_interfaces_are_those_of_iproute2() -> None:
    output = subprocess.run(["ip", "-j", "addr"], capture_output=True, check=True).stdout
    expected = {
        entry["ifname"]: (
            "UP" in entry["flags"],
            "LOOPBACK" in entry["flags"],
            {ip_interface(f"{a['local']}/{a['prefixlen']}") for a in entry["addr_info"]},
        )
        for entry in json.loads(output)
    }
    assert {i.name: (i.up, i.loopback, set(i.addresses)) for i in interfaces()} == expected


def test_a_namespace_with_two_links_is_routed_by_subnet() -> None:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("iproute2 or util-linux is not installed")
    command = ["unshare", "--user", "--map-root-user", "--net", "sh", "-ec"]
    if subprocess.run([*command, SETUP], capture_output=True).returncode:
        pytest.skip("this user may not make a network namespace with veth links")
    finished = subprocess.run(
        [*command, f'{SETUP}\nexec "$0" -c "$1"', sys.executable, PROGRAM],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["towards"] == {
        "10.91.0.9": ["first", "10.91.0.1"],
        "10.91.1.9": ["first", "10.91.1.1"],
        "10.92.15.9": ["second", "10.92.0.1"],
        "fd92::9": ["second", "fd92::1"],
        "127.0.0.1": ["lo", "127.0.0.1"],
        "10.92.0.1": ["second", "10.92.0.1"],  # its own address: not through the loopback
    }
    listed = {name: rest for name, *rest in report["listed"]}
    assert listed["first"][:2] == [True, False]
    assert {"10.91.0.1/24", "10.91.1.1/24"} <= set(listed["first"][2])
    assert {"10.92.0.1/20", "fd92::1/64"} <= set(listed["second"][2])
    assert listed["unused"] == [False, False, []]
    assert listed["lo"][:2] == [True, True]


def test_the_loopback_is_found_by_its_address() -> None:
    interface = interface_of("127.0.0.1")
    assert interface is not None
    assert interface.loopback
    assert interface_towards("localhost")[0] == interface.name
    assert interface_of("198.51.100.77") is None  # of a subnet that is for documentation


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"^no-such-host\.invalid: this host does not know"):
        interface_towards("no-such-host.invalid")


def test_a_missing_route_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "interfaces", list)
    with pytest.raises(UserError, match=r"no interface has the address 127\.0\.0\.1"):
        interface_towards("127.0.0.1")


def test_gloo_listens_on_the_address_of_the_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"node7": ["198.51.100.77", "127.0.0.1"], "lost": ["198.51.100.77"]}

    def lookup(name: str, port: None, type: int) -> list:
        if name not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, type, 0, "", (address, 0)) for address in names[name]]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    for name, expected in {"node7": "127.0.0.1", "lost": None, "unknown": None}.items():
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        assert address_of_host_name() == expected
