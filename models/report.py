"""The report of a forward pass: balancing losses, expert loads and terms of the objective."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class BlockReport(NamedTuple):
    """The report of one sub-block in a pass, detached.

    Attributes:
        loads: `[E]`, the number of tokens that chose each expert.
        term: the sum of its balancing losses as it enters the objective, a scalar; None: no losses.
    """

    loads: Tensor
    term: Tensor | None


class PassReport(NamedTuple):
    """The report of a whole pass, detached.

    Attributes:
        terms: balancing losses, by the index of the sub-block.
        loads: `[E]`, the number of tokens that chose each expert, by the index of the sub-block.
        extras: terms of the objective beside the cross entropy (its mean over THOR's two passes),
            summed over tokens, by name.
    """

    terms: dict[int, Tensor]
    loads: dict[int, Tensor]
    extras: dict[str, Tensor]

    @classmethod
    def of(cls, blocks: Mapping[int, BlockReport]) -> "PassReport":
        """Returns the report of a pass from those of its sub-blocks."""
        terms = {index: report.term for index, report in blocks.items() if report.term is not None}
        return cls(terms, {index: report.loads for index, report in blocks.items()}, {})

    def merged(self, other: "PassReport") -> "PassReport":
        """Returns the union with a report of other sub-blocks or with other extras."""
        return PassReport(
            self.terms | other.terms, self.loads | other.loads, self.extras | other.extras
        )
