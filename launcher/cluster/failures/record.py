"""The record of a rank's failure, or of a rank that hangs: a file in the run's folder."""

import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from colonnade.launcher.cluster.collective import ORIGIN
from colonnade.launcher.cluster.failures.flight import KEPT, Collective, Group, waiting_for

# What gloo, NCCL and the store say when another rank is gone, and not when this one has failed.
LOST_PEER = re.compile(
    r"gloo/|Connection (closed|reset)|Broken pipe|Socket Timeout|NCCL (error|communicator)|"
    r"remote process exited|failed to recv|wait timeout|connectFullMesh|"
    r"connection was likely closed",
    re.IGNORECASE,
)
# Files that send and receive, which gloo's flight recorder does not see.
SENT_AND_RECEIVED = re.compile(r"/(pipeline/run|context/p2p)\.py")
CAUSE, LOST, STUCK = "cause", "lost a rank", "stuck"  # kinds of records


@dataclass(frozen=True)
class Record:
    """What a rank knows of a failure.

    Attributes:
        rank: of the job.
        host: its name.
        kind: CAUSE, the rank itself failed; LOST, its communication with another rank failed;
            STUCK, it has waited for long, and may still go on.
        time: in Unix seconds.
        position: where the rank was in its step.
        error: one line; empty for STUCK.
        trace: of the error, or the stacks of the rank's threads.
        waits: the collective that the rank waits for.
        last: the number of the last collective that it launched, by group.
        flight: the last collectives, for experts.
    """

    rank: int
    host: str
    kind: str
    time: float
    position: str
    error: str = ""
    trace: str = ""
    waits: Collective | None = None
    last: list[tuple[Group, int]] = field(default_factory=list)
    flight: list[str] = field(default_factory=list)

    def reached(self, collective: Collective) -> bool:
        """Returns whether the rank has launched a collective of one of its groups."""
        if collective.between_two:
            return True  # its number counts on one rank alone
        group = collective.group
        return any(g.ranks == group.ranks and n >= collective.number for g, n in self.last)

    def write(self, folder: Path) -> None:
        """Writes it as `rank-R.json`; the file is whole or is the one that was there."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{self.rank}.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self), indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(new, path)


def record_of(
    rank: int, position: str, launched: list[Collective], error: BaseException | None = None
) -> Record:
    """Returns the record of this rank now: of its error, or, without one, of its threads."""
    kind, line = STUCK, ""
    if error is not None:
        elsewhere = getattr(error, ORIGIN, rank) != rank  # another rank raised it, and shared it
        kind = LOST if elsewhere or is_lost_peer(error) else CAUSE
        line = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        text = "".join(traceback.format_exception(error))
    else:
        text = stacks()
    waits = waiting_for(launched)
    if waits is None and kind == LOST and launched and not SENT_AND_RECEIVED.search(text):
        waits = launched[-1]  # a collective that has failed has ended
    last: dict[Group, int] = {}
    for one in launched:
        if not one.between_two:
            last[one.group] = max(one.number, last.get(one.group, 0))
    flight = [
        f"{one} {one.sizes} launched {one.launched:.3f}{'' if one.ended else ', in flight'}"
        for one in launched[-KEPT:]
    ]
    return Record(
        rank, socket.gethostname(), kind, time.time(), position, line, text, waits,
        list(last.items()), flight,
    )  # fmt: skip


def is_lost_peer(error: BaseException) -> bool:
    """Returns whether an error says that another rank is gone, and so is no cause itself."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__
    return any(
        isinstance(one, dist.DistError)
        or (isinstance(one, RuntimeError) and LOST_PEER.search(str(one)) is not None)
        for one in chain
    )


def stacks() -> str:
    """Returns the stacks of this process's threads, the main thread's first, but for this one's."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    main = threading.main_thread().ident
    order = sorted(frames, key=lambda ident: ident != main)
    parts = []
    for ident in order:
        stack = "".join(traceback.format_stack(frames[ident]))
        parts.append(f"thread {names.get(ident, ident)}:\n{stack}")
    return "\n".join(parts)


def read_records(folder: Path) -> dict[int, Record]:
    """Returns the records of an attempt, by rank."""
    found = {}
    for path in folder.glob("rank-*.json"):
        record = record_from(json.loads(path.read_text(encoding="utf-8")))
        found[record.rank] = record
    return dict(sorted(found.items()))


def record_from(plain: dict[str, Any]) -> Record:
    """Returns a record from what `Record.write` wrote."""
    if plain["waits"] is not None:
        group, *others = plain["waits"]
        plain["waits"] = Collective(group_from(group), *others)
    plain["last"] = [(group_from(group), number) for group, number in plain["last"]]
    return Record(**plain)


def group_from(plain: list[Any]) -> Group:
    """Returns a group from its plain form."""
    axis, ranks = plain
    return Group(axis, tuple(ranks))


def cause_in(records: dict[int, Record]) -> Record | None:
    """Returns the record of the rank that failed first by itself; None: no rank did."""
    causes = [record for record in records.values() if record.kind == CAUSE]
    return min(causes, key=lambda record: record.time, default=None)
