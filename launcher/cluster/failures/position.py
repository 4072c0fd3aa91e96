"""Where a rank is in its step."""

import time
from collections.abc import Callable


class Position:
    """The step and the part of it in which a rank is, and the sub-block whose pass began last.

    Attributes:
        step: that is trained, from 1; 0 before the first.
        part: of the step, as in `Timer`; empty between parts.
        visited: the direction, `forward` or `backward`, and the index of the sub-block in the row
            whose pass in that direction began last; None: of no one in this part.
        since: when the position last changed, on the clock `time.monotonic`.
        name: returns the name of a sub-block, of its index.
    """

    def __init__(self) -> None:
        self.step, self.part = 0, ""
        self.visited: tuple[str, int] | None = None
        self.since = time.monotonic()
        self.name: Callable[[int], str] = str

    def begin_step(self, step: int) -> None:
        """From now on the rank is in this step."""
        self.step = step
        self.enter("")

    def enter(self, part: str) -> None:
        """From now on the rank is in this part of its step."""
        self.part, self.visited = part, None
        self.since = time.monotonic()

    def visit(self, direction: str, index: int) -> None:
        """From now on the rank is in a pass of sub-block `index` of the row."""
        self.visited = direction, index
        self.since = time.monotonic()

    def describe(self) -> str:
        """Describes the position: `step 12, passes, backward of sub-block 3 (attention)`."""
        words = [f"step {self.step}" if self.step else "before the first step"]
        if self.part:
            words.append(self.part)
        if self.visited is not None:
            direction, index = self.visited
            words.append(f"{direction} of sub-block {self.name(index)}")
        return ", ".join(words)
