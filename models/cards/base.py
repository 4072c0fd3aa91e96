"""A sub-block's card: all that is known of it but how it computes. Imports no torch.

Cards stand in `models/cards/NAME.py`. Beside options (`models.options`) and parameters
(`models.parameters`) a card says what mixes along the sequence, and what of it ranks may exchange:
the seams of the sub-block's halves, the exchange of heads, the bytes that are sent and the types of
the checker in tests follow from that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from colonnade.models.parameters import ParameterSpec, constant

if TYPE_CHECKING:
    from colonnade.models.blocks.base import SubBlock
    from colonnade.models.config import ModelConfig

# How an argument lies over the heads of a sub-block (of Mamba-1 the channels), which do not meet:
# head      [S, B, H, ...]  of each head
# group     [S, B, G, ...]  of each group of heads; where ranks outnumber groups, several share one
# shared    [S, B, ...]     the same for all heads
# constant  [H, ...]        of each head, for all tokens
Kind = Literal["head", "group", "shared", "constant"]
Size = Callable[["ModelConfig"], int]


@dataclass(frozen=True)
class Argument:
    """A tensor that an operator along the sequence takes or gives.

    Attributes:
        kind: how it lies over the heads.
        count: heads or groups; 1 where it is shared.
        width: numbers of a token in each of them.
        wide: whether it is in at least fp32 whatever the precision.
        given: whether there is one.
    """

    kind: Kind
    count: Size = lambda c: 1
    width: Size = lambda c: 1
    wide: bool = False
    given: bool = True


@dataclass(frozen=True)
class Mixing:
    """What a sub-block does along the sequence, through one seam.

    Attributes:
        seam: its name.
        arguments: the seam's tensors, in order, before all other arguments.
        result: the tensor that it gives.
        state: numbers of a sequence's state and of the transition that a segment applies to it,
            which ranks hand on; None: it has no state (attention).
    """

    seam: Literal["attend", "scan"]
    arguments: Mapping[str, Argument]
    result: Argument
    state: Size | None = None

    @property
    def kinds(self) -> dict[str, Kind]:
        """How each argument lies over the heads."""
        return {name: argument.kind for name, argument in self.arguments.items()}


class Card:
    """All that is known of the sub-block that `symbol` stands for.

    `title` names it within a sentence. `mixing` is None where it works token by token; parallelism
    refuses a card that does not say.
    """

    symbol: str
    title: str
    mixing: Mixing | None

    def parameters(self, config: "ModelConfig", out_std: float) -> list[ParameterSpec]:
        """A new record of each parameter; `out_std` is that of weights that write the stream."""
        raise NotImplementedError

    def mixing_flops(self, config: "ModelConfig", seq_len: int, index: int) -> int:
        """Forward FLOPs per token at this place beside those of the weights (2 per weight used)."""
        return 0

    def build(self, config: "ModelConfig", out_std: float) -> "SubBlock":
        """The module. Imports torch."""
        raise NotImplementedError

    def records(self, config: "ModelConfig", out_std: float) -> list[ParameterSpec]:
        """The parameters, and under σReparam the gain and the singular vectors of each weight."""
        own = self.parameters(config, out_std)
        return own + [r for spec in own for r in gains(spec)] if config.sigma_reparam else own


def gains(spec: ParameterSpec) -> list[ParameterSpec]:
    """What σReparam holds beside a linear weight `[..., O, I]` (`models.reparam`)."""
    if not spec.is_matrix:
        return []
    *many, rows, columns = spec.shape
    zero = constant(0.0)
    return [
        ParameterSpec(f"{spec.name}_gain", tuple(many) or (1,), zero, half=spec.half),
        ParameterSpec(f"{spec.name}_left", (*many, rows), zero, half=spec.half, state=True),
        ParameterSpec(f"{spec.name}_right", (*many, columns), zero, half=spec.half, state=True),
    ]
