"""Transforms of weights at their use: σReparam, centring, muP's multipliers.

`ParameterModule.weight_of` applies them, so no sub-block depends on them.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from colonnade.kernels.precision import wide
from colonnade.kernels.sharding import UNSHARDED, Sharding
from colonnade.models.mup import apply_mup
from colonnade.models.parameter_module import ParameterModule

if TYPE_CHECKING:
    from colonnade.models.decoder import Decoder


def reparametrise(model: "Decoder") -> None:
    """Installs the transforms that the config of the model enables."""
    config = model.config
    if config.sigma_reparam:
        for wiring in model.wirings():
            for module in wiring.modules():
                if isinstance(module, ParameterModule):
                    spectral(module)
    if config.norm == "pre_rms":
        for module in model.modules():
            if isinstance(module, ParameterModule):
                centre(module)
    if config.mup_base is not None:
        apply_mup(model)


def centre(module: ParameterModule) -> None:
    """Subtracts the mean over the stream's channels from all that writes onto the stream.

    This centres the stream, so that RMSNorm equals LayerNorm (arXiv:2305.14858, section 3).
    """
    for spec in module.specs.values():
        if spec.stream_dim is not None:
            spec.transforms.append(partial(centred, dim=spec.stream_dim))


def centred(weight: Tensor, dim: int) -> Tensor:
    """Returns the weight minus its mean along `dim`."""
    return weight - weight.mean(dim, keepdim=True)


def spectral(module: ParameterModule) -> None:
    """Installs σReparam (arXiv:2303.06296, eq. 3): linear weights are used as γ W / σ(W).

    γ, `[1]` or one per expert, starts at 1 and is stored minus 1, so that bf16 rounds only its
    change. The singular vectors are fp32 state, advanced by one power iteration per optimizer step,
    at the first use in training.
    """
    for name, spec in module.specs.items():
        if f"{name}_gain" in module.specs:  # declared by `models.cards.base.gains`
            spec.transforms.append(partial(normalised, module, name))


INITIAL_ITERATIONS = 64  # power iterations that initialise the singular vectors


def normalised(module: ParameterModule, name: str, weight: Tensor) -> Tensor:
    """Returns γ W / (leftᵀ W right), differentiable in W, with constant singular vectors.

    Where ranks shard W, the product in the denominator is all-reduced over them.
    """
    left, right = (module.state_of(f"{name}_{side}") for side in ("left", "right"))
    w, (rows, columns) = wide(weight), shardings(module, name)
    if name not in module.started:
        module.started.add(name)
        if not bool(left.any()):  # neither advanced nor loaded from a checkpoint
            right.fill_(right.shape[-1] ** -0.5)
            power_iteration(w, left, right, rows, columns, INITIAL_ITERATIONS)
            module.due.discard(name)
    if name in module.due and module.training:
        power_iteration(w, left, right, rows, columns, 1)
        module.due.discard(name)
    # Clones, because autograd saves them and power iteration changes the vectors in place.
    u, v = rows.local(left, -1).clone(), columns.local(right, -1).clone()
    sigma = all_reduce(torch.einsum("...o,...oi,...i->...", u, w, v), rows, columns)
    gain = 1 + wide(module.weight_of(f"{name}_gain")).view(sigma.shape)
    return (w * (gain / sigma)[..., None, None]).to(weight.dtype)


def shardings(module: ParameterModule, name: str) -> tuple[Sharding, Sharding]:
    """Returns how ranks shard the rows and the columns of a weight as it is used."""
    split = module.specs[name].split
    if split is None or split.units % module.sharding.size:
        return UNSHARDED, UNSHARDED
    of_rows = split.dim == getattr(module, name).dim() - 2
    return (module.sharding, UNSHARDED) if of_rows else (UNSHARDED, module.sharding)


def all_reduce(t: Tensor, *shardings: Sharding) -> Tensor:
    """All-reduces partial sums over the ranks of each sharding; differentiable."""
    for sharding in shardings:
        t = sharding.all_reduce(t) if sharding.size > 1 else t
    return t


def all_reduce_no_grad(t: Tensor, *shardings: Sharding) -> Tensor:
    """All-reduces partial sums over the ranks of each sharding, without gradient."""
    for sharding in shardings:
        t = sharding.all_reduce_no_grad(t) if sharding.size > 1 else t
    return t


@torch.no_grad()
def power_iteration(
    w: Tensor, left: Tensor, right: Tensor, rows: Sharding, columns: Sharding, times: int
) -> None:
    """Runs power iteration on `w` `[..., O, I]`, in place of left `[..., O]` and right `[..., I]`.

    `w` is the rank's shard; both vectors are full, and all-reduced after each update. It does not
    use matrix products: selective recomputation counts those of a forward pass in backward, where
    these do not run again.
    """

    def advance(vector: Tensor, sharding: Sharding, product: Tensor) -> None:
        # Each rank writes its shard between zeros, so that the all-reduce gathers (for a sharded
        # dimension) or sums (for the other one) the product.
        vector.zero_()
        sharding.local(vector, -1).copy_(product)
        vector.copy_(F.normalize(all_reduce_no_grad(vector, rows, columns), dim=-1))

    for _ in range(times):
        advance(left, rows, (w * columns.local(right, -1)[..., None, :]).sum(-1))
        advance(right, columns, (w * rows.local(left, -1)[..., None]).sum(-2))
