"""Signals that end a run: at the first one it saves, at a second Ctrl-C it ends at once."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any

from colonnade.launcher.errors import UserError

# Ctrl-C; a scheduler's end; a lost connection; SLURM's notice before the end of its time.
SAVE_FIRST = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ONE_SIGNAL = 1.0  # seconds: a terminal and a launcher that passes it on may send the same one

Handler = Callable[[int, FrameType | None], Any]


class StopSignal:
    """A signal, noted now and obeyed at the end of the step, after saving."""

    def __init__(self) -> None:
        self.number = 0
        self.agreed = False  # all ranks know of it, and save

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal."""
        self.number = number


@contextmanager
def stop_signal(ranks: int, answers: bool = False) -> Iterator[StopSignal]:
    """Note the signals of `SAVE_FIRST` for the length of the block (main thread only).

    `answers` says that this process is the one to tell the user that a signal came, and to end at
    once when Ctrl-C comes again. One of several `ranks` that is told to stop and then fails has
    lost a peer, which tells why; it ends by the signal, as it would without us.
    """
    stop = StopSignal()
    bereft = False
    try:
        with handled(stop.note, answers):
            yield stop
    except Exception as failure:
        bereft = ranks > 1 and not isinstance(failure, UserError)
        raise
    finally:
        if bereft and stop.number and not stop.agreed:
            signal.raise_signal(stop.number)


@contextmanager
def handled(handler: Handler, answers: bool) -> Iterator[None]:
    """Let `handler` have the signals of `SAVE_FIRST`, and their earlier handlers afterwards.

    A lost connection that the process was started to ignore (nohup) stays ignored. Outside of the
    main thread nothing changes.
    """
    before = {}
    with suppress(ValueError):  # not the main thread: the caller keeps its own handling
        for number in SAVE_FIRST:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    with answered() if answers and before else nullcontext():
        try:
            yield
        finally:
            for number, earlier in before.items():
                signal.signal(number, earlier)


@contextmanager
def answered() -> Iterator[None]:
    """Have a thread tell the user of signals as they come, and end at the second Ctrl-C.

    Python runs handlers between its own instructions, and backward is one of them: the byte that
    the C handler writes reaches a thread at once.
    """
    here, there = socket.socketpair()
    there.setblocking(False)
    before = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_answer, args=(here,), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        there.close()  # the thread reads the end
        thread.join()
        here.close()


def _answer(received: socket.socket) -> None:
    """Tell of the first signal; end the process at a Ctrl-C that comes later."""
    first: float | None = None
    while number := received.recv(1):
        if number[0] not in SAVE_FIRST:
            continue
        name, now = signal.Signals(number[0]).name, time.monotonic()
        if first is None:
            first = now
            _write(
                f"\n{name}: stopping (a run after its step, saved); "
                "Ctrl-C again ends at once, without saving\n"
            )
        elif number[0] == signal.SIGINT and now - first > ONE_SIGNAL:
            _write("\nended at once, without saving\n")
            os._exit(128 + signal.SIGINT)


def _write(text: str) -> None:
    """To stderr, past buffers that the main thread may be writing; a lost terminal is no matter."""
    with suppress(OSError):
        os.write(2, text.encode())
