"""Generates patterns of hybrid models from the fractions of attention and MLPs."""

from collections.abc import Iterable

from colonnade.models.config import CARDS


def hybrid_pattern(
    layers: int, attention: float, mlp: float, symbols: tuple[str, str, str] = ("M", "*", "-")
) -> str:
    """Returns a row in which attention, then MLPs, are spaced as evenly as possible.

    The allocation is Megatron's, so that its ratios give the same model: 56 layers at 0.08 and 0.5
    are the published Mamba-2-Hybrid 8B (arXiv:2406.07887). Attention has equal numbers of other
    layers before, between and after it; after the last MLP there are none.

    Args:
        layers: length of the row.
        attention: fraction of attention, rounded to whole layers.
        mlp: fraction of MLPs; where rounding up both exceeds `layers`, there are fewer MLPs.
        symbols: the symbols of all other layers, of attention and of MLPs.

    Raises:
        ValueError: no layers, fractions out of range, or symbols that are unknown or repeat.
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
    remaining = layers - count
    for index in evenly_spaced(range(layers), remaining / (count + 1)):
        row[index] = symbols[1]
    if mlp_count := min(round(layers * mlp), remaining):
        free = [index for index in range(layers) if row[index] == symbols[0]]
        for index in evenly_spaced(free, (remaining - mlp_count) / mlp_count):
            row[index] = symbols[2]
    return "".join(row)


def evenly_spaced(indices: Iterable[int], gap: float) -> list[int]:
    """Chooses indices so that, on average, `gap` others are before each of them.

    The distance to the next one is counted down in floating point as in Megatron, because its
    rounding decides ties.
    """
    chosen, distance = [], gap
    for index in indices:
        if distance < 0.5:
            chosen.append(index)
            distance += gap
        else:
            distance -= 1
    return chosen
