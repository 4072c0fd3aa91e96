"""Muon: the momentum of a matrix, orthogonalised (K. Jordan, 2024; arXiv:2502.16982)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import _disable_current_modes

from colonnade.kernels.orthogonal import orthogonalised
from colonnade.models.parameter_module import Declared, trained
from colonnade.parallel.gradients import local, scale_gradients
from colonnade.parallel.optimizer.adamw import AdamW
from colonnade.parallel.optimizer.base import Optimizer, OptimizerSettings

ENDS = ("embedding.", "head.")  # their rows are vectors of tokens, not maps between activations
RMS = 0.2  # of an update's elements, about that of AdamW's (arXiv:2502.16982, eq. 4)


class Muon(Optimizer):
    """Muon on all linear weights but embedding and head, AdamW on the rest, at one learning rate.

    The update of every matrix, and of each expert's, is lr · 0.2 · √max(rows, columns) times its
    orthogonalised Nesterov momentum. The ranks that shard a matrix all-gather the shards of its
    momentum over the axes of its mesh, each orthogonalises the full matrix, and keeps its own shard
    of the result, so that an update does not depend on the layout. Ranks that hold different
    experts keep to these.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings, compute: torch.dtype) -> None:
        super().__init__()
        parameters = trained(model)
        self.matrices = [p for p in parameters if is_matrix(p)]
        self.adamw = AdamW(model, settings, [p for p in parameters if not is_matrix(p)])
        self.momentum, self.decay, self.compute = settings.momentum, settings.weight_decay, compute
        self.momenta = [torch.zeros_like(p) for _, p, _ in self.matrices]

    @torch.no_grad()
    def update(self, lr: float, scale: float) -> None:
        """Updates every parameter; all-gathers the momentum of every matrix. Collective."""
        self.adamw.update(lr, scale)
        scale_gradients((p for _, p, _ in self.matrices), scale)
        for (_, p, spec), momentum in zip(self.matrices, self.momenta, strict=True):
            if p.grad is None:
                continue
            weight, grad, local_momentum = local(p), local(p.grad), local(momentum)
            local_momentum.lerp_(grad, 1 - self.momentum)
            nesterov = torch.zeros_like(p, dtype=self.compute)  # rounded before the all-gather
            local(nesterov).copy_(grad.lerp(local_momentum, self.momentum))
            gathered = gather_matrices(nesterov)
            direction = orthogonalised(local(gathered))
            scale = RMS * max(p.shape[-2:]) ** 0.5
            weight.mul_(1 - lr * (self.decay if spec.decayed else 0.0))
            update = shard_of(direction, gathered, p)
            weight.add_(update.to(weight.dtype), alpha=-lr * scale)

    def zero_grad(self) -> None:
        self.adamw.zero_grad()
        for _, p, _ in self.matrices:
            p.grad = None

    def named_state(self) -> dict[str, Tensor]:
        momenta = zip(self.matrices, self.momenta, strict=True)
        return self.adamw.named_state() | {f"{p.name}.momentum": m for p, m in momenta}

    def resume(self, updates: int, before: Mapping[str, int]) -> None:
        super().resume(updates, before)
        self.adamw.resume(updates, before)


def is_matrix(p: Declared) -> bool:
    """Whether Muon updates the parameter: a linear weight, or one of each expert, that is not the
    embedding or the head."""
    return p.spec.is_matrix and not p.name.startswith(ENDS)


def gather_matrices(t: Tensor) -> Tensor:
    """All-gathers the shards of the matrices in `[..., rows, columns]`; a tensor that is no DTensor
    stays as it is.

    The result is a DTensor that is replicated over all axes but those that divide the matrices
    among them as a whole.
    """
    if not isinstance(t, DTensor):
        return t
    kept = tuple(
        p if isinstance(p, Shard | _StridedShard) and p.dim < t.dim() - 2 else Replicate()
        for p in t.placements
    )
    return t if kept == t.placements else t.redistribute(placements=kept)


def local_range(t: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of the local shard of a DTensor, and where it starts.

    PyTorch reads it off tensors, which hold no numbers under fake tensors.
    """
    with _disable_current_modes():
        return compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)


def shard_of(values: Tensor, gathered: Tensor, like: Tensor) -> Tensor:
    """Slices from `values`, the local shard of `gathered`, the shard that this rank holds of the
    DTensor `like`."""
    if not isinstance(like, DTensor) or not isinstance(gathered, DTensor):
        return values
    _, starts = local_range(gathered)
    shape, offset = local_range(like)
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        values = values.narrow(dim, min(start - starts[dim], values.shape[dim]), size)
    return values
