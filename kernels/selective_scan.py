"""The selective scan of Mamba-1 (arXiv:2312.00752): chunks of tokens in cache, and a recurrence.

Shape letters: S sequence, B batch, C channels, N state, Q tokens of a chunk, W channels of a block.

Every channel and state forgets at a rate of its own, so products of matrices over tokens do not
apply. What can be done for a chunk's tokens at once (decays, inputs, reading the states) is; only
state_t = decay_t state_{t-1} + input_t goes token by token, as one fused operation. Inside,
channels are last and contiguous, and taken in blocks, so that a chunk's `[Q, B, N, W]` stays in
cache. Decays are never divided, nor multiplied over tokens: any dt is safe.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.precision import wide, wide_dtype

# Elements of a token's `[B, N, W]` on CPU: with fewer its operation costs more to call than to do,
# with more a chunk's leave the cache.
STEP = 2**14


class _Block:
    """Decays and states of one chunk of a block of channels, in buffers that every chunk reuses."""

    def __init__(self, A: Tensor, Q: int, batch: int) -> None:
        N, W = A.shape
        self.rate = A * math.log2(math.e)  # base 2: its exponential is several times faster on CPU
        self.decay = A.new_empty(Q, batch, N, W)
        self.states = A.new_empty(Q + 1, batch, N, W)  # before the chunk, then after each token
        self.decay_of, self.state_of = self.decay.unbind(), self.states.unbind()

    def run(self, dt: Tensor, u: Tensor, B: Tensor, barrier: Tensor, state: Tensor) -> None:
        """Fills the buffers from dt and u = dt·x `[q, B, W]`, B, and `state` before the chunk."""
        q = len(dt)
        self.states[0] = state  # first: it may be the last row of the chunk before
        torch.addcmul(barrier, dt[:, :, None], self.rate, out=self.decay[:q]).exp2_()
        torch.mul(u[:, :, None], B[..., None], out=self.states[1 : q + 1])
        for t in range(q):
            self.state_of[t + 1].addcmul_(self.decay_of[t], self.state_of[t])


class _SelectiveScan(torch.autograd.Function):
    """Keeps its inputs and the state before each chunk; backward computes the rest again.

    All floating inputs but x, dt, B and C are wide. `barrier` is 0, or −∞ where the state of the
    token before is of another document.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [S, B, C]
        dt: Tensor,  # [S, B, C]
        A: Tensor,  # [N, C]
        B: Tensor,  # [S, B, N]
        C: Tensor,
        D: Tensor | None,  # [C]
        initial: Tensor,  # [B, N, C]
        barrier: Tensor,  # [S, B, 1, 1]
        Q: int,
    ) -> tuple[Tensor, Tensor]:
        chunks = _ranges(len(x), Q)
        y, final = x.new_empty(x.shape), torch.empty_like(initial)
        before = initial.new_empty(len(chunks), *initial.shape)
        with torch.inference_mode():  # the steps are so short that views' bookkeeping would show
            for c in _blocks(x, len(A)):
                block = _Block(A[:, c], Q, x.shape[1])
                state = initial[..., c]
                for i, s in enumerate(chunks):
                    before[i, ..., c] = state
                    x_s, dt_s = wide(x[s, :, c]), wide(dt[s, :, c])
                    block.run(dt_s, dt_s * x_s, wide(B[s]), barrier[s], state)
                    states = block.states[1 : len(x_s) + 1]
                    state = states[-1]
                    y_s = _over_states(wide(C[s]), states)
                    y[s, :, c] = y_s if D is None else y_s.addcmul_(x_s, D[c])
                final[..., c] = state
        ctx.save_for_backward(x, dt, A, B, C, D, barrier, before)
        ctx.Q = Q
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, barrier, before = ctx.saved_tensors
        chunks = list(enumerate(_ranges(len(x), ctx.Q)))
        dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
        dA, dinitial = torch.empty_like(A), before.new_empty(before.shape[1:])
        dB, dC = (torch.zeros(t.shape, dtype=A.dtype, device=A.device) for t in (B, C))
        dD = None if D is None else torch.zeros_like(D)
        with torch.inference_mode():
            for c in _blocks(x, len(A)):
                A_c = A[:, c]
                block = _Block(A_c, ctx.Q, x.shape[1])
                grads, dA_of = torch.empty_like(block.decay), torch.zeros_like(block.decay)
                grad_of = grads.unbind()  # of the states after each token
                carried = dfinal[..., c]  # from the tokens after the chunk
                for i, s in reversed(chunks):
                    x_s, dt_s, B_s = wide(x[s, :, c]), wide(dt[s, :, c]), wide(B[s])
                    dy_s, u, q = wide(dy[s, :, c]), dt_s * x_s, len(x_s)
                    block.run(dt_s, u, B_s, barrier[s], before[i, ..., c])

                    grad = torch.mul(dy_s[:, :, None], wide(C[s])[..., None], out=grads[:q])
                    grad_of[q - 1].add_(carried)
                    for t in range(q - 1, 0, -1):
                        grad_of[t - 1].addcmul_(block.decay_of[t], grad_of[t])

                    dC[s] += _over_channels(dy_s, block.states[1 : q + 1])
                    dB[s] += _over_channels(u, grad)
                    du = _over_states(B_s, grad)

                    carried = grad.mul_(block.decay[:q])[0].clone()
                    dlog = grad.mul_(block.states[:q])  # of dt·A, the decays' logarithms
                    dA_of[:q].addcmul_(dlog, dt_s[:, :, None])
                    ddt[s, :, c] = dlog.mul_(A_c).sum(2).addcmul_(du, x_s)
                    dx_s = du.mul_(dt_s)
                    if D is not None and dD is not None:
                        dx_s.addcmul_(dy_s, D[c])
                        dD[c] += (dy_s * x_s).sum((0, 1))
                    dx[s, :, c] = dx_s
                dA[:, c] = dA_of.sum((0, 1))
                dinitial[..., c] = carried
        return dx, ddt, dA, dB.to(B.dtype), dC.to(C.dtype), dD, dinitial, None, None


def _ranges(length: int, step: int) -> list[slice]:
    """Slices of at most `step` that make up `length`."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _blocks(x: Tensor, N: int) -> list[slice]:
    """Ranges of channels to work on, one after the other."""
    _, batch, channels = x.shape
    width = STEP // (batch * N) if x.device.type == "cpu" else channels
    return _ranges(channels, max(1, width))


def _over_states(weights: Tensor, t: Tensor) -> Tensor:
    """`[q, B, N]` and `[q, B, N, W]`, summed over N: `[q, B, W]`."""
    q, batch, N, W = t.shape
    return torch.bmm(weights.reshape(-1, 1, N), t.view(-1, N, W)).view(q, batch, W)


def _over_channels(weights: Tensor, t: Tensor) -> Tensor:
    """`[q, B, W]` and `[q, B, N, W]`, summed over W: `[q, B, N]`."""
    q, batch, N, W = t.shape
    return torch.bmm(weights.reshape(-1, 1, W), t.view(-1, N, W).mT).view(q, batch, N)


# Traced, every token would be a node of the graph, and compiling would take minutes.
@torch.compiler.disable
def selective_scan(
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
) -> tuple[Tensor, Tensor]:
    """state_t = exp(dt_t A) state_{t-1} + dt_t x_t ⊗ B_t;  y_t = state_t C_t + D x_t, by chunks.

    Work and memory are linear in S; backward keeps the inputs and one state per chunk. Everything
    inside is in at least fp32, whatever the inputs' dtype.

    Args:
        x: `[S, B, C]`, fp64, fp32 or bf16. S need not be a multiple of the chunk.
        dt: `[S, B, C]`, step sizes, not negative (after softplus).
        A: `[C, N]`, negative.
        B, C: `[S, B, N]`, shared by the channels.
        D: `[C]`, weight of the direct path, or None.
        chunk: tokens per chunk, at least 1; changes speed and memory, not the function.
        documents: `[S, B]` integers, constant within a document. No state crosses from one
            document into another.
        initial_state: `[B, C, N]` before the first token, of its document; None: zeros.

    Returns:
        y `[S, B, C]` in x's dtype, and the state after the last token, `[B, C, N]` in at least
        fp32.

    Raises:
        ValueError: chunk < 1.
    """
    if chunk < 1:
        raise ValueError(f"selective_scan: chunks of {chunk} tokens")
    S, batch, _ = x.shape
    dtype = wide_dtype(x.dtype)
    if initial_state is None:
        initial_state = torch.zeros(batch, *A.shape, dtype=dtype, device=x.device)
    barrier = torch.zeros(S, batch, 1, 1, dtype=dtype, device=x.device)
    if documents is not None:
        crossed = documents[1:] != documents[:-1]
        barrier[1:].masked_fill_(crossed[..., None, None], -torch.inf)
    y, final = _SelectiveScan.apply(
        x,
        dt,
        A.to(dtype).t().contiguous(),
        B,
        C,
        None if D is None else D.to(dtype),
        initial_state.to(dtype).transpose(1, 2).contiguous(),
        barrier,
        min(chunk, max(1, S)),
    )
    return y, final.transpose(1, 2).contiguous()


def selective_scan_recurrence(
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
    """`selective_scan` by its formula, token by token."""
    batch, dtype = x.shape[1], wide_dtype(x.dtype)
    x_wide, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
    state = torch.zeros(batch, *A.shape, dtype=dtype, device=x.device)
    if initial_state is not None:
        state = initial_state.to(dtype)
    outputs = []
    rows = zip(x_wide.unbind(), dt.unbind(), B.unbind(), C.unbind(), strict=True)
    for t, (x_t, dt_t, B_t, C_t) in enumerate(rows):
        if documents is not None and t > 0:
            same = documents[t] == documents[t - 1]
            state = torch.where(same[:, None, None], state, 0)
        decay = torch.exp(dt_t[..., None] * A)
        state = decay * state + (dt_t * x_t)[..., None] * B_t[:, None, :]
        y = (state @ C_t[..., None])[..., 0]
        outputs.append(y if D is None else y + D.to(dtype) * x_t)
    return torch.stack(outputs).to(x.dtype), state
