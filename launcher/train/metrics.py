"""Reads the metrics.jsonl of a run, and selects what of a line is shown as curves.

Every row has the step, the `attempt` that wrote it, and its `time` in Unix seconds; after a rewind
(`guard.spike`) also how many `rewinds` the attempt has had. When steps repeat after a restart or a
rewind, the file keeps their earlier rows; `current_rows` tells which ones count.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colonnade.launcher.train.lines import read_lines

NOT_SHOWN = ("step", "attempt", "rewinds", "time")  # they place a row, and are no curves themselves


def read_metrics(path: Path, superseded: bool = False) -> list[dict[str, Any]]:
    """The rows of a metrics file, one for every step and validation of the run as it now is.

    Args:
        path: the file; a last line that a crash truncated is left out.
        superseded: return all rows, those of steps that a later attempt repeated, too.
    """
    rows = read_lines(path, "step")
    return rows if superseded else current_rows(rows)


def attempt_of(row: dict[str, Any]) -> int:
    """The attempt that wrote a row; 1 where it does not say, as in files of older versions."""
    return row.get("attempt", 1)


def segment_of(row: dict[str, Any]) -> tuple[int, int]:
    """The segment of a run that wrote a row: the attempt, and its rewinds up to then. Within a
    segment steps only grow; a later segment may repeat steps of earlier ones."""
    return attempt_of(row), row.get("rewinds", 0)


def place(row: dict[str, Any]) -> tuple[float, bool]:
    """Where a row stands in the course of a run: its step, of which validation comes last."""
    return row["step"], "validation_loss" in row


def current_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of a run without those that a later segment superseded.

    A segment, an attempt or what follows a rewind in it, that goes on after step s supersedes what
    earlier segments recorded of steps after s. If s is the last step, it repeats the validation,
    and supersedes only that. Both are the rows from the first row of the segment on; a segment
    without a row supersedes nothing.
    """
    first: dict[tuple[int, int], tuple[float, bool]] = {}
    for row in rows:
        first.setdefault(segment_of(row), place(row))
    limits, limit = {}, (math.inf, False)  # of each segment: where a later one took over
    for segment in sorted(first, reverse=True):
        limits[segment] = limit
        limit = min(limit, first[segment])
    return [row for row in rows if place(row) < limits[segment_of(row)]]


def curves(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line that are measured or set, by name, without its step, attempt and time.

    A number in an object, such as the largest share of an expert of a layer, is named
    `largest_share/LAYER`. Lists (loads) and objects in objects are not shown as curves.
    """
    numbers: dict[str, float] = {}
    for name, value in row.items():
        inner = value if isinstance(value, dict) else {"": value}
        for key, number in inner.items():
            if isinstance(number, int | float) and name not in NOT_SHOWN:
                numbers[f"{name}/{key}" if key else name] = number
    return numbers
