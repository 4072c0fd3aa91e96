"""Measures the parts of a step in seconds of the host."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from colonnade.launcher.cluster.failures.position import Position
from colonnade.launcher.cluster.waits import Waits

BETWEEN_STEPS = ("save", "validation")  # parts that do not count as time of a step


class Timer:
    """Measures a step, from one call of `restart` to the next, and its named parts.

    The parts are `data` (waiting for batches), `passes` (forward and backward), `update` (clipping
    and optimizer), `replay` (`guard.replay_every`), and, of what came between this step and the one
    before it, `save` (blocked by a checkpoint) and `validation`. What belongs to none is reports,
    and waiting for other ranks.

    Parts are times of the host, not of a GPU's kernels. `passes` end when the norm of the gradients
    has been read from the GPU, so that its work on them is within. It may still be busy with the
    update when `update` ends; the ranks' exchange of signals after the step waits for that.

    Attributes:
        waits: measures how long other ranks are waited for in the parts of a step.
    """

    def __init__(self, position: Position | None = None) -> None:
        """`position` is told which part begins."""
        self.position = position or Position()
        self.waits = Waits()
        self.parts: dict[str, float] = {}
        self.start = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to a part of the step."""
        start = time.perf_counter()
        self.position.enter(name)
        try:
            with nullcontext() if name in BETWEEN_STEPS else self.waits.counted():
                yield
            self.position.enter("")  # an exception leaves the position where it is
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start

    def restart(self) -> tuple[float, dict[str, float]]:
        """Ends a step, and begins the next.

        Returns:
            the seconds of the step, without a checkpoint and a validation before it; and its parts.
        """
        now, parts = time.perf_counter(), self.parts
        seconds = now - self.start - sum(parts.get(name, 0.0) for name in BETWEEN_STEPS)
        self.start, self.parts = now, {}
        return seconds, parts
