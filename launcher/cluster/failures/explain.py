"""Makes sentences of the records of a job's ranks: which rank did not reach which collective."""

import re
import time
from collections.abc import Sequence

from colonnade.launcher.cluster.failures.record import STUCK, Record, cause_in

FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


def explain(records: dict[int, Record], hosts: Sequence[str]) -> str:
    """Returns what failed first, as text for people.

    Args:
        records: of the ranks that wrote one.
        hosts: of all ranks of the job.
    """
    if cause := cause_in(records):
        return (
            f"rank {cause.rank} on {cause.host} failed first ({cause.position}): {cause.error}\n"
            f"{cause.trace.rstrip()}"
        )
    culprit = missing_rank(records)
    if culprit is None:
        if stuck := [record for record in records.values() if record.kind == STUCK]:
            first = min(stuck, key=lambda record: record.time)
            return (
                f"rank {first.rank} on {first.host} hung ({first.position}), while others waited "
                f"for it; it was at {innermost(first.trace)}"
            )
        silent = [rank for rank in range(len(hosts)) if rank not in records]
        if not silent:
            return "all ranks lost their connections at once; the network, or a host, has failed"
        return f"{without_word(silent, hosts)}; no other rank knows why"
    rank, waiting = culprit
    collective = waiting.waits
    assert collective is not None
    since = time.strftime("%H:%M:%S", time.localtime(collective.launched))
    text = (
        f"rank {rank} on {hosts[rank]} did not reach {collective}, for which rank {waiting.rank} "
        f"on {waiting.host} has waited since {since} ({waiting.position}). "
    )
    if rank not in records:
        return text + f"{without_word([rank], hosts)}."
    record = records[rank]
    if record.waits is not None:
        return (
            text + f"It waits in {record.waits} instead: the ranks differ in their order of calls."
        )
    return text + f"It was at {innermost(record.trace)} ({record.position})."


def without_word(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Says that ranks left no record."""
    named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:4])
    if len(ranks) > 4:
        named += f" and {len(ranks) - 4} others"
    logs = ", ".join(f"rank-{rank}.log" for rank in ranks[:4] if rank)
    text = "left no record: killed (out of memory?), stopped, or the host is out of reach"
    return f"{named} {text}" + (f" (see {logs} in the run's logs)" if logs else "")


def missing_rank(records: dict[int, Record]) -> tuple[int, Record] | None:
    """Returns the rank on which others wait, in the end, and a record of one that waits for it.

    A rank that waits for a second one, which itself waits for a third one, waits for the third.
    """
    waiting = next(
        (r for r in records.values() if r.waits is not None and r.waits.group.ranks), None
    )
    if waiting is None:
        return None
    passed: set[int] = set()
    while True:
        collective = waiting.waits
        assert collective is not None
        behind = [
            rank
            for rank in collective.group.ranks
            if rank not in records or not records[rank].reached(collective)
        ]
        if not behind:
            return None
        rank = next((r for r in behind if r not in records), behind[0])
        following = records.get(rank)
        if following is None or following.waits is None or rank in passed:
            return rank, waiting
        if not following.waits.group.ranks:
            return rank, waiting
        passed.add(rank)
        waiting = following


def innermost(trace: str) -> str:
    """Returns the innermost place in this package's files of the first thread of some stacks."""
    first = trace.partition("\nthread ")[0]
    frames = FRAME.findall(first)
    ours = [f for f in frames if re.search(r"/(colonnade|launcher|parallel|models|kernels)/", f[0])]
    path, line, function = (ours or frames or [("an unknown place", "0", "?")])[-1]
    return f"{path}:{line}, in {function}"
