"""What a rule is, and numbers as remedies write them."""

import math
from collections.abc import Callable, Iterable, Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.tables import Recipe

Rule = Callable[[Recipe, int | None], Iterator[Fault]]

# The fields that say which sub-blocks there are.
ROW = ("model.pattern", "model.mtp", "model.mtp_pattern")


class Rules(list[tuple[tuple[str, ...], Rule]]):
    """The rules of one file, in order, each with the fields it looks at."""

    def add(self, *involves: str) -> Callable[[Rule], Rule]:
        """Adds a rule; it looks at the fields `involves` and at those it reports."""

        def register(check: Rule) -> Rule:
            self.append((involves, check))
            return check

        return register


def divisors(n: int) -> list[int]:
    """All divisors, in order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def choice(values: Iterable[int], near: int) -> str:
    """The up to six values nearest to a given one, in words."""
    nearest = sorted(sorted(set(values), key=lambda v: abs(v - near))[:6])
    return ("" if len(nearest) == 1 else "one of ") + ", ".join(map(str, nearest))


def multiples(unit: int, near: int) -> str:
    """The positive multiples on both sides of a value, in words."""
    below = near // unit * unit
    return " or ".join(str(v) for v in (below, below + unit) if v > 0)
