"""The seams of sub-blocks, filled in one place: what is not declared or filled is refused."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from colonnade.models.blocks.base import SubBlock
from colonnade.models.decoder import Decoder
from colonnade.models.seams import Seam

FILLED_BY = {
    "attach": "tp",
    "attend": "cp", "scan": "cp", "conv": "cp", "full_sequence": "cp", "local_segments": "cp",
}  # fmt: skip

Fill = Callable[[Seam], Callable[..., Any]]


class RefusedError(ValueError):
    """A sub-block that parallelism cannot be applied to, by name."""


def sub_blocks(model: Decoder) -> Iterator[tuple[str, SubBlock]]:
    """Every sub-block once, with its name in the model."""
    for name, module in model.named_modules():
        if isinstance(module, SubBlock):
            yield name, module


def fill_seams(model: Decoder, axis: str, fills: Mapping[str, Fill]) -> None:
    """Put at every seam that `axis` fills what `fills` has for its name.

    Raises:
        RefusedError: a half that does not declare its seams, or a seam that nothing fills.
    """
    for path, block in sub_blocks(model):
        for half in ("first", "second"):
            part = getattr(block, half)
            if part.seams is None:
                raise RefusedError(
                    f"{path}.{half}: {type(part).__name__} does not declare its seams, so {axis} "
                    "could leave it local without a word; declare `seams`, () if it works token "
                    "by token"
                )
        for where, owner in block.named_modules(prefix=path):
            for seam in getattr(owner, "seams", None) or ():
                name = seam.name
                if name not in FILLED_BY:
                    known = ", ".join(FILLED_BY)
                    raise RefusedError(
                        f"{where}: {type(owner).__name__} declares the seam {name!r}, which no "
                        f"parallelism fills; the seams are {known}"
                    )
                if FILLED_BY[name] != axis:
                    continue
                if name not in fills:
                    raise RefusedError(f"{where}: {axis} has nothing for the seam {name!r}")
                setattr(owner, name, fills[name](seam))


def check_sequence_mixers(model: Decoder) -> None:
    """Refuse, where ranks share sequences, what mixes along them and has no seam for that.

    Raises:
        RefusedError: such a sub-block, or one that does not say what it mixes.
    """
    for path, block in sub_blocks(model):
        kind = type(block).__name__
        if not hasattr(block.card, "mixing"):
            raise RefusedError(
                f"{path}: the card of {kind} does not say what it mixes, so cp could leave it "
                "local without a word; give it `mixing`, None if it works token by token"
            )
        declared = [seam.name for half in (block.first, block.second) for seam in half.seams or ()]
        mixing = block.card.mixing
        if mixing is not None and mixing.seam not in declared:
            raise RefusedError(
                f"{path}: {kind} mixes along the sequence and has no seam where ranks could take "
                f"part; declare {mixing.seam} on the half that mixes"
            )
