"""Handles signals that stop a run: the first one saves, a second Ctrl-C ends it at once."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any

from colonnade.launcher.errors import UserError

# Ctrl-C; a scheduler's termination; a lost connection; SLURM's notice before its time limit.
SAVE_FIRST = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Seconds in which a second SIGINT counts as the same Ctrl-C: the terminal sends one to the process,
# and the launcher may forward another.
ONE_SIGNAL = 1.0

Handler = Callable[[int, FrameType | None], Any]


class StopSignal:
    """A received signal, which the run obeys at the end of the step, after saving.

    Attributes:
        number: of the last signal that stops the run; 0: none.
        agreed: all ranks know of it, and save.
        save: a signal asks for a checkpoint without a stop.
    """

    def __init__(self, saving: Collection[int] = ()) -> None:
        self.number, self.agreed, self.save = 0, False, False
        self.saving = saving

    def note(self, number: int, frame: FrameType | None) -> None:
        """Records the signal; has the signature of a signal handler."""
        if number in self.saving:
            self.save = True
        else:
            self.number = number


def signal_name(number: int) -> str:
    """The name of a signal, such as SIGTERM; nothing for 0."""
    return signal.Signals(number).name if number else ""


@contextmanager
def stop_signal(
    ranks: int, announce: bool = False, saving: Collection[int] = ()
) -> Iterator[StopSignal]:
    """Records the signals of `SAVE_FIRST` while the block runs (in the main thread only).

    One of several `ranks` that receives a signal and then fails, before all ranks have agreed to
    stop, has probably lost a peer, and the peer reports the reason. Such a rank raises the signal
    again, and so ends by it, as it would without this handler.

    Args:
        ranks: the number of all ranks.
        announce: this process prints that a signal came, and ends at once at a second Ctrl-C.
        saving: signals that ask for a checkpoint, and do not stop the run.
    """
    stop = StopSignal(saving)
    peer_lost = False
    try:
        with signal_handler(stop.note, announce, saving):
            yield stop
    except Exception as failure:
        peer_lost = ranks > 1 and not isinstance(failure, UserError)
        raise
    finally:
        # `signal_handler` has restored the earlier handlers, so the signal now has its usual effect
        if peer_lost and stop.number and not stop.agreed:
            signal.raise_signal(stop.number)


@contextmanager
def signal_handler(
    handler: Handler, announce: bool, saving: Collection[int] = ()
) -> Iterator[None]:
    """Installs `handler` for the signals of `SAVE_FIRST`, and restores the earlier handlers.

    SIGHUP stays ignored if the process was started to ignore it (nohup). Outside of the main thread
    nothing is installed. `announce` and `saving` as in `stop_signal`.
    """
    previous = {}
    with suppress(ValueError):  # not in the main thread: the handlers of the caller stay
        for number in SAVE_FIRST:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    with announced_signals(saving) if announce and previous else nullcontext():
        try:
            yield
        finally:
            for number, earlier in previous.items():
                signal.signal(number, earlier)


@contextmanager
def announced_signals(saving: Collection[int]) -> Iterator[None]:
    """Starts a thread that prints signals as they come, and ends the process at a second Ctrl-C.

    Python runs handlers only between its own instructions, and a whole backward pass is one
    instruction. The byte that the C handler writes to the wake-up socket reaches a thread at once.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_announce, args=(reader, saving), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        writer.close()  # the thread reads the end of the stream, and returns
        thread.join()
        reader.close()


def _announce(reader: socket.socket, saving: Collection[int]) -> None:
    """Prints the first signal that stops the run, and each that does not; ends the process at a
    Ctrl-C that comes after the first."""
    first: float | None = None
    while number := reader.recv(1):
        if number[0] not in SAVE_FIRST:
            continue
        name, now = signal.Signals(number[0]).name, time.monotonic()
        if number[0] in saving:
            _write(f"\n{name}: a run saves after its step, and goes on\n")
        elif first is None:
            first = now
            _write(
                f"\n{name}: stopping (a run after its step, saved); "
                "Ctrl-C again ends at once, without saving\n"
            )
        elif number[0] == signal.SIGINT and now - first > ONE_SIGNAL:
            _write("\nended at once, without saving\n")
            os._exit(128 + signal.SIGINT)


def _write(text: str) -> None:
    """Writes to stderr without Python's buffers, in which the main thread may be writing.

    The loss of the terminal is ignored.
    """
    with suppress(OSError):
        os.write(2, text.encode())
