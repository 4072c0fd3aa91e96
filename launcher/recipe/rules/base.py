"""The type of a rule, and how remedies write suggested numbers."""

import math
from collections.abc import Callable, Iterable, Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.options import ROW

Rule = Callable[[Recipe, int | None], Iterator[Fault]]

# The fields that decide which sub-blocks the model has.
ROW_FIELDS = tuple(f"model.{name}" for name in ROW)


class Rules(list[tuple[tuple[str, ...], Rule]]):
    """The rules of one file, in order, each as (the fields it looks at, the function)."""

    def add(self, *involves: str) -> Callable[[Rule], Rule]:
        """Returns a decorator that adds a rule.

        The rule looks at the fields `involves` and at those that it reports.
        """

        def register(check: Rule) -> Rule:
            self.append((involves, check))
            return check

        return register


def divisors(n: int) -> list[int]:
    """Returns all divisors of `n`, in ascending order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def nearest_values(values: Iterable[int], target: int) -> str:
    """Writes up to six of `values`, those nearest to `target`, in ascending order."""
    nearest = sorted(sorted(set(values), key=lambda v: abs(v - target))[:6])
    return ("" if len(nearest) == 1 else "one of ") + ", ".join(map(str, nearest))


def nearest_multiples(unit: int, target: int) -> str:
    """Writes the positive multiples of `unit` next to `target`: at most it, and above it."""
    below = target // unit * unit
    return " or ".join(str(v) for v in (below, below + unit) if v > 0)
