"""Timing of alternatives in alternation, so that a drifting machine moves both alike."""

import statistics
import time
from collections.abc import Callable


def alternate(
    contestants: dict[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; all run once in every round, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warmup + rounds):
        for name, action in contestants.items():
            start = time.perf_counter()
            action()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
