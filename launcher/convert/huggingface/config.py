"""What Hugging Face's families share in reading and writing configs: rotary positions, rows."""

from collections.abc import Iterable, Mapping
from typing import Any

from colonnade.launcher.convert.huggingface.fields import REQUIRED, Fields, Unsupported
from colonnade.models.config import FACTS, ModelConfig

# Our spelling of rotary scalings beside theirs: (our field, their field, their default).
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
    """Our fields of rotary positions.

    Transformers 5 has them in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`. Where both
    tables are given, transformers 5 takes `rope_scaling` alone, and so do we.

    Args:
        fields: their config.
        theta: the base, where none is given.
        fraction: share of each head's channels that turns, where none is given; None: the family
            turns all channels always.
    """
    scaling, parameters = fields.table("rope_scaling"), fields.table("rope_parameters")
    if scaling and parameters and scaling != parameters:
        fields.tell("rope_parameters is left out: as in transformers, rope_scaling goes before it")
    rope = Fields(scaling or parameters, "rope_scaling.", fields.tell)
    theta = rope.number("rope_theta", default=fields.number("rope_theta", default=theta))
    length = fields.get("max_position_embeddings", default=None)
    ours: dict[str, Any] = {"rope_theta": theta}
    if length is not None:
        ours["rope_original"] = length
    outer = fields.number("partial_rotary_factor", default=fraction or 1.0)
    share = rope.number("partial_rotary_factor", default=outer)
    if fraction is not None:
        ours["rope_fraction"] = share
    elif share != 1.0:
        raise Unsupported("partial_rotary_factor", share, "this family rotates all channels")
    kind = rope.get("rope_type", "type", default="default")
    if kind != "default":
        ours |= read_scaling(rope, kind, length)
    rope.finish()
    return ours


def read_scaling(rope: Fields, kind: object, length: Any) -> dict[str, Any]:
    """Our fields of a scaling of rotary positions; `length` is of positions in all, or None."""
    if not isinstance(kind, str) or kind not in SCALINGS:
        remedy = f"only default, {', '.join(SCALINGS)} can be represented"
        raise Unsupported("rope_scaling.rope_type", kind, remedy)
    values = {
        o: rope.get(t, default=default, null=False if default is True else default)
        for o, t, default in SCALINGS[kind]
    }
    if "rope_original" in values and values["rope_original"] is None:
        if length is None:
            remedy = f"missing from config.json, and {kind} needs it"
            raise Unsupported("rope_scaling.original_max_position_embeddings", None, remedy)
        values["rope_original"] = length
    if values["rope_factor"] is None:  # yarn
        if not isinstance(length, int) or not isinstance(values["rope_original"], int):
            raise Unsupported("rope_scaling.factor", None, "missing from config.json")
        values["rope_factor"] = length / max(values["rope_original"], 1)
    return {"rope_scaling": kind, **values}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Their fields of rotary positions, in the spelling that transformers 4 and 5 both read."""
    c = config
    theirs: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_scaling": None}
    theirs["max_position_embeddings"] = c.rope_original
    if c.rope_scaling in SCALINGS:
        names = SCALINGS[c.rope_scaling]
        values = {t: getattr(c, o) for o, t, _ in names if getattr(c, o) is not None}
        theirs["rope_scaling"] = {"rope_type": c.rope_scaling, **values}
        if "original_max_position_embeddings" in values:  # transformers 4 derives yarn's factor
            theirs["max_position_embeddings"] = round(c.rope_original * c.rope_factor)
    return theirs


def row(symbols: str) -> dict[str, Any]:
    """Our `pattern` and `repeat`: the shortest pattern that gives these sub-blocks."""
    for width in range(1, len(symbols) + 1):
        repeat, left = divmod(len(symbols), width)
        if not left and symbols[:width] * repeat == symbols:
            return {"pattern": symbols[:width], "repeat": repeat}
    raise Unsupported("num_hidden_layers", 0, "a model has at least one layer")


def symbols_of(kinds: Iterable[str], names: Mapping[str, str], field: str) -> str:
    """Our symbols, from theirs of each layer."""
    symbols = ""
    for kind in kinds:
        if kind not in names:
            raise Unsupported(field, kind, f"only {', '.join(names)} can be represented")
        symbols += names[kind]
    return symbols


# Tensors of modules for further tokens, of which transformers has no code: where their names start.
FURTHER = "mtp.", "modules that predict further tokens"


def leave_out_further(f: Fields) -> None:
    """Tell of modules for further tokens that their config counts, and that are not read."""
    count = f.integer("num_nextn_predict_layers", default=0)
    if count:
        f.tell(f"num_nextn_predict_layers = {count} is left out: {FURTHER[1]} are not read")


def function_of(config: ModelConfig) -> dict[str, Any]:
    """What decides the function, in one spelling: two configs with equal ones are the same model.

    Fields that only matter in training are left out, and those that have no effect.
    """
    c = config
    fields: dict[str, Any] = {
        name: getattr(c, name)
        for name, known in FACTS.items()
        if not known.training and c.unused(name) is None
    }
    _drop(fields, "pattern repeat window full_attention")
    fields["symbols"] = c.symbols
    fields["windows"] = [c.window_of(t) for t, symbol in enumerate(c.symbols) if symbol == "*"]
    if c.router_top_groups == c.router_groups:
        _drop(fields, "router_groups router_top_groups")
    if not c.share:
        _drop(fields, "share")
    if not c.has("-"):  # experts have a width of their own, which may follow from it
        _drop(fields, "ffn")
    return fields


def _drop(fields: dict[str, Any], names: str) -> None:
    for name in names.split():
        fields.pop(name, None)
