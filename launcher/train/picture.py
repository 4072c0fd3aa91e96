"""Draws a timeline as SVG: a row of boxes for each rank of a pipeline, over time.

The picture has a light background of its own, so that it can be read on a dark page.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

COLOURS = {  # those of boxes, and of the text in them
    "forward": ("#2f6fb5", "#ffffff"),
    "backward": ("#c65a11", "#ffffff"),
    "input gradient": ("#e8924a", "#1f2933"),
    "weight gradient": ("#f0c244", "#1f2933"),
    "communication": ("#8e5bb5", "#ffffff"),
    "idle": ("#e3e7eb", "#1f2933"),
}
LEFT, RIGHT, TOP, LINE = 70, 20, 96, 18  # margins, and the height of a line of text; pixels
WIDTH, ROW, GAP, AXIS = 1400, 38, 8, 36  # of all boxes; of a row, between rows, of the axis
CHARACTER, SMALL = 7.5, 6.0  # widths of a character of the micro-batch, and of the stage
FONT = "font-family='system-ui, sans-serif' fill='#1f2933'"


class Box(NamedTuple):
    """What a rank did for some time.

    Attributes:
        kind: the words for it.
        colour: one of `COLOURS`.
        stage: the index of the stage.
        micro_batch: the index of the micro-batch.
        start: seconds from the left edge.
        end: likewise.
    """

    kind: str
    colour: str
    stage: int
    micro_batch: int
    start: float
    end: float


def draw(rows: Sequence[Sequence[Box]], seconds: float, caption: Sequence[str]) -> str:
    """Returns the picture of the ranks' `rows`, `seconds` wide, with lines of text above it."""
    height = TOP + len(rows) * (ROW + GAP) + AXIS
    scale = WIDTH / seconds
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{LEFT + WIDTH + RIGHT}' height='{height}'"
        f" viewBox='0 0 {LEFT + WIDTH + RIGHT} {height}' {FONT}>",
        "<rect width='100%' height='100%' fill='#ffffff'/>",
    ]
    for index, line in enumerate(caption):
        weight = " font-weight='bold'" if index == 0 else ""
        parts.append(text(LEFT, 22 + LINE * index, line, f"font-size='13'{weight}"))
    parts += legend(rows)
    for rank, boxes in enumerate(rows):
        top = TOP + rank * (ROW + GAP)
        middle = top + ROW / 2 + 4
        parts.append(text(LEFT - 8, middle, f"rank {rank}", "font-size='12' text-anchor='end'"))
        parts.append(rectangle(LEFT, top, WIDTH, COLOURS["idle"][0]))
        # Passes are drawn last: a transfer, often shorter than a pixel, hides none of them.
        for box in sorted(boxes, key=lambda box: box.colour != "communication"):
            parts += draw_box(box, top, scale)
    parts += axis(seconds, TOP + len(rows) * (ROW + GAP))
    return "\n".join([*parts, "</svg>"]) + "\n"


def draw_box(box: Box, top: float, scale: float) -> list[str]:
    """Returns a box, with micro-batch and stage where they fit, and its times for a pointer."""
    x, width = LEFT + box.start * scale, (box.end - box.start) * scale
    fill, ink = COLOURS[box.colour]
    title = (
        f"{box.kind}, stage {box.stage}, micro-batch {box.micro_batch}: "
        f"{1e3 * box.start:.2f} to {1e3 * box.end:.2f} ms"
    )
    drawn = [rectangle(x, top, width, fill, title)]
    if box.colour == "communication":
        return drawn
    number, stage = str(box.micro_batch), f"s{box.stage}"
    style = f"text-anchor='middle' style='fill:{ink}' font-size="
    if width > CHARACTER * len(number) + 2:
        drawn.append(text(x + width / 2, top + 17, number, f"{style}'12'"))
    if width > SMALL * len(stage) + 2:
        drawn.append(text(x + width / 2, top + 31, stage, f"{style}'10'"))
    return drawn


def legend(rows: Sequence[Sequence[Box]]) -> list[str]:
    """Returns the colours that are in the picture, with their words."""
    present = {box.colour for row in rows for box in row} | {"idle"}
    x, y, parts = float(LEFT), TOP - 24, []
    for name, (fill, _) in COLOURS.items():
        if name in present:
            parts.append(f"<rect x='{x:.1f}' y='{y}' width='12' height='12' fill='{fill}'/>")
            parts.append(text(x + 17, y + 10, name, "font-size='12'"))
            x += 40 + CHARACTER * len(name)
    words = "number: micro-batch, s: stage"
    return [*parts, text(x, y + 10, words, "font-size='12'")]


def axis(seconds: float, y: float) -> list[str]:
    """Returns the axis of time in milliseconds, at 1, 2 or 5 times a power of ten."""
    rough = 1e3 * seconds / 10
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    parts = []
    for index in range(int(1e3 * seconds / step) + 1):
        x = LEFT + WIDTH * index * step / (1e3 * seconds)
        line = f"x1='{x:.1f}' x2='{x:.1f}' y1='{y - GAP}' y2='{y}' stroke='#1f2933'"
        parts.append(f"<line {line}/>")
        label = f"{index * step:g}" + (" ms" if index == 0 else "")
        parts.append(text(x, y + 14, label, "font-size='11' text-anchor='middle'"))
    return parts


def rectangle(x: float, y: float, width: float, fill: str, title: str = "") -> str:
    """Returns a rectangle as high as a row."""
    shape = f"x='{x:.2f}' y='{y}' width='{width:.2f}' height='{ROW}' fill='{fill}'"
    if not title:
        return f"<rect {shape}/>"
    edge = "stroke='#ffffff' stroke-width='0.5'"
    return f"<rect {shape} {edge}><title>{escape(title)}</title></rect>"


def text(x: float, y: float, words: str, style: str) -> str:
    """Returns a line of text."""
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}>{escape(words)}</text>"
