"""What a forward pass returns beside its output, for reports and for steering routers."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class BlockReport(NamedTuple):
    """What one sub-block found in a pass, detached.

    Attributes:
        loads: `[E]`, the rows that each expert was chosen for.
        term: balancing losses as they enter the objective, a scalar; None: there are none.
    """

    loads: Tensor
    term: Tensor | None


class PassReport(NamedTuple):
    """What a whole pass found, detached.

    Attributes:
        terms: balancing losses, by the sub-block's index.
        loads: `[E]`, the rows that each expert was chosen for, by the sub-block's index.
        extras: parts of the objective beside the mean cross entropy, summed over tokens, by name.
    """

    terms: dict[int, Tensor]
    loads: dict[int, Tensor]
    extras: dict[str, Tensor]

    @classmethod
    def of(cls, blocks: Mapping[int, BlockReport]) -> "PassReport":
        """The report of these sub-blocks."""
        terms = {index: found.term for index, found in blocks.items() if found.term is not None}
        return cls(terms, {index: found.loads for index, found in blocks.items()}, {})

    def joined(self, other: "PassReport") -> "PassReport":
        """Both in one, of other sub-blocks or with other extras."""
        return PassReport(
            self.terms | other.terms, self.loads | other.loads, self.extras | other.extras
        )
