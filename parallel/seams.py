"""Fills the seams of sub-blocks with functions that communicate over the `tp`, the `cp` or the `ep`
axis, and refuses a seam that is not declared or not filled."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from colonnade.models.blocks.base import SubBlock
from colonnade.models.blocks.experts import ExpertBlock
from colonnade.models.decoder import Decoder
from colonnade.models.seams import Seam

AXIS_OF_SEAM = {
    "attach": "tp",
    "dispatch": "ep", "combine": "ep",
    "attend": "cp", "scan": "cp", "conv": "cp", "full_sequence": "cp", "local_segments": "cp",
}  # fmt: skip

Fill = Callable[[Seam], Callable[..., Any]]  # makes the function to put at a seam


class RefusedError(ValueError):
    """Parallelism cannot be applied to a sub-block, which the message names."""


def sub_blocks(model: nn.Module) -> Iterator[tuple[str, SubBlock]]:
    """Yields every sub-block once, with its name in the model."""
    for name, module in model.named_modules():
        if isinstance(module, SubBlock):
            yield name, module


def seams_of_halves(block: SubBlock) -> set[str]:
    """The names of the seams that the halves of a sub-block declare."""
    return {seam.name for half in (block.first, block.second) for seam in half.seams or ()}


def expert_blocks(model: nn.Module) -> Iterator[ExpertBlock]:
    """Yields every sub-block with experts once."""
    return (block for _, block in sub_blocks(model) if isinstance(block, ExpertBlock))


def fill_seams(model: Decoder, axis: str, fills: Mapping[str, Fill]) -> None:
    """Puts a function at every seam of `axis`: the one that `fills` makes for the seam's name.

    Raises:
        RefusedError: a half that does not declare its seams, or a seam that nothing fills.
    """
    for path, block in sub_blocks(model):
        for half in ("first", "second"):
            module = getattr(block, half)
            if module.seams is None:
                raise RefusedError(
                    f"{path}.{half}: {type(module).__name__} does not declare its seams, so "
                    f"{axis} could leave it local without a word; declare `seams`, () if it works "
                    "token by token"
                )
        for name, module in block.named_modules(prefix=path):
            for seam in getattr(module, "seams", None) or ():
                if seam.name not in AXIS_OF_SEAM:
                    known = ", ".join(AXIS_OF_SEAM)
                    raise RefusedError(
                        f"{name}: {type(module).__name__} declares the seam {seam.name!r}, which "
                        f"no parallelism fills; the seams are {known}"
                    )
                if AXIS_OF_SEAM[seam.name] != axis:
                    continue
                if seam.name not in fills:
                    raise RefusedError(f"{name}: {axis} has nothing for the seam {seam.name!r}")
                setattr(module, seam.name, fills[seam.name](seam))


def ignore_collective_names() -> None:
    """Hides a deprecation warning of PyTorch 2.13: spmd_types calls functional collectives by names
    for which PyTorch now has others."""
    message = ".*torch.distributed._functional_collectives.*deprecated"
    warnings.filterwarnings("ignore", message=message)


def check_sequence_mixers(model: Decoder) -> None:
    """Refuses a sub-block that mixes along the sequence and has no seam for the `cp` axis.

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
        mixing = block.card.mixing
        if mixing is not None and mixing.seam not in seams_of_halves(block):
            raise RefusedError(
                f"{path}: {kind} mixes along the sequence and has no seam where ranks could take "
                f"part; declare {mixing.seam} on the half that mixes"
            )
