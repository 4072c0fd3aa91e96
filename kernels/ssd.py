"""The Mamba-2 scan (SSD, arXiv:2405.21060, section 6): matrix products by chunk, and a recurrence.

Shape letters: S sequence, B batch, H heads, P head width, G groups, R = H / G heads of a group,
N state, n chunks of Q tokens. Inside, tensors are in one of three orders, each contiguous: natural
[n, Q, B, G, R, P], by head [n·B·G·R, Q, P] and by group [n·B·G, Q, R·P]; B and C are shared by the
heads of a group and never repeated over them.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.opaque import opaque
from colonnade.kernels.precision import LOG_ZERO, wide, wide_dtype
from colonnade.kernels.segments import Chunking, StatePassing
from colonnade.kernels.sharding import outside_graphs


@dataclass(frozen=True)
class _Shape:
    n: int
    Q: int
    B: int
    G: int
    R: int
    P: int
    N: int

    def heads(self, t: Tensor, scale: Tensor | None = None) -> Tensor:
        """`[n, Q, B, G, R, P]` times `[n, Q, B, G, R, 1]`, by head: `[n·B·G·R, Q, P]`."""
        if scale is None:
            return wide(t).permute(0, 2, 3, 4, 1, 5).reshape(-1, self.Q, self.P)
        out = scale.new_empty(self.n, self.B, self.G, self.R, self.Q, self.P)
        torch.mul(t, scale, out=out.permute(0, 4, 1, 2, 3, 5))
        return out.view(-1, self.Q, self.P)

    def groups(self, t: Tensor, scale: Tensor) -> Tensor:
        """The same by group: `[n·B·G, Q, R·P]`."""
        out = scale.new_empty(self.n, self.B, self.G, self.Q, self.R, self.P)
        torch.mul(t, scale, out=out.permute(0, 3, 1, 2, 4, 5))
        return out.view(-1, self.Q, self.R * self.P)

    def shared(self, t: Tensor) -> Tensor:
        """B or C, `[n, Q, B, G, N]`, by group and wide: `[n·B·G, Q, N]`."""
        return wide(t).permute(0, 2, 3, 1, 4).reshape(-1, self.Q, self.N)

    def from_heads(self, t: Tensor) -> Tensor:
        """By head -> a view in natural order."""
        return t.view(self.n, self.B, self.G, self.R, self.Q, -1).permute(0, 4, 1, 2, 3, 5)

    def from_groups(self, t: Tensor) -> Tensor:
        """By group -> a view in natural order, `[n, Q, B, G, R, P]`."""
        return t.view(self.n, self.B, self.G, self.Q, self.R, -1).permute(0, 3, 1, 2, 4, 5)

    def from_shared(self, t: Tensor) -> Tensor:
        """A gradient of B or C -> a view in natural order, `[n, Q, B, G, N]`."""
        return t.view(self.n, self.B, self.G, self.Q, -1).permute(0, 3, 1, 2, 4)

    def by_segment(self, t: Tensor, segments: int) -> Tensor:
        """A state or its decay, `[B, G, R, ...]`, as `[segments, B / segments, H, ...]`."""
        return t.reshape(segments, -1, self.G * self.R, *t.shape[3:])


@dataclass(frozen=True)
class _Decays:
    """The decays between the tokens of a chunk and the states before and after it."""

    within: Tensor  # [n, B, G, R, Q, Q] from token s (last) to token t, 0 where t < s
    entering: Tensor  # [n, Q, B, G, R, 1] from the state before the chunk to token t
    leaving: Tensor  # [n, Q, B, G, R, 1] from token s to the state after the chunk
    across: Tensor  # [n, B, G, R, 1, 1] from the state before to the state after


def _decays(shape: _Shape, dt: Tensor, A: Tensor, documents: Tensor | None) -> _Decays:
    """Computes each decay as the exponential of one masked sum over a range of tokens.

    For fp32 the sums are differences of cumulative sums in fp64, which lose no precision. For fp64
    such differences would lose it after a strong decay, so each range is summed by itself. The
    exponentials are to base 2, which is several times faster on CPU.
    """
    dtype, Q = dt.dtype, shape.Q
    logs = (dt * A).clamp_(min=LOG_ZERO).double().mul_(math.log2(math.e))
    cumulative = logs.cumsum(1)
    if dtype == torch.float64:
        rows = logs.permute(0, 2, 3, 4, 1)[..., None]
        within = rows.expand(*rows.shape[:-1], Q).tril(-1).cumsum(-2)
        leaving = within[..., -1, :].permute(0, 4, 1, 2, 3).exp2()
    else:
        rows = cumulative.permute(0, 2, 3, 4, 1).contiguous()
        within = torch.empty(*rows.shape, Q, dtype=dtype, device=dt.device)
        torch.sub(rows[..., :, None], rows[..., None, :], out=within)
        leaving = (cumulative[:, -1:] - cumulative).to(dtype).exp2_()
    entering = cumulative.to(dtype).exp2()
    across = entering[:, -1, ..., None, None]
    hidden = torch.ones(Q, Q, dtype=torch.bool, device=dt.device).triu_(1)
    if documents is not None:
        d = documents
        before = torch.cat([d[:1, :1], d[:-1, -1:]])  # document of the state before each chunk
        entering = entering * (d == before)[..., None, None]
        leaving = leaving * (d == d[:, -1:])[..., None, None]
        across = across * (d[:, -1] == before[:, 0])[..., None, None, None, None]
        d = d.transpose(1, 2)
        hidden = (hidden | (d[..., :, None] != d[..., None, :]))[:, :, None, None]
    bias = torch.zeros(hidden.shape, dtype=dtype, device=dt.device).masked_fill_(hidden, -torch.inf)
    return _Decays(within.add_(bias).exp2_(), entering[..., None], leaving[..., None], across)


def _states(shape: _Shape, decayed: Tensor, B: Tensor, across: Tensor, initial: Tensor) -> Tensor:
    """The state before every chunk and after the last one, `[n + 1, B, G, R, P, N]`.

    `decayed` `[n·B·G, Q, R·P]` is dt·x decayed to its chunk's end.
    """
    states = initial.new_empty(shape.n + 1, *initial.shape)
    states[0] = initial
    torch.bmm(decayed.transpose(1, 2), B, out=states[1:].view(-1, shape.R * shape.P, shape.N))
    _decay_states(states, across)
    return states


@opaque("ssd_states", lambda states, across: None, mutates=("states",))
def _decay_states(states: Tensor, across: Tensor) -> None:
    """Adds to the state after every chunk, in place, the decayed state before it."""
    for c in range(len(across)):
        states[c + 1].addcmul_(states[c], across[c])


@opaque("ssd_states_backward", lambda dstates, across: None, mutates=("dstates",))
def _decay_states_backward(dstates: Tensor, across: Tensor) -> None:
    """Adds to the gradient of the state before every chunk that of the state after it, decayed."""
    for i in reversed(range(len(across))):
        dstates[i].addcmul_(dstates[i + 1], across[i])


class _SSD(torch.autograd.Function):
    """Saves its inputs and the states between chunks; backward computes all else again.

    All floating inputs except x, B and C are in at least fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [n, Q, B, G, R, P]
        dt: Tensor,  # [n, Q, B, G, R]
        A: Tensor,  # [G, R]
        B: Tensor,  # [n, Q, B, G, N]
        C: Tensor,
        D: Tensor | None,  # [G, R, 1]
        initial: Tensor,  # [B, G, R, P, N]
        documents: Tensor | None,  # [n, Q, B]
        state_passing: StatePassing | None,
    ) -> tuple[Tensor, Tensor]:
        n, Q, batch, G, R, P = x.shape
        shape = _Shape(n, Q, batch, G, R, P, N=B.shape[-1])
        decay = _decays(shape, dt, A, documents)
        b, c, step = shape.shared(B), shape.shared(C), dt[..., None]
        states = _states(shape, shape.groups(x, step * decay.leaving), b, decay.across, initial)
        wait = None
        if state_passing is not None:
            # The decay from the state before the segment to that after each of its chunks.
            decays = decay.across.cumprod(0)
            final_state, transition = (
                shape.by_segment(t[-1], state_passing.segments) for t in (states, decays)
            )
            wait = state_passing.launch(final_state, transition, False)
        ctx.shape, ctx.state_passing = shape, state_passing
        ctx.save_for_backward(x, dt, A, B, C, D, documents, states)

        scores = torch.bmm(c, b.transpose(1, 2)).view(shape.n, shape.B, shape.G, 1, shape.Q, -1)
        weights = decay.within.mul_(scores).view(-1, shape.Q, shape.Q)
        inner = torch.bmm(weights, shape.heads(x, step))  # overlaps the exchange of states

        if wait is not None:
            states[0] = wait().reshape(initial.shape)
            states[1:].addcmul_(decays, states[0])
        flat = states[:-1].view(-1, shape.R * shape.P, shape.N)
        outer = shape.from_groups(torch.bmm(c, flat.transpose(1, 2)))
        y = torch.mul(outer, decay.entering, out=dt.new_empty(x.shape))
        y.add_(shape.from_heads(inner))
        if D is not None:
            y.addcmul_(x, D)
        final = states[-1].clone()
        if state_passing is not None:
            ctx.mark_non_differentiable(final)  # backward then gets zeros for its gradient
        return y.to(x.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, documents, states = ctx.saved_tensors
        shape: _Shape = ctx.shape
        n, Q, R, P, N = shape.n, shape.Q, shape.R, shape.P, shape.N
        decay = _decays(shape, dt, A, documents)
        b, c, step = shape.shared(B), shape.shared(C), dt[..., None]

        # Gradients of the states, from the last chunk to the first.
        dstates = torch.empty_like(states)
        dstates[-1] = dfinal
        before, after = states[:-1], dstates[1:]
        dy_entering = shape.groups(dy, decay.entering)
        torch.bmm(dy_entering.transpose(1, 2), c, out=dstates[:-1].view(-1, R * P, N))
        _decay_states_backward(dstates, decay.across)
        wait = None
        if ctx.state_passing is not None:
            # The decay from the state before each chunk to that after the segment.
            decays = decay.across.flip(0).cumprod(0).flip(0)
            dinitial, transition = (
                shape.by_segment(t[0], ctx.state_passing.segments) for t in (dstates, decays)
            )
            wait = ctx.state_passing.launch_backward(dinitial, transition, False)

        # Through the tokens' reads of the state before the chunk.
        dy_entering = shape.heads(dy, decay.entering)
        dc_head = torch.bmm(dy_entering, before.view(-1, P, N)).view(-1, R, Q, N)
        dc = dc_head.sum(1)
        ends = dc_head.mul_(c[:, None]).sum(-1).view(n, shape.B, shape.G, R, Q)

        # Through the tokens' reads of each other.
        scores = torch.bmm(c, b.transpose(1, 2)).view(n, shape.B, shape.G, 1, Q, Q)
        dy_head = shape.heads(dy)
        dweights = torch.bmm(dy_head, shape.heads(x, step).transpose(1, 2))
        dweights = dweights.view_as(decay.within).mul_(decay.within)
        dscores = dweights.sum(3).view(-1, Q, Q)
        dc.baddbmm_(dscores, b)
        weights = decay.within.mul_(scores).view(-1, Q, Q)
        inner = torch.bmm(weights.transpose(1, 2), dy_head)
        dwithin = dweights.mul_(scores)
        dwithin.diagonal(dim1=-2, dim2=-1).zero_()  # a token does not decay on its way to itself
        ends = (ends + dwithin.sum(-1)).sub_(dwithin.sum(-2))
        del weights, dweights, dwithin

        if wait is not None:
            dstates[-1] = wait().reshape(dfinal.shape)
            dstates[:-1].addcmul_(decays, dstates[-1])
        dacross = (after * before).sum((-1, -2), keepdim=True).mul_(decay.across)

        # Through the tokens' writes into the state after the chunk.
        flat = after.view(-1, R * P, N)
        outer = shape.from_groups(torch.bmm(b, flat.transpose(1, 2)))
        du = torch.mul(outer, decay.leaving, out=dt.new_empty(x.shape))
        dleaving = (du * x).sum(-1).mul_(dt)
        db = torch.bmm(shape.groups(x, step * decay.leaving), flat)
        db.baddbmm_(dscores.transpose(1, 2), c)
        du.add_(shape.from_heads(inner))

        # A token's log-decay is part of every range of tokens that covers it.
        dlog = ends.flip(-1).cumsum(-1).flip(-1).add_(dacross[..., 0]).permute(0, 4, 1, 2, 3)
        dlog[:, 1:] += dleaving[:, :-1].cumsum(1)
        dlog = dlog.mul(dt * A > LOG_ZERO)

        ddt = (du * x).sum(-1).addcmul_(dlog, A)
        dA = (dlog * dt).sum((0, 1, 2))
        dx, dD = du.mul_(step), None
        if D is not None:
            dx.addcmul_(dy, D)
            dD = (wide(dy) * x).sum((0, 1, 2, 5))[..., None]
        dB, dC = shape.from_shared(db).to(B.dtype), shape.from_shared(dc).to(C.dtype)
        return dx.to(x.dtype), ddt, dA, dB, dC, dD, dstates[0], None, None


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    chunk: int,
    documents: Tensor | None = None,
    initial_state: Tensor | None = None,
    state_passing: StatePassing | None = None,
) -> tuple[Tensor, Tensor]:
    """state_t = exp(dt_t A) state_{t-1} + dt_t x_t ⊗ B_t;  y_t = C_t state_t + D x_t, by chunks.

    Work and memory are linear in S; backward keeps the inputs and one state per chunk. Everything
    inside is in at least fp32, whatever the inputs' dtype.

    Args:
        x: `[S, B, H, P]`, fp64, fp32 or bf16. S need not be a multiple of the chunk.
        dt: `[S, B, H]`, step sizes, not negative (after softplus).
        A: `[H]`, negative.
        B, C: `[S, B, G, N]`; head h uses group h // (H / G).
        D: `[H]`, weight of the direct path, or None.
        chunk: tokens per chunk, at least 1; changes speed, not the function.
        documents: `[S, B]` integers, constant within a document and not decreasing along a
            segment. No state crosses from one document into another.
        initial_state: `[B, H, P, N]` before the first token, of its document; None: zeros.
        state_passing: the tokens are its `segments` equal segments, which need not be adjacent in
            the sequence, and it gives the state before each, of its first token's document. None:
            one segment.

    Returns:
        y `[S, B, H, P]` in x's dtype, and the state after the last token, `[B, H, P, N]` in at
        least fp32; with state_passing the states after each segment, `[segments, B, H, P, N]`,
        which have no gradient.

    Raises:
        ValueError: G does not divide H, chunk < 1, the segments do not divide S, or both
            initial_state and state_passing are given.
    """
    S, batch, H, P = x.shape
    G, N = B.shape[2:]
    if H % G or chunk < 1:
        raise ValueError(f"ssd: {H} heads in {G} groups, chunks of {chunk} tokens")
    if S == 1 and state_passing is None:  # as in generation: a step has no chunks
        return ssd_recurrence(x, dt, A, B, C, D, initial_state=initial_state)
    chunking = Chunking("ssd", S, chunk, state_passing, initial_state)
    chunks, heads, dtype = chunking.to_chunks, (G, H // G), wide_dtype(x.dtype)
    if initial_state is None:
        initial_state = torch.zeros(
            chunking.segments * batch, H, P, N, dtype=dtype, device=x.device
        )
    apply = _SSD.apply if state_passing is None else outside_graphs(_SSD.apply)
    y, final = apply(
        chunks(x).unflatten(3, heads),
        chunks(dt.to(dtype)).unflatten(3, heads),
        A.to(dtype).view(heads),
        chunks(B),
        chunks(C),
        None if D is None else D.to(dtype).view(*heads, 1),
        initial_state.to(dtype).unflatten(1, heads),
        None if documents is None else chunks(documents, repeat_last=True),
        state_passing,
    )
    y, final = chunking.to_tokens(y.flatten(3, 4)), final.flatten(1, 2)
    if state_passing is None:
        return y, final
    return y, final.unflatten(0, (state_passing.segments, -1))


def ssd_recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    documents: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd` by its formula, token by token."""
    _, batch, H, P = x.shape
    repeat, N, dtype = H // B.shape[2], B.shape[3], wide_dtype(x.dtype)
    u, dt, A = wide(x), dt.to(dtype), A.to(dtype)
    B, C = (wide(t).repeat_interleave(repeat, dim=2) for t in (B, C))
    state = torch.zeros(batch, H, P, N, dtype=dtype, device=x.device)
    if initial_state is not None:
        state = initial_state.to(dtype)
    outputs = []
    rows = zip(u.unbind(), dt.unbind(), B.unbind(), C.unbind(), strict=True)
    for t, (u_t, dt_t, B_t, C_t) in enumerate(rows):
        if documents is not None and t > 0:
            same = documents[t] == documents[t - 1]
            state = torch.where(same[:, None, None, None], state, 0)
        decay = torch.exp(dt_t * A)[..., None, None]
        state = decay * state + (dt_t[..., None] * u_t)[..., None] * B_t[:, :, None, :]
        y = (state @ C_t[..., None])[..., 0]
        outputs.append(y if D is None else y + D.to(dtype)[:, None] * u_t)
    return torch.stack(outputs).to(x.dtype), state
