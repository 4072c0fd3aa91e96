"""The report of `doctor --cluster` as a picture: a heat map of bandwidth, and one of latency."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from colonnade.launcher.cluster.figures import DPI, pyplot
from colonnade.launcher.errors import UserError

FORMATS = (".png", ".svg")
WRITTEN = 12  # members up to which cells have their figures written in


def check_picture(path: str | None) -> None:
    """Refuses a picture that could not be written, before anything is measured; None: no picture.

    Raises:
        UserError: another format than png or svg, no such folder, or no matplotlib.
    """
    if path is None:
        return
    if Path(path).suffix.lower() not in FORMATS:
        raise UserError(f"--picture {path}: give a name that ends in {' or '.join(FORMATS)}")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--picture {path}: its folder does not exist")
    if pyplot() is None:
        raise UserError(
            f"--picture {path}: matplotlib is not installed: pip install 'colonnade[plot]'"
        )


def draw(report: dict[str, Any], path: str | None) -> None:
    """Draws bandwidth (row sends to column) and latency of all pairs into a file; None: nowhere.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return
    if not report["links"]:
        print(f"colonnade: --picture {path}: no pair was measured", file=sys.stderr)
        return
    names, bandwidth, latency = matrices(report)
    plt = pyplot()
    side = min(max(3.6, 0.5 * len(names)), 14)  # inches
    figure, panels = plt.subplots(1, 2, figsize=(2 * side + 2, side + 0.8), layout="constrained")
    maps = (
        ("bandwidth in MB/s (row sends to column)", bandwidth / 1e6, "viridis"),
        ("latency in µs", latency * 1e6, "viridis_r"),
    )
    for axes, (title, values, colors) in zip(panels, maps, strict=True):
        image = axes.imshow(values, cmap=colors, interpolation="nearest", vmin=0)
        figure.colorbar(image, ax=axes, shrink=0.8)
        ticks = range(0, len(names), 1 + len(names) // 40)
        axes.set_xticks(ticks, labels=[names[t] for t in ticks], rotation=90, fontsize=7)
        axes.set_yticks(ticks, labels=[names[t] for t in ticks], fontsize=7)
        axes.set_title(title, fontsize=9)
        if len(names) <= WRITTEN:
            write_cells(axes, values, image)
    kind = "hosts" if len(report["hosts"]) > 1 else "ranks"
    wrong = len(report["faults"])
    said = "nothing is wrong" if not wrong else f"{wrong} {'fault' if wrong == 1 else 'faults'}"
    figure.suptitle(f"{len(names)} {kind}, {said}", fontsize=10)
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise UserError(f"--picture {path}: cannot write it: {error.strerror}") from error
    finally:
        plt.close(figure)


def matrices(report: dict[str, Any]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Returns the members' names, and their bandwidth in bytes/s and latency in s, `[N, N]`.

    The diagonal is NaN, which is drawn white.
    """
    links = report["links"]
    names = list(dict.fromkeys(name for link in links for name in (link["first"], link["second"])))
    bandwidth, latency = (np.full((len(names), len(names)), np.nan) for _ in range(2))
    for link in links:
        a, b = names.index(link["first"]), names.index(link["second"])
        bandwidth[a, b], bandwidth[b, a] = link["bytes_per_s"], link["bytes_per_s_back"]
        latency[a, b] = latency[b, a] = link["latency_s"]
    return names, bandwidth, latency


def write_cells(axes: Any, values: np.ndarray, image: Any) -> None:
    """Writes the figures into the cells, in black or white against their colours."""
    for row, column in np.argwhere(~np.isnan(values)):
        red, green, blue, _ = image.cmap(image.norm(values[row, column]))
        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        value = values[row, column]
        axes.text(
            column, row, f"{value:.0f}" if value >= 100 else f"{value:.1f}", ha="center",
            va="center", fontsize=7, color="white" if dark else "black",
        )  # fmt: skip
