"""Causal softmax attention over packed documents, with rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from colonnade.kernels.precision import wide, wide_dtype


def rope_table(
    positions: Tensor, width: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotary angle (arXiv:2104.09864, eq. 15).

    Args:
        positions: `[S, B]` integers, counted from each document's start.
        width: head width P, even.

    Returns:
        two `[S, B, 1, P/2]` tensors in at least fp32.
    """
    wanted = wide_dtype(dtype)
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=wanted) / width
    angle = positions[:, :, None, None].to(wanted) * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (x_i, x_{i+P/2}) by the table's angles. x: `[S, B, H, P]`."""
    cos, sin = table
    a, b = wide(x).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def document_mask(documents: Tensor) -> Tensor:
    """Which keys each query sees: not later, and of the same document.

    Args:
        documents: `[S, B]` integers, constant within a document.

    Returns:
        `[B, 1, S, S]` booleans, query before key.
    """
    d = documents.T
    same = d[:, None, :, None] == d[:, None, None, :]
    return same.tril_()


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention (arXiv:1706.03762, eq. 1; arXiv:2305.13245).

    Args:
        q: `[S, B, H, P]`; query head h reads key head h // (H / K).
        k, v: `[S, B, K, P]`, K divides H.
        mask: `document_mask(...)` where rows hold several documents; None: one document a row.

    Returns:
        `[S, B, H, P]`.
    """
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )
    return out.permute(2, 0, 1, 3)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention` by its formula, one full score matrix per head."""
    S, P, repeat = q.shape[0], q.shape[3], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeat, dim=2) for t in (k, v))
    scores = torch.einsum("sbhp,tbhp->bhst", q, k) * P**-0.5
    visible = torch.ones(S, S, dtype=torch.bool, device=q.device).tril() if mask is None else mask
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhp->sbhp", weights, v)
