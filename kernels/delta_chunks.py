"""The terms of the delta rule's chunks that do not depend on the state before a chunk.

Shape letters and formulas as in `kernels.delta`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from colonnade.kernels.precision import LOG_ZERO, wide


@dataclass(frozen=True)
class Shape:
    n: int
    Q: int
    B: int
    K: int
    R: int
    P: int
    V: int

    def flat(self, t: Tensor) -> Tensor:
        """Head order -> `[n·B·H, Q, ·]`, repeated over the value heads that share a key head."""
        return t.expand(self.n, self.B, self.K, self.R, *t.shape[4:]).reshape(-1, *t.shape[4:])

    def by_head(self, t: Tensor) -> Tensor:
        """`[n·B·H, ...]` -> head order."""
        return t.view(self.n, self.B, self.K, self.R, *t.shape[1:])


def head_order(t: Tensor) -> Tensor:
    """`[n, Q, B, K, R, ·]` -> `[n, B, K, R, Q, ·]`, a view."""
    return t.permute(0, 2, 3, 4, 1, 5)


def natural_order(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Head order -> contiguous `[n, Q, B, K, R, ·]`."""
    t = t.permute(0, 4, 1, 2, 3, 5)
    return t.to(dtype, memory_format=torch.contiguous_format).contiguous()


@dataclass(frozen=True)
class Decays:
    """The decays between the tokens of a chunk and the states before and after it, in head order.

    Dimensions along which they are constant have size 1.
    """

    within: Tensor  # [n, B, K, R, Q, Q] from token s (last) to token t, 0 where t < s
    entering: Tensor  # [n, B, K, R, Q, 1] from the state before the chunk to token t
    leaving: Tensor  # [n, B, K, R, Q, 1] from token s to the state after the chunk
    across: Tensor  # [n, B, K, R, 1, 1] from the state before to the state after


def decays_of(beta: Tensor, decay: Tensor | None, documents: Tensor | None) -> Decays:
    """Computes each decay as the exponential of one masked sum over a range of tokens.

    For fp32 the sums are differences of cumulative sums in fp64, which lose no precision. For fp64
    such differences would lose it after a strong decay, so each range is summed by itself. The
    exponentials are to base 2, which is faster on CPU.

    Args:
        beta, decay: `[n, B, K, R, Q, 1]`; `beta` gives the dtype.
        documents: `[n, Q, B]`.
    """
    dtype, Q = beta.dtype, beta.shape[-2]
    visible = torch.ones(1, 1, 1, 1, Q, Q, dtype=torch.bool, device=beta.device).tril_()
    entering = leaving = across = beta.new_ones((1,) * 6)
    if documents is not None:
        d = documents.transpose(1, 2)[:, :, None, None, :, None]
        # The document of the state before each chunk.
        before = torch.cat([d[:1, ..., :1, :], d[:-1, ..., -1:, :]])
        visible = visible & (d == d.mT)
        entering = (d == before).to(dtype)
        leaving = (d == d[..., -1:, :]).to(dtype)
        across = (d[..., -1:, :] == before).to(dtype)
    if decay is None:
        return Decays(visible.to(dtype), entering, leaving, across)
    logs = decay.clamp(min=LOG_ZERO).double().mul_(math.log2(math.e))
    cumulative = logs.cumsum(-2)
    if dtype == torch.float64:
        within = logs.expand(*logs.shape[:-1], Q).tril(-1).cumsum(-2)
        end = within[..., -1:, :].mT.exp2()
    else:
        within = torch.empty(*cumulative.shape[:-1], Q, dtype=dtype, device=beta.device)
        torch.sub(cumulative, cumulative.mT, out=within)
        end = (cumulative[..., -1:, :] - cumulative).to(dtype).exp2_()
    bias = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)
    within, start = within.add_(bias).exp2_(), cumulative.to(dtype).exp2()
    return Decays(within, start * entering, end * leaving, start[..., -1:, :] * across)


def unit_inverse(L: Tensor) -> Tensor:
    """Inverse of I + the strict lower triangle of `L`, `[N, Q, Q]`, by recursion on halves.

    It takes few large products instead of Q steps. With keys of norm 1 and 0 <= β <= 2 no step of
    the delta rule expands, so that no entry of this inverse, or of a diagonal block's, exceeds 2.
    """
    Q = L.shape[-1]
    if Q <= 16:
        eye = torch.eye(Q, dtype=L.dtype, device=L.device)
        return torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True)
    m, out = Q // 2, torch.empty_like(L)
    out[:, :m, :m] = first = unit_inverse(L[:, :m, :m])
    out[:, m:, m:] = second = unit_inverse(L[:, m:, m:])
    out[:, m:, :m] = torch.bmm(second, torch.bmm(L[:, m:, :m], first)).neg_()
    out[:, :m, m:] = 0
    return out


@dataclass(frozen=True)
class Chunks:
    """The terms of all chunks."""

    decays: Decays
    keys: Tensor  # [n, B, K, 1, Q, P]
    beta: Tensor  # [n, B, K, R, Q, 1]
    gram: Tensor  # D ∘ k kᵀ, [n, B, K, R or 1, Q, Q]
    inverse: Tensor  # (I + L)⁻¹, [n·B·H, Q, Q]
    W: Tensor  # [n·B·H, Q, P]
    leaving_keys: Tensor  # F k, [n·B·H, Q, P]


def chunk_terms(
    shape: Shape, k: Tensor, beta: Tensor, decay: Tensor | None, documents: Tensor | None
) -> Chunks:
    """Computes the terms from the arguments of `kernels.delta._DeltaRule`."""
    beta = head_order(beta)
    decays = decays_of(beta, None if decay is None else head_order(decay), documents)
    keys = wide(head_order(k)).contiguous()
    gram = (keys @ keys.mT) * decays.within
    inverse = unit_inverse(shape.flat(gram * beta))
    W = torch.bmm(inverse, shape.flat(keys * (beta * decays.entering)))
    return Chunks(decays, keys, beta, gram, inverse, W, shape.flat(keys * decays.leaving))
