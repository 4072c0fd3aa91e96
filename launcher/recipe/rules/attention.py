"""Rules on attention: its heads, its window, its rotary positions."""

from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import ROW, Rules, choice, divisors, multiples
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.config import ModelConfig

RULES = Rules()


@RULES.add(*ROW, "model.attention", "model.hidden", "model.heads", "model.head_dim")
def gate_slices(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A gate per head reads that head's slice of the stream."""
    m = r.model
    gated = m.has("*") and m.attention == "gqa" and m.attention_gate == "head"
    if gated and m.given("head_dim") and m.hidden % m.heads:
        remedy = f"model.attention_gate = head slices model.hidden = {m.hidden} among them; set "
        remedy += f"model.heads to {choice(head_counts(m), m.heads)}, or model.attention_gate to "
        yield Fault("model.heads", m.heads, f"{remedy}channel")


@RULES.add(*ROW, "model.repeat", "model.window")
def full_attention(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Attentions without the window are among those of the row, and leave it some."""
    m, there = r.model, r.model.symbols.count("*")
    chosen = m.full_attention
    if not m.has("*") or m.window is None or not chosen:
        return
    value, names = list(chosen), f"the row has {there} attentions, 0..{there - 1}"
    further = m.mtp > 0 and "*" in m.mtp_pattern
    if not there:
        remedy = "model.pattern has no attention (`*`); leave it out"
        yield Fault("model.full_attention", value, remedy)
    elif wrong := sorted({n for n in chosen if not 0 <= n < there}):
        remedy = f"{names}; take out {', '.join(map(str, wrong))}"
        yield Fault("model.full_attention", value, remedy)
    elif len(set(chosen)) < len(chosen):
        remedy = f"name each once; set model.full_attention to {sorted(set(chosen))}"
        yield Fault("model.full_attention", value, remedy)
    elif len(chosen) == there and not further:
        remedy = f"{names}: none is left to the window; take some out, or leave both it and "
        remedy += "model.window out"
        yield Fault("model.full_attention", value, remedy)


def head_counts(m: ModelConfig) -> list[int]:
    """Numbers of heads that divide the hidden width, and are multiples of a given kv_heads."""
    fit = divisors(m.hidden)
    return [h for h in fit if not m.given("kv_heads") or h % m.kv_heads == 0] or fit


def rotated_width(m: ModelConfig) -> int | None:
    """Channels of a head that rotary positions turn; None without them, or where heads do not fit.

    As the two attentions take it.
    """
    if not m.has("*") or m.positions == "none":
        return None
    if m.attention == "mla":
        return m.rope_dim
    if not m.given("head_dim") and m.hidden % m.heads:
        return None
    return round(m.head_dim * m.rope_fraction)


@RULES.add(*ROW, "model.attention", "model.hidden", "model.heads", "model.head_dim",
           "model.positions", "model.rope_fraction")  # fmt: skip
def rotated_pairs(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Rotary positions turn pairs of channels."""
    m, turned = r.model, rotated_width(r.model)
    if turned is None or (turned and turned % 2 == 0):
        return
    otherwise = "or model.positions to none"
    if m.attention == "mla":
        remedy = f"rope turns pairs of channels: set model.rope_dim to {multiples(2, turned)}, "
        yield Fault("model.rope_dim", turned, remedy + otherwise)
        return
    width = m.head_dim
    if turned == width:
        given = m.given("head_dim")
        taken = "" if given else f"hidden / heads = {width} is taken; "
        remedy = f"{taken}rope turns pairs of channels: set model.head_dim to "
        yield Fault(
            "model.head_dim",
            width if given else None,
            f"{remedy}{multiples(2, width)}, {otherwise}",
        )
        return
    pairs = [n for n in (turned // 2 * 2, turned // 2 * 2 + 2) if 2 <= n <= width]
    shares = " or ".join(f"{n / width:g}" for n in pairs)
    remedy = f"of {width} channels it turns {turned}, and rope turns pairs: set "
    remedy += f"model.rope_fraction to {shares}, " if pairs else "model.head_dim to at least 2, "
    yield Fault("model.rope_fraction", m.rope_fraction, remedy + otherwise)


@RULES.add(*ROW, "model.attention", "model.hidden", "model.heads", "model.head_dim",
           "model.positions", "model.rope_fraction", "model.rope_dim",
           "model.rope_scaling", "model.rope_high", "model.rope_fast")  # fmt: skip
def rope_scaling(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A scaling stretches, over a ramp that rises."""
    m, turned = r.model, rotated_width(r.model)
    kind = m.rope_scaling
    if turned is None or kind == "none":
        return
    if m.rope_factor == 1:
        remedy = f"model.rope_scaling = {kind} stretches by it; set model.rope_factor above 1, or "
        yield Fault("model.rope_factor", m.rope_factor, f"{remedy}model.rope_scaling to none")
    if kind == "ntk" and turned == 2:
        remedy = "ntk keeps the highest frequency and stretches the others, but 2 rotated channels "
        yield Fault(
            "model.rope_scaling", kind, f"{remedy}have one; rotate 4 or more, or set linear"
        )
    if kind == "yarn" and m.rope_theta <= 1:
        remedy = "yarn tells frequencies apart by its logarithm; set model.rope_theta above 1"
        yield Fault("model.rope_theta", m.rope_theta, remedy)
    low, high = {"llama3": ("low", "high"), "yarn": ("slow", "fast")}.get(kind, ("", ""))
    if low:
        least, most = getattr(m, f"rope_{low}"), getattr(m, f"rope_{high}")
        if least >= most:
            remedy = f"must be below model.rope_{high} = {most:g}, where frequencies are kept; "
            yield Fault(f"model.rope_{low}", least, f"{remedy}set model.rope_{low} lower")
