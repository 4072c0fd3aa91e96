"""muP: how initial weights, learning rates and multipliers follow from a base model's shapes.

Rules for Adam (arXiv:2203.03466, table 8): a weight whose input and output both grow with the
model starts with a standard deviation smaller by √r and learns r times slower, r the growth of its
input; one whose input alone grows is divided by r where it is used. The configured multipliers
are those of the base model, and stay as they are.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch

from colonnade.models.parameter_module import declared
from colonnade.models.parameters import ParameterSpec, scaled
from colonnade.models.records import records_of

if TYPE_CHECKING:
    from colonnade.models.decoder import Decoder


def apply_mup(model: "Decoder") -> None:
    """Scales initial weights, learning rates and logits of `model` relative to its base model."""
    base = model.config.base()
    assert base is not None
    if model.has_head:
        model.head.scale *= base.hidden / model.config.hidden
    base_records = records_of(base)
    for name, _, spec in declared(model):
        if spec.is_matrix and not name.startswith("head."):
            scale(spec, base_records[name].shape)


def scale(spec: ParameterSpec, base: tuple[int, ...]) -> None:
    """Applies the rules to a linear weight; vectors and embeddings are left unchanged."""
    rows, columns = spec.shape[-2] / base[-2], spec.shape[-1] / base[-1]
    if rows != 1 and columns != 1:
        spec.fill, spec.rate = scaled(spec.fill, columns**-0.5), 1 / columns
    elif columns != 1:
        spec.transforms.append(partial(torch.mul, other=1 / columns))
