"""Plots the losses of a run, and the loads of its experts."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from colonnade.launcher.cluster.figures import DPI, pyplot
from colonnade.launcher.run_files import METRICS
from colonnade.launcher.train.metrics import read_metrics

COLUMNS = 200  # of a heat map, at most: loads of neighbouring steps are added


def plot_loss(run: Path) -> Path | None:
    """Draws `loss.png` from metrics.jsonl; returns its path, or None without matplotlib."""
    plt = pyplot()
    if plt is None:
        return None
    rows = read_metrics(run / METRICS)
    train = [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None]
    validation = [(r["step"], r["validation_loss"]) for r in rows if "validation_loss" in r]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*train, strict=True), color="#9aa5b1", linewidth=1, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#c0392b", marker="o", label="validation")
    stages = [(r["step"], r["stage"]) for r in rows if "stage" in r]
    for (before, _), _ in (pair for pair in pairwise(stages) if pair[0][1] != pair[1][1]):
        axes.axvline(before + 0.5, color="#34495e", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run / "loss.png", dpi=DPI)
    plt.close(figure)
    return run / "loss.png"


def plot_loads(run: Path) -> Path | None:
    """Draws `loads.png` from metrics.jsonl: for each mixture a heat map of experts over steps.

    The colour is the load over an even load, on a logarithmic scale: white is even. The title of a
    mixture whose router collapsed is red.

    Returns:
        its path, or None without matplotlib or without recorded loads.
    """
    rows = read_metrics(run / METRICS)
    records = [row for row in rows if row.get("loads")]
    plt = pyplot()
    if plt is None or not records:
        return None
    layers = sorted(records[0]["loads"], key=int)
    collapsed = {k: v for row in rows for k, v in row.get("collapsed", {}).items()}
    loads = np.array([[row["loads"][layer] for layer in layers] for row in records])
    steps, E = np.array([row["step"] for row in records]), loads.shape[-1]
    limit = min(max(E, 2), 8)  # colours end at 1/limit and at limit, beyond which all look alike
    figure, panels, bar = figure_of_panels(plt, len(layers), E)
    maps = heat_maps(steps, loads, min(COLUMNS, steps[-1]))
    for axes, layer, ratio in zip(panels, layers, maps, strict=True):
        image = axes.imshow(
            ratio.clip(1 / limit, limit), cmap="RdBu_r", norm="log", aspect="auto",
            interpolation="nearest", extent=(0, steps[-1], E - 0.5, -0.5),
        )  # fmt: skip
        image.set_clim(1 / limit, limit)
        title, color = f"sub-block {layer}", "black"
        if event := collapsed.get(layer):
            title, color = f"{title}: {event['share']:.0%} to expert {event['expert']}", "#c0392b"
        axes.set_title(title, fontsize=7, color=color, pad=3)
    colors = figure.colorbar(image, cax=bar, label="load / even load")
    colors.ax.tick_params(labelsize=8)
    ticks = [2.0**t for t in range(-3, 4) if 1 / limit <= 2.0**t <= limit]
    colors.set_ticks(ticks, labels=[f"{t:g}" if t >= 1 else f"1/{1 / t:g}" for t in ticks])
    colors.ax.minorticks_off()
    figure.suptitle(run.name, fontsize=10, y=1 - 0.08 / figure.get_figheight(), va="top")
    figure.savefig(run / "loads.png", dpi=DPI)
    plt.close(figure)
    return run / "loads.png"


def figure_of_panels(plt: Any, count: int, experts: int) -> tuple[Any, list[Any], Any]:
    """Makes a nearly square figure of `count` panels, each at least a pixel high for every expert.

    The axes are placed by hand: with a hundred panels, matplotlib's layouts take a minute.

    Returns:
        the figure; the axes of the panels, row by row; and those of the colour bar.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    # Lengths are in inches.
    left, right, top, bottom, gap, title = 0.65, 0.9, 0.55, 0.5, 0.3, 0.25
    width, height = 1.6, max(1.2, experts / DPI)
    columns = min(count, math.ceil(math.sqrt(count * height / width)))
    lines = math.ceil(count / columns)
    width, height = max(width, 6 / columns), max(height, 3 / lines)
    full_width = left + columns * (width + gap) - gap + right
    full_height = top + lines * (height + title) - title + bottom
    figure = plt.figure(figsize=(full_width, full_height))

    def place(x: float, y: float, w: float, h: float) -> Any:
        """Adds axes whose upper left corner is x from the left and y from the top."""
        return figure.add_axes(
            (x / full_width, 1 - (y + h) / full_height, w / full_width, h / full_height)
        )

    panels = []
    for n in range(count):
        line, column = divmod(n, columns)
        axes = place(left + column * (width + gap), top + line * (height + title), width, height)
        axes.tick_params(labelsize=7)
        axes.tick_params(labelleft=column == 0, labelbottom=n + columns >= count)
        axes.xaxis.set_major_locator(MaxNLocator(max(2, int(width / 0.8)), integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(min(experts, int(height / 0.25)), integer=True))
        panels.append(axes)
    figure.supxlabel("step", fontsize=9, y=0.08 / full_height, va="bottom")
    figure.supylabel("expert", fontsize=9, x=0.08 / full_width, ha="left")
    return figure, panels, place(full_width - right + 0.2, top, 0.15, min(full_height - 1.2, 4))


def heat_maps(steps: np.ndarray, loads: np.ndarray, columns: int) -> np.ndarray:
    """Returns loads over an even load, `[L, E, columns]`, of loads `[N, L, E]` at `steps`, `[N]`.

    The columns divide the steps from 0 to the last evenly. Each adds the records of its steps; one
    without any shows the next record, which stands for the steps since the one before it.
    """
    edges = np.linspace(0, steps[-1], columns + 1).round()
    first = np.searchsorted(steps, edges[:-1], side="right")
    stop = np.maximum(np.searchsorted(steps, edges[1:], side="right"), first + 1)
    sums = np.concatenate([np.zeros_like(loads[:1]), loads.cumsum(0)])
    added = (sums[stop] - sums[first]).transpose(1, 2, 0)  # [L, E, columns]
    return added * added.shape[1] / added.sum(1, keepdims=True).clip(1)
