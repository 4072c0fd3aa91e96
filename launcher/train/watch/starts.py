"""Records every start of a run in environment.jsonl: software, hosts, settings, command line.

A line is one attempt. Variables are those of an allow-list, and the command line is masked, so that
no secret gets into a run's folder.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from colonnade.launcher.cluster.environment import recorded_variables
from colonnade.launcher.cluster.secrets import masked
from colonnade.launcher.cluster.software import software
from colonnade.launcher.run_files import ENVIRONMENT
from colonnade.launcher.train.lines import Lines, write_below


class Place(NamedTuple):
    """Where a rank runs: its host, and its device there, with the name of a GPU."""

    host: str
    device: str


def device_text(device: torch.device) -> str:
    """Describes a device: `cpu`, or the index and the name of a GPU."""
    name = f" {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{device}{name}"


def record_start(run: Path, attempt: int, command: Sequence[str], places: Sequence[Place]) -> None:
    """Appends the line of an attempt. Rank 0 calls it.

    Args:
        run: its folder.
        attempt: the number of this start.
        command: the words of the command line.
        places: of all ranks.

    Raises:
        UserError: the disk refuses it.
    """
    row = {
        "attempt": attempt,
        "time": round(time.time(), 3),
        "command": masked(command),
        "hosts": by_host(places),
        "variables": recorded_variables(),
        **software(),
    }

    def write() -> None:
        with closing(Lines(run / ENVIRONMENT)) as lines:
            lines.append(row)

    write_below(run, write)


def by_host(places: Sequence[Place]) -> dict[str, list[dict[str, Any]]]:
    """Returns the ranks of every host, with their devices: the index in the list is the local rank,
    as launchers number the ranks of a host in the order of all ranks."""
    hosts: dict[str, list[dict[str, Any]]] = {}
    for rank, place in enumerate(places):
        local = hosts.setdefault(place.host, [])
        local.append({"rank": rank, "local_rank": len(local), "device": place.device})
    return hosts
