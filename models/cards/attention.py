"""`*`: softmax attention over grouped queries, or latent (arXiv:2405.04434, section 2.1)."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from colonnade.models.cards.base import Argument, Card, Mixing
from colonnade.models.options import (
    Count,
    Formula,
    Length,
    Need,
    Options,
    choice,
    formula,
    head_count,
    length,
    option,
    taps,
    width,
)
from colonnade.models.parameters import (
    ParameterSpec,
    Split,
    bias_of,
    constant,
    last_tap,
    normal,
)

if TYPE_CHECKING:
    from colonnade.models.blocks.base import SubBlock
    from colonnade.models.config import ModelConfig

HEADS = "model.heads"


def latent(c: "ModelConfig") -> bool:
    """Whether keys and values are projected from a latent (MLA)."""
    return c.attention == "mla"


def key_heads(c: "ModelConfig") -> int:
    """The number of key and value heads: that of query heads under latent attention."""
    return c.heads if latent(c) else c.kv_heads


def rotated_width(c: "ModelConfig") -> int:
    """Returns how many channels of a head rotary positions rotate; 0 without them."""
    if c.positions == "none":
        return 0
    return c.rope_dim if latent(c) else round(c.head_dim * c.rope_fraction)


def rotates_pairs(c: "ModelConfig") -> bool:
    """Whether the channels that rotary positions rotate are pairs, at least one."""
    return rotated_width(c) > 0 and rotated_width(c) % 2 == 0


def stretches(c: "ModelConfig") -> bool:
    """Whether the scaling changes a frequency; `ntk` does not change that of the first pair."""
    return c.rope_scaling != "ntk" or rotated_width(c) != 2


ATTEND = Mixing(
    "attend",
    {
        "q": Argument("head", lambda c: c.heads, lambda c: c.score_width),
        "k": Argument("group", key_heads, lambda c: c.score_width),
        "v": Argument("group", key_heads, lambda c: c.values_width),
    },
    result=Argument("head", lambda c: c.heads, lambda c: c.values_width),
)


class AttentionCard(Card):
    """Halves: `q, k, v, positions | attend, gate, out`."""

    symbol, title, mixing = "*", "attention", ATTEND

    def parameters(self, config: "ModelConfig", out_std: float) -> list[ParameterSpec]:
        """Returns projections of q, k and v, sinks, temperature and the output projection."""
        c, split = config, Split(0, config.heads, HEADS)
        records = latents(c, split) if latent(c) else grouped(c, split)
        for name, enabled, initial in (
            ("sinks", c.sinks, 0.0),
            ("growth", c.position_temperature, 1.5),
        ):
            if enabled:
                spec = ParameterSpec(name, (c.heads,), constant(initial), tp=split, half="small")
                records.append(spec)
        inner = c.heads * c.values_width
        out = ParameterSpec(
            "out", (c.hidden, inner), normal(out_std), "writes",
            tp=Split(1, c.heads, HEADS), half="second",
        )  # fmt: skip
        return [
            *records,
            out,
            *([bias_of(out)] if c.attention_bias == "all" and not latent(c) else []),
        ]

    def mixing_flops(self, config: "ModelConfig", seq_len: int, index: int) -> int:
        """Counts 2 FLOPs per visible key and channel, for scores and for values: with the causal
        mask half of the sequence, less with a window."""
        c = config
        window = min(c.window_of(index) or seq_len, seq_len)
        visible = window - window * window / (2 * seq_len)
        return round(2 * visible * c.heads * (c.score_width + c.values_width))

    def build(self, config: "ModelConfig", out_std: float) -> "SubBlock":
        """Builds attention over grouped queries, or latent attention."""
        from colonnade.models.blocks.attention import Attention
        from colonnade.models.blocks.latent import LatentAttention

        return (LatentAttention if latent(config) else Attention)(self, config, out_std)


def grouped(c: "ModelConfig", queries: Split) -> list[ParameterSpec]:
    """Returns projections, biases, filters and norms of q, k and v, and the gate on the output."""
    keys = queries
    if c.is_explicit("kv_heads"):
        keys = Split(0, c.kv_heads, "model.kv_heads", replicable=True)
    records = []
    for name, split in {"q": queries, "k": keys, "v": keys}.items():
        size = split.units * c.head_dim
        fill = normal(0.0 if name == "q" and c.zero_init else c.init_std)
        weight = ParameterSpec(name, (size, c.hidden), fill, "reads", tp=split)
        records += [weight, *([bias_of(weight)] if c.attention_bias != "none" else [])]
        if c.attention_conv:  # the identity at first
            shape = size, c.attention_conv
            records.append(ParameterSpec(f"conv_{name}", shape, last_tap, decay=False, tp=split))
        if c.qk_norm != "none" and name != "v":
            full = c.qk_norm == "full"
            width, norm_split = (size, split) if full else (c.head_dim, None)
            fill = constant(c.first_norm)
            records.append(ParameterSpec(f"{name}_norm", (width,), fill, tp=norm_split))
    if c.attention_gate == "channel":
        shape = c.heads * c.head_dim, c.hidden
        records.append(ParameterSpec("gate_z", shape, normal(c.init_std), "reads", tp=queries))
    elif c.attention_gate == "head":
        shape = c.heads, c.hidden // c.heads
        records.append(ParameterSpec("gate_w", shape, normal(c.init_std), tp=queries))
        records.append(ParameterSpec("gate_b", shape[:1], constant(0.0), tp=queries))
    return records


def latents(c: "ModelConfig", split: Split) -> list[ParameterSpec]:
    """Returns projections of queries, through a latent if `q_rank`, and of keys and values, always
    through theirs."""
    queries, init = c.heads * c.score_width, normal(c.init_std)
    fill = normal(0.0 if c.zero_init else c.init_std)
    if c.q_rank:
        records = [
            ParameterSpec("q_a", (c.q_rank, c.hidden), init, "reads"),
            ParameterSpec("q_norm", (c.q_rank,), constant(1.0)),
            ParameterSpec("q_b", (queries, c.q_rank), fill, "inner", tp=split),
        ]
    else:
        records = [ParameterSpec("q", (queries, c.hidden), fill, "reads", tp=split)]
    keys, values = c.heads * c.head_dim, c.heads * c.value_dim
    return [
        *records,
        ParameterSpec("kv_a", (c.kv_rank, c.hidden), init, "reads"),
        ParameterSpec("kv_norm", (c.kv_rank,), constant(1.0)),
        ParameterSpec("k_rope", (c.rope_dim, c.hidden), init, "reads"),
        ParameterSpec("k_b", (keys, c.kv_rank), init, "inner", tp=split),
        ParameterSpec("v_b", (values, c.kv_rank), init, "inner", tp=split),
    ]


def scales_scores(m: "ModelConfig") -> bool:
    """Whether `rope_mscale_all` has an effect: it scales the scores of latent attention, and enters
    the factor of cosine and sine where that is computed."""
    computed = m.rope_attention_factor is None and m.rope_mscale > 0
    return latent(m) or computed


MLA = Need(latent, "unless model.attention = mla", ("attention",))
GQA = Need(lambda m: not latent(m), "with model.attention = mla", ("attention",))
ROPE = Need(
    lambda m: m.positions == "rope", "with model.positions = none", ("positions",)
)  # fmt: skip
STRETCHED = Need(
    lambda m: m.rope_scaling != "none", "with model.rope_scaling = none", ("rope_scaling",)
)
ORIGINAL = Need(
    lambda m: m.rope_scaling in ("yarn", "llama3"),
    "unless model.rope_scaling is yarn or llama3",
    ("rope_scaling",),
)
LLAMA3 = Need(
    lambda m: m.rope_scaling == "llama3", "unless model.rope_scaling = llama3", ("rope_scaling",)
)
YARN = Need(
    lambda m: m.rope_scaling == "yarn", "unless model.rope_scaling = yarn", ("rope_scaling",)
)
COMPUTED = Need(
    lambda m: m.rope_attention_factor is None,
    "with model.rope_attention_factor given",
    ("rope_attention_factor",),
)
MSCALE_ALL = Need(
    lambda m: m.rope_mscale_all > 0, "with model.rope_mscale_all = 0", ("rope_mscale_all",)
)
MSCALE = Need(
    scales_scores,
    "unless model.attention = mla, or model.rope_mscale is above 0 and "
    "model.rope_attention_factor not given",
    ("attention", "rope_mscale", "rope_attention_factor"),
)
WINDOW = Need(lambda m: m.window is not None, "without model.window", ("window",))


class AttentionOptions(Options):
    """`*`: attention."""

    cards: ClassVar[tuple[Card, ...]] = (AttentionCard(),)

    attention: Annotated[Literal["gqa", "mla"], choice()] = option(
        "gqa", "grouped queries, or latent"
    )
    heads: Annotated[Count, head_count()] = option(4, "query heads", ge=1)
    kv_heads: Annotated[Count, head_count(GQA, divides="heads")] = formula(
        Formula("heads"), "gqa", ge=1
    )  # fmt: skip
    head_dim: Annotated[Count, width(4)] = formula(Formula("hidden", by="heads"), ge=1)
    q_rank: Annotated[Count | None, width(8, MLA, optional=True)] = option(
        None, "mla: latent of the queries; default: none", ge=1
    )
    kv_rank: Annotated[Count, width(8, MLA)] = option(128, "mla: latent of keys and values", ge=1)
    rope_dim: Annotated[Count, width(4, MLA)] = option(
        32, "mla: channels with positions, beside head_dim", ge=2
    )
    value_dim: Annotated[Count, width(6, MLA)] = formula(
        Formula("head_dim"), "mla: width of values", ge=1
    )
    latent_norm_eps: Annotated[float, choice(MLA)] = formula(
        Formula("norm_eps"), "mla: norm_eps of the latents' norms", gt=0
    )
    positions: Annotated[Literal["rope", "none"], choice()] = option(
        "rope", "rotary positions, or none"
    )
    rope_theta: Annotated[float, choice(ROPE)] = option(
        10000.0, "base of the rotary frequencies", gt=0
    )
    rope_fraction: Annotated[float, choice(GQA, ROPE)] = option(
        1.0, "gqa: share of channels rotated", gt=0, le=1
    )
    rope_scaling: Annotated[Literal["none", "linear", "ntk", "yarn", "llama3"], choice(ROPE)] = (
        Field("none", description="how positions are stretched beyond the trained length")
    )
    rope_factor: Annotated[float, choice(ROPE, STRETCHED)] = option(
        1.0, "how much longer than trained", ge=1
    )
    rope_original: Annotated[Length, length(8, ROPE, ORIGINAL)] = option(
        4096, "yarn, llama3: positions trained on", ge=1
    )
    rope_low: Annotated[float, choice(ROPE, LLAMA3)] = option(1.0, "llama3: low_freq_factor", gt=0)
    rope_high: Annotated[float, choice(ROPE, LLAMA3)] = option(
        4.0, "llama3: high_freq_factor", gt=0
    )
    rope_fast: Annotated[float, choice(ROPE, YARN)] = option(32.0, "yarn: beta_fast", gt=0)
    rope_slow: Annotated[float, choice(ROPE, YARN)] = option(1.0, "yarn: beta_slow", gt=0)
    rope_mscale: Annotated[float, choice(ROPE, YARN, COMPUTED, MSCALE_ALL)] = option(
        0.0, "yarn: mscale; 0: none", ge=0
    )
    rope_mscale_all: Annotated[float, choice(ROPE, YARN, MSCALE)] = option(
        0.0, "yarn: mscale_all_dim; 0: none", ge=0
    )
    rope_attention_factor: Annotated[float | None, choice(ROPE, YARN)] = option(
        None, "yarn: factor of cos and sin; default: 0.1 ln(factor) + 1", gt=0
    )
    rope_truncate: Annotated[bool, choice(ROPE, YARN)] = option(
        True, "yarn: whole channels in the ramp's ends"
    )
    attention_bias: Annotated[Literal["none", "qkv", "all"], choice(GQA)] = option(
        "none", "biases on queries, keys and values, or on the output too"
    )
    qk_norm: Annotated[Literal["none", "head", "full"], choice(GQA)] = option(
        "none", "norm queries and keys in each head, or over all of them"
    )
    window: Annotated[Length | None, length(5)] = option(
        None, "keys a query attends to, its own included", ge=1
    )
    full_attention: Annotated[tuple[int, ...], Field(strict=False), choice(WINDOW)] = option(
        (), "which attentions of the row, counted from 0, have no window"
    )
    window_rope_theta: Annotated[float, choice(ROPE, WINDOW)] = formula(
        Formula("rope_theta"), "base of the rotary frequencies of attentions with a window", gt=0
    )
    window_rope_scaled: Annotated[bool, choice(ROPE, STRETCHED, WINDOW)] = option(
        True, "rope_scaling applies to attentions with a window, too"
    )
    unrotated: Annotated[tuple[int, ...], Field(strict=False), choice(ROPE)] = option(
        (), "which attentions of the row, counted from 0, have no rotary positions"
    )
    sinks: Annotated[bool, choice()] = option(
        False, "a learned logit per head in the softmax, without a value"
    )
    attention_gate: Annotated[Literal["none", "head", "channel"], choice(GQA)] = option(
        "none", "sigmoid gate per head on its input slice, or per channel"
    )
    attention_multiplier: Annotated[float | None, choice()] = option(
        None,
        "factor of scores at the width of muP's base; default: 1 / √(channels of a score)",
        gt=0,
    )
    attention_cap: Annotated[float | None, choice()] = option(
        None, "scores as cap · tanh(score / cap)", gt=0
    )
    clip_low: Annotated[float, choice()] = option(
        0.0, "clipped softmax: γ, for instance −α / length", le=0
    )
    clip_high: Annotated[float, choice()] = option(1.0, "clipped softmax: ζ", ge=1)
    position_temperature: Annotated[bool, choice()] = option(
        False, "scores grow with the query's position, at a rate learned per head"
    )
    attention_conv: Annotated[Count, taps(GQA)] = option(
        0, "taps of convolutions on q, k, v; 0: none", ge=0
    )
