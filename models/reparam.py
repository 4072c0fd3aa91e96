"""What is done to a weight wherever it is used: σReparam, centring, muP's multipliers.

Sub-blocks ask for `weight_of(name)` and know of none of it.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from colonnade.kernels.precision import wide
from colonnade.models.mup import apply_mup
from colonnade.models.part import Part, constant

if TYPE_CHECKING:
    from colonnade.models.decoder import Decoder


def reparametrise(model: "Decoder") -> None:
    """Install the changes that the model's config asks for."""
    config = model.config
    if config.sigma_reparam:
        for wiring in model.wirings():
            for part in wiring.modules():
                if isinstance(part, Part):
                    spectral(part)
    if config.norm == "pre_rms":
        for part in model.modules():
            if isinstance(part, Part):
                centre(part)
    if config.mup_base is not None:
        apply_mup(model)


def centre(part: Part) -> None:
    """Take the mean over the stream's channels out of all that is written onto it.

    The stream is then centred, on which RMSNorm is LayerNorm (arXiv:2305.14858, section 3).
    """
    for name, role in part.roles.items():
        if role in ("writes", "table"):
            part.change(name, partial(centred, dim=-2 if role == "writes" else -1))


def centred(weight: Tensor, dim: int) -> Tensor:
    """The weight less its mean along `dim`."""
    return weight - weight.mean(dim, keepdim=True)


def spectral(part: Part) -> None:
    """σReparam (arXiv:2303.06296, eq. 3): linear weights of sub-blocks are used as γ W / σ(W).

    γ, `[1]` or one per expert, starts at 1 and is stored less 1, so that bf16 rounds its change
    alone. The singular vectors are fp32 state, advanced by one power iteration per optimizer step,
    at the first use in training.
    """
    for name, role in list(part.roles.items()):
        if role not in ("reads", "inner", "writes"):
            continue
        *many, rows, columns = getattr(part, name).shape
        part.declare(f"{name}_gain", tuple(many) or (1,), constant(0.0))
        part.declare_state(f"{name}_left", (*many, rows), 0.0)
        part.declare_state(f"{name}_right", (*many, columns), 0.0)
        part.change(name, partial(normalised, part, name))


STARTING_ITERATIONS = 64  # of power iteration, the first time


def normalised(part: Part, name: str, weight: Tensor) -> Tensor:
    """γ W / (leftᵀ W right), differentiable in W, with the singular vectors held fixed."""
    left, right = getattr(part, f"{name}_left"), getattr(part, f"{name}_right")
    w = wide(weight)
    if name not in part.started:
        part.started.add(name)
        if not bool(left.any()):  # neither advanced yet nor loaded
            iterate(w, left, right.fill_(right.shape[-1] ** -0.5), STARTING_ITERATIONS)
            part.due.discard(name)
    if name in part.due and torch.is_grad_enabled():
        iterate(w, left, right, 1)
        part.due.discard(name)
    sigma = torch.einsum("...o,...oi,...i->...", left.clone(), w, right.clone())
    gain = 1 + wide(part.weight_of(f"{name}_gain")).view(sigma.shape)
    return (w * (gain / sigma)[..., None, None]).to(weight.dtype)


@torch.no_grad()
def iterate(w: Tensor, left: Tensor, right: Tensor, times: int) -> None:
    """Power iteration on `[..., O, I]`, in place: left `[..., O]`, right `[..., I]`.

    Not by matrix products: selective recomputation counts those, and these do not happen again.
    """
    for _ in range(times):
        left.copy_(F.normalize((w * right[..., None, :]).sum(-1), dim=-1))
        right.copy_(F.normalize((w * left[..., None]).sum(-2), dim=-1))
