"""Finds matplotlib, which draws figures into files where it is installed."""

from typing import Any

DPI = 120  # pixels per inch


def pyplot() -> Any:
    """Returns matplotlib.pyplot, which draws to files; None without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    return plt
