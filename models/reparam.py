"""What is done to a weight wherever it is used: σReparam, centring, muP's multipliers.

Sub-blocks ask for `weight_of(name)` and know of none of it.
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
    """Install the changes that the model's config asks for."""
    config = model.config
    if config.sigma_reparam:
        for wiring in model.wirings():
            for part in wiring.modules():
                if isinstance(part, ParameterModule):
                    spectral(part)
    if config.norm == "pre_rms":
        for part in model.modules():
            if isinstance(part, ParameterModule):
                centre(part)
    if config.mup_base is not None:
        apply_mup(model)


def centre(part: ParameterModule) -> None:
    """Take the mean over the stream's channels out of all that is written onto it.

    The stream is then centred, on which RMSNorm is LayerNorm (arXiv:2305.14858, section 3).
    """
    for spec in part.specs.values():
        if spec.role in ("writes", "table"):
            spec.transforms.append(partial(centred, dim=-2 if spec.role == "writes" else -1))


def centred(weight: Tensor, dim: int) -> Tensor:
    """The weight less its mean along `dim`."""
    return weight - weight.mean(dim, keepdim=True)


def spectral(part: ParameterModule) -> None:
    """σReparam (arXiv:2303.06296, eq. 3): linear weights of sub-blocks are used as γ W / σ(W).

    γ, `[1]` or one per expert, starts at 1 and is stored less 1, so that bf16 rounds its change
    alone. The singular vectors are fp32 state, advanced by one power iteration per optimizer step,
    at the first use in training.
    """
    for name, spec in part.specs.items():
        if f"{name}_gain" in part.specs:  # declared beside it (`models.cards.base.gains`)
            spec.transforms.append(partial(normalised, part, name))


STARTING_ITERATIONS = 64  # of power iteration, the first time


def normalised(part: ParameterModule, name: str, weight: Tensor) -> Tensor:
    """γ W / (leftᵀ W right), differentiable in W, with the singular vectors held fixed."""
    left, right = getattr(part, f"{name}_left"), getattr(part, f"{name}_right")
    w, (rows, columns) = wide(weight), cuts(part, name)
    if name not in part.started:
        part.started.add(name)
        if not bool(left.any()):  # neither advanced yet nor loaded
            right.fill_(right.shape[-1] ** -0.5)
            iterate(w, left, right, rows, columns, STARTING_ITERATIONS)
            part.due.discard(name)
    if name in part.due and part.training:
        iterate(w, left, right, rows, columns, 1)
        part.due.discard(name)
    ends = rows.local(left, -1).clone(), columns.local(right, -1).clone()
    sigma = total(torch.einsum("...o,...oi,...i->...", ends[0], w, ends[1]), rows, columns)
    gain = 1 + wide(part.weight_of(f"{name}_gain")).view(sigma.shape)
    return (w * (gain / sigma)[..., None, None]).to(weight.dtype)


def cuts(part: ParameterModule, name: str) -> tuple[Sharding, Sharding]:
    """How the rows and the columns of a weight are cut as it is used here."""
    split = part.specs[name].split
    if split is None or split.pieces % part.sharding.size:
        return UNSHARDED, UNSHARDED
    of_rows = split.dim == getattr(part, name).dim() - 2
    return (part.sharding, UNSHARDED) if of_rows else (UNSHARDED, part.sharding)


def total(t: Tensor, *cuts: Sharding) -> Tensor:
    """`t` summed over whatever ranks hold the rest."""
    for cut in cuts:
        t = cut.all_reduce(t) if cut.size > 1 else t
    return t


def total_once(t: Tensor, *cuts: Sharding) -> Tensor:
    """The same in power iteration."""
    for cut in cuts:
        t = cut.all_reduce_no_grad(t) if cut.size > 1 else t
    return t


@torch.no_grad()
def iterate(
    w: Tensor, left: Tensor, right: Tensor, rows: Sharding, columns: Sharding, times: int
) -> None:
    """Power iteration on `[..., O, I]`, in place: left `[..., O]`, right `[..., I]`, both whole.

    Not by matrix products: selective recomputation counts those, and these do not happen again.
    """

    def advance(vector: Tensor, here: Sharding, product: Tensor) -> None:
        vector.zero_()
        here.local(vector, -1).copy_(product)
        vector.copy_(F.normalize(total_once(vector, rows, columns), dim=-1))

    for _ in range(times):
        advance(left, rows, (w * columns.local(right, -1)[..., None, :]).sum(-1))
        advance(right, columns, (w * rows.local(left, -1)[..., None]).sum(-2))
