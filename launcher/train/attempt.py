"""An attempt at a run on one rank: who reports its failure, and what its start took."""

import socket
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero
from colonnade.launcher.cluster.failures.position import Position
from colonnade.launcher.cluster.failures.report import FailureReporter, output_in_file
from colonnade.launcher.cluster.startup import Startup
from colonnade.launcher.run_files import FAILURES, LOGS
from colonnade.launcher.train.events import next_attempt
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
    number = on_rank_zero(lambda: next_attempt(run))
    hosts = on_all_ranks(socket.gethostname)
    folder = run / FAILURES / f"attempt-{number}"
    reporter = FailureReporter(folder, world, Position(), hosts, started)
    return Attempt(reporter, world.is_rank_zero and not started, startup or Startup())


def own_output(run: Path, attempt: Attempt) -> AbstractContextManager[None]:
    """Returns a block in which ranks but the first print into files of their own."""
    rank = attempt.reporter.world.rank
    path = run / LOGS / attempt.reporter.folder.name / f"rank-{rank}.log"
    return output_in_file(path) if rank else nullcontext()
