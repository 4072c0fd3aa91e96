"""Helpers of the chunked mixers' tests: packed documents, and results with gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

Scan = Callable[..., tuple[Tensor, Tensor]]  # to an output `[S, B, ...]` and the last state


def packed(S: int, B: int, documents: int, seed: int = 0) -> Tensor:
    """Document numbers `[S, B]` with random bounds; some documents are empty."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, documents, (S, B), generator=g, dtype=torch.int32).sort(0).values


def call(scan: Scan, t: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor]:
    """Calls `scan` with the arguments in `t`; Mamba's D, without a default, is None if absent."""
    absent: dict[str, None] = {"D": None} if "A" in t else {}
    return scan(**{**absent, **t}, **options)


def results(scan: Scan, t: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Outputs, and gradients of a random function of both outputs, the same in every dtype."""
    t = {name: v.detach().requires_grad_() for name, v in t.items()}
    y, state = call(scan, t, **options)
    g = torch.Generator().manual_seed(1)
    dy, dstate = (torch.randn(o.shape, generator=g).bfloat16().to(o.dtype) for o in (y, state))
    gradients = torch.autograd.grad([y, state], list(t.values()), [dy, dstate])
    named = {f"d{name}": v for name, v in zip(t, gradients, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}
