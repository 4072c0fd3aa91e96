"""Attention of some queries over some keys, to be merged with their attention over other keys.

All that attention over many keys needs to be put together from pieces, wherever these are, is each
piece's output beside the logarithm of its sum of exponentials (LSE); backward needs the final
ones and computes the pieces again (arXiv:1805.02867; arXiv:2205.14135, section 3.1).

Shape letters: S sequence, B batch, H query heads, K key heads, G = H / K query heads of a key head,
P head width, V width of values.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from colonnade.kernels.pieces import Packing, Piece, Region, Rule, pieces
from colonnade.kernels.precision import wide, wide_dtype

aten = torch.ops.aten


# One piece.


def has_fused(q: Tensor, rule: Rule) -> bool:
    """Whether an operator computes pieces without a mask, and keeps no scores."""
    if rule.cap is not None or rule.clip is not None:
        return False
    return q.device.type == "cpu" or (q.is_cuda and q.dtype.itemsize == 2)


def _fused(q: Tensor, rule: Rule, piece: Piece) -> bool:
    """Whether one computes this piece; that of CUDA takes no mask."""
    return has_fused(q, rule) and (q.device.type == "cpu" or piece.visible is None)


def _heads_first(width: int, *tensors: Tensor) -> list[Tensor]:
    """`[S, B, H, P]` as operators take it, `[B, H, S, P]`, of one width; zeros change nothing."""
    return [F.pad(t, (0, width - t.shape[3])).permute(1, 2, 0, 3) for t in tensors]


def _width(q: Tensor, v: Tensor) -> int:
    width = max(q.shape[3], v.shape[3])
    return -(-width // 8) * 8 if q.is_cuda else width


def _bias(piece: Piece, q: Tensor) -> Tensor | None:
    """The mask as numbers to be added."""
    if piece.visible is None:
        return None
    zeros = torch.zeros(piece.visible.shape, dtype=q.dtype, device=q.device)
    return zeros.masked_fill_(~piece.visible.to(q.device), -torch.inf)


def block(q: Tensor, k: Tensor, v: Tensor, piece: Piece, rule: Rule) -> tuple[Tensor, Tensor]:
    """A piece alone: output `[Sq, B, H, V]` and LSE `[Sq, B, H]`; 0 and −∞ where nothing is seen.

    q `[Sq, B, H, P]`, k `[Sk, B, K, P]` and v `[Sk, B, K, V]` are the piece's own.
    """
    if not _fused(q, rule, piece):
        scores = _scores(q, k, piece, rule)
        lse = scores.logsumexp(-1)
        return _over(_weights(scores, lse), v), _rows(lse)
    width = _width(q, v)
    args = *_heads_first(width, q, k, v), 0.0, piece.causal
    if q.is_cuda:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*args, False, scale=rule.scale)
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *args, attn_mask=_bias(piece, q), scale=rule.scale
        )
    out, lse = out.permute(2, 0, 1, 3)[..., : v.shape[3]], lse.permute(2, 0, 1)
    if piece.visible is not None:  # where nothing is seen its results mean nothing
        blind = ~piece.visible.to(q.device).any(-1).permute(2, 0, 1)
        out, lse = out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, -torch.inf)
    return out, lse


def block_back(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    piece: Piece,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through one piece, given the final output and LSE of its queries.

    Under `rule.clip`, `out` is what `clipped` gives beside the output.
    """
    if not _fused(q, rule, piece):
        return _scored_back(grad, q, k, v, (grad * out).sum(-1), lse, piece, rule)
    width = _width(q, v)
    g, q_, k_, v_, out_ = _heads_first(width, grad.to(q.dtype), q, k, v, out.to(q.dtype))
    lse = lse.permute(1, 2, 0).contiguous()
    if q.is_cuda:
        none, seed = torch.empty(0), torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = aten._scaled_dot_product_flash_attention_backward(
            g, q_, k_, v_, out_, lse, none, none, q.shape[0], k.shape[0], 0.0, piece.causal,
            seed, seed, scale=rule.scale,
        )  # fmt: skip
    else:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q_, k_, v_, out_, lse, 0.0, piece.causal,
            attn_mask=_bias(piece, q), scale=rule.scale,
        )  # fmt: skip
    dq, dk, dv = (t.permute(2, 0, 1, 3) for t in grads)
    return dq[..., : q.shape[3]], dk[..., : k.shape[3]], dv[..., : v.shape[3]]


def clipped(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, piece: Piece, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Under `rule.clip` a piece's output, given the final LSE; and, of what gradients pass through,
    ∂weight/∂softmax · softmax over the values: its product with the output's gradient is what the
    softmax's backward subtracts."""
    scores = _scores(q, k, piece, rule)
    softmax = _weights(scores, lse.movedim(0, 2).unflatten(1, (k.shape[2], -1)))
    weights, slope = _clip(softmax, rule)
    return _over(weights, v), _over(slope.mul_(softmax), v)


# With scores at hand, [B, K, G, Sq, Sk].


def _scores(q: Tensor, k: Tensor, piece: Piece, rule: Rule) -> Tensor:
    scale = rule.scale if rule.cap is None else rule.scale / rule.cap
    grouped = (wide(q) * scale).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("sbkgp,tbkp->bkgst", grouped, wide(k))
    if rule.cap is not None:
        scores = scores.tanh_().mul_(rule.cap)
    if piece.causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        return scores.masked_fill_(hidden, -torch.inf)
    if piece.visible is not None:
        return scores.masked_fill_(~piece.visible.to(q.device)[:, :, None], -torch.inf)
    return scores


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    return scores.sub(lse.masked_fill(lse.isneginf(), 0)[..., None]).exp_()


def _rows(of_heads: Tensor) -> Tensor:
    """`[B, K, G, Sq]` -> `[Sq, B, H]`."""
    return of_heads.flatten(1, 2).movedim(2, 0)


def _over(weights: Tensor, v: Tensor) -> Tensor:
    """Values by weights, in at least fp32: `[Sq, B, H, V]`."""
    return torch.einsum("bkgst,tbkp->sbkgp", weights, wide(v)).flatten(2, 3)


def _clip(softmax: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Clipped weights, and their derivatives by the softmax."""
    assert rule.clip is not None
    gamma, zeta = rule.clip
    weights = softmax.mul(zeta - gamma).add_(gamma)
    slope = ((weights > 0) & (weights < 1)).to(weights.dtype).mul_(zeta - gamma)
    return weights.clamp_(0, 1), slope


def _scored_back(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    lse: Tensor,
    piece: Piece,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """`block_back` by the formulas; `delta` `[Sq, B, H]` is the gradient times the output."""
    groups = k.shape[2], -1
    scores = _scores(q, k, piece, rule)
    weights = _weights(scores, lse.movedim(0, 2).unflatten(1, groups))
    g = wide(grad).unflatten(2, groups)
    dweights = torch.einsum("sbkgp,tbkp->bkgst", g, wide(v))
    used = weights
    if rule.clip is not None:
        used, slope = _clip(weights, rule)
        dweights = dweights.mul_(slope)
    dv = torch.einsum("bkgst,sbkgp->tbkp", used, g)
    dscores = dweights.sub_(delta.movedim(0, 2).unflatten(1, groups)[..., None]).mul_(weights)
    if rule.cap is not None:
        slope = scores.masked_fill_(weights == 0, 0).div_(rule.cap).square_().neg_().add_(1)
        dscores = dscores.mul_(slope)
    dq = torch.einsum("bkgst,tbkp->sbkgp", dscores, wide(k)).flatten(2, 3).mul_(rule.scale)
    dk = torch.einsum("bkgst,sbkgp->tbkp", dscores, wide(q).unflatten(2, groups))
    return dq, dk.mul_(rule.scale), dv


# Many pieces.

# k, v and regions to look at; and the same with the gradients of k and v to add to
Look = Callable[[Tensor, Tensor, list[Region]], None]
LookBack = Callable[[Tensor, Tensor, list[Region], Tensor, Tensor], None]


class Attended:
    """Attention of queries over all keys so far: output and LSE, in at least fp32."""

    def __init__(self, q: Tensor, width: int, rule: Rule, packing: Packing | None) -> None:
        self.q, self.rule, self.packing, self.width = q, rule, packing, width
        self.lse = torch.full(q.shape[:3], -torch.inf, dtype=wide_dtype(q.dtype), device=q.device)
        # what clips takes the final LSE: no output before
        self.out = self.through = self.zeros(width if rule.clip is None else 0)

    def zeros(self, width: int) -> Tensor:
        """An output to add to."""
        return torch.zeros(*self.lse.shape, width, dtype=self.lse.dtype, device=self.lse.device)

    def see(self, k: Tensor, v: Tensor, regions: list[Region]) -> None:
        """Further keys and values."""
        fused, v = has_fused(self.q, self.rule), v[..., : self.out.shape[3]]
        for region in regions:
            for piece in pieces(region, self.rule, self.packing, fused):
                part = self.q[piece.rows], k[piece.keys], v[piece.keys]
                self.merge(piece.rows, *block(*part, piece, self.rule))

    def merge(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Take in the attention of some rows over keys they have not seen yet."""
        before = self.lse[rows]
        both = torch.logaddexp(before, lse)
        base = both.masked_fill(both.isneginf(), 0)
        self.out[rows] *= (before - base).exp_()[..., None]
        self.out[rows] += out * (lse - base).exp_()[..., None]
        self.lse[rows] = both

    def sink(self, sinks: Tensor) -> None:
        """One more key a head, `[H]` scores, that has no value."""
        self.merge(slice(None), torch.zeros_like(self.out[:1]), sinks.to(self.lse))

    def clip(self, k: Tensor, v: Tensor, regions: list[Region]) -> None:
        """Under `rule.clip`, once all keys have been seen, further keys' part of the output."""
        if not self.out.shape[3]:
            self.out, self.through = self.zeros(self.width), self.zeros(self.width)
        for region in regions:
            for piece in pieces(region, self.rule, self.packing, False):
                rows, keys = piece.rows, piece.keys
                part = self.q[rows], k[keys], v[keys], self.lse[rows]
                out, through = clipped(*part, piece, self.rule)
                self.out[rows] += out
                self.through[rows] += through


class Differentiated:
    """Backward of attention over all keys so far: gradients of the queries, fp32 at least."""

    def __init__(
        self,
        grad: Tensor,
        q: Tensor,
        through: Tensor,
        lse: Tensor,
        rule: Rule,
        packing: Packing | None,
    ) -> None:
        self.grad, self.q, self.through, self.lse = grad, q, through, lse
        self.rule, self.packing = rule, packing
        self.dq = torch.zeros(q.shape, dtype=wide_dtype(q.dtype), device=q.device)

    def see(self, k: Tensor, v: Tensor, regions: list[Region], dk: Tensor, dv: Tensor) -> None:
        """Add the gradients of these keys and values to `dk` and `dv`."""
        fused = has_fused(self.q, self.rule)
        for region in regions:
            for piece in pieces(region, self.rule, self.packing, fused):
                rows, keys = piece.rows, piece.keys
                found = block_back(
                    self.grad[rows], self.q[rows], k[keys], v[keys],
                    self.through[rows], self.lse[rows], piece, self.rule,
                )  # fmt: skip
                for total, part in zip((self.dq[rows], dk[keys], dv[keys]), found, strict=True):
                    total += part

    def sinks(self, sinks: Tensor) -> Tensor:
        """Gradient of the sinks, `[H]`."""
        weights = (sinks.to(self.lse) - self.lse).exp_()
        return -(weights * (self.grad * self.through).sum(-1)).sum((0, 1)).to(sinks.dtype)


# All keys, however they come.


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    rule: Rule,
    packing: Packing | None,
    see: Callable[[Tensor, Tensor, Look], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of `q` over all keys; `see(k, v, look)` has all of them looked at.

    Returns:
        the output, in the dtype of `q`; the LSE; and what backward takes for the output, which
        without `rule.clip` it is.
    """
    attended = Attended(q, v.shape[3], rule, packing)
    see(k, v if rule.clip is None else v[..., :0], attended.see)
    if sinks is not None:
        attended.sink(sinks)
    if rule.clip is not None:  # a weight is clipped once its sum over all keys is known
        see(k, v, attended.clip)
    out = attended.out.to(q.dtype)
    return out, attended.lse, out if rule.clip is None else attended.through


def attend_back(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    through: Tensor,
    lse: Tensor,
    rule: Rule,
    packing: Packing | None,
    back: Callable[[Tensor, Tensor, LookBack], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sinks; `back(k, v, look)` gives those of `k` and `v`, wide."""
    differentiated = Differentiated(grad, q, through, lse, rule, packing)
    dk, dv = back(k, v, differentiated.see)
    dsinks = None if sinks is None else differentiated.sinks(sinks)
    return differentiated.dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks
