"""Reads and writes config fields that Hugging Face families share: rotary positions, patterns."""

from collections.abc import Iterable, Mapping
from typing import Any

from colonnade.launcher.convert.huggingface.fields import REQUIRED, Fields, Unsupported
from colonnade.models.config import FACTS, ModelConfig

# Fields of each kind of rotary scaling: (native field, Hugging Face field, its default).
SCALINGS: dict[str, tuple[tuple[str, str, Any], ...]] = {
    "linear": (("rope_factor", "factor", REQUIRED),),
    "llama3": (
        ("rope_factor", "factor", REQUIRED),
        ("rope_original", "original_max_position_embeddings", None),
        ("rope_low", "low_freq_factor", REQUIRED),
        ("rope_high", "high_freq_factor", REQUIRED),
    ),
    "yarn": (
        ("rope_factor", "factor", None),
        ("rope_original", "original_max_position_embeddings", None),
        ("rope_fast", "beta_fast", 32.0),
        ("rope_slow", "beta_slow", 1.0),
        ("rope_mscale", "mscale", 0.0),
        ("rope_mscale_all", "mscale_all_dim", 0.0),
        ("rope_attention_factor", "attention_factor", None),
        ("rope_truncate", "truncate", True),
    ),
}


def read_rope(
    fields: Fields, theta: float = 10000.0, fraction: float | None = None
) -> dict[str, Any]:
    """Reads the native fields of rotary positions.

    Transformers 5 has them in `rope_parameters`, transformers 4 in `rope_theta` and `rope_scaling`.
    Where both tables are given, `rope_scaling` alone is read, as in transformers 5.

    Args:
        fields: the Hugging Face config.
        theta: the default of the base.
        fraction: the default of the share of each head's channels that is rotated; None: the family
            always rotates all channels.
    """
    scaling, parameters = fields.table("rope_scaling"), fields.table("rope_parameters")
    if scaling and parameters and scaling != parameters:
        fields.notify(
            "rope_parameters is left out: as in transformers, rope_scaling takes precedence"
        )
    rope = Fields(scaling or parameters, "rope_scaling.", fields.notify)
    theta = rope.number("rope_theta", default=fields.number("rope_theta", default=theta))
    length = fields.get("max_position_embeddings", default=None)
    native: dict[str, Any] = {"rope_theta": theta}
    if length is not None:
        native["rope_original"] = length
    outer = fields.number("partial_rotary_factor", default=fraction or 1.0)
    rotated = rope.number("partial_rotary_factor", default=outer)
    if fraction is not None:
        native["rope_fraction"] = rotated
    elif rotated != 1.0:
        raise Unsupported("partial_rotary_factor", rotated, "this family rotates all channels")
    native |= read_scaling(rope, length)
    rope.finish()
    return native


# Kinds of attention, each with a table of its own in `rope_parameters`: whether it has a window.
KINDS = {"full_attention": False, "sliding_attention": True}


def read_ropes(fields: Fields, theta: float, window_theta: float) -> dict[str, Any]:
    """Reads the native fields of rotary positions that attentions with and without a window have
    each of their own.

    Transformers 4 has a base for both, and stretches attentions without a window alone.

    Args:
        fields: the Hugging Face config.
        theta, window_theta: the defaults of the base without and with a window.
    """
    tables, old = fields.table("rope_parameters"), fields.table("rope_scaling")
    length = fields.get("max_position_embeddings", default=None)
    if unknown := sorted(set(tables) - set(KINDS)):
        remedy = f"must be a table for each of {', '.join(KINDS)}"
        raise Unsupported(f"rope_parameters.{unknown[0]}", tables[unknown[0]], remedy)
    native: dict[str, Any] = {} if length is None else {"rope_original": length}
    defaults = {False: fields.number("rope_theta", default=theta), True: window_theta}
    scalings = {}
    for kind, windowed in KINDS.items():
        table = Fields(tables, "rope_parameters.").table(kind) | ({} if windowed else old)
        rope = Fields(table, f"rope_parameters.{kind}.", fields.notify)
        name = "window_rope_theta" if windowed else "rope_theta"
        native[name] = rope.number("rope_theta", default=defaults[windowed])
        rope.only("partial_rotary_factor", 1.0)
        rope.only("truncate", True, remedy="transformers reads no such field in these tables")
        scalings[windowed] = read_scaling(rope, length)
        rope.finish()
    if scalings[True] and scalings[True] != scalings[False]:
        remedy = "a window's positions are stretched as those without a window, or not at all"
        raise Unsupported("rope_parameters.sliding_attention", tables["sliding_attention"], remedy)
    return native | scalings[False] | {"window_rope_scaled": bool(scalings[True])}


def write_ropes(config: ModelConfig) -> dict[str, Any]:
    """Writes the fields that `read_ropes` reads."""
    c, common = config, write_rope(config)
    scaling = common["rope_scaling"] or {"rope_type": "default"}
    scaling.pop("truncate", None)  # where it is false, reading shows that it cannot be written
    windowed = scaling if c.window_rope_scaled else {"rope_type": "default"}
    tables = {
        "full_attention": {"rope_theta": c.rope_theta, **scaling},
        "sliding_attention": {"rope_theta": c.window_rope_theta, **windowed},
    }
    return common | {"rope_parameters": tables}


def read_scaling(rope: Fields, length: Any) -> dict[str, Any]:
    """Reads the native fields of a rotary scaling, none where positions are not stretched; `length`
    is max_position_embeddings or None."""
    kind: object = rope.get("rope_type", "type", default="default")
    if kind == "default":
        return {}
    if not isinstance(kind, str) or kind not in SCALINGS:
        remedy = f"only default, {', '.join(SCALINGS)} can be represented"
        raise Unsupported("rope_scaling.rope_type", kind, remedy)
    values = {
        native: rope.get(hf, default=default, null=False if default is True else default)
        for native, hf, default in SCALINGS[kind]
    }
    if "rope_original" in values and values["rope_original"] is None:
        if length is None:
            remedy = f"missing from config.json, and {kind} needs it"
            raise Unsupported("rope_scaling.original_max_position_embeddings", None, remedy)
        values["rope_original"] = length
    if values["rope_factor"] is None:  # yarn, where the factor follows from the two lengths
        if not isinstance(length, int) or not isinstance(values["rope_original"], int):
            raise Unsupported("rope_scaling.factor", None, "missing from config.json")
        values["rope_factor"] = length / max(values["rope_original"], 1)
    return {"rope_scaling": kind, **values}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Writes the fields of rotary positions as transformers 4 and 5 both read them."""
    c = config
    hf_fields: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_scaling": None}
    hf_fields["max_position_embeddings"] = c.rope_original
    if c.rope_scaling in SCALINGS:
        names = SCALINGS[c.rope_scaling]
        values = {hf: getattr(c, n) for n, hf, _ in names if getattr(c, n) is not None}
        hf_fields["rope_scaling"] = {"rope_type": c.rope_scaling, **values}
        if "original_max_position_embeddings" in values:  # transformers 4 derives yarn's factor
            hf_fields["max_position_embeddings"] = round(c.rope_original * c.rope_factor)
    return hf_fields


def pattern_fields(symbols: str) -> dict[str, Any]:
    """Returns `pattern` and `repeat` with the shortest pattern that gives this row of symbols."""
    for length in range(1, len(symbols) + 1):
        repeat, remainder = divmod(len(symbols), length)
        if not remainder and symbols[:length] * repeat == symbols:
            return {"pattern": symbols[:length], "repeat": repeat}
    raise Unsupported("num_hidden_layers", 0, "a model has at least one layer")


def symbols_of(kinds: Iterable[str], names: Mapping[str, str], field: str) -> str:
    """Returns the row of symbols for the kinds of layers that a Hugging Face config lists."""
    symbols = ""
    for kind in kinds:
        if kind not in names:
            raise Unsupported(field, kind, f"only {', '.join(names)} can be represented")
        symbols += names[kind]
    return symbols


# Tensors of multi-token prediction modules, which transformers has no code for: the prefix of their
# names, and what they are.
UNREAD_MTP = "mtp.", "modules that predict further tokens"


def notify_unread_mtp(f: Fields) -> None:
    """Notifies that the multi-token prediction modules that the config counts are not read."""
    count = f.integer("num_nextn_predict_layers", default=0)
    if count:
        f.notify(f"num_nextn_predict_layers = {count} is left out: {UNREAD_MTP[1]} are not read")


def function_fields(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that decide the function, in a canonical form.

    Two configs with equal fields are the same model. Unused fields and those that only matter in
    training are left out.
    """
    c = config
    fields: dict[str, Any] = {
        name: getattr(c, name)
        for name, known in FACTS.items()
        if not known.training and c.unused(name) is None
    }
    _drop(fields, "pattern repeat window full_attention")
    _drop(fields, "window_rope_theta window_rope_scaled unrotated")
    fields["symbols"] = c.symbols
    fields["windows"] = [c.window_of(t) for t, symbol in enumerate(c.symbols) if symbol == "*"]
    if c.has("*") and c.positions == "rope":
        fields["ropes"] = [c.rope_of(t) for t, symbol in enumerate(c.symbols) if symbol == "*"]
    if "norm_after" in fields:
        fields["norm_after"] = "".join(sorted(c.norm_after))
    if c.attention_multiplier == c.score_width**-0.5 and "attention_multiplier" in fields:
        fields["attention_multiplier"] = None  # the default
    if c.router_top_groups == c.router_groups:
        _drop(fields, "router_groups router_top_groups")
    if not c.share:
        _drop(fields, "share")
    if not c.has("-"):  # expert_ffn is among the fields, and ffn may only be its default
        _drop(fields, "ffn")
    return fields


def _drop(fields: dict[str, Any], names: str) -> None:
    for name in names.split():
        fields.pop(name, None)
