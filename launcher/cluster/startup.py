"""Measures what comes before a rank's first step."""

import os
import time
from pathlib import Path


class Startup:
    """Seconds of what comes before the first step, part by part.

    Attributes:
        begin: when the job was started, in Unix seconds: its launcher's start, or this process's.
        parts: seconds by name: `launcher`, until it has started this process; `imports`, until this
            process has imported what trains; `ranks`, until they are connected; `data`; `model`,
            until it is built, filled and loaded; `first step`.
    """

    def __init__(self, launched: float | None = None) -> None:
        """`launched` is when the launcher that started this process was started itself."""
        started = process_start()
        self.begin, self.parts = launched or started, dict[str, float]()
        self._last = started
        if launched is not None:
            self.parts["launcher"] = started - launched

    def mark(self, part: str) -> None:
        """Ends a part."""
        now = time.time()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        """The seconds of all parts."""
        return self._last - self.begin

    def describe(self) -> str:
        """`first step after 7.9 s: launcher 2.4, imports 3.9, …`."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return f"first step after {self.seconds:.1f} s: {parts}"


def process_start() -> float:
    """When this process was started, in Unix seconds; without /proc, when it asks for the first
    time."""
    stat, uptime = Path("/proc/self/stat"), Path("/proc/uptime")
    if not stat.exists():
        return time.time()
    ticks = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    age = float(uptime.read_text(encoding="ascii").split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
