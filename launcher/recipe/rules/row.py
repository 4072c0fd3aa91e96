"""Rules on the row of sub-blocks and the residual stream through it."""

from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import Rules
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.config import CARDS, LONGEST_ROW

RULES = Rules()


@RULES.add("model.mtp")
def symbols(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Every symbol of the patterns is one we build."""
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
    """The row is no longer than anything that is trained."""
    m = r.model
    if len(m.pattern) * m.repeat > LONGEST_ROW:
        most = LONGEST_ROW // len(m.pattern)
        remedy = f"model.pattern has {len(m.pattern)} symbols, and a row at most {LONGEST_ROW:,}; "
        yield Fault("model.repeat", m.repeat, f"{remedy}set it to at most {most}")


@RULES.add("model.pattern", "model.repeat", "model.residual")
def ladder_length(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """No more sub-blocks are a ladder than there are."""
    m, there = r.model, len(r.model.symbols)
    if m.residual == "ladder" and m.ladder_last is not None and m.ladder_last > there:
        remedy = f"the row has {there} sub-blocks; set model.ladder_last to 0..{there}, or leave "
        yield Fault("model.ladder_last", m.ladder_last, f"{remedy}it out for all of them")


@RULES.add("model.norm")
def bias_of_norms(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """CRMSNorm has no bias: the stream's left-out channel could not follow it."""
    if r.model.norm_bias and r.model.norm == "crms":
        remedy = "model.norm = crms has no bias; set model.norm to pre_rms, which can have one, or "
        yield Fault("model.norm_bias", True, f"{remedy}model.norm_bias to false")


@RULES.add("model.norm")
def centred_stream(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """What a norm behind a sub-block writes is not centred, so pre_rms would not be LayerNorm."""
    m = r.model
    if m.norm == "pre_rms" and m.norm_position != "before":
        remedy = "model.norm = pre_rms needs a centred stream, and norms behind sub-blocks write "
        remedy += "what is not; set model.norm_position to before, or model.norm to layer"
        yield Fault("model.norm_position", m.norm_position, remedy)


@RULES.add("model.norm", "model.mtp_pattern")
def further_rows(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Modules for further tokens read a normed stream, and take no passes of their own."""
    m = r.model
    if m.mtp and m.norm == "pre_rms":
        remedy = "its modules read the normed stream, which is not centred as model.norm = pre_rms "
        yield Fault(
            "model.mtp", m.mtp, f"{remedy}needs; set model.norm to layer, or model.mtp to 0"
        )
    if m.mtp and "T" in m.mtp_pattern and "T" not in m.pattern:
        remedy = "`T` takes every token through the whole model twice; put it into model.pattern, "
        yield Fault("model.mtp_pattern", m.mtp_pattern, f"{remedy}too, or take it out here")


@RULES.add("train.seq_len")
def further_tokens(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A row holds the furthest token that is predicted."""
    m, length = r.model, r.train.seq_len
    if m.mtp and m.mtp >= length:
        remedy = f"a row has train.seq_len = {length} tokens; set model.mtp to at most {length - 1}"
        yield Fault("model.mtp", m.mtp, remedy)
