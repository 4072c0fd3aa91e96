"""The delta rule, plain (arXiv:2406.06484) and gated (arXiv:2412.06464), by chunks and by token.

Shape letters: S sequence, B batch, H value heads, K key heads, R = H / K value heads of a key head,
P key width, V value width, n chunks of Q tokens. Inside, tensors are in head order, [n, B, K, R, Q,
·], with R = 1 where the value heads of a key head share them, or flat, [n·B·H, Q, ·], for bmm.

In the formulas S is the state before a chunk, E_t the decay from it to token t, D_ts from token s
to token t, F_s from token s to the chunk's end. The corrections
d_t = β_t (v_t − (the value that the decayed state returns for k_t)) of a chunk solve

    (I + L) d = β (v − E k S),    L_ts = β_t D_ts k_t·k_s for s < t,

so that d = U − W S with U = (I + L)⁻¹ β v and W = (I + L)⁻¹ β E k, which do not depend on S; then
o = E q S + (D ∘ q kᵀ) d with s <= t, and the state after the chunk is E_Q S + (F k)ᵀ d.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.delta_chunks import (
    Chunks,
    Shape,
    chunk_terms,
    head_order,
    natural_order,
)
from colonnade.kernels.opaque import opaque
from colonnade.kernels.precision import LOG_ZERO, wide, wide_dtype
from colonnade.kernels.segments import Chunking, StatePassing
from colonnade.kernels.sharding import outside_graphs


def _reads(shape: Shape, x: Chunks, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and D ∘ q kᵀ, of the shapes of `keys` and `gram`, and E q, of the shape of `W`."""
    queries = wide(head_order(q)).contiguous()
    scores = (queries @ x.keys.mT) * x.decays.within
    return queries, scores, shape.flat(queries * x.decays.entering)


def _run(shape: Shape, x: Chunks, corrections: Tensor, states: Tensor) -> None:
    """Runs the recurrence over the chunks, in place.

    `corrections` holds U and becomes d = U − W S; `states[0]` is the initial state, and the state
    after c chunks is written into `states[c]`, counted around where there are fewer.
    """
    _run_chunks(corrections, x.W, x.leaving_keys, shape.flat(x.decays.across), states, shape.n)


@opaque("delta_chunks", lambda *_: None, mutates=("corrections", "states"))
def _run_chunks(
    corrections: Tensor, W: Tensor, leaving_keys: Tensor, across: Tensor, states: Tensor, n: int
) -> None:
    for c, (d, w, keys, decay) in enumerate(_by_chunk(n, corrections, W, leaving_keys, across)):
        before, after = states[c % len(states)], states[(c + 1) % len(states)]
        d.baddbmm_(w, before, alpha=-1)
        torch.mul(before, decay, out=after).baddbmm_(keys.mT, d)


def _run_backward(shape: Shape, x: Chunks, dcorrections: Tensor, dstates: Tensor) -> None:
    """Runs the recurrence's backward over the chunks, from the last to the first, in place.

    `dstates[-1]` is the gradient of the final state; the others, and `dcorrections`, hold the
    gradients through the outputs, to which those through later chunks are added.
    """
    across = shape.flat(x.decays.across)
    _run_chunks_backward(dcorrections, x.W, x.leaving_keys, across, dstates, shape.n)


@opaque("delta_chunks_backward", lambda *_: None, mutates=("dcorrections", "dstates"))
def _run_chunks_backward(
    dcorrections: Tensor, W: Tensor, leaving_keys: Tensor, across: Tensor, dstates: Tensor, n: int
) -> None:
    per_chunk = _by_chunk(n, dcorrections, W, leaving_keys, across)
    for c, (dd, w, keys, decay) in reversed(list(enumerate(per_chunk))):
        dd.baddbmm_(keys, dstates[c + 1])
        dstates[c].addcmul_(dstates[c + 1], decay).baddbmm_(w.mT, dd, alpha=-1)


def _by_chunk(n: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`[n·B·H, Q, ·]` tensors -> the chunks in turn, `[B·H, Q, ·]` of each."""
    return zip(*(t.view(n, -1, *t.shape[1:]).unbind() for t in tensors), strict=True)


def _final_states_from_zeros(
    shape: Shape, x: Chunks, U: Tensor, segments: int
) -> tuple[Tensor, Tensor]:
    """The states after each segment, `[segments, B, H, P, V]`, when it starts from zeros, and the
    segments' transitions, `[segments, B, H, P, P]`.

    A transition is the state to which a segment turns the identity when all its values are zeros,
    so it is computed as P more columns of the same state.
    """
    heads, V, P = shape.K * shape.R, shape.V, x.W.shape[-1]
    eye = torch.eye(P, dtype=U.dtype, device=U.device)
    states = F.pad(eye, (V, 0)).repeat(2, shape.B * heads, 1, 1)  # the newest two
    _run(shape, x, F.pad(U, (0, P)), states)
    final = states[shape.n % 2].view(segments, -1, heads, P, V + P)
    state, transition = final.split([V, P], -1)
    return state, transition.contiguous()


def _log_decay_grad(within: Tensor, entering: Tensor, leaving: Tensor, across: Tensor) -> Tensor:
    """Gradient of each token's log-decay: the sum of those of the ranges of tokens that cover it.

    The arguments are gradients of the logarithms of `Decays`' fields: `within` `[..., Q, Q]` from
    token s (last) to t, `entering` and `leaving` `[..., Q]`, `across` `[..., 1]`. A token does not
    decay on its way to itself: the diagonal does not count.
    """
    within.diagonal(dim1=-2, dim2=-1).zero_()  # before the sums, in which it would cancel
    ends = entering.add_(within.sum(-1)).sub_(within.sum(-2))
    out = ends.flip(-1).cumsum(-1).flip(-1).add_(across)
    out[..., 1:] += leaving[..., :-1].cumsum(-1)
    return out


class _DeltaRule(torch.autograd.Function):
    """Saves its inputs and the states between chunks; backward computes all else again.

    beta, decay and initial are in at least fp32.
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
        state_passing: StatePassing | None,
    ) -> tuple[Tensor, Tensor]:
        n, Q, batch, K, R, V = v.shape
        shape = Shape(n, Q, batch, K, R, k.shape[-1], V)
        x = chunk_terms(shape, k, beta, decay, documents)
        # U; `_run` adds −W S.
        corrections = torch.bmm(x.inverse, shape.flat(head_order(v) * x.beta))
        wait = transition = None
        if state_passing is not None:
            final, transition = _final_states_from_zeros(
                shape, x, corrections, state_passing.segments
            )
            wait = state_passing.launch(final, transition, True)
        _, scores, entering_queries = _reads(shape, x, q)  # overlaps the exchange of states
        states = initial.new_empty(n + 1, *initial.shape)
        states[0] = initial if wait is None else wait().reshape(initial.shape)
        _run(shape, x, corrections, states)
        ctx.shape, ctx.state_passing = shape, state_passing
        ctx.save_for_backward(q, k, v, beta, decay, documents, states, transition)
        o = torch.bmm(entering_queries, states[:-1].flatten(0, 1))
        o.baddbmm_(shape.flat(scores), corrections)
        final = states[-1].clone()
        if state_passing is not None:
            ctx.mark_non_differentiable(final)  # backward then gets zeros for its gradient
        return natural_order(shape.by_head(o), v.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, decay, documents, states, transition = ctx.saved_tensors
        shape: Shape = ctx.shape
        x = chunk_terms(shape, k, beta, decay, documents)
        queries, scores, entering_queries = _reads(shape, x, q)
        before, do = states[:-1].flatten(0, 1), shape.flat(wide(head_order(do)))

        # Gradients of the corrections and the states, from the last chunk to the first.
        dcorrections = torch.bmm(shape.flat(scores).mT, do)
        dstates = torch.empty_like(states)
        dstates[-1] = dfinal
        torch.bmm(entering_queries.mT, do, out=dstates[:-1].flatten(0, 1))
        wait = None
        if ctx.state_passing is not None:
            # Gradients of the initial states through the segments' own outputs only.
            dinitial = dstates.clone()
            _run_backward(shape, x, dcorrections.clone(), dinitial)
            dinitial = dinitial[0].view(*transition.shape[:-1], shape.V)
            wait = ctx.state_passing.launch_backward(dinitial, transition, True)
        predicted = shape.by_head(torch.bmm(shape.flat(x.keys), before)).mul_(x.decays.entering)
        errors = predicted.neg_().add_(head_order(v))  # v − E k S
        corrections = torch.bmm(x.inverse, shape.flat(errors * x.beta))
        dscores = shape.by_head(torch.bmm(do, corrections.mT))
        dentering_queries = shape.by_head(torch.bmm(do, before.mT)).mul_(x.decays.entering)
        if wait is not None:
            dstates[-1] = wait().reshape(dfinal.shape)
        _run_backward(shape, x, dcorrections, dstates)
        after = dstates[1:].flatten(0, 1)

        # Through the solve: dz = (I + L)⁻ᵀ dd is the gradient of its right side, −dz dᵀ that of L.
        dz = torch.bmm(x.inverse.mT, dcorrections)
        dgram = shape.by_head(torch.bmm(dz, corrections.mT).neg_().tril_(-1))
        dlog_gram = dgram * x.gram
        dz = shape.by_head(dz)
        dbeta = (dz * errors).sum(-1, keepdim=True).add_(dlog_gram.sum(-1, keepdim=True))
        dv = dz.mul_(x.beta)

        # Through the tokens' reads of each other and of the state before the chunk, and through
        # their writes into the state after it.
        dlog_within = dlog_gram.mul_(x.beta).addcmul_(dscores, scores)
        dentering_keys = shape.by_head(torch.bmm(dv.flatten(0, 3), before.mT)).mul_(
            x.decays.entering
        )
        dleaving_keys = shape.by_head(torch.bmm(corrections, after.mT)).mul_(x.decays.leaving)
        ddecay = None
        if decay is not None:
            ddecay = _log_decay_grad(
                dlog_within,
                (dentering_queries * queries).sum(-1).sub_((dentering_keys * x.keys).sum(-1)),
                (dleaving_keys * x.keys).sum(-1),
                shape.by_head((after * before).sum((-2, -1))[:, None]) * x.decays.across[..., 0],
            )
            ddecay = natural_order(ddecay[..., None], decay.dtype).mul_(decay > LOG_ZERO)

        dgram = dgram.mul_(x.beta).mul_(x.decays.within).sum(3, keepdim=True)
        dscores = dscores.mul_(x.decays.within).sum(3, keepdim=True)
        dq = dentering_queries.sum(3, keepdim=True).add_(dscores @ x.keys)
        dk = dleaving_keys.sub_(dentering_keys).sum(3, keepdim=True)
        dk.add_(dscores.mT @ queries).add_((dgram + dgram.mT) @ x.keys)
        dq, dk, dv = (natural_order(d, t.dtype) for d, t in ((dq, q), (dk, k), (dv, v)))
        return dq, dk, dv, natural_order(dbeta, beta.dtype), ddecay, dstates[0].clone(), None, None


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
    state_passing: StatePassing | None = None,
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
        state_passing: the tokens are its `segments` equal segments, which need not be adjacent in
            the sequence, and it gives the state before each, of its first token's document. None:
            one segment.

    Returns:
        o `[S, B, H, V]` in v's dtype, and the state after the last token, `[B, H, P, V]` in at
        least fp32; with state_passing the states after each segment, `[segments, B, H, P, V]`,
        which have no gradient.

    Raises:
        ValueError: K does not divide H, chunk < 1, the segments do not divide S, or both
            initial_state and state_passing are given.
    """
    S, batch, H, V = v.shape
    K, P = k.shape[2:]
    if H % K or chunk < 1:
        raise ValueError(f"delta_rule: {H} value heads, {K} key heads, chunks of {chunk} tokens")
    if S == 1 and state_passing is None:  # as in generation: a step has no chunks
        return delta_rule_recurrence(q, k, v, beta, decay, initial_state=initial_state)
    chunking = Chunking("delta_rule", S, chunk, state_passing, initial_state)
    chunks, dtype = chunking.to_chunks, wide_dtype(v.dtype)
    if initial_state is None:
        initial_state = torch.zeros(
            chunking.segments * batch, H, P, V, dtype=dtype, device=v.device
        )
    apply = _DeltaRule.apply if state_passing is None else outside_graphs(_DeltaRule.apply)
    o, final = apply(
        chunks(q)[..., None, :],
        chunks(k)[..., None, :],
        chunks(v).unflatten(3, (K, -1)),
        chunks(beta.to(dtype)).unflatten(3, (K, -1))[..., None],
        None if decay is None else chunks(decay.to(dtype)).unflatten(3, (K, -1))[..., None],
        initial_state.to(dtype).flatten(0, 1),
        None if documents is None else chunks(documents, repeat_last=True),
        state_passing,
    )
    o, final = chunking.to_tokens(o.flatten(3, 4)), final.unflatten(0, (-1, H))
    if state_passing is None:
        return o, final
    return o, final.unflatten(0, (state_passing.segments, -1))


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
        predicted = (state.mT @ k_t[..., None])[..., 0]
        d = beta[t].to(dtype)[..., None] * (v_t - predicted)
        state = state + k_t[..., None] * d[..., None, :]
        outputs.append((state.mT @ q_t[..., None])[..., 0])
    return torch.stack(outputs).to(v.dtype), state
