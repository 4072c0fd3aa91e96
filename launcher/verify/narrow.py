"""Narrows a model to test size: the same pattern, wiring, options and counts, smaller widths."""

import math

from colonnade.models.cards.attention import rotated_width, rotates_pairs, stretches
from colonnade.models.config import FACTS, ModelConfig

REPEATS = 2  # of the pattern, at most, unless a pipeline has more stages
STD = 0.2  # of the first weights; in narrow layers, outputs are then about as large as inputs


def narrow_model(m: ModelConfig, ranks: int, stages: int = 1) -> ModelConfig:
    """The model at test size, as `shrink` describes it, with at least as many sub-blocks as stages;
    it may give fields without effect."""
    sizes, base = sizes_of(m), m.base()
    base_sizes = sizes if base is None else sizes_of(base)
    # by field: the width of the model, and that of muP's base model
    pairs = {n: narrow(m, n, size, base_sizes.get(n, size), ranks) for n, size in sizes.items()}
    widths = {name: width for name, (width, _) in pairs.items()}
    lengths = {n: known.least for n, known in FACTS.items() if known.kind == "length"}
    short = {n: min(getattr(m, n), least) for n, least in lengths.items() if getattr(m, n)}
    repeat = min(m.repeat, max(REPEATS, -(-stages // len(m.pattern))))
    update: dict[str, object] = {**widths, **short, **fields_by_position(m, repeat)}
    update |= {"repeat": repeat, "init_std": STD}
    if base is not None:
        base_fields = m.mup_base or {}
        narrow_base = {
            name: base_width
            for name, (width, base_width) in pairs.items()
            if base_width != width or name in base_fields
        }
        if m.attention_gate == "head":  # each head's slice of the stream is as wide as the model's
            narrow_base["hidden"] = widths["hidden"] // m.heads * base.heads
        update["mup_base"] = narrow_base
    return m.changed(**update)


def sizes_of(m: ModelConfig) -> dict[str, int]:
    """All widths and numbers of heads of a model, with those that follow from others."""
    names = (name for name, known in FACTS.items() if known.kind in ("width", "heads"))
    return {name: size for name in names if (size := getattr(m, name))}


def narrow(m: ModelConfig, name: str, size: int, base: int, ranks: int) -> tuple[int, int]:
    """The narrow value of a size, and of the same size of muP's base model.

    Counts stay. Widths become as small as `fits` allows; where the base model's width differs, it
    becomes half or twice the model's.
    """
    if FACTS[name].kind == "heads":
        return size, base
    halved = base != size
    least = FACTS[name].least * (2 if halved else 1)
    widths = (w for w in range(least, size) if fits(m, name, w, size, ranks, halved))
    width = next(widths, None)
    if width is None:
        return size, base
    return width, (width // 2 if base < size else 2 * width) if halved else width


def fits(m: ModelConfig, name: str, width: int, size: int, ranks: int, halved: bool) -> bool:
    """Whether a model may have this width instead of `size`; with `halved`, half of it, too."""
    if FACTS[name].divided:
        slices = m.heads if name == "hidden" and m.attention_gate == "head" else 1
        return math.gcd(width, ranks) == math.gcd(size, ranks) and width % slices == 0
    if name in ("head_dim", "rope_dim") and m.positions == "rope":
        widths = [width, width // 2] if halved else [width]
        return all(rope_fits(m.changed(**{name: w})) for w in widths)
    return True


def rope_fits(m: ModelConfig) -> bool:
    """Whether rotary positions can rotate `rope_fraction` of the channels, all only at 1."""
    in_part = m.rope_fraction == 1 or rotated_width(m) < m.head_dim
    return rotates_pairs(m) and stretches(m) and in_part


def fields_by_position(m: ModelConfig, repeat: int) -> dict[str, object]:
    """The fields that name sub-blocks by their position, for the row of `repeat` patterns.

    A ladder over all sub-blocks stays one; a ladder over the last ones leaves out the first. Where
    some attention sub-blocks have full attention and others a window, or some have positions and
    others none, both kinds stay, if the row has room for both.
    """
    sub_blocks = len(m.pattern) * repeat
    attentions = m.pattern.count("*") * repeat
    update: dict[str, object] = {}
    if m.ladder_last is not None:
        over_all = m.ladder_last >= len(m.symbols)
        update["ladder_last"] = min(m.ladder_last, sub_blocks if over_all else sub_blocks - 1)
    for field in ("full_attention", "unrotated"):
        if listed := getattr(m, field):
            in_mtp = m.mtp > 0 and "*" in m.mtp_pattern
            kept = tuple(n for n in listed if n < attentions)
            if not kept or (len(kept) == attentions and not in_mtp):
                kept = (0,) if attentions > 1 else ()
            update[field] = kept
    return update
