"""Rules on attention: its heads, its window, its rotary positions."""

from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import (
    ROW_FIELDS,
    Rules,
    divisors,
    nearest_multiples,
    nearest_values,
)
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.cards.attention import rotated_width, rotates_pairs, stretches
from colonnade.models.config import ModelConfig

RULES = Rules()


@RULES.add(*ROW_FIELDS, "model.attention", "model.hidden", "model.heads", "model.head_dim")
def gate_slices(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A gate per head reads that head's slice of the stream."""
    m = r.model
    gated = m.has("*") and m.attention == "gqa" and m.attention_gate == "head"
    if gated and m.is_explicit("head_dim") and m.hidden % m.heads:
        remedy = f"model.attention_gate = head slices model.hidden = {m.hidden} among them; set "
        remedy += f"model.heads to {nearest_values(head_counts(m), m.heads)}, or "
        yield Fault("model.heads", m.heads, f"{remedy}model.attention_gate to channel")


@RULES.add(*ROW_FIELDS, "model.repeat", "model.window")
def full_attention(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """`full_attention` indexes attentions of the row, each once, and not all of them."""
    if r.model.window is not None:
        none_left = "none has the window; take some out, or leave both it and model.window out"
        yield from attention_numbers(r.model, "full_attention", none_left)


@RULES.add(*ROW_FIELDS, "model.repeat", "model.positions")
def unrotated(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """`unrotated` indexes attentions of the row, each once, and not all of them."""
    if r.model.positions != "none":
        none_left = "none has positions; take some out, or set model.positions to none"
        yield from attention_numbers(r.model, "unrotated", none_left)


def attention_numbers(m: ModelConfig, field: str, none_left: str) -> Iterator[Fault]:
    """Yields the fault of a field that lists attentions of the row, if it has one.

    `none_left` is said where it lists all of them. Modules of mtp never count as listed.
    """
    indices, count = getattr(m, field), m.symbols.count("*")
    if not m.has("*") or not indices:
        return
    value, attentions = list(indices), f"the row has {count} attentions, 0..{count - 1}"
    mtp_attention = m.mtp > 0 and "*" in m.mtp_pattern
    if not count:
        remedy = "model.pattern has no attention (`*`); leave it out"
        yield Fault(f"model.{field}", value, remedy)
    elif wrong := sorted({n for n in indices if not 0 <= n < count}):
        remedy = f"{attentions}; take out {', '.join(map(str, wrong))}"
        yield Fault(f"model.{field}", value, remedy)
    elif len(set(indices)) < len(indices):
        remedy = f"name each once; set model.{field} to {sorted(set(indices))}"
        yield Fault(f"model.{field}", value, remedy)
    elif len(indices) == count and not mtp_attention:
        yield Fault(f"model.{field}", value, f"{attentions}: {none_left}")


def head_counts(m: ModelConfig) -> list[int]:
    """Returns the divisors of the hidden width that are multiples of an explicit kv_heads."""
    fit = divisors(m.hidden)
    return [h for h in fit if not m.is_explicit("kv_heads") or h % m.kv_heads == 0] or fit


def rotates(m: ModelConfig) -> bool:
    """Whether rotary positions rotate channels of heads.

    False where the number of heads does not divide the hidden width, which is another fault.
    """
    if not m.has("*") or m.positions == "none":
        return False
    return m.attention == "mla" or m.is_explicit("head_dim") or m.hidden % m.heads == 0


@RULES.add(*ROW_FIELDS, "model.attention", "model.hidden", "model.heads", "model.head_dim",
           "model.positions", "model.rope_fraction")  # fmt: skip
def rotated_pairs(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Rotary positions rotate pairs of channels."""
    m, rotated = r.model, rotated_width(r.model)
    if not rotates(m) or rotates_pairs(m):
        return
    otherwise = "or model.positions to none"
    if m.attention == "mla":
        options = nearest_multiples(2, rotated)
        remedy = f"rope rotates pairs of channels: set model.rope_dim to {options}, "
        yield Fault("model.rope_dim", rotated, remedy + otherwise)
        return
    width = m.head_dim
    if rotated == width:
        given = m.is_explicit("head_dim")
        default = "" if given else f"by default it is hidden / heads = {width}; "
        remedy = f"{default}rope rotates pairs of channels: set model.head_dim to "
        yield Fault(
            "model.head_dim",
            width if given else None,
            f"{remedy}{nearest_multiples(2, width)}, {otherwise}",
        )
        return
    even = [n for n in (rotated // 2 * 2, rotated // 2 * 2 + 2) if 2 <= n <= width]
    fractions = " or ".join(f"{n / width:g}" for n in even)
    remedy = f"of {width} channels it rotates {rotated}, and rope rotates pairs: set "
    remedy += f"model.rope_fraction to {fractions}, " if even else "model.head_dim to at least 2, "
    yield Fault("model.rope_fraction", m.rope_fraction, remedy + otherwise)


@RULES.add(*ROW_FIELDS, "model.attention", "model.hidden", "model.heads", "model.head_dim",
           "model.positions", "model.rope_fraction", "model.rope_dim",
           "model.rope_scaling", "model.rope_high", "model.rope_fast")  # fmt: skip
def rope_scaling(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A scaling has a factor above 1, and the bounds of its ramp over frequencies ascend."""
    m, kind = r.model, r.model.rope_scaling
    if not rotates(m) or kind == "none":
        return
    if m.rope_factor == 1:
        remedy = f"model.rope_scaling = {kind} stretches by it; set model.rope_factor above 1, or "
        yield Fault("model.rope_factor", m.rope_factor, f"{remedy}model.rope_scaling to none")
    if not stretches(m):
        remedy = "ntk keeps the highest frequency and stretches the others, but 2 rotated channels "
        yield Fault(
            "model.rope_scaling", kind, f"{remedy}have one; rotate 4 or more, or set linear"
        )
    windowed = m.window is not None and m.window_rope_scaled
    for field in ("rope_theta", *(["window_rope_theta"] if windowed else [])):
        if kind == "yarn" and m.is_explicit(field) and getattr(m, field) <= 1:
            remedy = f"yarn divides by its logarithm; set model.{field} above 1"
            yield Fault(f"model.{field}", getattr(m, field), remedy)
    low, high = {"llama3": ("low", "high"), "yarn": ("slow", "fast")}.get(kind, ("", ""))
    if low:
        lower, upper = getattr(m, f"rope_{low}"), getattr(m, f"rope_{high}")
        if lower >= upper:
            remedy = f"must be below model.rope_{high} = {upper:g}, where frequencies are kept; "
            yield Fault(f"model.rope_{low}", lower, f"{remedy}set model.rope_{low} lower")
