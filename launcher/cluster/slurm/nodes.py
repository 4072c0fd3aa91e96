"""Orders the nodes of a job along the switches of the cluster."""

from collections.abc import Callable, Sequence

from colonnade.launcher.cluster.slurm.client import parse_record

Expand = Callable[[str], Sequence[str]]  # the names in SLURM's notation, such as `n[1-3]`


def rack_order(hosts: Sequence[str], topology: str, expand: Expand) -> list[str]:
    """Returns the hosts in an order in which those below one switch follow each other, on every
    level of switches; otherwise they keep the order they have. Hosts that the topology does not
    name come last.

    Args:
        hosts: of the job, in SLURM's order.
        topology: what `scontrol show topology` prints; a line `SwitchName=… Level=… Nodes=…
            Switches=…` for each switch of a tree.
        expand: returns the names in SLURM's notation, of hosts and of switches.
    """
    position = {host: number for number, host in enumerate(hosts)}
    records = [parse_record(line) for line in topology.splitlines() if "SwitchName=" in line]
    switches = {record["SwitchName"]: record for record in records}
    below = {name: list(expand(record["Switches"])) for name, record in switches.items()
             if record.get("Switches")}  # fmt: skip
    of_leaf = {
        name: [host for host in expand(record["Nodes"]) if host in position]
        for name, record in switches.items()
        if record.get("Nodes") and name not in below
    }

    def ordered(name: str) -> list[str]:
        """Returns the hosts below a switch."""
        if name in of_leaf:
            return sorted(of_leaf[name], key=position.__getitem__)
        return joined([ordered(child) for child in below.get(name, []) if child in switches])

    def joined(groups: Sequence[Sequence[str]]) -> list[str]:
        """Joins groups of hosts, in the order of their first hosts."""
        with_hosts = sorted((g for g in groups if g), key=lambda group: position[group[0]])
        return [host for group in with_hosts for host in group]

    children = {child for names in below.values() for child in names}
    roots = [name for name in switches if name not in children]
    found = list(dict.fromkeys(joined([ordered(name) for name in roots])))
    return [*found, *(host for host in hosts if host not in set(found))]
