"""Causal softmax attention over packed documents: windows, sinks, soft-capping, clipping.

What one fused call cannot express is computed tile by tile (`kernels.blockwise`): backward keeps
the inputs, the output and one number a query and head, and no mask or score outlives its tile.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.blockwise import (
    AttendTiles,
    AttendTilesBackward,
    attend,
    attend_backward,
)
from colonnade.kernels.precision import wide
from colonnade.kernels.tiles import DocumentStarts, ScoreOptions, Tile


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """Causal grouped-query attention (arXiv:1706.03762, eq. 1; arXiv:2305.13245).

    Without options and with as many queries as keys, or with a single query, it is one fused call.
    Otherwise memory beyond inputs and output is one tile's; with a window, time is linear in Sk.

    Args:
        q: `[Sq, B, H, P]`, Sq <= Sk: queries of the last Sq positions (generation with a cache).
        k: `[Sk, B, K, P]`, K divides H; query head h reads key head h // (H / K).
        v: `[Sk, B, K, Pv]`.
        documents: `[Sk, B]` integers, constant within a document and not decreasing along Sk; a
            query sees its own document only. None: one document a sample.
        window: keys that a query sees, itself included; None: all before it.
        scale: of the scores; None: P^(−1/2).
        cap: soft-capping of the scaled scores, cap · tanh(score / cap) (Gemma 2, arXiv:2408.00118).
        sinks: `[H]` learned scores, one more key a head that has no value (gpt-oss).
        clip: (gamma, zeta): weights are clip((zeta − gamma) · softmax + gamma, 0, 1)
            (arXiv:2306.12929), gamma <= 0 and zeta >= 1.

    Returns:
        `[Sq, B, H, Pv]`, dtype of `q`.

    Raises:
        ValueError: more queries than keys, a window below 1, or a clip with gamma > 0 or zeta < 1.
    """
    queries, keys = q.shape[0], k.shape[0]
    options = score_options(q, k, window, scale, cap, clip)
    if sinks is None and cap is None and clip is None:
        if queries == 1:  # it sees every key of its window and document
            start = keys - min(options.window or keys, keys)
            seen = None if documents is None else documents[start:] == documents[-1]
            return _one_query(q, k[start:], v[start:], options.scale, seen)
        if documents is None and queries == keys and options.window is None:
            return _fused(q, k, v, options.scale)
    tiled = _Attention.apply
    if torch.compiler.is_compiling():  # it would unroll the tiles, a minute of compilation
        tiled = torch.compiler.disable(tiled)
    return tiled(q, k, v, sinks, documents, options)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """`attention` by its formula, one full score matrix per head."""
    scale = score_options(q, k, window, scale, cap, clip).scale
    queries, keys, repeat = q.shape[0], k.shape[0], q.shape[2] // k.shape[2]
    query = torch.arange(keys - queries, keys, device=q.device)[:, None]  # positions
    key = torch.arange(keys, device=q.device)
    visible = (key <= query) & (key > query - (window or keys))
    if documents is not None:
        of_keys = documents.T
        visible = visible & (of_keys[:, -queries:, None] == of_keys[:, None])
        visible = visible[:, None]  # [B, 1, Sq, Sk]
    k, v = (wide(t.repeat_interleave(repeat, dim=2)) for t in (k, v))
    scores = torch.einsum("sbhp,tbhp->bhst", wide(q), k) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink_scores = wide(sinks)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink_scores.to(scores)], dim=-1)
    weights = scores.softmax(-1)[..., :keys]
    if clip is not None:
        gamma, zeta = clip
        weights = ((zeta - gamma) * weights + gamma).clamp(0, 1)
    return torch.einsum("bhst,tbhp->sbhp", weights, v).to(q.dtype)


def score_options(
    q: Tensor,
    k: Tensor,
    window: int | None,
    scale: float | None,
    cap: float | None,
    clip: tuple[float, float] | None,
) -> ScoreOptions:
    """Checks the options of `attention` that are not tensors; drops a window that hides no key."""
    if q.shape[0] > k.shape[0]:
        raise ValueError(f"{q.shape[0]} queries for {k.shape[0]} keys: queries are the last keys'")
    if window is not None and window < 1:
        raise ValueError(f"window {window}: a query sees at least itself, 1")
    if clip is not None and not (clip[0] <= 0 and clip[1] >= 1):
        raise ValueError(f"clip {clip}: (gamma, zeta) with gamma <= 0 and zeta >= 1")
    unwindowed = window is None or window >= k.shape[0]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return ScoreOptions(scale, None if unwindowed else window, cap, clip)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention by one call of PyTorch's operator."""
    grouped, value_width = q.shape[2] != k.shape[2], v.shape[3]
    if q.shape[3] != value_width:
        # the flash kernels want one width; zeros change no score and add no value
        width = max(q.shape[3], value_width)
        q, k, v = (F.pad(t, (0, width - t.shape[3])) for t in (q, k, v))
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out[..., :value_width].permute(2, 0, 1, 3)


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    """Attention of one query `[1, B, H, P]` by one call of PyTorch's operator.

    The query heads of a key head are its queries, so that no key is read or copied twice. `seen`
    `[Sk, B]` says which keys are seen; None: all.
    """
    groups, per_group = k.shape[2], q.shape[2] // k.shape[2]
    q = q[0].unflatten(1, (groups, per_group))  # [B, K, H / K, P]
    k, v = (t.permute(1, 2, 0, 3) for t in (k, v))
    mask = None if seen is None else seen.T[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.flatten(1, 2)[None]


class _Attention(torch.autograd.Function):
    """Attention tile after tile; backward computes each tile again.

    Not left to autograd: it would keep every tile's mask, and for every tile's slice of the keys
    fill a gradient as long as the sequence.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        documents: Tensor | None,
        options: ScoreOptions,
    ) -> Tensor:
        starts = None if documents is None else DocumentStarts(documents)

        def visit_keys(k: Tensor, v: Tensor, attend_tiles: AttendTiles) -> None:
            attend_tiles(k, v, _all_keys(q, k))

        out, lse, out_for_backward = attend(q, k, v, sinks, options, starts, visit_keys)
        ctx.save_for_backward(q, k, v, sinks, out_for_backward, lse)
        ctx.options, ctx.starts = options, starts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors

        def visit_keys(
            k: Tensor, v: Tensor, attend_tiles: AttendTilesBackward
        ) -> tuple[Tensor, Tensor]:
            dk, dv = (torch.zeros_like(t, dtype=lse.dtype) for t in (k, v))
            attend_tiles(k, v, _all_keys(q, k), dk, dv)
            return dk, dv

        given = grad, q, k, v, sinks, out, lse, ctx.options, ctx.starts
        return *attend_backward(*given, visit_keys), None, None


def _all_keys(q: Tensor, k: Tensor) -> list[Tile]:
    """One tile: the queries, which are at the last positions, over all keys."""
    queries, keys = len(q), len(k)
    return [Tile(slice(0, queries), keys - queries, slice(0, keys), 0)]
