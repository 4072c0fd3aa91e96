"""muP: how initial weights, learning rates and multipliers follow from a base model's shapes.

Rules for Adam (arXiv:2203.03466, table 8): a weight whose input and output both grow with the
model starts with a standard deviation smaller by √r and learns r times slower, r the growth of its
input; one whose input alone grows is divided by r where it is used.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch

from colonnade.models.part import Fill, Part

if TYPE_CHECKING:
    from colonnade.models.decoder import Decoder


def apply_mup(model: "Decoder") -> None:
    """Scale first weights, learning rates and outputs of `model` as its config's base asks."""
    base = model.config.base()
    assert base is not None
    with torch.device("meta"):
        small = type(model)(base, stage=model.stage)
    if model.is_last:
        model.head.scale = base.hidden / model.config.hidden
    parts = dict(small.named_modules())
    for path, part in model.named_modules():
        if isinstance(part, Part) and path != "head":
            other = parts[path]
            assert isinstance(other, Part)
            scale_part(part, other)


def scale_part(part: Part, base: Part) -> None:
    """Apply the rules to one part's linear weights; vectors and embeddings stay as they are."""
    for name, spec in part.specs.items():
        if spec.role in ("table", "other"):
            continue
        shape, smaller = getattr(part, name).shape, getattr(base, name).shape
        rows, columns = shape[-2] / smaller[-2], shape[-1] / smaller[-1]
        if rows != 1 and columns != 1:
            spec.fill, spec.rate = scaled(spec.fill, columns**-0.5), 1 / columns
        elif columns != 1:
            spec.transforms.append(partial(torch.mul, other=1 / columns))


def scaled(fill: Fill, factor: float) -> Fill:
    """`fill`, times a factor."""
    return lambda t, g: (fill(t, g), t.mul_(factor))
