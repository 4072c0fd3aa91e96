"""The order of nodes along switches."""

import re
from collections.abc import Sequence
from itertools import pairwise
from random import Random

import pytest

from colonnade.launcher.cluster.slurm.nodes import rack_order


def expand(nodes: str) -> list[str]:
    """Expands one range of SLURM's notation, as `scontrol show hostnames` does."""
    names: list[str] = []
    for word in re.findall(r"[^,\[]+(?:\[[^\]]*\])?", nodes):
        prefix, _, ranges = word.rstrip("]").partition("[")
        if not ranges:
            names.append(prefix)
        for part in filter(None, ranges.split(",")):
            first, _, last = part.partition("-")
            names += [f"{prefix}{number}" for number in range(int(first), int(last or first) + 1)]
    return names


TWO_LEVELS = """
SwitchName=leaf1 Level=0 LinkSpeed=1 Nodes=n[1,3,5]
SwitchName=leaf2 Level=0 LinkSpeed=1 Nodes=n[2,4]
SwitchName=leaf3 Level=0 LinkSpeed=1 Nodes=n[6-7]
SwitchName=row1 Level=1 LinkSpeed=1 Nodes=n[1,3,5-7] Switches=leaf[1,3]
SwitchName=row2 Level=1 LinkSpeed=1 Nodes=n[2,4] Switches=leaf2
SwitchName=core Level=2 LinkSpeed=1 Nodes=n[1-7] Switches=row[1-2]
"""


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["n1", "n2", "n3", "n4", "n5", "n6", "n7"], ["n1", "n3", "n5", "n6", "n7", "n2", "n4"]),
        (["n2", "n3", "n4", "n6"], ["n2", "n4", "n3", "n6"]),
        (["n1", "n3"], ["n1", "n3"]),
        (["n1", "n2", "n3", "x9"], ["n1", "n3", "n2", "x9"]),  # x9 is below no switch
    ],
)
def test_nodes_of_a_switch_follow_each_other(hosts: list[str], expected: list[str]) -> None:
    assert rack_order(hosts, TWO_LEVELS, expand) == expected


def test_without_a_topology_slurms_order_stays() -> None:
    assert rack_order(["n2", "n1"], "", expand) == ["n2", "n1"]
    assert rack_order(["n2", "n1"], "No topology information available\n", expand) == ["n2", "n1"]


def runs_of(order: Sequence[str], group: dict[str, int]) -> int:
    """The number of stretches of hosts of one group."""
    return 1 + sum(group[a] != group[b] for a, b in pairwise(order))


def test_any_tree_keeps_switches_together() -> None:
    """Each switch of each level is one stretch of the order, whatever nodes a job has."""
    for seed in range(50):
        rng = Random(seed)
        names = [f"n{i}" for i in range(1, 13)]
        rng.shuffle(names)
        leaf = {name: i // 3 for i, name in enumerate(names)}
        lines = [
            f"SwitchName=leaf{i} Level=0 Nodes={','.join(n for n in names if leaf[n] == i)}"
            for i in range(4)
        ]
        lines += [
            f"SwitchName=row{i} Level=1 Nodes=n1 Switches=leaf{2 * i},leaf{2 * i + 1}"
            for i in range(2)
        ]
        rng.shuffle(lines)
        hosts = rng.sample(names, 8)
        order = rack_order(hosts, "\n".join(lines), expand)
        assert sorted(order) == sorted(hosts)
        used = {leaf[host] for host in hosts}
        assert runs_of(order, leaf) == len(used)
        row = {name: number // 2 for name, number in leaf.items()}
        assert runs_of(order, row) == len({row[host] for host in hosts})
