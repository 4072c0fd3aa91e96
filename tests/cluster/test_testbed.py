"""The hosts and the SLURM cluster of these tests are what they claim to be."""

import socket
import sys

from cluster.hosts import Hosts
from cluster.slurm_cluster import SlurmCluster

ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000), timeout=2) as s: print(s.recv(9).decode())
"""
ANSWER = """
import socket
with socket.create_server(("", 7000)) as server:
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        connection.sendall(socket.gethostname().encode())
        connection.close()
"""


def test_hosts_reach_each_other_by_name_until_a_link_is_cut(hosts: Hosts) -> None:
    one, two = hosts.others
    server = two.start(sys.executable, "-uc", ANSWER, stdout=-1)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    assert one.run(sys.executable, "-c", ASK, "n2").stdout == "n2\n"
    hosts.cut(two)
    assert "timed out" in one.run(sys.executable, "-c", ASK, "n2").stderr
    hosts.mend(two)
    assert one.run(sys.executable, "-c", ASK, two.address).stdout == "n2\n"
    server.kill()
    server.wait()


def test_slurm_runs_tasks_on_both_nodes(slurm: SlurmCluster) -> None:
    printed = slurm.call("srun", "--nodes=2", "hostname").split()
    assert sorted(printed) == ["n1", "n2"]
    assert socket.gethostname() not in printed
