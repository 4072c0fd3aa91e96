"""What a training job is asked for, and how its folder is opened."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from colonnade.launcher.train.folder import NEWEST, OpenRun, ResumePoint

OpenFolder = Callable[[], AbstractContextManager[OpenRun]]  # opens and locks a run's folder


class Order(NamedTuple):
    """What a job is asked for.

    Attributes:
        source: where it goes on.
        until: after which step it stops; None: the last.
        step: at which the run is, as far as it is known before a checkpoint is read.
        restarts: how often ranks that are started on this host are started again after a failure.
        command: the words of the command line that started the job; none: that of this process.
    """

    source: ResumePoint = NEWEST
    until: int | None = None
    step: int = 0
    restarts: int = 0
    command: Sequence[str] = ()


NOTHING_ASKED = Order()
