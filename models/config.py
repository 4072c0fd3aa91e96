"""The `[model]` table: every choice that decides which function is trained.

The fields of a sub-block are in the file of its card (`models/cards/NAME.py`). A new sub-block's
table becomes a base class of `ModelConfig`, which makes its symbol known everywhere.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from colonnade.models.cards.attention import AttentionOptions
from colonnade.models.cards.base import Card
from colonnade.models.cards.delta import DeltaOptions
from colonnade.models.cards.mamba1 import Mamba1Options
from colonnade.models.cards.mamba2 import Mamba2Options
from colonnade.models.cards.mixture import ExpertOptions
from colonnade.models.cards.mlp import MLPOptions
from colonnade.models.cards.s4d import S4DOptions
from colonnade.models.options import ROW, Count, Fact, Formula, Need, Options, choice, option, width

LONGEST_ROW = 16384  # sub-blocks


def has_parallel_pair(m: "ModelConfig") -> bool:
    """Whether a channel mixer directly follows a sequence mixer."""
    pairs = [pair for row in m.rows() for pair in pairwise(row)]
    return any(mixes_sequence(a) and not mixes_sequence(b) for a, b in pairs)


PARALLEL = Need(
    lambda m: m.residual != "parallel" or has_parallel_pair(m),
    "as parallel unless `-`, `E` or `T` directly follows a sequence mixer in model.pattern",
    (*ROW, "repeat"),
)
REPEATED = Need(lambda m: m.repeat > 1, "with model.repeat = 1", ("repeat",))
LADDER = Need(lambda m: m.residual == "ladder", "unless model.residual = ladder", ("residual",))
BIASED = Need(  # a rule refuses crms
    lambda m: m.norm in ("layer", "pre_rms", "crms"),
    "unless model.norm is layer or pre_rms",
    ("norm",),
)
WEIGHTED = Need(lambda m: m.norm_weight, "with model.norm_weight = false", ("norm_weight",))
MOVABLE = Need(
    lambda m: m.norm_position != "after", "with model.norm_position = after", ("norm_position",)
)
MTP = Need(lambda m: m.mtp > 0, "with model.mtp = 0", ("mtp",))
BASE = Need(lambda m: m.mup_base is not None, "without model.mup_base", ("mup_base",))
ZERO = Need(
    lambda m: m.has("*") or not m.tied,
    "without attention (`*` in model.pattern) and with a tied head",
    (*ROW, "tied"),
)
Pattern = Annotated[str, Field(min_length=1, max_length=4096)]


Position = Literal["before", "after", "both"]


class StreamOptions(Options):
    """The residual stream, its norms, embedding and head, whatever the sub-blocks."""

    pattern: Annotated[Pattern, choice()] = option("*-", "one symbol per residual sub-block")
    repeat: Annotated[int, choice()] = option(
        1, "number of times the pattern is repeated", ge=1, le=4096
    )
    share: Annotated[bool, choice(REPEATED)] = option(
        False, "every repeat uses the same sub-blocks, with norms of its own (WideNet)"
    )
    residual: Annotated[Literal["standard", "ladder", "parallel"], choice(PARALLEL)] = option(
        "standard",
        "ladder: each sub-block reads the stream without the newest output "
        "(arXiv:2501.06589); parallel: a channel mixer reads what the mixer before it reads",
    )
    ladder_last: Annotated[Count | None, choice(LADDER)] = option(
        None, "ladder over the last n sub-blocks of a row only; default: all", ge=0
    )
    hidden: Annotated[Count, width(24, divided=True)] = option(
        256, "width D of the residual stream", ge=1
    )
    vocab: Annotated[int, width(40, divided=True, grows=False)] = option(
        257, "rows of the embedding and of the head", ge=2, le=2**26
    )
    tied: Annotated[bool, choice()] = option(False, "the head uses the embedding's weights")
    norm: Annotated[Literal["rms", "rms_offset", "layer", "pre_rms", "crms"], choice()] = option(
        "rms", "rms_offset: weights stored minus 1; pre_rms, crms: a centred stream"
    )
    norm_weight: Annotated[bool, choice()] = option(
        True, "the norms of the stream have a learned weight"
    )
    norm_bias: Annotated[bool, choice(BIASED, WEIGHTED)] = option(
        False, "layer and pre_rms: the norms add a bias"
    )
    norm_position: Annotated[Position, choice()] = option(
        "before", "of each sub-block: at its input, at its output, or at both"
    )
    norm_after: Annotated[str, choice(MOVABLE)] = option(
        "",
        "symbols of sequence mixers that, with the channel mixers behind each, have norms only at "
        "their outputs",
        max_length=64,
    )
    norm_eps: Annotated[float, choice()] = option(1e-5, "added to the mean square in norms", gt=0)
    embedding_multiplier: Annotated[float, choice()] = option(1.0, "factor of embeddings", gt=0)
    residual_multiplier: Annotated[float, choice()] = option(
        1.0, "factor of each sub-block's output where it is added to the stream", gt=0
    )
    logit_multiplier: Annotated[float, choice()] = option(
        1.0, "factor of logits; muP's comes on top", gt=0
    )
    learned_positions: Annotated[Count | None, choice()] = option(
        None,
        "positions of a learned table that is added to embeddings (GPT-2); default: no table",
        ge=1,
    )
    init_std: Annotated[float, choice(training=True)] = option(
        0.02, "standard deviation of initial weights", gt=0
    )
    sigma_reparam: Annotated[bool, choice()] = option(False, "linear weights as γ W / σ(W)")
    logit_cap: Annotated[float | None, choice()] = option(
        None, "logits as cap · tanh(logits / cap)", gt=0
    )
    logit_z: Annotated[float, choice(training=True)] = option(
        0.0, "weight of the z-loss on logits", ge=0
    )
    mtp: Annotated[Count, choice()] = option(
        0, "additional tokens predicted (MTP), each by a module of its own", ge=0
    )
    mtp_pattern: Annotated[Pattern, choice(MTP)] = option("*-", "sub-blocks of each MTP module")
    mtp_weight: Annotated[float, choice(MTP, training=True)] = option(
        0.3, "weight of the mean of the MTP losses", ge=0
    )
    mup_base: Annotated[dict[str, Count] | None, choice()] = option(
        None, "fields of the base model whose hyper-parameters are transferred (muP)"
    )
    mup_zero_init: Annotated[bool, choice(BASE, ZERO, training=True)] = option(
        False, "muP: queries and an untied head start at 0"
    )


class ModelConfig(  # pydantic takes the fields of the last one first
    ExpertOptions,
    MLPOptions,
    DeltaOptions,
    S4DOptions,
    Mamba1Options,
    Mamba2Options,
    AttentionOptions,
    StreamOptions,
):
    """A decoder: a row of residual sub-blocks given by `pattern`, one symbol of `CARDS` each."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        """Treats None as unset where the default is a formula."""
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if v is not None or k not in FORMULAS}

    @property
    def symbols(self) -> str:
        """The whole row: `pattern` repeated `repeat` times."""
        return self.pattern * self.repeat

    def rows(self) -> list[str]:
        """Returns the rows, shortened to two repeats, which have every pair of adjacent symbols."""
        row = self.pattern * min(self.repeat, 2)
        return [row, self.mtp_pattern] if self.mtp else [row]

    @property
    def has_unknown_symbols(self) -> bool:
        """Whether a pattern has symbols that no card defines."""
        return not set("".join(self.rows())) <= set(CARDS)

    def has(self, *symbols: str) -> bool:
        """Whether the model has any of these symbols."""
        return any(s in row for s in symbols for row in self.rows())

    def sub_blocks(self) -> list[Card]:
        """Returns the cards of the sub-blocks in the model, without repetition."""
        return [card for symbol, card in CARDS.items() if self.has(symbol)]

    def is_explicit(self, field: str) -> bool:
        """Whether a field was set explicitly, so that its default is not used."""
        return field in self.model_fields_set

    def source_of(self, field: str) -> str:
        """Returns the dotted field that decides this one: itself, or the first of its formula."""
        return f"model.{field if self.is_explicit(field) else FORMULAS[field].of}"

    def changed(self, **update: Any) -> "ModelConfig":
        """Returns the config with these fields set too; formulas are computed from them anew."""
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self).model_validate(fields | update)

    def model_copy(
        self, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> "ModelConfig":
        """As in pydantic, but an update is validated, and formulas follow it (`changed`)."""
        return self.changed(**update) if update else super().model_copy(deep=deep)

    def explicit(self) -> "ModelConfig":
        """Returns the config with every used field set explicitly whose default is a formula."""
        used = (name for name in FORMULAS if self.unused(name) is None)
        return self.changed(**{name: getattr(self, name) for name in used})

    def unused(self, field: str) -> Need | None:
        """Returns the first unmet condition for an effect of a field; None: it has an effect.

        While a pattern has unknown symbols, conditions that read it count as met.
        """
        unknown = self.has_unknown_symbols
        for need in NEEDS[field]:
            if not need.holds(self) and not (unknown and "pattern" in need.involves):
                return need
        return None

    def norm_positions(self, row: str) -> list[Position]:
        """Returns where the norms of each sub-block of a row are.

        A sequence mixer of `norm_after` has its norm at its output, and so have the channel mixers
        between it and the next sequence mixer; all others have theirs at `norm_position`.
        """
        if not self.norm_after:
            return [self.norm_position] * len(row)
        positions: list[Position] = []
        position = self.norm_position
        for symbol in row:
            if mixes_sequence(symbol):
                position = "after" if symbol in self.norm_after else self.norm_position
            positions.append(position)
        return positions

    def attention_number(self, index: int) -> int:
        """Returns how many attentions the row has before the one at `index`."""
        return self.symbols[:index].count("*")

    def window_of(self, index: int) -> int | None:
        """Returns the window of the attention at `index` of the row; None: full attention."""
        return None if self.attention_number(index) in self.full_attention else self.window

    def rope_of(self, index: int) -> tuple[float, bool] | None:
        """Returns the base of the rotary frequencies of the attention at `index` of the row, and
        whether its positions are stretched as configured; None: it has no rotary positions."""
        if self.positions == "none" or self.attention_number(index) in self.unrotated:
            return None
        if self.window_of(index) is None:
            return self.rope_theta, self.rope_scaling != "none"
        return self.window_rope_theta, self.rope_scaling != "none" and self.window_rope_scaled

    @property
    def zero_init(self) -> bool:
        """Whether queries and an untied head start at zero."""
        return self.mup_base is not None and self.mup_zero_init

    def base(self) -> "ModelConfig | None":
        """Returns the model whose hyper-parameters muP transfers; None without muP."""
        if self.mup_base is None:
            return None
        return self.changed(**self.mup_base, mup_base=None)

    @property
    def first_norm(self) -> float:
        """The initial weight of norms: 1, or 0 where the norm adds 1 to it."""
        return 0.0 if self.norm == "rms_offset" else 1.0

    @property
    def score_width(self) -> int:
        """Channels of the dot product of a query and a key."""
        return self.head_dim + self.rope_dim if self.attention == "mla" else self.head_dim

    @property
    def values_width(self) -> int:
        """Channels of a value."""
        return self.value_dim if self.attention == "mla" else self.head_dim


TABLES: tuple[type[Options], ...] = ModelConfig.__bases__[::-1]
CARDS: dict[str, Card] = {card.symbol: card for table in TABLES for card in table.cards}


def mixes_sequence(symbol: str) -> bool:
    """Whether a sub-block mixes tokens of a sequence; the others work token by token."""
    return symbol in CARDS and CARDS[symbol].mixing is not None


def fact(field: str) -> Fact:
    """Returns the metadata of a field."""
    facts = (m for m in ModelConfig.model_fields[field].metadata if isinstance(m, Fact))
    return next(facts)


def need_of_symbols(symbols: str) -> Need:
    """Returns the condition that the model has one of these symbols."""
    titles = " or ".join(dict.fromkeys(CARDS[s].title for s in symbols))
    names = ", ".join(f"`{s}`" for s in symbols)
    alternatives = " or ".join(names.rsplit(", ", 1))
    reason = f"without {titles} ({alternatives} in model.pattern)"
    return Need(lambda m: m.has(*symbols), reason, ROW)


def needs(table: type[Options], field: str) -> tuple[Need, ...]:
    """Returns a field's conditions for an effect: a symbol in the model, and its own `needs`."""
    known = fact(field)
    symbols = known.symbols or "".join(card.symbol for card in table.cards)
    return (need_of_symbols(symbols), *known.needs) if symbols else known.needs


FACTS = {name: fact(name) for name in ModelConfig.model_fields}
NEEDS = {name: needs(t, name) for t in TABLES for name in t.__annotations__ if name in FACTS}
FORMULAS = {
    name: info.default_factory
    for name, info in ModelConfig.model_fields.items()
    if isinstance(info.default_factory, Formula)
}
