"""Metadata of the fields of the `[model]` table: kind, default, and when a field has an effect.

The annotation of a field carries a `Fact` beside its type; its default may be a `Formula` of
earlier fields. The checks for settings without effect, the rules on sizes, muP's base, `verify`'s
small models and the conversions to other systems all read these.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from colonnade.models.cards.base import Card
    from colonnade.models.config import ModelConfig

# Bounds far beyond what anyone trains: a larger number is a typo, which would otherwise show up as
# a hang or an overflow.
Count = Annotated[int, Field(le=2**20)]  # widths, heads, experts, taps
Length = Annotated[int, Field(le=2**31 - 1)]  # tokens


# The fields that decide which sub-blocks the model has.
ROW = "pattern", "mtp", "mtp_pattern"


@dataclass(frozen=True)
class Need:
    """A condition without which a field has no effect.

    Attributes:
        holds: evaluates the condition on a model.
        reason: completes the sentence «has no effect …» where the condition does not hold.
        involves: the fields that the condition reads.
    """

    holds: Callable[["ModelConfig"], bool]
    reason: str
    involves: tuple[str, ...]


@dataclass(frozen=True)
class Formula:
    """A default that is computed from other fields: `times · of / by`, rounded up where `up`.

    Without `up` the division must be exact, or the field must be set.
    """

    of: str
    times: int = 1
    by: str | int = 1
    up: bool = False

    def __call__(self, values: dict[str, Any]) -> Any:
        """Computes the default from the earlier fields; None where one of those was refused."""
        terms = self.terms(values)
        if terms is None:
            return None
        product, divisor = terms
        if divisor == 1:
            return product
        return -(-product // divisor) if self.up else product // divisor

    def terms(self, values: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """Returns the product and the divisor; None where a field of the formula is missing."""
        by = values.get(self.by) if isinstance(self.by, str) else self.by
        of = values.get(self.of)
        return None if of is None or not by else (self.times * of if self.times > 1 else of, by)

    def __str__(self) -> str:
        product = self.of if self.times == 1 else f"{self.times} * {self.of}"
        quotient = product if self.by == 1 else f"{product} / {self.by}"
        return f"{quotient}, rounded up" if self.up else quotient


Kind = Literal["choice", "width", "heads", "length", "taps"]


@dataclass(frozen=True)
class Fact:
    """Metadata of a field beside its type and bounds.

    Attributes:
        kind: a width (channels), a number of heads or of groups of heads, a
            length in tokens, the taps of a causal convolution; or a choice.
        symbols: the field needs one of these symbols in the model; empty: any symbol of its table.
        needs: further conditions for an effect.
        least: the smallest width or length in `verify`'s small models.
        divided: whether ranks shard the width; small models keep its common divisors with the
            number of ranks.
        grows: whether a base model of muP may have another value.
        optional: whether a model may lack the tensor that has this size.
        divides: the field of which this number must be a divisor.
        training: whether only training uses the field, so that other systems' checkpoints do not
            have it.
    """

    kind: Kind = "choice"
    symbols: str = ""
    needs: tuple[Need, ...] = ()
    least: int = 1
    divided: bool = False
    grows: bool = False
    optional: bool = False
    divides: str | None = None
    training: bool = False


def width(
    least: int,
    *needs: Need,
    divided: bool = False,
    grows: bool = True,
    optional: bool = False,
    symbols: str = "",
) -> Fact:
    """Describes a number of channels."""
    return Fact(
        "width", symbols, needs, least, divided=divided, grows=grows, optional=optional
    )  # fmt: skip


def head_count(*needs: Need, divides: str | None = None) -> Fact:
    """Describes a number of heads, or of groups of heads."""
    return Fact("heads", needs=needs, grows=True, divides=divides)


def length(least: int, *needs: Need, training: bool = False) -> Fact:
    """Describes a number of tokens."""
    return Fact("length", needs=needs, least=least, training=training)


def taps(*needs: Need) -> Fact:
    """Describes the width of a causal convolution, in tokens."""
    return Fact("taps", needs=needs)


def choice(*needs: Need, symbols: str = "", training: bool = False) -> Fact:
    """Describes any other field."""
    return Fact("choice", symbols, needs, training=training)


def option(default: Any, description: str, **bounds: Any) -> Any:
    """Declares a field with a constant default."""
    return Field(default, description=description, **bounds)


def formula(default: Formula, description: str = "", **bounds: Any) -> Any:
    """Declares a field whose default is a formula of earlier fields."""
    text = f"{description}; default: {default}" if description else f"default: {default}"
    return Field(default_factory=default, description=text, **bounds)


class Options(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """A group of fields of the `[model]` table."""

    # The cards whose sub-blocks these fields configure; empty for the residual stream's table.
    cards: ClassVar[tuple["Card", ...]] = ()
