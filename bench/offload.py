"""`bench offload`: what optimizer state in host memory costs, in parts that run one by one."""

from collections.abc import Callable
from typing import Any

from colonnade.bench import host_adamw

PARTS: tuple[Callable[[], dict[str, Any]], ...] = (host_adamw.run,)


def run() -> dict[str, Any]:
    """The figures of all parts."""
    figures: dict[str, Any] = {}
    for part in PARTS:
        figures |= part()
    return figures
