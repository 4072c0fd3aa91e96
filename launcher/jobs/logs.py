"""`logs`: prints the output of a job, and follows it until the job has ended."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from colonnade.launcher.cluster.slurm import client
from colonnade.launcher.errors import UserError
from colonnade.launcher.jobs.status import facts_of, jobs_of
from colonnade.launcher.run_files import job_log

Candidate = tuple[str, Path | None, Path]  # a job, the folder of its run, its output
POLL = 0.5  # seconds between two looks at the file
ASK = 5.0  # seconds between two questions to SLURM


def logs(
    target: str, *, lines: int = 50, follow: bool = False, runs: str | Path = "runs"
) -> Iterator[bytes]:
    """Yields the last lines of a job's output; with `follow` also all that comes until its end.

    Args:
        target: the number of a job, or the folder of a run.
        lines: how many of those that are written already.
        follow: go on until the job has ended, over requeues.
        runs: the folder of the runs' folders.

    Raises:
        UserError: there is no such job or run, it has several outputs, or no output yet.
    """
    found = jobs_of(target, Path(runs))
    candidates = [(job, run, output_of(job, run)) for job, run in found]
    job, run, path = chosen(target, candidates)

    def facts() -> list[dict[str, str]]:
        return [known] if (known := facts_of(job, run)) else []

    if not follow:
        if not path.is_file():
            state = client.state_of(facts()[0]) if facts() else "unknown to SLURM"
            raise UserError(f"job {job} is {state}, and has written nothing yet: no file {path}")
        yield last_lines(path.read_bytes(), lines)
        return
    yield from followed(path, lines, lambda: client.has_ended(facts()))


def chosen(target: str, candidates: list[Candidate]) -> Candidate:
    """Returns the job that is meant: of a chain the last that has begun.

    Raises:
        UserError: these are jobs of a sweep, which run at the same time.
    """
    if any("_" in job for job, *_ in candidates) and len(candidates) > 1:
        names = ", ".join(job for job, *_ in candidates)
        raise UserError(f"logs {target}: it has several outputs; name one of {names}")
    begun = [one for one in candidates if one[2].is_file()]
    return begun[-1] if begun else candidates[0]


def output_of(job: str, run: Path | None) -> Path:
    """Returns the path of a job's output, where SLURM says that it is, or in the run's folder.

    Raises:
        UserError: SLURM does not tell, and the run's folder is unknown.
    """
    if output := facts_of(job, run).get("StdOut"):
        return Path(output)
    if run is None:
        raise UserError(f"job {job}: SLURM does not tell where its output is")
    return (run.parent if "_" in job else run) / job_log(job)


def last_lines(text: bytes, lines: int) -> bytes:
    """Returns the last lines of a text."""
    return b"".join(text.splitlines(keepends=True)[-lines:] if lines else [])


def followed(path: Path, lines: int, has_ended: Callable[[], bool]) -> Iterator[bytes]:
    """Yields the last lines of a file, and then what is appended to it until `has_ended`. The file
    may come later, and may be replaced or cut off meanwhile: a new one is read from its begin."""
    file: BinaryIO | None = None
    asked = -ASK
    try:
        while True:
            ended = False
            if time.monotonic() - asked >= ASK:
                ended, asked = has_ended(), time.monotonic()
            if file is None and path.is_file():
                file = path.open("rb")
                yield last_lines(file.read(), lines)
            if file is not None:
                if text := file.read():
                    yield text
                elif was_replaced(file, path):
                    file.close()
                    file = path.open("rb")
                    continue
            if ended:
                return
            time.sleep(POLL)
    finally:
        if file is not None:
            file.close()


def was_replaced(file: BinaryIO, path: Path) -> bool:
    """Whether a path has another file than the open one, or that was cut off."""
    try:
        now = path.stat()
    except FileNotFoundError:  # the new one comes yet
        return False
    return now.st_ino != os.fstat(file.fileno()).st_ino or now.st_size < file.tell()
