"""Reads the metrics.jsonl of a run, and selects what of a line is shown as curves."""

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file, without a last line that a crash truncated."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def curves(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line but its step, by name.

    A number in an object, such as the largest share of an expert of a layer, is named
    `largest_share/LAYER`. Lists (loads) and objects in objects are not shown as curves.
    """
    numbers: dict[str, float] = {}
    for name, value in row.items():
        inner = value if isinstance(value, dict) else {"": value}
        for key, number in inner.items():
            if isinstance(number, int | float) and name != "step":
                numbers[f"{name}/{key}" if key else name] = number
    return numbers
