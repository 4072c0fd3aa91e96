"""Rules on the row of sub-blocks, the residual stream and multi-token prediction."""

from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import ROW_FIELDS, Rules
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.config import CARDS, LONGEST_ROW, mixes_sequence

RULES = Rules()


@RULES.add("model.mtp")
def symbols(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Every symbol of the patterns stands for a sub-block that exists."""
    patterns = {"model.pattern": r.model.pattern}
    if r.model.mtp:
        patterns["model.mtp_pattern"] = r.model.mtp_pattern
    for field, pattern in patterns.items():
        unknown = [f"`{s}` at position {i}" for i, s in enumerate(pattern, 1) if s not in CARDS]
        if unknown:
            known = ", ".join(f"`{s}` {card.title}" for s, card in CARDS.items())
            remedy = f"unknown symbol {', '.join(unknown)}; the symbols are {known}"
            yield Fault(field, pattern, remedy)


@RULES.add("model.pattern")
def row_length(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The row has at most `LONGEST_ROW` sub-blocks; a longer one is a typing error."""
    m = r.model
    if len(m.pattern) * m.repeat > LONGEST_ROW:
        most = LONGEST_ROW // len(m.pattern)
        remedy = f"model.pattern has {len(m.pattern)} symbols, and a row at most {LONGEST_ROW:,}; "
        yield Fault("model.repeat", m.repeat, f"{remedy}set it to at most {most}")


@RULES.add("model.pattern", "model.repeat", "model.residual")
def ladder_length(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The ladder spans at most the sub-blocks of the row."""
    m, count = r.model, len(r.model.symbols)
    if m.residual == "ladder" and m.ladder_last is not None and m.ladder_last > count:
        remedy = f"the row has {count} sub-blocks; set model.ladder_last to 0..{count}, or leave "
        yield Fault("model.ladder_last", m.ladder_last, f"{remedy}it out for all of them")


@RULES.add("model.norm")
def norm_bias(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """CRMSNorm has no bias: the channel that the stream omits could not represent it."""
    if r.model.norm_bias and r.model.norm == "crms":
        remedy = "model.norm = crms has no bias; set model.norm to pre_rms, which can have one, or "
        yield Fault("model.norm_bias", True, f"{remedy}model.norm_bias to false")


@RULES.add("model.norm")
def centred_stream(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """`pre_rms` needs norms before sub-blocks.

    A norm after a sub-block writes output that is not centred, so RMSNorm of the stream would not
    equal LayerNorm.
    """
    m = r.model
    if m.norm != "pre_rms":
        return
    remedy = "model.norm = pre_rms needs a centred stream, and the output of norms behind "
    remedy += "sub-blocks is not centred; "
    if m.norm_position != "before":
        remedy += "set model.norm_position to before, or model.norm to layer"
        yield Fault("model.norm_position", m.norm_position, remedy)
    elif m.norm_after:
        yield Fault(
            "model.norm_after", m.norm_after, f"{remedy}leave it out, or set model.norm to layer"
        )


@RULES.add("model.pattern", "model.mtp_pattern", "model.norm_position")
def norms_after(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """`norm_after` has sequence mixers of the model, each once, and leaves some sub-blocks out."""
    m, listed = r.model, r.model.norm_after
    if not listed or m.norm_position == "after":
        return
    rows = m.rows()
    mixers = [s for s in dict.fromkeys("".join(rows)) if mixes_sequence(s)]
    if len(set(listed)) < len(listed) or not set(listed) <= set(mixers):
        known = ", ".join(f"`{s}`" for s in mixers) or "none"
        remedy = f"must have sequence mixers of the model ({known}), each once; set it to some of "
        yield Fault("model.norm_after", listed, f"{remedy}these, or leave it out")
    elif all(position == "after" for row in rows for position in m.norm_positions(row)):
        remedy = "all norms are then behind their sub-blocks; leave it out, and set "
        yield Fault("model.norm_after", listed, f"{remedy}model.norm_position to after")


@RULES.add("model.norm", "model.mtp_pattern")
def mtp_modules(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Multi-token prediction needs no centred stream, and THOR only with THOR in the model.

    The modules read the normed stream, and take no second forward pass for THOR by themselves.
    """
    m = r.model
    if m.mtp and m.norm == "pre_rms":
        remedy = "its modules read the normed stream, which is not centred as model.norm = pre_rms "
        yield Fault(
            "model.mtp", m.mtp, f"{remedy}needs; set model.norm to layer, or model.mtp to 0"
        )
    if m.mtp and "T" in m.mtp_pattern and "T" not in m.pattern:
        remedy = "`T` takes every token through the whole model twice; put it into model.pattern, "
        remedy += "too, or remove it from model.mtp_pattern"
        yield Fault("model.mtp_pattern", m.mtp_pattern, remedy)


@RULES.add("train.seq_len")
def mtp_length(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A row of data has more tokens than `model.mtp` predicts ahead."""
    m, length = r.model, r.train.seq_len
    if m.mtp and m.mtp >= length:
        remedy = f"a row has train.seq_len = {length} tokens; set model.mtp to at most {length - 1}"
        yield Fault("model.mtp", m.mtp, remedy)


@RULES.add("train.seq_len", "model.mtp")
def learned_positions(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The table has a row for every position, and modules for further tokens have no positions."""
    m, length = r.model, r.train.seq_len
    if m.learned_positions is None:
        return
    if m.learned_positions < length:
        remedy = f"a row has train.seq_len = {length} tokens; set it to at least that, or "
        remedy += f"train.seq_len to at most {m.learned_positions}"
        yield Fault("model.learned_positions", m.learned_positions, remedy)
    if m.mtp:
        remedy = "its modules embed tokens at other places than the model.learned_positions of the "
        yield Fault("model.mtp", m.mtp, f"{remedy}row; set model.mtp to 0")


@RULES.add("model.norm", "model.norm_weight", "model.qk_norm", *ROW_FIELDS)
def offset(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """`rms_offset` says how weights of norms are stored, so some norm has one."""
    m = r.model
    of_heads = m.has("*") and m.unused("qk_norm") is None and m.qk_norm != "none"
    if m.norm == "rms_offset" and not m.norm_weight and not of_heads:
        remedy = "no norm has a weight; set it to rms, or model.norm_weight to true"
        yield Fault("model.norm", m.norm, remedy)
