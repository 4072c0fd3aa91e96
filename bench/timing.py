"""Times alternatives in alternation, so that a drift of the machine's speed affects all alike."""

import statistics
import time
from collections.abc import Callable


def alternate(
    candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Runs every candidate once in each round, in turn; returns the seconds of each, by round.

    The first `warmup` rounds are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_index in range(warmup + rounds):
        for name, action in candidates.items():
            start = time.perf_counter()
            action()
            if round_index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median over rounds of the ratio in each round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
