"""Causal softmax attention over packed documents: windows, sinks, soft-capping, clipping.

Everything that one fused call cannot express is computed in blocks of queries, each against the
keys that it may see. Backward computes a block again, so that between the passes there are the
inputs and nothing else, and no mask or score outlives its block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.precision import wide, wide_dtype

BLOCK = 256  # queries at a time


@dataclass(frozen=True)
class _Rule:
    """The options of one call that are not tensors."""

    scale: float
    window: int | None
    cap: float | None
    clip: tuple[float, float] | None


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
    Otherwise memory beyond inputs and output is one block's; with a window, time is linear in Sk.

    Args:
        q: `[Sq, B, H, P]`, Sq <= Sk: queries of the last Sq positions (generation with a cache).
        k: `[Sk, B, K, P]`, K divides H; query head h reads key head h // (H / K).
        v: `[Sk, B, K, Pv]`.
        documents: `[Sk, B]` integers, constant within a document and different in another; a query
            sees its own document alone. None: one document a row.
        window: keys that a query sees, itself included; None: all before it.
        scale: of the scores; None: P^(−1/2).
        cap: soft-capping of the scaled scores, cap · tanh(score / cap) (Gemma 2, arXiv:2408.00118).
        sinks: `[H]` learned scores, one more key a head that has no value (gpt-oss).
        clip: (gamma, zeta): weights are clip((zeta − gamma) · softmax + gamma, 0, 1)
            (arXiv:2306.12929), gamma <= 0 and zeta >= 1.

    Returns:
        `[Sq, B, H, Pv]`, dtype of `q`.

    Raises:
        ValueError: more queries than keys, a window below 1, a clip that is none.
    """
    queries, keys = q.shape[0], k.shape[0]
    rule = _rule(q, k, window, scale, cap, clip)
    if documents is None and sinks is None and cap is None and clip is None:
        if queries == 1:  # it sees all that its window holds
            start = keys - min(rule.window or keys, keys)
            return _fused(q, k[start:], v[start:], rule.scale)
        if queries == keys and rule.window is None:
            return _fused(q, k, v, rule.scale, causal=True)
    blockwise = _Blockwise.apply
    if torch.compiler.is_compiling():  # it would unroll the blocks, a minute of compilation
        blockwise = torch.compiler.disable(blockwise)
    return blockwise(q, k, v, sinks, documents, rule)


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
    scale = _rule(q, k, window, scale, cap, clip).scale
    queries, keys, repeat = q.shape[0], k.shape[0], q.shape[2] // k.shape[2]
    at = torch.arange(keys - queries, keys, device=q.device)[:, None]
    key = torch.arange(keys, device=q.device)
    visible = (key <= at) & (key > at - (window or keys))
    if documents is not None:
        row = documents.T
        visible = visible & (row[:, -queries:, None] == row[:, None])
        visible = visible[:, None]  # [B, 1, Sq, Sk]
    k, v = (wide(t.repeat_interleave(repeat, dim=2)) for t in (k, v))
    scores = torch.einsum("sbhp,tbhp->bhst", wide(q), k) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        extra = wide(sinks)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra.to(scores)], dim=-1)
    weights = scores.softmax(-1)[..., :keys]
    if clip is not None:
        gamma, zeta = clip
        weights = ((zeta - gamma) * weights + gamma).clamp(0, 1)
    return torch.einsum("bhst,tbhp->sbhp", weights, v).to(q.dtype)


def _rule(
    q: Tensor,
    k: Tensor,
    window: int | None,
    scale: float | None,
    cap: float | None,
    clip: tuple[float, float] | None,
) -> _Rule:
    if q.shape[0] > k.shape[0]:
        raise ValueError(f"{q.shape[0]} queries for {k.shape[0]} keys: queries are the last keys'")
    if window is not None and window < 1:
        raise ValueError(f"window {window}: a query sees at least itself, 1")
    if clip is not None and not (clip[0] <= 0 and clip[1] >= 1):
        raise ValueError(f"clip {clip}: (gamma, zeta) with gamma <= 0 and zeta >= 1")
    everything = window is None or window >= k.shape[0]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _Rule(scale, None if everything else window, cap, clip)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    visible: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """One call of PyTorch's operator. visible: `[B or 1, 1, Sq, Sk]`."""
    grouped, value_width = q.shape[2] != k.shape[2], v.shape[3]
    if grouped and visible is not None and q.is_cuda:
        # with a mask and grouped heads CUDA has no fused kernel, only the full score matrix
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        grouped = False
    if q.shape[3] != value_width and q.shape[0] > 1:
        # the flash kernels want one width; zeros change no score and add no value
        width = max(q.shape[3], value_width)
        q, k, v = (F.pad(t, (0, width - t.shape[3])) for t in (q, k, v))
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out[..., :value_width].permute(2, 0, 1, 3)


def _scored(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, visible: Tensor | None, rule: _Rule
) -> Tensor:
    """Attention with its scores at hand. visible: `[B or 1, 1, Sq, Sk]`."""
    groups = k.shape[2], -1  # query heads as K groups of G
    scale = rule.scale if rule.cap is None else rule.scale / rule.cap
    scores = torch.einsum("sbkgp,tbkp->bkgst", (wide(q) * scale).unflatten(2, groups), wide(k))
    if rule.cap is not None:
        scores = scores.tanh() * rule.cap
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], float("-inf"))
    if sinks is not None:
        extra = sinks.to(scores).unflatten(0, groups)[..., None, None]
        scores = torch.cat([scores, extra.expand(*scores.shape[:4], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[0]]
    if rule.clip is not None:
        gamma, zeta = rule.clip
        weights = ((zeta - gamma) * weights + gamma).clamp(0, 1)
    return torch.einsum("bkgst,tbkp->sbkgp", weights.to(v.dtype), v).flatten(2, 3)


def _visible(at: slice, seen: slice, documents: Tensor | None, rule: _Rule, like: Tensor) -> Tensor:
    """Which of the keys `seen` the queries `at` see: `[B or 1, 1, queries, keys]` booleans."""
    query = torch.arange(at.start, at.stop, device=like.device)[:, None]
    key = torch.arange(seen.start, seen.stop, device=like.device)
    visible = key <= query
    if rule.window is not None:
        visible &= key > query - rule.window
    if documents is not None:
        visible = visible & (documents[at].T[:, :, None] == documents[seen].T[:, None])
    return visible.view(-1, 1, *visible.shape[-2:])


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    *,
    at: slice,
    seen: slice,
    documents: Tensor | None,
    rule: _Rule,
) -> Tensor:
    """Attention of `q`, at positions `at`, over the keys `k` and values `v` at positions `seen`."""
    visible = None
    if documents is not None or at.stop - at.start > 1:  # one query sees all its block's keys
        visible = _visible(at, seen, documents, rule, q)
    if sinks is None and rule.cap is None and rule.clip is None:
        return _fused(q, k, v, rule.scale, visible)
    return _scored(q, k, v, sinks, visible, rule)


def _blocks(queries: int, keys: int, window: int | None) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of queries, their positions, and the keys from the first that one of them sees on."""
    before = keys - queries
    for start in range(0, queries, BLOCK):
        rows = slice(start, min(start + BLOCK, queries))
        at = slice(before + rows.start, before + rows.stop)
        first = 0 if window is None else max(0, at.start - window + 1)
        yield rows, at, slice(first, at.stop)


class _Blockwise(torch.autograd.Function):
    """Block after block of queries; backward computes each block again and differentiates it.

    Not left to autograd: it would keep every block's mask, and for every block's slice of the keys
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
        rule: _Rule,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks, documents)
        ctx.rule = rule
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for rows, at, seen in _blocks(q.shape[0], k.shape[0], rule.window):
            part = q[rows], k[seen], v[seen], sinks
            out[rows] = _block(*part, at=at, seen=seen, documents=documents, rule=rule)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, documents = ctx.saved_tensors
        wanted = [i for i in range(4) if ctx.needs_input_grad[i]]
        # wide, as they are sums over blocks
        totals = {i: torch.zeros_like(inputs[i], dtype=wide_dtype(grad.dtype)) for i in wanted}
        queries, keys = inputs[0].shape[0], inputs[1].shape[0]
        for rows, at, seen in _blocks(queries, keys, ctx.rule.window):
            parts = (rows, seen, seen, slice(None))
            with torch.enable_grad():
                leaves: list[Any] = [
                    None if t is None else t[part].detach().requires_grad_(i in wanted)
                    for i, (t, part) in enumerate(zip(inputs, parts, strict=True))
                ]
                out = _block(*leaves, at=at, seen=seen, documents=documents, rule=ctx.rule)
            grads = torch.autograd.grad(out, [leaves[i] for i in wanted], grad[rows])
            for i, g in zip(wanted, grads, strict=True):
                totals[i][parts[i]] += g
        d = [totals[i].to(inputs[i].dtype) if i in wanted else None for i in range(4)]
        return *d, None, None
