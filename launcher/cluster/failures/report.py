"""Records why this rank failed or what it waits for, and prints the cause once for all ranks."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from colonnade.launcher.cluster.environment import USER_MISTAKE
from colonnade.launcher.cluster.failures.explain import explain
from colonnade.launcher.cluster.failures.flight import collectives
from colonnade.launcher.cluster.failures.position import Position
from colonnade.launcher.cluster.failures.record import cause_in, read_records, record_of
from colonnade.launcher.errors import ReportedError, UserError
from colonnade.parallel.world import World

# Seconds in which a rank whose peer is gone waits for the record of the rank that failed first.
GRACE_PERIOD = 5.0
# Of the time-out of collectives: after it a rank that is where it was records what it waits for.
STUCK_AFTER = 0.7


class FailureReporter:
    """Writes this rank's records into a folder of the run, and prints what failed first.

    Attributes:
        folder: of this attempt's records.
        world: this rank among all ranks.
        position: where this rank is.
        hosts: of all ranks.
        started: our launcher started this rank, and prints users' mistakes for all ranks.
        recorded: the error whose record was written.
    """

    def __init__(
        self, folder: Path, world: World, position: Position, hosts: list[str],
        started: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.world, self.position = folder, world, position
        self.hosts, self.started = hosts, started
        self.recorded: BaseException | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Writes the record of this rank while it hangs within the block."""
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(ended,), name="watch", daemon=True)
        if self.world.size > 1:
            watch.start()
        try:
            yield
        finally:
            ended.set()
            if watch.is_alive():
                watch.join()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Writes the record of an exception that leaves the block, but for a user's mistake."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if self.world.size > 1:
                self.record(error)
            raise

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Turns an exception that leaves the block into `ReportedError`, after one of the ranks has
        printed what failed first.

        A rank that failed by itself prints at once; one that lost a peer first waits for the record
        of the rank that failed first, which then prints it itself.
        """
        try:
            yield
        except UserError as mistake:
            if self.world.size > 1 and not self.started and not self.is_first():
                raise ReportedError(USER_MISTAKE, str(mistake)) from None
            raise
        except Exception as error:
            if self.world.size == 1:
                raise
            self.record(error)
            text = self.cause()
            if text is not None:
                where = f"(records of all ranks: {self.folder})"
                print(f"\ncolonnade: {text}\n{where}", file=sys.stderr, flush=True)
            line = (text or f"another rank failed first: {self.folder}").partition("\n")[0]
            raise ReportedError(1, line) from error

    def cause(self) -> str | None:
        """Returns what failed first, for this rank to print; None: another rank prints it."""
        end = time.monotonic() + GRACE_PERIOD
        while True:
            records = read_records(self.folder)
            cause = cause_in(records)
            if cause is not None or time.monotonic() > end:
                break
            time.sleep(0.1)
        if cause is not None and cause.rank != self.world.rank:
            return None
        return explain(records, self.hosts) if self.is_first() else None

    def is_first(self) -> bool:
        """Whether no other rank has asked this before; a disk that refuses makes every rank the
        first."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.folder / "reported", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError as error:
            print(f"colonnade: {self.folder}: {error.strerror}", file=sys.stderr, flush=True)
        return True

    def record(self, error: BaseException | None = None) -> None:
        """Writes the record of this rank, of an error or, without one, of a rank that hangs; of an
        error once."""
        if error is not None and error is self.recorded:
            return
        self.recorded = error or self.recorded
        if error is not None and self.world.rank:
            traceback.print_exception(error)  # into the log of this rank
        launched = collectives(self._axes()) if dist.is_initialized() else []
        record = record_of(self.world.rank, self.position.describe(), launched, error)
        try:
            record.write(self.folder)
        except OSError as refused:
            print(f"colonnade: {self.folder}: {refused.strerror}", file=sys.stderr, flush=True)

    def _axes(self) -> dict[tuple[int, ...], str]:
        """Returns the axes of the meshes by the ranks of this rank's groups."""
        return {
            tuple(dist.get_process_group_ranks(group)): axis
            for (axis, _), group in self.world.groups.items()
            if axis
        }

    def _watch(self, ended: threading.Event) -> None:
        """Writes a record whenever the rank has been at one position for long, until `ended`."""
        if self.world.timeout is None:
            return
        limit = STUCK_AFTER * self.world.timeout.total_seconds()
        written: float | None = None  # of which position there is a record
        while not ended.wait(min(1.0, limit / 4)):
            since = self.position.since
            if written is not None and written != since:
                (self.folder / f"rank-{self.world.rank}.json").unlink(missing_ok=True)
                written = None
            elif written is None and time.monotonic() - since > limit:
                written = since
                self.record()
        if written is not None and self.recorded is None:
            (self.folder / f"rank-{self.world.rank}.json").unlink(missing_ok=True)


@contextmanager
def output_in_file(path: Path | None) -> Iterator[None]:
    """Redirects what this process and its libraries print to a file while the block runs; None: it
    stays where it is. Appends, and makes the folder. Raises OSError."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    copies = os.dup(1), os.dup(2)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(copies, start=1):
            os.dup2(copy, number)
            os.close(copy)
