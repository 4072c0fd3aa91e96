"""Writes `heartbeat.json`, by which a watchdog outside of the job sees that a run makes progress.

A watchdog compares the file's modification time with a clock: while the run trains, the file is
replaced after every step, at most once a second. A run is stuck when the file is older than its
longest step, or, in another `phase` than `train`, than what that phase may take: nothing is written
in the middle of a step, a save or a validation. `stopped` and `failed` are the last words of an
attempt, after which nothing follows. The job's `attempt`, `host` and `pid` say what to look at.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Literal

from colonnade.launcher.run_files import HEARTBEAT

Phase = Literal["start", "train", "save", "validation", "stopped", "failed"]
INTERVAL = 1.0  # seconds between two beats of the same phase


class Heartbeat:
    """Writes the heartbeat of rank 0.

    A disk that refuses the file does not end the run, because the run itself needs none of it: the
    first refusal is printed, and the first beat that succeeds after it.

    Attributes:
        attempt: the number of this start of the run.
        interval: seconds between two beats of the same phase.
        phase: of the last beat; None before the first.
        refused: the last beat could not be written.
    """

    def __init__(self, run: Path, attempt: int, interval: float = INTERVAL) -> None:
        self.path, self.attempt, self.interval = run / HEARTBEAT, attempt, interval
        self.phase: Phase | None = None
        self.last = 0.0
        self.refused = False
        self.process = {"host": socket.gethostname(), "pid": os.getpid()}

    def beat(self, step: int, phase: Phase = "train") -> None:
        """Replaces the file, unless it was replaced in this phase less than `interval` ago."""
        now = time.monotonic()
        if phase == self.phase and now - self.last < self.interval:
            return
        self.phase, self.last = phase, now
        row = {"step": step, "time": round(time.time(), 3), "attempt": self.attempt}
        text = json.dumps(row | self.process | {"phase": phase}) + "\n"
        new = self.path.with_name(f"{self.path.name}.new")
        try:
            new.write_text(text, encoding="utf-8")
            os.replace(new, self.path)
        except OSError as error:
            self.tell(True, f"cannot be written ({error.strerror}); the run goes on without")
        else:
            self.tell(False, "can be written again")

    def tell(self, refused: bool, what: str) -> None:
        """Prints what has become of the file, where that has changed."""
        if refused != self.refused:
            print(f"colonnade: {self.path} {what}", file=sys.stderr, flush=True)
        self.refused = refused
