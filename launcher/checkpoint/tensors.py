"""All tensors of a checkpoint, by name."""

from torch import Tensor, nn

from colonnade.parallel.optimizer import Optimizer


def named_tensors(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """`model.NAME` of parameters and buffers, and `optimizer.NAME.STATE`."""
    tensors: dict[str, Tensor] = {f"model.{name}": b for name, b in model.named_buffers()}
    tensors |= {f"model.{name}": p.data for name, p in model.named_parameters()}
    if optimizer is not None:
        tensors |= {f"optimizer.{name}": t for name, t in optimizer.named_state().items()}
    return tensors
