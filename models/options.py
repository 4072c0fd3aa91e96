"""What is known of a field of the `[model]` table: what it is, its default, when it has an effect.

A field's annotation carries a `Fact` beside its type; its default may be a `Formula` of earlier
fields. The checks for settings without effect, the rules on sizes, muP's base, `verify`'s small
models and the conversions to other systems all read these.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from colonnade.models.cards.base import Card
    from colonnade.models.config import ModelConfig

# Bounds far beyond what is trained: larger is a slip, and would be met as a hang or an overflow.
Count = Annotated[int, Field(le=2**20)]  # widths, heads, experts, taps
Length = Annotated[int, Field(le=2**31 - 1)]  # tokens


# The fields that say which sub-blocks there are.
ROW = "pattern", "mtp", "mtp_pattern"


@dataclass(frozen=True)
class Need:
    """A condition without which a field has no effect.

    Attributes:
        holds: of the model.
        otherwise: the end of the sentence «has no effect …».
        involves: the fields that it looks at.
    """

    holds: Callable[["ModelConfig"], bool]
    otherwise: str
    involves: tuple[str, ...]


@dataclass(frozen=True)
class Formula:
    """A default that follows from other fields: `times · of / by`, rounded up where `up` says so.

    A quotient that is not rounded up has to be whole, or the field has to be given.
    """

    of: str
    times: int = 1
    by: str | int = 1
    up: bool = False

    def __call__(self, values: dict[str, Any]) -> Any:
        """The default, from the fields before it; None where one of those was refused."""
        parts = self.parts(values)
        if parts is None:
            return None
        product, divisor = parts
        if divisor == 1:
            return product
        return -(-product // divisor) if self.up else product // divisor

    def parts(self, values: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """The product and what divides it."""
        by = values.get(self.by) if isinstance(self.by, str) else self.by
        of = values.get(self.of)
        return None if of is None or not by else (self.times * of if self.times > 1 else of, by)

    def __str__(self) -> str:
        product = self.of if self.times == 1 else f"{self.times} * {self.of}"
        return product if self.by == 1 else f"{product} / {self.by}"


Kind = Literal["choice", "width", "heads", "count", "length", "taps"]


@dataclass(frozen=True)
class Fact:
    """What is known of a field beside its type and bounds.

    Attributes:
        kind: a width (channels), a number of heads or groups of them, a count of anything else, a
            length in tokens, the taps of a causal convolution; or a choice.
        symbols: of which one has to stand in the model; empty: all those of the field's table.
        needs: further conditions for an effect.
        least: a width or length in `verify`'s small models.
        divided: whether parallel ranks divide the width among them: small models keep its common
            divisors with the number of ranks.
        grows: whether a base model of muP may differ in it.
        optional: whether a model may lack what the size is of.
        divides: the field of which this number has to be a divisor.
        training: whether it matters in training alone, and no other system's checkpoint has it.
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
    """A number of channels."""
    return Fact(
        "width", symbols, needs, least, divided=divided, grows=grows, optional=optional
    )  # fmt: skip


def head_count(*needs: Need, divides: str | None = None) -> Fact:
    """A number of heads, or of groups of them."""
    return Fact("heads", needs=needs, grows=True, divides=divides)


def length(least: int, *needs: Need, training: bool = False) -> Fact:
    """A number of tokens."""
    return Fact("length", needs=needs, least=least, training=training)


def taps(*needs: Need) -> Fact:
    """The width of a causal convolution, in tokens."""
    return Fact("taps", needs=needs)


def choice(
    *needs: Need, symbols: str = "", training: bool = False, divides: str | None = None
) -> Fact:
    """Any other field."""
    return Fact("choice", symbols, needs, training=training, divides=divides)


def option(default: Any, description: str, **bounds: Any) -> Any:
    """A field with its default."""
    return Field(default, description=description, **bounds)


def formula(default: Formula, description: str = "", **bounds: Any) -> Any:
    """A field whose default is a formula of earlier ones."""
    told = f"{description}; default: {default}" if description else f"default: {default}"
    return Field(default_factory=default, description=told, **bounds)


class Options(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """Fields of the `[model]` table that belong together."""

    # Of the sub-blocks that these fields are of; a table of the residual stream's has none.
    cards: ClassVar[tuple["Card", ...]] = ()
