"""Reads which collectives this rank has launched and waits for, from PyTorch's flight recorder.

The recorder keeps the last collectives of every process group in memory, for gloo and for NCCL,
where `TORCH_FR_BUFFER_SIZE` is set before the groups are made
(`environment.settle_flight_recorder`).
"""

import json
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

KEPT = 40  # of the last collectives, in a record


class Group(NamedTuple):
    """A process group of this rank.

    Attributes:
        axis: of the mesh, or what PyTorch calls the group.
        ranks: in the order of the group.
    """

    axis: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        """`tp (ranks 0, 1)`; of many ranks the first and the last."""
        names = [str(rank) for rank in self.ranks]
        if len(names) > 8:
            names = [*names[:3], "…", names[-1]]
        return f"{self.axis} (ranks {', '.join(names)})"


class Collective(NamedTuple):
    """A collective, or a send or receive, that this rank has launched.

    Attributes:
        group: of ranks.
        name: such as all_reduce.
        number: of it among those of the group, from 1.
        sizes: of its inputs.
        launched: in Unix seconds.
        ended: it has completed or failed.
        between_two: it is a send or a receive.
    """

    group: Group
    name: str
    number: int
    sizes: list[list[int]]
    launched: float
    ended: bool
    between_two: bool = False

    def __str__(self) -> str:
        return f"{self.name} number {self.number} of {self.group}"


def collectives(axes: dict[tuple[int, ...], str]) -> list[Collective]:
    """Returns the last collectives of this rank, in the order of their launch.

    Args:
        axes: the mesh axis of a group of these ranks, where known.
    """
    groups = groups_by_name(axes)
    unknown = Group("a group", ())
    found = []
    for entry in entries():
        name = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
        number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
        found.append(
            Collective(
                groups.get(entry["process_group"][0], unknown),
                name,
                number,
                entry["input_sizes"],
                entry["time_created_ns"] / 1e9,
                bool(entry["retired"]),
                bool(entry["is_p2p"]),
            )
        )
    return found


def entries() -> list[dict[str, Any]]:
    """Returns what the flight recorder has, oldest first; nothing where it is switched off."""
    c10d: Any = torch._C._distributed_c10d  # its stubs do not name the recorder
    dumps = [c10d._dump_fr_trace_json()]
    if torch.cuda.is_available() and hasattr(c10d, "_dump_nccl_trace_json"):
        dumps.append(c10d._dump_nccl_trace_json())
    found = [entry for dump in dumps for entry in json.loads(dump).get("entries", [])]
    return sorted(found, key=lambda entry: entry["time_created_ns"])


def groups_by_name(axes: dict[tuple[int, ...], str]) -> dict[str, Group]:
    """Returns the process groups of this process by PyTorch's names for them."""
    found: dict[str, Group] = {}
    for group in list(distributed_c10d._world.pg_map):
        ranks = tuple(dist.get_process_group_ranks(group))
        whole = len(ranks) == dist.get_world_size()
        label = axes.get(ranks) or ("all ranks" if whole else group.group_desc)
        found[str(group.group_name)] = Group(label, ranks)
    return found


def waiting_for(launched: list[Collective]) -> Collective | None:
    """Returns the collective that a rank waits for: of those in flight the one launched first."""
    return next((one for one in launched if not one.ended), None)
