"""A model at test size: the same pattern, wiring, options and counts, with narrow widths."""

import math

from colonnade.models.config import FACTS, ModelConfig

REPEATS = 2  # of the pattern, at most
STD = 0.2  # of first weights: narrow layers need large ones for outputs of about their inputs' size


def narrow_model(m: ModelConfig, ranks: int) -> ModelConfig:
    """The model at test size, as `shrink` describes it; what has no effect may be given in it."""
    sizes, base = sizes_of(m), m.base()
    basis = sizes if base is None else sizes_of(base)
    pairs = {n: narrow(m, n, size, basis.get(n, size), ranks) for n, size in sizes.items()}
    widths = {name: width for name, (width, _) in pairs.items()}
    lengths = {n: known.least for n, known in FACTS.items() if known.kind == "length"}
    short = {n: min(getattr(m, n), least) for n, least in lengths.items() if getattr(m, n)}
    update: dict[str, object] = {**widths, **short, **rows(m)}
    update |= {"repeat": min(m.repeat, REPEATS), "init_std": STD}
    if base is not None:
        named = m.mup_base or {}
        smaller = {n: other for n, (width, other) in pairs.items() if other != width or n in named}
        if m.attention_gate == "head":  # its slices of the stream are as wide as the model's
            smaller["hidden"] = widths["hidden"] // m.heads * base.heads
        update["mup_base"] = smaller
    return m.changed(**update)


def sizes_of(m: ModelConfig) -> dict[str, int]:
    """All widths and numbers of heads that a model has, those that follow from others, too."""
    names = (name for name, known in FACTS.items() if known.kind in ("width", "heads"))
    return {name: size for name in names if (size := getattr(m, name))}


def narrow(m: ModelConfig, name: str, size: int, base: int, ranks: int) -> tuple[int, int]:
    """A size, and that of muP's base model: counts stay, widths shrink and keep a factor of 2."""
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
    """Whether a model may have this width, and half of it, instead of `size`."""
    if FACTS[name].divided:
        slices = m.heads if name == "hidden" and m.attention_gate == "head" else 1
        return math.gcd(width, ranks) == math.gcd(size, ranks) and width % slices == 0
    if name == "head_dim" and m.attention == "gqa" and m.positions == "rope":
        return all(turns(m, w) for w in ([width, width // 2] if halved else [width]))
    return name not in ("head_dim", "rope_dim") or width % 2 == 0


def turns(m: ModelConfig, width: int) -> bool:
    """Whether rotary positions can turn their share of so many channels."""
    turned = round(width * m.rope_fraction)
    least = 4 if m.rope_scaling == "ntk" else 2
    return turned >= least and turned % 2 == 0 and (turned < width or m.rope_fraction == 1)


def rows(m: ModelConfig) -> dict[str, object]:
    """What names sub-blocks by their place, for the shorter row."""
    places = len(m.pattern) * min(m.repeat, REPEATS)
    there = m.pattern.count("*") * min(m.repeat, REPEATS)
    update: dict[str, object] = {}
    if m.ladder_last is not None:
        whole = m.ladder_last >= len(m.symbols)
        update["ladder_last"] = min(m.ladder_last, places if whole else places - 1)
    if m.full_attention:
        further = m.mtp > 0 and "*" in m.mtp_pattern
        kept = tuple(n for n in m.full_attention if n < there)
        if not kept or (len(kept) == there and not further):
            kept = (0,) if there > 1 else ()
        update["full_attention"] = kept
    return update
