"""Optimizers of a sharded model, behind one interface.

base     the interface that training, checkpoints and resumption use
adamw    AdamW
muon     Muon on linear weights, AdamW on the rest
"""

import torch
from torch import nn

from colonnade.parallel.optimizer.adamw import AdamW
from colonnade.parallel.optimizer.base import Optimizer, OptimizerSettings
from colonnade.parallel.optimizer.muon import Muon

__all__ = ["AdamW", "Muon", "Optimizer", "OptimizerSettings", "build_optimizer"]


def build_optimizer(
    model: nn.Module, settings: OptimizerSettings, compute: torch.dtype = torch.float32
) -> Optimizer:
    """Builds the optimizer named `settings.name`, with zero state.

    Args:
        model: sharded and filled.
        settings: `[optimizer]`.
        compute: the dtype in which Muon multiplies matrices.

    Raises:
        KeyError: no optimizer of this name.
    """
    if settings.name == "muon":
        return Muon(model, settings, compute)
    return {"adamw": AdamW}[settings.name](model, settings)
