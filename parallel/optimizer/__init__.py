"""Optimizers of a sharded model, behind one interface.

base     the interface that training, checkpoints and resumption use
adamw    AdamW
muon     Muon on linear weights, AdamW on the rest
offload/ AdamW with its state in the host's memory
"""

import torch

from colonnade.models.decoder import Decoder
from colonnade.parallel.optimizer.adamw import AdamW
from colonnade.parallel.optimizer.base import Optimizer, OptimizerSettings
from colonnade.parallel.optimizer.muon import Muon
from colonnade.parallel.optimizer.offload.adamw import Offload, OffloadedAdamW

__all__ = [
    "AdamW",
    "Muon",
    "Offload",
    "OffloadedAdamW",
    "Optimizer",
    "OptimizerSettings",
    "build_optimizer",
]


def build_optimizer(
    model: Decoder,
    settings: OptimizerSettings,
    compute: torch.dtype = torch.float32,
    offload: Offload | None = None,
) -> Optimizer:
    """Builds the optimizer named `settings.name`, with zero state.

    Args:
        model: sharded and allocated.
        settings: `[optimizer]`.
        compute: the dtype in which Muon multiplies matrices.
        offload: kernel and device of `settings.offload`, unless that is `none`.

    Raises:
        KeyError: no optimizer of this name.
        ValueError: nothing to offload with, or an optimizer that cannot be offloaded.
    """
    if settings.offload != "none":
        if settings.name != "adamw" or offload is None:
            raise ValueError(f"optimizer.offload = {settings.offload}: AdamW alone, and a kernel")
        return OffloadedAdamW(model, settings, offload)
    if settings.name == "muon":
        return Muon(model, settings, compute)
    return {"adamw": AdamW}[settings.name](model, settings)
