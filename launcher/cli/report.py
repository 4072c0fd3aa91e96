"""Prints reports as aligned lines, or writes them as JSON."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from colonnade.launcher.errors import UserError


@contextmanager
def reporting(target: str | None) -> Iterator[Callable[[dict], None]]:
    """Yields a function that prints a report as aligned lines, or writes it as JSON to `target`.

    With `-` the report is the only output on stdout: other output of this process and of those that
    it starts goes to stderr.
    """
    if target != "-":
        yield lambda report: emit(report, target)
        return
    # Redirect the file descriptor, not only `sys.stdout`: started processes inherit it.
    sys.stdout.flush()
    stdout_copy, stdout = os.dup(1), sys.stdout
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def write_to_stdout(report: dict) -> None:
        sys.stderr.flush()
        with open(stdout_copy, "w", encoding="utf-8", closefd=False) as out:
            out.write(json.dumps(report, indent=2) + "\n")

    try:
        yield write_to_stdout
    finally:
        sys.stderr.flush()
        sys.stdout = stdout
        os.dup2(stdout_copy, 1)
        os.close(stdout_copy)


def emit(report: dict, target: str | None) -> None:
    """Prints a report as aligned lines, or writes it as JSON to a file."""
    if target is None:
        width = max(len(key) for key in report)
        print("\n".join(f"{key:<{width}}  {format_value(value)}" for key, value in report.items()))
        return
    write_text("--json", target, json.dumps(report, indent=2) + "\n")


def write_text(option: str, path: str, text: str) -> None:
    """Writes the file that an option names.

    Raises:
        UserError: it cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{option} {path}: cannot write it: {error.strerror}") from error


def format_value(value: object) -> str:
    """Formats a value for people: `1,234,567`, `0.8123`, `1.2e+21`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    return str(value)
