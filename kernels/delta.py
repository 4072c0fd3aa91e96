"""The delta rule, plain (arXiv:2406.06484) and gated (arXiv:2412.06464), by chunks and by token.

Shape letters: S sequence, B batch, H value heads, K key heads, R = H / K value heads of a key head,
P key width, V value width, n chunks of Q tokens. Inside, tensors are in head order, [n, B, K, R, Q,
·], with R = 1 where the value heads of a key head share them, and flat, [n·B·H, Q, ·], for bmm.

In the formulas S is the state before a chunk, E_t the decay from it to token t, D_ts from token s
to token t, F_s from token s to the chunk's end. The corrections
d_t = β_t (v_t − (what the decayed state holds under k_t)) of a chunk solve

    (I + L) d = β (v − E k S),    L_ts = β_t D_ts k_t·k_s for s < t,

so that d = U − W S with U = (I + L)⁻¹ β v and W = (I + L)⁻¹ β E k, which do not depend on S; then
o = E q S + (D ∘ q kᵀ) d with s <= t, and the state after the chunk is E_Q S + (F k)ᵀ d.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.cut import outside_graphs
from colonnade.kernels.precision import wide, wide_dtype
from colonnade.kernels.segments import Chunking, Passing

# exp of anything below is 0 in fp32 and fp64 alike, so clamping log-decays here changes no result;
# it keeps their running sums small enough for differences of them to mean something.
LOG_ZERO = -1000.0


@dataclass(frozen=True)
class _Shape:
    n: int
    Q: int
    B: int
    K: int
    R: int
    P: int
    V: int

    def flat(self, t: Tensor) -> Tensor:
        """Head order -> `[n·B·H, Q, ·]`; what the value heads of a key head share is repeated."""
        return t.expand(self.n, self.B, self.K, self.R, *t.shape[4:]).reshape(-1, *t.shape[4:])

    def ordered(self, t: Tensor) -> Tensor:
        """`[n·B·H, ...]` -> head order."""
        return t.view(self.n, self.B, self.K, self.R, *t.shape[1:])

    def by_chunk(self, t: Tensor) -> tuple[Tensor, ...]:
        """`[n·B·H, Q, ·]` -> each chunk's `[B·H, Q, ·]`."""
        return t.view(self.n, -1, *t.shape[1:]).unbind()


def _head_order(t: Tensor) -> Tensor:
    """`[n, Q, B, K, R, ·]` -> `[n, B, K, R, Q, ·]`, a view."""
    return t.permute(0, 2, 3, 4, 1, 5)


def _natural(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Head order -> contiguous `[n, Q, B, K, R, ·]`."""
    t = t.permute(0, 4, 1, 2, 3, 5)
    return t.to(dtype, memory_format=torch.contiguous_format).contiguous()


@dataclass(frozen=True)
class _Decays:
    """What a chunk's tokens, and the states around it, lose on their way; in head order.

    Dimensions over which they do not change are 1.
    """

    within: Tensor  # [n, B, K, R, Q, Q] from token s (last) to token t, 0 where t < s
    entering: Tensor  # [n, B, K, R, Q, 1] from the state before the chunk to token t
    leaving: Tensor  # [n, B, K, R, Q, 1] from token s to the state after the chunk
    across: Tensor  # [n, B, K, R, 1, 1] from the state before to the state after


def _decays(beta: Tensor, decay: Tensor | None, documents: Tensor | None) -> _Decays:
    """Every decay is the exponential of one masked segment sum, to base 2: faster on CPU than e.

    In fp32 these are differences of running sums in fp64, which lose nothing. In fp64 they would
    behind a strong decay, so that every segment is summed by itself.
    `beta` (for its dtype), `decay` `[n, B, K, R, Q, 1]`; `documents` `[n, Q, B]`.
    """
    dtype, Q = beta.dtype, beta.shape[-2]
    visible = torch.ones(1, 1, 1, 1, Q, Q, dtype=torch.bool, device=beta.device).tril_()
    entering = leaving = across = beta.new_ones((1,) * 6)
    if documents is not None:
        d = documents.transpose(1, 2)[:, :, None, None, :, None]
        carried = torch.cat([d[:1, ..., :1, :], d[:-1, ..., -1:, :]])  # of each entering state
        visible = visible & (d == d.mT)
        entering = (d == carried).to(dtype)
        leaving = (d == d[..., -1:, :]).to(dtype)
        across = (d[..., -1:, :] == carried).to(dtype)
    if decay is None:
        return _Decays(visible.to(dtype), entering, leaving, across)
    logs = decay.clamp(min=LOG_ZERO).double().mul_(math.log2(math.e))
    total = logs.cumsum(-2)
    if dtype == torch.float64:
        within = logs.expand(*logs.shape[:-1], Q).tril(-1).cumsum(-2)
        end = within[..., -1:, :].mT.exp2()
    else:
        within = torch.empty(*total.shape[:-1], Q, dtype=dtype, device=beta.device)
        torch.sub(total, total.mT, out=within)
        end = (total[..., -1:, :] - total).to(dtype).exp2_()
    bias = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)
    within, start = within.add_(bias).exp2_(), total.to(dtype).exp2()
    return _Decays(within, start * entering, end * leaving, start[..., -1:, :] * across)


def _unit_inverse(L: Tensor) -> Tensor:
    """Inverse of I + the strict lower triangle of `L`, `[N, Q, Q]`, by halves.

    Few large products instead of Q steps. With keys of norm 1 and 0 <= β <= 2 no step of the delta
    rule expands, so that no entry of this inverse, or of a diagonal block's, exceeds 2.
    """
    Q = L.shape[-1]
    if Q <= 16:
        eye = torch.eye(Q, dtype=L.dtype, device=L.device)
        return torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True)
    m, out = Q // 2, torch.empty_like(L)
    out[:, :m, :m] = first = _unit_inverse(L[:, :m, :m])
    out[:, m:, m:] = second = _unit_inverse(L[:, m:, m:])
    out[:, m:, :m] = torch.bmm(second, torch.bmm(L[:, m:, :m], first)).neg_()
    out[:, :m, m:] = 0
    return out


@dataclass(frozen=True)
class _Chunks:
    """What chunks hold that does not depend on the state before them."""

    lose: _Decays
    keys: Tensor  # [n, B, K, 1, Q, P]
    beta: Tensor  # [n, B, K, R, Q, 1]
    gram: Tensor  # D ∘ k kᵀ, [n, B, K, R or 1, Q, Q]
    inverse: Tensor  # (I + L)⁻¹, [n·B·H, Q, Q]
    W: Tensor  # [n·B·H, Q, P]
    written: Tensor  # F k, like W


def _chunks(
    shape: _Shape, k: Tensor, beta: Tensor, decay: Tensor | None, documents: Tensor | None
) -> _Chunks:
    """All of it, from the arguments of `_DeltaRule`."""
    beta = _head_order(beta)
    lose = _decays(beta, None if decay is None else _head_order(decay), documents)
    keys = wide(_head_order(k)).contiguous()
    gram = (keys @ keys.mT) * lose.within
    inverse = _unit_inverse(shape.flat(gram * beta))
    W = torch.bmm(inverse, shape.flat(keys * (beta * lose.entering)))
    return _Chunks(lose, keys, beta, gram, inverse, W, shape.flat(keys * lose.leaving))


def _reads(shape: _Shape, x: _Chunks, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and D ∘ q kᵀ, like keys and gram, and E q, like W."""
    queries = wide(_head_order(q)).contiguous()
    scores = (queries @ x.keys.mT) * x.lose.within
    return queries, scores, shape.flat(queries * x.lose.entering)


def _run(shape: _Shape, x: _Chunks, corrections: Tensor, states: Tensor | list[Tensor]) -> None:
    """Through the chunks: corrections holds U; states its first, and room for the others."""
    across = shape.flat(x.lose.across)
    per_chunk = zip(*map(shape.by_chunk, (corrections, x.W, x.written, across)), strict=True)
    for c, (d, w, written, crossing) in enumerate(per_chunk):
        d.baddbmm_(w, states[c], alpha=-1)
        torch.mul(states[c], crossing, out=states[c + 1]).baddbmm_(written.mT, d)


def _run_back(shape: _Shape, x: _Chunks, dcorrections: Tensor, dstates: Tensor) -> None:
    """Backwards from the last state's gradient; the others hold what came through the outputs."""
    across = shape.flat(x.lose.across)
    per_chunk = zip(*map(shape.by_chunk, (dcorrections, x.W, x.written, across)), strict=True)
    for c, (dd, w, written, crossing) in reversed(list(enumerate(per_chunk))):
        dd.baddbmm_(written, dstates[c + 1])
        dstates[c].addcmul_(dstates[c + 1], crossing).baddbmm_(w.mT, dd, alpha=-1)


def _over_segments(shape: _Shape, x: _Chunks, U: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """What segments leave that start from zeros, and their transitions: `[parts, B, H, P, V or P]`.

    A transition is what becomes of the identity without values: more columns of the same state.
    """
    heads, V, P = shape.K * shape.R, shape.V, x.W.shape[-1]
    eye = torch.eye(P, dtype=U.dtype, device=U.device)
    state = F.pad(eye, (V, 0)).repeat(shape.B * heads, 1, 1)
    states = [state, torch.empty_like(state)] * (shape.n // 2 + 1)
    _run(shape, x, F.pad(U, (0, P)), states)
    left, transition = states[shape.n].view(parts, -1, heads, P, V + P).split([V, P], -1)
    return left, transition.contiguous()


def _segments(within: Tensor, entering: Tensor, leaving: Tensor, across: Tensor) -> Tensor:
    """Gradient of a token's log-decay: the sum of those of the segments that cover it.

    `within` `[..., Q, Q]` from token s (last) to t, `entering`, `leaving` `[..., Q]`, `across`
    `[..., 1]`. A token does not decay on its way to itself: the diagonal does not count.
    """
    within.diagonal(dim1=-2, dim2=-1).zero_()  # before the sums, in which it would only cancel
    ends = entering.add_(within.sum(-1)).sub_(within.sum(-2))
    out = ends.flip(-1).cumsum(-1).flip(-1).add_(across)
    out[..., 1:] += leaving[..., :-1].cumsum(-1)
    return out


class _DeltaRule(torch.autograd.Function):
    """Keeps its inputs and the states between chunks; backward computes the rest again.

    beta, decay and initial are wide.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,  # [n, Q, B, K, 1, P]
        k: Tensor,
        v: Tensor,  # [n, Q, B, K, R, V]
        beta: Tensor,  # [n, Q, B, K, R, 1]
        decay: Tensor | None,
        initial: Tensor,  # [B·H, P, V]
        documents: Tensor | None,
        passing: Passing | None,
    ) -> tuple[Tensor, Tensor]:
        n, Q, batch, K, R, V = v.shape
        shape = _Shape(n, Q, batch, K, R, k.shape[-1], V)
        x = _chunks(shape, k, beta, decay, documents)
        corrections = torch.bmm(x.inverse, shape.flat(_head_order(v) * x.beta))  # U, − W S below
        wait = transition = None
        if passing is not None:
            left, transition = _over_segments(shape, x, corrections, passing.parts)
            wait = passing.launch(left, transition, True)
        _, scores, seen = _reads(shape, x, q)
        states = initial.new_empty(n + 1, *initial.shape)
        states[0] = initial if wait is None else wait().reshape(initial.shape)
        _run(shape, x, corrections, states)
        ctx.shape, ctx.passing = shape, passing
        ctx.save_for_backward(q, k, v, beta, decay, documents, states, transition)
        o = torch.bmm(seen, states[:-1].flatten(0, 1))
        o.baddbmm_(shape.flat(scores), corrections)
        final = states[-1].clone()
        if passing is not None:
            ctx.mark_non_differentiable(final)  # backward then gets zeros for its gradient
        return _natural(shape.ordered(o), v.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, decay, documents, states, transition = ctx.saved_tensors
        shape: _Shape = ctx.shape
        x = _chunks(shape, k, beta, decay, documents)
        queries, scores, seen = _reads(shape, x, q)
        before, do = states[:-1].flatten(0, 1), shape.flat(wide(_head_order(do)))

        # Through the states, from the end backwards: what they and the corrections receive.
        dcorrections = torch.bmm(shape.flat(scores).mT, do)
        dstates = torch.empty_like(states)
        dstates[-1] = dfinal
        torch.bmm(seen.mT, do, out=dstates[:-1].flatten(0, 1))
        wait = None
        if ctx.passing is not None:
            own = dstates.clone()
            _run_back(shape, x, dcorrections.clone(), own)
            own = own[0].view(*transition.shape[:-1], shape.V)
            wait = ctx.passing.launch_back(own, transition, True)
        held = shape.ordered(torch.bmm(shape.flat(x.keys), before)).mul_(x.lose.entering)
        errors = held.neg_().add_(_head_order(v))  # v − E k S
        corrections = torch.bmm(x.inverse, shape.flat(errors * x.beta))
        dscores = shape.ordered(torch.bmm(do, corrections.mT))
        dseen = shape.ordered(torch.bmm(do, before.mT)).mul_(x.lose.entering)
        if wait is not None:
            dstates[-1] = wait().reshape(dfinal.shape)
        _run_back(shape, x, dcorrections, dstates)
        after = dstates[1:].flatten(0, 1)

        # Through the solve: dz = (I + L)⁻ᵀ dd is the gradient of its right side, −dz dᵀ that of L.
        dz = torch.bmm(x.inverse.mT, dcorrections)
        dgram = shape.ordered(torch.bmm(dz, corrections.mT).neg_().tril_(-1))
        dlog_gram = dgram * x.gram
        dz = shape.ordered(dz)
        dbeta = (dz * errors).sum(-1, keepdim=True).add_(dlog_gram.sum(-1, keepdim=True))
        dv = dz.mul_(x.beta)

        # Through what tokens read of each other and of the state before, and write into the next.
        dlog_within = dlog_gram.mul_(x.beta).addcmul_(dscores, scores)
        dheld = shape.ordered(torch.bmm(dv.flatten(0, 3), before.mT)).mul_(x.lose.entering)
        dwritten = shape.ordered(torch.bmm(corrections, after.mT)).mul_(x.lose.leaving)
        ddecay = None
        if decay is not None:
            ddecay = _segments(
                dlog_within,
                (dseen * queries).sum(-1).sub_((dheld * x.keys).sum(-1)),
                (dwritten * x.keys).sum(-1),
                shape.ordered((after * before).sum((-2, -1))[:, None]) * x.lose.across[..., 0],
            )
            ddecay = _natural(ddecay[..., None], decay.dtype).mul_(decay > LOG_ZERO)

        dgram = dgram.mul_(x.beta).mul_(x.lose.within).sum(3, keepdim=True)
        dscores = dscores.mul_(x.lose.within).sum(3, keepdim=True)
        dq = dseen.sum(3, keepdim=True).add_(dscores @ x.keys)
        dk = dwritten.sub_(dheld).sum(3, keepdim=True)
        dk.add_(dscores.mT @ queries).add_((dgram + dgram.mT) @ x.keys)
        dq, dk, dv = (_natural(d, t.dtype) for d, t in ((dq, q), (dk, k), (dv, v)))
        return dq, dk, dv, _natural(dbeta, beta.dtype), ddecay, dstates[0].clone(), None, None


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    chunk: int,
    documents: Tensor | None = None,
    initial_state: Tensor | None = None,
    passing: Passing | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = S + β_t k_t (v_t − Sᵀ k_t)ᵀ with S = exp(decay_t) S_{t-1};  o_t = S_tᵀ q_t; by chunks.

    Work and memory are linear in S; backward keeps the inputs and one state per chunk. Everything
    inside is in at least fp32, whatever the inputs' dtype.

    Args:
        q, k: `[S, B, K, P]`, fp64, fp32 or bf16; k of norm 1 (or 0), q scaled as it is to be used.
            Value head h uses key head h // (H / K). S need not be a multiple of the chunk.
        v: `[S, B, H, V]`.
        beta: `[S, B, H]`, between 0 and 1, or 2 to allow negative eigenvalues.
        decay: `[S, B, H]`, logs of the gates, at most 0; None: no gates.
        chunk: tokens per chunk, at least 1; changes speed, not the function.
        documents: `[S, B]` integers, constant within a document and not decreasing along a
            segment. No state crosses from one document into another.
        initial_state: `[B, H, P, V]` before the first token, of its document; None: zeros.
        passing: the tokens are its `parts` equal segments, not neighbours of each other, and it
            gives the state before each, of its first token's document. None: one segment.

    Returns:
        o `[S, B, H, V]` in v's dtype, and the state after the last token, `[B, H, P, V]` in at
        least fp32; with passing those after each segment, `[parts, B, H, P, V]`, which have no
        gradient.

    Raises:
        ValueError: K does not divide H, chunk < 1, passing cannot divide S, or there is
            initial_state beside passing.
    """
    S, batch, H, V = v.shape
    K, P = k.shape[2:]
    if H % K or chunk < 1:
        raise ValueError(f"delta_rule: {H} value heads, {K} key heads, chunks of {chunk} tokens")
    chunks = Chunking("delta_rule", S, chunk, passing, initial_state)
    cut, dtype = chunks.cut, wide_dtype(v.dtype)
    if initial_state is None:
        initial_state = torch.zeros(chunks.parts * batch, H, P, V, dtype=dtype, device=v.device)
    apply = _DeltaRule.apply if passing is None else outside_graphs(_DeltaRule.apply)
    o, final = apply(
        cut(q)[..., None, :],
        cut(k)[..., None, :],
        cut(v).unflatten(3, (K, -1)),
        cut(beta.to(dtype)).unflatten(3, (K, -1))[..., None],
        None if decay is None else cut(decay.to(dtype)).unflatten(3, (K, -1))[..., None],
        initial_state.to(dtype).flatten(0, 1),
        None if documents is None else cut(documents, last=True),
        passing,
    )
    o, final = chunks.whole(o.flatten(3, 4)), final.unflatten(0, (-1, H))
    return o, final if passing is None else final.unflatten(0, (passing.parts, -1))


def delta_rule_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    documents: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`delta_rule` by its formula, token by token."""
    _, batch, H, V = v.shape
    K, P = k.shape[2:]
    dtype = wide_dtype(v.dtype)
    q, k = (wide(t).repeat_interleave(H // K, dim=2) for t in (q, k))
    gates = torch.ones_like(beta, dtype=dtype) if decay is None else decay.to(dtype).exp()
    state = torch.zeros(batch, H, P, V, dtype=dtype, device=v.device)
    if initial_state is not None:
        state = initial_state.to(dtype)
    outputs = []
    for t, (q_t, k_t, v_t) in enumerate(zip(q, k, wide(v), strict=True)):
        if documents is not None and t > 0:
            same = documents[t] == documents[t - 1]
            state = torch.where(same[:, None, None, None], state, 0)
        state = gates[t][..., None, None] * state
        held = (state.mT @ k_t[..., None])[..., 0]
        d = beta[t].to(dtype)[..., None] * (v_t - held)
        state = state + k_t[..., None] * d[..., None, :]
        outputs.append((state.mT @ q_t[..., None])[..., 0])
    return torch.stack(outputs).to(v.dtype), state
