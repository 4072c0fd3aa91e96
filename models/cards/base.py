"""A sub-block's card: its options, parameters, seams and FLOPs, without its code. Imports no torch.

The cards are in `models/cards/NAME.py`. Beside options (`models.options`) and parameters
(`models.parameters`) a card describes the operator that mixes along the sequence, and the tensors
that ranks may exchange for it. The seams of the sub-block's halves, the all-to-all of heads, the
count of bytes sent and the tests' type checker are derived from that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from colonnade.models.parameters import ParameterSpec, constant

if TYPE_CHECKING:
    from colonnade.models.blocks.base import SubBlock
    from colonnade.models.config import ModelConfig

# How an argument is laid out over the heads of a sub-block (of Mamba-1 over the channels), which
# the operator treats independently of each other:
# head      [S, B, H, ...]  one slice per head
# group     [S, B, G, ...]  one slice per group of heads; with more ranks than groups, several ranks
#                           hold the same group
# shared    [S, B, ...]     the same for all heads
# constant  [H, ...]        one slice per head, the same for all tokens
Kind = Literal["head", "group", "shared", "constant"]
Size = Callable[["ModelConfig"], int]


@dataclass(frozen=True)
class Argument:
    """An input or the output of an operator along the sequence.

    Attributes:
        kind: how it is laid out over the heads.
        count: the number of heads or groups; 1 where it is shared.
        width: elements per token and head, or per token and group.
        wide: whether it is in at least fp32 whatever the precision.
        present: whether the sub-block has it; otherwise None is passed.
    """

    kind: Kind
    count: Size = lambda c: 1
    width: Size = lambda c: 1
    wide: bool = False
    present: bool = True


@dataclass(frozen=True)
class Mixing:
    """The operator of a sub-block along the sequence, which is called through one seam.

    Attributes:
        seam: the name of the seam.
        arguments: the seam's tensors, in order, before all other arguments.
        result: the output tensor.
        state: elements per sequence of the state, and of the transition that a segment applies to
            it, which context ranks send to each other; None: no state (attention).
    """

    seam: Literal["attend", "scan"]
    arguments: Mapping[str, Argument]
    result: Argument
    state: Size | None = None

    @property
    def kinds(self) -> dict[str, Kind]:
        """How each argument is laid out over the heads."""
        return {name: argument.kind for name, argument in self.arguments.items()}


class Card(ABC):
    """Describes the kind of sub-block that `symbol` denotes in a pattern.

    `title` is its name within a sentence. `mixing` is None where it works token by token;
    `parallelize` refuses a card without the attribute.
    """

    symbol: str
    title: str
    mixing: Mixing | None

    @abstractmethod
    def parameters(self, config: "ModelConfig", out_std: float) -> list[ParameterSpec]:
        """Returns a new record of each parameter.

        `out_std` is the initial standard deviation of weights that write onto the stream.
        """

    def mixing_flops(self, config: "ModelConfig", seq_len: int, index: int) -> int:
        """Returns forward FLOPs per token at row index `index`, without the 2 per weight used."""
        return 0

    @abstractmethod
    def build(self, config: "ModelConfig", out_std: float) -> "SubBlock":
        """Builds the module. Imports torch."""

    def records(self, config: "ModelConfig", out_std: float) -> list[ParameterSpec]:
        """Returns `parameters`, and for σReparam each weight's gain and singular vectors."""
        records = self.parameters(config, out_std)
        if not config.sigma_reparam:
            return records
        return records + [extra for record in records for extra in gains(record)]


def gains(spec: ParameterSpec) -> list[ParameterSpec]:
    """Returns σReparam's gain and singular vectors of a linear weight `[..., O, I]`.

    `models.reparam` uses them; a record of another role has none.
    """
    if not spec.is_matrix:
        return []
    *experts, rows, columns = spec.shape
    zero, half, ep = constant(0.0), spec.half, spec.ep
    return [
        ParameterSpec(f"{spec.name}_gain", tuple(experts) or (1,), zero, half=half, ep=ep),
        *(
            ParameterSpec(f"{spec.name}_{side}", (*experts, n), zero, half=half, ep=ep, state=True)
            for side, n in (("left", rows), ("right", columns))
        ),
    ]
