"""Locks a run's folder, so that one job trains it at a time, whatever its hosts.

The kernel frees the lock of a process that has died. Hosts whose file system does not share locks
see signs of life instead: the holder touches the file every few seconds.
"""

import fcntl
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from colonnade.launcher.cluster.environment import scheduler_job
from colonnade.launcher.errors import UserError
from colonnade.launcher.run_files import LOCK

BEAT = 5.0  # seconds between two signs of life


@contextmanager
def locked(folder: Path, beat: float = BEAT) -> Iterator[None]:
    """Locks a run's folder against all other jobs while the block runs.

    Where a job of another host did not give the lock back, it waits for up to three beats for a
    sign of life, unless the last one is older.

    Raises:
        UserError: another job trains this run, or the folder cannot be written to.
    """
    path = folder / LOCK
    try:
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise unwritable_error(folder, error) from error
    with file:
        try:
            take(folder, file, beat)
        except OSError as error:
            raise unwritable_error(folder, error) from error
        ended = threading.Event()
        pulse = threading.Thread(target=show_life, args=(path, beat, ended), daemon=True)
        pulse.start()
        try:
            yield
        finally:
            ended.set()
            pulse.join()
            file.truncate(0)  # given back, so that no one waits for signs of life


def take(folder: Path, file: FileIO, beat: float) -> None:
    """Takes the lock, and writes this process into it; raises UserError where a living job has it,
    OSError where the disk refuses."""
    shared = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise held_error(folder, read(file)) from None
    except OSError as error:  # a file system without locks
        print(
            f"colonnade: {folder} cannot be locked ({error.strerror}): a second job is noticed by "
            "its signs of life alone",
            file=sys.stderr,
        )
        shared = False
    holder = read(file)
    on_this_host = host_of(holder) == socket.gethostname()
    if holder and not (shared and on_this_host) and shows_life(folder / LOCK, beat):
        raise held_error(folder, holder)
    file.truncate(0)
    file.write(f"{describe_holder()}\n".encode())
    if not shared:  # of two jobs that start at the same moment, the one that wrote last has it
        time.sleep(beat / 5)
        if (holder := read(file)) != describe_holder():
            raise held_error(folder, holder)


def unwritable_error(folder: Path, error: OSError) -> UserError:
    """Returns the error for a run's folder that cannot be written to."""
    return UserError(
        f"{folder}: cannot write in the run's folder: {error.strerror}; free space, or make it "
        "writable"
    )


def host_of(holder: str) -> str | None:
    """Returns the host in the text of a lock, which `describe_holder` wrote."""
    found = re.match(r"process \d+ on (\S+)", holder)
    return found[1] if found else None


def describe_holder() -> str:
    """Returns the text of the lock: this process, its host, and the scheduler's job."""
    job = scheduler_job()
    return f"process {os.getpid()} on {socket.gethostname()}" + (f" ({job})" if job else "")


def held_error(folder: Path, holder: str) -> UserError:
    """Returns the error for a run that another job trains."""
    return UserError(
        f"{folder}: {holder or 'another process'} trains this run; wait for its end, or stop it, "
        "then resume"
    )


def read(file: FileIO) -> str:
    """Returns the text of the lock: its last holder, or nothing if that gave it back."""
    file.seek(0)
    return file.read().decode().strip()


def shows_life(path: Path, beat: float) -> bool:
    """Returns whether the file is touched within three beats; no, at once, if it was not for long.

    Times are those of the file system's clock, on which hosts need not agree.
    """
    last = path.stat().st_mtime
    clock = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    clock.touch()
    now = clock.stat().st_mtime
    clock.unlink()
    if now - last > 3 * beat:
        return False
    end = time.monotonic() + 3 * beat
    while time.monotonic() < end:
        time.sleep(beat / 5)
        path.open("rb").close()  # network file systems look for news when a file is opened
        if path.stat().st_mtime != last:
            return True
    return False


def show_life(path: Path, beat: float, ended: threading.Event) -> None:
    """Touches the file every `beat` seconds until `ended` is set."""
    while not ended.wait(beat):
        # a beat that a file system in trouble refuses is one beat less: the next may come through,
        # and the run itself reports a folder that is gone
        with suppress(OSError):
            os.utime(path)
