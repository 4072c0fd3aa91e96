"""Reading Hugging Face's config fields so that none is overlooked, and what they share."""

from collections.abc import Mapping
from typing import Any

from colonnade.models.config import ModelConfig

REQUIRED: Any = object()

# Fields of any config.json that do not alter the function of tokens and weights.
HARMLESS = frozenset(
    [
        "architectures",
        "model_type",
        "_name_or_path",
        "name_or_path",
        "auto_map",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "cls_token_id",
        "decoder_start_token_id",
        "max_position_embeddings",
        "pretraining_tp",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "output_router_logits",
        "router_aux_loss_coef",
        "aux_loss_alpha",
        "seq_aux",
        "id2label",
        "label2id",
        "problem_type",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "torchscript",
        "unsloth_version",
        "_attn_implementation_autoset",
        "experts_implementation",
        "rescale_prenorm_residual",
    ]
)


class Unsupported(ValueError):  # noqa: N818
    """A field or tensor that one side cannot represent: its name, its value, and the remedy."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field} = {value!r}: {remedy}")

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        """Processes send it to each other: it is made anew from its parts."""
        return Unsupported, (self.field, self.value, self.remedy)


class Fields:
    """Their config, of which every field must be read, or be known to be harmless.

    A field that is null counts as absent, as with transformers. `prefix` names it in errors.
    """

    def __init__(self, theirs: Mapping[str, Any], prefix: str = "") -> None:
        self.theirs, self.prefix = theirs, prefix
        self.read: set[str] = set()

    def get(self, *names: str, default: Any = REQUIRED) -> Any:
        """The first of these spellings that is given; all of them count as read."""
        self.read.update(names)
        for name in names:
            if self.theirs.get(name) is not None:
                return self.theirs[name]
        if default is REQUIRED:
            raise Unsupported(self.prefix + names[0], None, "missing from config.json")
        return default

    def integer(self, *names: str, default: Any = REQUIRED) -> int:
        """As `get`, for a number that is counted with: at least 0."""
        value = self.get(*names, default=default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise Unsupported(self.prefix + names[0], value, "must be a whole number, at least 0")
        return value

    def only(self, name: str, default: Any, *allowed: Any, remedy: str = "") -> Any:
        """A field that may have the default or one of these values; the value."""
        value = self.get(name, default=default)
        known = (default, *allowed)
        if not any(value == k and isinstance(value, bool) == isinstance(k, bool) for k in known):
            listed = " or ".join(repr(k) for k in known)
            remedy = remedy or f"only {listed} can be represented"
            raise Unsupported(self.prefix + name, value, remedy)
        return value

    def finish(self, harmless: frozenset[str] = frozenset()) -> None:
        """No field may be left that is neither read nor harmless."""
        for name, value in self.theirs.items():
            if name not in self.read | harmless and value is not None:
                remedy = "an unknown field, which may alter the model; remove it if it does not"
                raise Unsupported(self.prefix + name, value, remedy)


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


def read_rope(fields: Fields, theta: float = 10000.0, partial: bool = False) -> dict[str, Any]:
    """Our fields of rotary positions.

    Transformers 5 has them in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`.

    Args:
        fields: their config.
        theta: the base, where none is given.
        partial: whether the family may rotate a part of each head's channels.
    """
    given = fields.get("rope_scaling", default=None) or fields.get("rope_parameters", default={})
    fields.get("rope_parameters", default={})
    rope = Fields(given, "rope_scaling.")
    theta = rope.get("rope_theta", default=fields.get("rope_theta", default=theta))
    length = fields.get("max_position_embeddings", default=4096)
    ours: dict[str, Any] = {"rope_theta": theta, "rope_original": length}
    fraction = fields.get("partial_rotary_factor", default=1.0)
    if partial:
        ours["rope_fraction"] = rope.get("partial_rotary_factor", default=fraction)
    elif rope.get("partial_rotary_factor", default=fraction) != 1.0:
        raise Unsupported("partial_rotary_factor", fraction, "this family rotates all channels")
    kind = rope.get("rope_type", "type", default="default")
    if kind != "default":
        if kind not in SCALINGS:
            remedy = f"only default, {', '.join(SCALINGS)} can be represented"
            raise Unsupported("rope_scaling.rope_type", kind, remedy)
        values = {o: rope.get(t, default=default) for o, t, default in SCALINGS[kind]}
        if "rope_original" in values:
            values["rope_original"] = values["rope_original"] or length
        if values["rope_factor"] is None:  # yarn
            values["rope_factor"] = length / values["rope_original"]
        ours |= {"rope_scaling": kind, **values}
    rope.finish()
    return ours


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


# Fields of training alone, which no config of theirs carries: they are the recipe's to choose.
TRAINING = frozenset(
    [
        "init_std",
        "logit_z",
        "mtp_weight",
        "mup_zero_init",
        "router_bias_rate",
        "router_noise",
        "balance",
        "balance_sequence",
        "balance_samples",
        "router_z",
        "thor_alpha",
        "mamba_chunk",
        "mamba1_chunk",
        "delta_chunk",
    ]
)
# Which fields matter, by symbols of which one must stand in the model.
ATTENTION = (
    "attention heads kv_heads head_dim q_rank kv_rank rope_dim value_dim positions rope_theta "
    "rope_fraction rope_scaling rope_factor rope_original rope_low rope_high rope_fast rope_slow "
    "rope_mscale rope_mscale_all rope_attention_factor rope_truncate qk_norm window full_attention "
    "sinks attention_gate attention_cap clip_low clip_high ssa attention_conv"
)
OF_SYMBOLS = {
    "*": ATTENTION,
    "-": "ffn",
    "-ET": "activation",
    "M": "mamba_heads mamba_head_dim mamba_state mamba_groups mamba_conv",
    "m": "mamba1_inner mamba1_state mamba1_rank mamba1_conv",
    "DG": "delta_heads delta_key_heads delta_key_dim delta_value_dim delta_conv delta_negative",
    "ET": "experts expert_ffn",
    "E": "top_k shared_ffn shared_gate router_score router_normalise router_scale router_groups "
    "router_top_groups router_bias capacity",
}
# The fields each scaling of rotary positions reads.
ROPE = {
    "none": "",
    "linear": "rope_factor",
    "ntk": "rope_factor",
    "yarn": "rope_factor rope_original rope_fast rope_slow rope_mscale rope_mscale_all "
    "rope_attention_factor rope_truncate",
    "llama3": "rope_factor rope_original rope_low rope_high",
}
ROPE_FIELDS = {name for names in ROPE.values() for name in names.split()}


def function_of(config: ModelConfig) -> dict[str, Any]:
    """What decides the function, in one spelling: two configs with equal ones are the same model.

    Fields that only matter in training are left out, and those that no sub-block reads.
    """
    c = config
    fields = c.model_dump(exclude={"pattern", "repeat", *TRAINING})
    for symbols, names in OF_SYMBOLS.items():
        if not c.has(*symbols):
            _drop(fields, names)
    if not c.mtp:
        _drop(fields, "mtp_pattern")
    if c.residual != "ladder":
        _drop(fields, "ladder_last")
    fields["symbols"] = c.symbols
    if not c.share:
        _drop(fields, "share")
    if c.has("*"):
        _attention(fields, c)
    if c.has("M"):
        fields["mamba_heads"] = c.mamba_heads or 2 * c.hidden // c.mamba_head_dim
    if c.has("m"):
        fields["mamba1_inner"] = c.mamba1_inner or 2 * c.hidden
        fields["mamba1_rank"] = c.mamba1_rank or -(-c.hidden // 16)
    if c.has("D", "G"):
        heads = fields["delta_heads"] = c.delta_heads or c.hidden // c.delta_key_dim
        fields["delta_key_heads"] = c.delta_key_heads or heads
        fields["delta_value_dim"] = c.delta_value_dim or c.delta_key_dim
    if c.has("E", "T"):
        fields["expert_ffn"] = c.expert_ffn or c.ffn
    if c.has("E") and c.router_top_groups in (None, c.router_groups):
        _drop(fields, "router_groups router_top_groups")
    return fields


def _attention(fields: dict[str, Any], c: ModelConfig) -> None:
    """The fields of attention in one spelling."""
    fields["head_dim"] = c.head_dim or c.hidden // c.heads
    if c.attention == "mla":
        fields["value_dim"] = c.value_dim or fields["head_dim"]
        _drop(fields, "kv_heads rope_fraction qk_norm attention_gate attention_conv")
    else:
        fields["kv_heads"] = c.kv_heads or c.heads
        _drop(fields, "q_rank kv_rank rope_dim value_dim")
    rotary = c.rope_scaling if c.positions == "rope" else "none"
    _drop(fields, " ".join(ROPE_FIELDS - {*ROPE[rotary].split()}))
    if c.positions == "none":
        _drop(fields, "rope_theta rope_fraction rope_scaling")
    windows = [c.window_of(t) for t, symbol in enumerate(c.symbols) if symbol == "*"]
    _drop(fields, "window full_attention")
    fields["windows"] = windows


def _drop(fields: dict[str, Any], names: str) -> None:
    for name in names.split():
        fields.pop(name, None)
