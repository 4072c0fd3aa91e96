"""Patterns of hybrid models from the shares of attention and MLPs."""

from collections.abc import Iterable

from colonnade.models.config import CARDS


def hybrid_pattern(
    layers: int, attention: float, mlp: float, symbols: tuple[str, str, str] = ("M", "*", "-")
) -> str:
    """A row in which attention, then MLPs, stand as evenly as they can.

    Megatron's allocation, so that its ratios make the same model here: 56 layers at 0.08 and 0.5
    are the published Mamba-2-Hybrid 8B (arXiv:2406.07887). Attention has equal stretches of other
    layers before, between and behind; MLPs have none behind the last.

    Args:
        layers: length of the row.
        attention: share of attention, rounded to whole layers.
        mlp: share of MLPs; where both are rounded up beyond `layers`, MLPs give way.
        symbols: of what fills the row, of attention, of MLPs.

    Raises:
        ValueError: no layers, shares out of range, or symbols that do not exist or repeat.
    """
    if layers < 1:
        raise ValueError(f"layers = {layers}: a row has at least 1; give a positive number")
    for name, share in (("attention", attention), ("mlp", mlp)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} = {share}: a share of the layers; give 0 to 1")
    if attention + mlp > 1:
        raise ValueError(
            f"mlp = {mlp}: with attention = {attention} more than all layers; "
            f"give at most {1 - attention:g}"
        )
    if len(set(symbols)) < 3 or not set(symbols) <= set(CARDS):
        known = " ".join(CARDS)
        raise ValueError(f"symbols = {symbols!r}: give three different ones of {known}")
    row = [symbols[0]] * layers
    count = round(layers * attention)
    rest = layers - count
    for place in spaced(range(layers), rest / (count + 1)):
        row[place] = symbols[1]
    if further := min(round(layers * mlp), rest):
        free = [place for place in range(layers) if row[place] == symbols[0]]
        for place in spaced(free, (rest - further) / further):
            row[place] = symbols[2]
    return "".join(row)


def spaced(places: Iterable[int], stretch: float) -> list[int]:
    """Those of the places that have, on average, `stretch` others before each.

    The distance to the next is walked in floating point as Megatron walks it: it decides ties.
    """
    chosen, ahead = [], stretch
    for place in places:
        if ahead < 0.5:
            chosen.append(place)
            ahead += stretch
        else:
            ahead -= 1
    return chosen
