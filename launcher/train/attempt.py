"""An attempt at a run on one rank: who reports its failure, and what its start took."""

import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero
from colonnade.launcher.cluster.environment import restart_count
from colonnade.launcher.cluster.failures.position import Position
from colonnade.launcher.cluster.failures.report import (
    FailureReporter,
    explained,
    output_in_file,
    write_hosts,
)
from colonnade.launcher.cluster.startup import Startup
from colonnade.launcher.errors import UserError
from colonnade.launcher.run_files import FAILURES, LOGS, MISTAKE
from colonnade.launcher.train.events import next_attempt, read_events
from colonnade.launcher.train.lines import write_below
from colonnade.parallel.world import World


@dataclass
class Attempt:
    """An attempt at a run on one rank.

    Attributes:
        reporter: records why this rank failed.
        announce: this process prints that a signal came, and ends at once at a second Ctrl-C.
        startup: measures what comes before the first step.
    """

    reporter: FailureReporter
    announce: bool = False
    startup: Startup = field(default_factory=Startup)


def attempt_of(
    run: Path, world: World, startup: Startup | None = None, started: bool = False
) -> Attempt:
    """Returns this attempt at a run. Collective: all-gathers the hosts.

    `started` says that our launcher started the ranks: it prints users' mistakes, and announces
    signals.
    """
    hosts = on_all_ranks(socket.gethostname)
    folder = on_rank_zero(lambda: new_folder(run, hosts))
    reporter = FailureReporter(folder, world, Position(), hosts, started)
    return Attempt(reporter, world.is_rank_zero and not started, startup or Startup())


def new_folder(run: Path, hosts: list[str]) -> Path:
    """Makes the folder of this attempt's records of failures, with the hosts of all ranks. An
    attempt that failed before it wrote an event shares its number with the next one.

    Raises:
        UserError: the disk refuses.
    """
    number, folder = next_attempt(run), run / FAILURES

    def make() -> None:
        folder.mkdir(exist_ok=True)
        name = f"attempt-{number}"
        again = (folder / name).exists() + len(list(folder.glob(f"{name}.*")))
        made.append(folder / (f"{name}.{again}" if again else name))
        made[0].mkdir()
        write_hosts(made[0], hosts)

    made: list[Path] = []
    write_below(folder, make)
    return made[0]


def own_output(run: Path, attempt: Attempt) -> AbstractContextManager[None]:
    """Returns a block in which ranks but the first print into files of their own."""
    rank = attempt.reporter.world.rank
    path = run / LOGS / attempt.reporter.folder.name / f"rank-{rank}.log"
    return output_in_file(path) if rank else nullcontext()


@contextmanager
def mistakes_kept(run: Path) -> Iterator[None]:
    """Writes a user's mistake that leaves the block into the run's folder: the ranks need not be
    started again."""
    try:
        yield
    except UserError as mistake:
        with suppress(OSError):  # the mistake itself is what to report
            (run / MISTAKE).write_text(f"{mistake}\n", encoding="utf-8")
        raise


def consider_earlier(run: Path) -> None:
    """Where the ranks are started again, prints why, or raises the user's mistake for which the
    attempt before has ended. Rank 0 calls it before an attempt.

    Raises:
        UserError: the mistake of the attempt before.
    """
    mistake = run / MISTAKE
    if not restart_count():
        write_below(run, lambda: mistake.unlink(missing_ok=True))
        return
    if mistake.exists():
        raise UserError(mistake.read_text(encoding="utf-8").strip())
    folders = sorted((run / FAILURES).glob("attempt-*"), key=lambda path: path.stat().st_mtime)
    why = explained(folders[-1]) if folders else None
    events = read_events(run)
    if why is None and events and events[-1]["event"] == "stop":
        why = f"{events[-1]['reason']} after step {events[-1]['step']}"
    text = f"start {restart_count() + 1}"
    print(f"colonnade: {text}, after: {why or 'ranks came or went'}", file=sys.stderr, flush=True)
