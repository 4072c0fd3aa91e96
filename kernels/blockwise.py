"""Attention computed tile by tile: outputs are merged by their log-sum-exp (LSE).

Attention over many keys, wherever they are, can be put together from tiles of the score matrix
when each tile gives its output and the logarithm of its sum of exponentials. Backward needs the
final output and LSE of all keys and computes the tiles again (arXiv:1805.02867; arXiv:2205.14135,
section 3.1).

Shape letters: S sequence, B batch, H query heads, K key heads, G = H / K query heads of a key head,
P head width, V width of values.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from colonnade.kernels.precision import wide, wide_dtype
from colonnade.kernels.tiles import DocumentStarts, MaskedTile, ScoreOptions, Tile, masked_tiles

aten = torch.ops.aten


# One tile.


def has_fused(q: Tensor, options: ScoreOptions) -> bool:
    """Whether a fused operator computes tiles without a mask, keeping no scores."""
    if options.cap is not None or options.clip is not None:
        return False
    return q.device.type == "cpu" or (q.is_cuda and q.dtype.itemsize == 2)


def _use_fused(q: Tensor, options: ScoreOptions, tile: MaskedTile) -> bool:
    """Whether a fused operator computes this tile; that of CUDA takes no mask."""
    return has_fused(q, options) and (q.device.type == "cpu" or tile.visible is None)


def _heads_first(width: int, *tensors: Tensor) -> list[Tensor]:
    """`[S, B, H, P]` as the operators take it, `[B, H, S, P]`, padded to one width with zeros: they
    change no score and add no value."""
    return [F.pad(t, (0, width - t.shape[3])).permute(1, 2, 0, 3) for t in tensors]


def _width(q: Tensor, v: Tensor) -> int:
    """The width to which heads are padded: on CUDA a multiple of 8."""
    width = max(q.shape[3], v.shape[3])
    return -(-width // 8) * 8 if q.is_cuda else width


def _bias(tile: MaskedTile, q: Tensor) -> Tensor | None:
    """The mask as numbers to add to the scores."""
    if tile.visible is None:
        return None
    zeros = torch.zeros(tile.visible.shape, dtype=q.dtype, device=q.device)
    return zeros.masked_fill_(~tile.visible.to(q.device), -torch.inf)


def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, tile: MaskedTile, options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """Attention within one tile.

    Args:
        q: `[Sq, B, H, P]`, the tile's queries.
        k: `[Sk, B, K, P]`, its keys.
        v: `[Sk, B, K, V]`, their values.

    Returns:
        output `[Sq, B, H, V]` and LSE `[Sq, B, H]`; 0 and −∞ for queries that see no key.
    """
    if not _use_fused(q, options, tile):
        scores = _scores(q, k, tile, options)
        lse = scores.logsumexp(-1)
        return _weighted_sum(_weights(scores, lse), v), _sequence_first(lse)
    width = _width(q, v)
    args = *_heads_first(width, q, k, v), 0.0, tile.causal
    if q.is_cuda:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*args, False, scale=options.scale)
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *args, attn_mask=_bias(tile, q), scale=options.scale
        )
    out, lse = out.permute(2, 0, 1, 3)[..., : v.shape[3]], lse.permute(2, 0, 1)
    if tile.visible is not None:  # for queries that see no key its results mean nothing
        masked = ~tile.visible.to(q.device).any(-1).permute(2, 0, 1)
        out, lse = out.masked_fill(masked[..., None], 0), lse.masked_fill(masked, -torch.inf)
    return out, lse


def tile_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tile: MaskedTile,
    options: ScoreOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through one tile.

    `out` and `lse` are those of the tile's queries over all keys. Under `options.clip`, `out` is
    the second result of `tile_clipped`, summed over all tiles.
    """
    if not _use_fused(q, options, tile):
        return _backward_by_scores(grad, q, k, v, (grad * out).sum(-1), lse, tile, options)
    width = _width(q, v)
    g, q_, k_, v_, out_ = _heads_first(width, grad.to(q.dtype), q, k, v, out.to(q.dtype))
    lse = lse.permute(1, 2, 0).contiguous()
    if q.is_cuda:
        none, seed = torch.empty(0), torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = aten._scaled_dot_product_flash_attention_backward(
            g, q_, k_, v_, out_, lse, none, none, q.shape[0], k.shape[0], 0.0, tile.causal,
            seed, seed, scale=options.scale,
        )  # fmt: skip
    else:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q_, k_, v_, out_, lse, 0.0, tile.causal,
            attn_mask=_bias(tile, q), scale=options.scale,
        )  # fmt: skip
    dq, dk, dv = (t.permute(2, 0, 1, 3) for t in grads)
    return dq[..., : q.shape[3]], dk[..., : k.shape[3]], dv[..., : v.shape[3]]


def tile_clipped(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, tile: MaskedTile, options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """Under `options.clip`, a tile's output, given the LSE of its queries over all keys.

    The second result is what backward takes in place of the output: ∂weight/∂softmax · softmax,
    multiplied by the values. Its product with the output's gradient is what the softmax's backward
    subtracts. Both are `[Sq, B, H, V]`.
    """
    scores = _scores(q, k, tile, options)
    softmax = _weights(scores, lse.movedim(0, 2).unflatten(1, (k.shape[2], -1)))
    weights, slope = _clip(softmax, options)
    return _weighted_sum(weights, v), _weighted_sum(slope.mul_(softmax), v)


# By explicit scores, [B, K, G, Sq, Sk].


def _scores(q: Tensor, k: Tensor, tile: MaskedTile, options: ScoreOptions) -> Tensor:
    scale = options.scale if options.cap is None else options.scale / options.cap
    grouped = (wide(q) * scale).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("sbkgp,tbkp->bkgst", grouped, wide(k))
    if options.cap is not None:
        scores = scores.tanh_().mul_(options.cap)
    if tile.causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        return scores.masked_fill_(hidden, -torch.inf)
    if tile.visible is not None:
        return scores.masked_fill_(~tile.visible.to(q.device)[:, :, None], -torch.inf)
    return scores


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores − LSE); 0 where the LSE is −∞."""
    return scores.sub(lse.masked_fill(lse.isneginf(), 0)[..., None]).exp_()


def _sequence_first(t: Tensor) -> Tensor:
    """`[B, K, G, Sq]` -> `[Sq, B, H]`."""
    return t.flatten(1, 2).movedim(2, 0)


def _weighted_sum(weights: Tensor, v: Tensor) -> Tensor:
    """The values' sums by weight, in at least fp32: `[Sq, B, H, V]`."""
    return torch.einsum("bkgst,tbkp->sbkgp", weights, wide(v)).flatten(2, 3)


def _clip(softmax: Tensor, options: ScoreOptions) -> tuple[Tensor, Tensor]:
    """Clipped weights, and their derivatives by the softmax."""
    assert options.clip is not None
    gamma, zeta = options.clip
    weights = softmax.mul(zeta - gamma).add_(gamma)
    slope = ((weights > 0) & (weights < 1)).to(weights.dtype).mul_(zeta - gamma)
    return weights.clamp_(0, 1), slope


def _backward_by_scores(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    lse: Tensor,
    tile: MaskedTile,
    options: ScoreOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """`tile_attention_backward` by the formulas; `delta` `[Sq, B, H]` is the gradient times the
    output, summed over the width."""
    groups = k.shape[2], -1
    scores = _scores(q, k, tile, options)
    weights = _weights(scores, lse.movedim(0, 2).unflatten(1, groups))
    g = wide(grad).unflatten(2, groups)
    dweights = torch.einsum("sbkgp,tbkp->bkgst", g, wide(v))
    clipped = weights
    if options.clip is not None:
        clipped, slope = _clip(weights, options)
        dweights = dweights.mul_(slope)
    dv = torch.einsum("bkgst,sbkgp->tbkp", clipped, g)
    dscores = dweights.sub_(delta.movedim(0, 2).unflatten(1, groups)[..., None]).mul_(weights)
    if options.cap is not None:
        slope = scores.masked_fill_(weights == 0, 0).div_(options.cap).square_().neg_().add_(1)
        dscores = dscores.mul_(slope)
    dq = torch.einsum("bkgst,tbkp->sbkgp", dscores, wide(k)).flatten(2, 3).mul_(options.scale)
    dk = torch.einsum("bkgst,sbkgp->tbkp", dscores, wide(q).unflatten(2, groups))
    return dq, dk.mul_(options.scale), dv


# Many tiles.

# Attends the queries to tiles of these keys and values; backward adds to the gradients of k and v.
AttendTiles = Callable[[Tensor, Tensor, list[Tile]], None]  # k, v, tiles
AttendTilesBackward = Callable[[Tensor, Tensor, list[Tile], Tensor, Tensor], None]  # and dk, dv


class RunningAttention:
    """Attention of queries over all keys seen so far: running output and LSE, at least fp32."""

    def __init__(
        self, q: Tensor, width: int, options: ScoreOptions, starts: DocumentStarts | None
    ) -> None:
        self.q, self.options, self.starts, self.width = q, options, starts, width
        self.lse = torch.full(q.shape[:3], -torch.inf, dtype=wide_dtype(q.dtype), device=q.device)
        # Clipping needs the final LSE: until then there is no output, so its width is 0.
        self.out = self.out_for_backward = self.zeros(width if options.clip is None else 0)

    def zeros(self, width: int) -> Tensor:
        """An output to add to."""
        return torch.zeros(*self.lse.shape, width, dtype=self.lse.dtype, device=self.lse.device)

    def attend(self, k: Tensor, v: Tensor, tiles: list[Tile]) -> None:
        """Attends to more keys and values."""
        fused, v = has_fused(self.q, self.options), v[..., : self.out.shape[3]]
        for tile in tiles:
            for masked in masked_tiles(tile, self.options, self.starts, fused):
                qkv = self.q[masked.rows], k[masked.keys], v[masked.keys]
                self.merge(masked.rows, *tile_attention(*qkv, masked, self.options))

    def merge(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merges some queries' attention over keys that they have not seen yet."""
        before = self.lse[rows]
        merged = torch.logaddexp(before, lse)
        base = merged.masked_fill(merged.isneginf(), 0)
        self.out[rows] *= (before - base).exp_()[..., None]
        self.out[rows] += out * (lse - base).exp_()[..., None]
        self.lse[rows] = merged

    def attend_sinks(self, sinks: Tensor) -> None:
        """Attends to one more key a head, `[H]` scores, which has no value."""
        self.merge(slice(None), torch.zeros_like(self.out[:1]), sinks.to(self.lse))

    def attend_clipped(self, k: Tensor, v: Tensor, tiles: list[Tile]) -> None:
        """Under `options.clip`, adds these keys' outputs, once the LSE is that of all keys."""
        if not self.out.shape[3]:
            self.out, self.out_for_backward = self.zeros(self.width), self.zeros(self.width)
        for tile in tiles:
            for masked in masked_tiles(tile, self.options, self.starts, False):
                rows, keys = masked.rows, masked.keys
                args = self.q[rows], k[keys], v[keys], self.lse[rows]
                out, out_for_backward = tile_clipped(*args, masked, self.options)
                self.out[rows] += out
                self.out_for_backward[rows] += out_for_backward


class RunningBackward:
    """Backward of attention over all keys seen so far: gradients of the queries, at least fp32."""

    def __init__(
        self,
        grad: Tensor,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        options: ScoreOptions,
        starts: DocumentStarts | None,
    ) -> None:
        self.grad, self.q, self.out, self.lse = grad, q, out, lse
        self.options, self.starts = options, starts
        self.dq = torch.zeros(q.shape, dtype=wide_dtype(q.dtype), device=q.device)

    def attend(self, k: Tensor, v: Tensor, tiles: list[Tile], dk: Tensor, dv: Tensor) -> None:
        """Adds the gradients of these keys and values to `dk` and `dv`."""
        fused = has_fused(self.q, self.options)
        for tile in tiles:
            for masked in masked_tiles(tile, self.options, self.starts, fused):
                rows, keys = masked.rows, masked.keys
                grads = tile_attention_backward(
                    self.grad[rows], self.q[rows], k[keys], v[keys],
                    self.out[rows], self.lse[rows], masked, self.options,
                )  # fmt: skip
                for total, d in zip((self.dq[rows], dk[keys], dv[keys]), grads, strict=True):
                    total += d

    def sinks(self, sinks: Tensor) -> Tensor:
        """Gradient of the sinks, `[H]`."""
        weights = (sinks.to(self.lse) - self.lse).exp_()
        return -(weights * (self.grad * self.out).sum(-1)).sum((0, 1)).to(sinks.dtype)


# All keys, in whatever order and from whichever rank they come.


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    options: ScoreOptions,
    starts: DocumentStarts | None,
    visit_keys: Callable[[Tensor, Tensor, AttendTiles], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of `q` over all keys.

    `visit_keys(k, v, attend_tiles)` calls `attend_tiles` until every key has been attended to. It
    is called twice where weights are clipped.

    Returns:
        the output, in the dtype of `q`; the LSE; and what backward takes in place of the output,
        which is the output itself without `options.clip`.
    """
    running = RunningAttention(q, v.shape[3], options, starts)
    visit_keys(k, v if options.clip is None else v[..., :0], running.attend)
    if sinks is not None:
        running.attend_sinks(sinks)
    if options.clip is not None:  # a weight is clipped once its sum over all keys is known
        visit_keys(k, v, running.attend_clipped)
    out = running.out.to(q.dtype)
    return out, running.lse, out if options.clip is None else running.out_for_backward


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    options: ScoreOptions,
    starts: DocumentStarts | None,
    visit_keys: Callable[[Tensor, Tensor, AttendTilesBackward], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sinks, given the third result of `attend` as `out`.

    `visit_keys(k, v, attend_tiles)` calls `attend_tiles` until every key has been attended to, and
    returns the gradients of `k` and `v` in at least fp32.
    """
    running = RunningBackward(grad, q, out, lse, options, starts)
    dk, dv = visit_keys(k, v, running.attend)
    dsinks = None if sinks is None else running.sinks(sinks)
    return running.dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks
