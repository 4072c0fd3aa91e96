"""Names the tensors that a checkpoint of a training run holds."""

from torch import Tensor

from colonnade.models.names import CanonicalNames, tensors_of
from colonnade.parallel.optimizer import Optimizer


def changing_names(model: CanonicalNames) -> set[str]:
    """Returns the names of buffers, which forward passes may change: others change by updates."""
    return {name for name, _ in model.named_buffers()}


def named_tensors(model: CanonicalNames, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Returns parameters and buffers by canonical name, and `optimizer.NAME.STATE` tensors.

    Where the optimizer has master weights, they take the places of parameters:
    `Optimizer.write_weights` writes them into the model after they were loaded.
    """
    tensors = {name: tensor.detach() for name, tensor in tensors_of(model)}
    if optimizer is not None:
        tensors |= optimizer.masters()
        tensors |= {f"optimizer.{name}": t for name, t in optimizer.named_state().items()}
    return tensors
