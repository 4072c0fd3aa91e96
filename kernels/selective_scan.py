"""The selective scan of Mamba-1 (arXiv:2312.00752): chunks of tokens in cache, and a recurrence.

Shape letters: S sequence, B batch, C channels, N state, Q tokens of a chunk, W channels of a block.

Every channel and state decays at a different rate, so matrix products over tokens do not apply.
What can be computed for all tokens of a chunk at once is (decays, inputs, outputs); only
state_t = decay_t state_{t-1} + input_t goes token by token, as one fused operation. Inside,
channels are last and contiguous, and processed in blocks, so that a chunk's `[Q, B, N, W]` stays in
cache. Decays are neither divided nor multiplied over tokens: any dt is safe.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.opaque import opaque
from colonnade.kernels.precision import wide, wide_dtype
from colonnade.kernels.segments import (
    StatePassing,
    Wait,
    batch_to_segments,
    check_segments,
    segments_to_batch,
)

# Elements of a token's `[B, N, W]` on CPU: with fewer its operation costs more to launch than to
# run, with more a chunk's tensors leave the cache.
STEP = 2**14


class _Block:
    """Decays and states of one chunk for a block of channels, in buffers that all chunks reuse."""

    def __init__(self, A: Tensor, Q: int, batch: int) -> None:
        N, W = A.shape
        self.rate = A * math.log2(math.e)  # base 2: its exponential is several times faster on CPU
        self.decay = A.new_empty(Q, batch, N, W)
        self.states = A.new_empty(Q + 1, batch, N, W)  # before the chunk, then after each token
        # Views of each token, made once: the steps are short.
        self.token_decays, self.token_states = self.decay.unbind(), self.states.unbind()

    def fill_decays(self, dt: Tensor, barrier: Tensor) -> None:
        """Fills the decays from dt `[q, B, W]`."""
        out = self.decay[: len(dt)]
        torch.addcmul(barrier, dt[:, :, None], self.rate, out=out).exp2_()

    def run(self, dt: Tensor, u: Tensor, B: Tensor, barrier: Tensor, state: Tensor) -> None:
        """Fills the buffers from dt and u = dt·x `[q, B, W]`, B, and `state` before the chunk."""
        q = len(dt)
        # First, as `state` may be a view of these buffers: the last state of the previous chunk.
        self.states[0] = state
        self.fill_decays(dt, barrier)
        torch.mul(u[:, :, None], B[..., None], out=self.states[1 : q + 1])
        for t in range(q):
            self.token_states[t + 1].addcmul_(self.token_decays[t], self.token_states[t])


class _Gradients(_Block):
    """A block with a buffer for the gradients of the states after each token."""

    def __init__(self, A: Tensor, Q: int, batch: int) -> None:
        super().__init__(A, Q, batch)
        self.grads = torch.empty_like(self.decay)
        self.token_grads = self.grads.unbind()

    def run_back(self, dy: Tensor, C: Tensor, carried: Tensor) -> Tensor:
        """Fills the gradients from dy `[q, B, W]`, C and `carried`, the gradient of the state after
        the chunk through later tokens; returns them, `[q, B, N, W]`."""
        q = len(dy)
        grad = torch.mul(dy[:, :, None], C[..., None], out=self.grads[:q])
        self.token_grads[q - 1].add_(carried)
        for t in range(q - 1, 0, -1):
            self.token_grads[t - 1].addcmul_(self.token_decays[t], self.token_grads[t])
        return grad


class _SelectiveScan(torch.autograd.Function):
    """Saves its inputs and the state before each chunk; backward computes all else again.

    All floating inputs except x, dt, B and C are in at least fp32. `barrier` is added to the
    logarithms of the decays: 0, or −∞ where the previous token is of another document.
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
        state_passing: StatePassing | None,
    ) -> tuple[Tensor, Tensor]:
        transition = None
        if state_passing is not None:
            final, transition = _final_state_from_zeros(x, dt, A, B, barrier, Q)
            initial = _exchanged(state_passing.launch, state_passing.segments, final, transition)
        y, final, before = _scan(x, dt, A, B, C, D, initial, barrier, Q)
        ctx.save_for_backward(x, dt, A, B, C, D, barrier, before, transition)
        ctx.Q, ctx.state_passing = Q, state_passing
        if state_passing is not None:
            ctx.mark_non_differentiable(final)  # backward then gets zeros for its gradient
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, barrier, before, transition = ctx.saved_tensors
        passing = ctx.state_passing
        if passing is not None:
            dinitial = _initial_state_grad(dy, dt, A, C, barrier, ctx.Q)
            dfinal = _exchanged(passing.launch_backward, passing.segments, dinitial, transition)
        inputs = x, dt, A, B, C, D, barrier, before, ctx.Q
        dx, ddt, dA, dB, dC, dD, dinitial = _scan_gradients(dy, dfinal, *inputs)
        of_D = None if D is None else dD
        return dx, ddt, dA, dB.to(B.dtype), dC.to(C.dtype), of_D, dinitial, None, None, None


def _fake_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor,
    barrier: Tensor, Q: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    before = initial.new_empty(-(-len(x) // Q), *initial.shape)
    return x.new_empty(x.shape), torch.empty_like(initial), before


@opaque("selective_scan", _fake_scan)
def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor,
    barrier: Tensor, Q: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The outputs, the state after the last token, and that before each chunk, `[n, B, N, C]`."""
    chunks = _ranges(len(x), Q)
    y, final = x.new_empty(x.shape), torch.empty_like(initial)
    before = initial.new_empty(len(chunks), *initial.shape)
    with torch.inference_mode():  # the steps are so short that tracking views would cost time
        for c in _blocks(x, len(A)):
            block = _Block(A[:, c], Q, x.shape[1])
            state = initial[..., c]
            for i, s in enumerate(chunks):
                before[i, ..., c] = state
                x_s, dt_s = wide(x[s, :, c]), wide(dt[s, :, c])
                block.run(dt_s, dt_s * x_s, wide(B[s]), barrier[s], state)
                states = block.states[1 : len(x_s) + 1]
                state = states[-1]
                y_s = _sum_over_states(wide(C[s]), states)
                y[s, :, c] = y_s if D is None else y_s.addcmul_(x_s, D[c])
            final[..., c] = state
    return y, final, before


_SevenTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _fake_scan_gradients(
    dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, barrier: Tensor, before: Tensor, Q: int,
) -> _SevenTensors:  # fmt: skip
    dB, dC = (torch.empty(t.shape, dtype=A.dtype, device=A.device) for t in (B, C))
    dx, ddt, dinitial = x.new_empty(x.shape), dt.new_empty(dt.shape), dfinal.new_empty(dfinal.shape)
    return dx, ddt, torch.empty_like(A), dB, dC, A.new_empty(A.shape[1]), dinitial


@opaque("selective_scan_backward", _fake_scan_gradients)
def _scan_gradients(
    dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, barrier: Tensor, before: Tensor, Q: int,
) -> _SevenTensors:  # fmt: skip
    """Gradients of x, dt, A, B, C, D and the initial state; that of D is zeros where there is
    none."""
    chunks = list(enumerate(_ranges(len(x), Q)))
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dA, dinitial = torch.empty_like(A), before.new_empty(before.shape[1:])
    dB, dC = (torch.zeros(t.shape, dtype=A.dtype, device=A.device) for t in (B, C))
    dD = A.new_zeros(A.shape[1])
    with torch.inference_mode():
        for c in _blocks(x, len(A)):
            A_c = A[:, c]
            block = _Gradients(A_c, Q, x.shape[1])
            dA_tokens = torch.zeros_like(block.decay)  # summed over tokens at the end
            carried = dfinal[..., c]  # gradient through the tokens after the chunk
            for i, s in reversed(chunks):
                x_s, dt_s, B_s = wide(x[s, :, c]), wide(dt[s, :, c]), wide(B[s])
                dy_s, u, q = wide(dy[s, :, c]), dt_s * x_s, len(x_s)
                block.run(dt_s, u, B_s, barrier[s], before[i, ..., c])

                grad = block.run_back(dy_s, wide(C[s]), carried)

                dC[s] += _sum_over_channels(dy_s, block.states[1 : q + 1])
                dB[s] += _sum_over_channels(u, grad)
                du = _sum_over_states(B_s, grad)

                carried = grad.mul_(block.decay[:q])[0].clone()
                dlog = grad.mul_(block.states[:q])  # of dt·A, the logarithm of the decay
                dA_tokens[:q].addcmul_(dlog, dt_s[:, :, None])
                ddt[s, :, c] = dlog.mul_(A_c).sum(2).addcmul_(du, x_s)
                dx_s = du.mul_(dt_s)
                if D is not None:
                    dx_s.addcmul_(dy_s, D[c])
                    dD[c] += (dy_s * x_s).sum((0, 1))
                dx[s, :, c] = dx_s
            dA[:, c] = dA_tokens.sum((0, 1))
            dinitial[..., c] = carried
    return dx, ddt, dA, dB, dC, dD, dinitial


def _fake_final_state(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, barrier: Tensor, Q: int
) -> tuple[Tensor, Tensor]:
    final = A.new_empty(x.shape[1], *A.shape)
    return final, torch.empty_like(final)


@opaque("selective_scan_final_state", _fake_final_state)
def _final_state_from_zeros(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, barrier: Tensor, Q: int
) -> tuple[Tensor, Tensor]:
    """The state after the tokens when they start from zeros, and their transition: `[B, N, C]`."""
    total = dt.sum(0, dtype=A.dtype)
    transition = torch.addcmul(barrier.sum(0), total[:, None], A).exp_()
    final = torch.zeros_like(transition)
    with torch.inference_mode():
        for c in _blocks(x, len(A)):
            block, state = _Block(A[:, c], Q, x.shape[1]), final[..., c]
            for s in _ranges(len(x), Q):
                dt_s = wide(dt[s, :, c])
                block.run(dt_s, dt_s * wide(x[s, :, c]), wide(B[s]), barrier[s], state)
                state = block.states[len(dt_s)]
            final[..., c] = state
    return final, transition


def _fake_initial_state_grad(
    dy: Tensor, dt: Tensor, A: Tensor, C: Tensor, barrier: Tensor, Q: int
) -> Tensor:
    return A.new_empty(dy.shape[1], *A.shape)


@opaque("selective_scan_initial_state_grad", _fake_initial_state_grad)
def _initial_state_grad(
    dy: Tensor, dt: Tensor, A: Tensor, C: Tensor, barrier: Tensor, Q: int
) -> Tensor:
    """Gradient of the state before the tokens through their own outputs, `[B, N, C]`."""
    out = A.new_zeros(dy.shape[1], *A.shape)
    with torch.inference_mode():
        for c in _blocks(dy, len(A)):
            block, carried = _Gradients(A[:, c], Q, dy.shape[1]), out[..., c]
            for s in reversed(_ranges(len(dy), Q)):
                block.fill_decays(wide(dt[s, :, c]), barrier[s])
                grad = block.run_back(wide(dy[s, :, c]), wide(C[s]), carried)
                carried = grad[0] * block.token_decays[0]
            out[..., c] = carried
    return out


def _exchanged(
    launch: Callable[[Tensor, Tensor, bool], Wait], segments: int, state: Tensor, transition: Tensor
) -> Tensor:
    """Launches the exchange of states (or gradients) and transitions `[B, N, C]`, in which segments
    are rows of the batch, and waits for its result, of the same shape."""
    states, transitions = (t.unflatten(0, (segments, -1)) for t in (state, transition))
    return launch(states, transitions, False)().reshape(state.shape)


def _ranges(length: int, step: int) -> list[slice]:
    """Slices of at most `step` that cover `length`."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _blocks(x: Tensor, N: int) -> list[slice]:
    """Ranges of channels to process one after the other."""
    _, batch, channels = x.shape
    width = STEP // (batch * N) if x.device.type == "cpu" else channels
    return _ranges(channels, max(1, width))


def _sum_over_states(weights: Tensor, t: Tensor) -> Tensor:
    """Products of `[q, B, N]` and `[q, B, N, W]`, summed over N: `[q, B, W]`."""
    q, batch, N, W = t.shape
    return torch.bmm(weights.reshape(-1, 1, N), t.view(-1, N, W)).view(q, batch, W)


def _sum_over_channels(weights: Tensor, t: Tensor) -> Tensor:
    """Products of `[q, B, W]` and `[q, B, N, W]`, summed over W: `[q, B, N]`."""
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
    state_passing: StatePassing | None = None,
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
        state_passing: the tokens are its `segments` equal segments, which need not be adjacent in
            the sequence, and it gives the state before each, of its first token's document. The
            scan then runs twice: from zeros for each segment's final state, and from the true
            state. None: one segment.

    Returns:
        y `[S, B, C]` in x's dtype, and the state after the last token, `[B, C, N]` in at least
        fp32; with state_passing the states after each segment, `[segments, B, C, N]`, which have no
        gradient.

    Raises:
        ValueError: chunk < 1, the segments do not divide S, or both initial_state and state_passing
            are given.
    """
    if chunk < 1:
        raise ValueError(f"selective_scan: chunks of {chunk} tokens")
    if len(x) == 1 and state_passing is None:  # as in generation: a step has no chunks
        return selective_scan_recurrence(x, dt, A, B, C, D, initial_state=initial_state)
    if state_passing is not None:
        check_segments("selective_scan", len(x), state_passing, initial_state)
        segments = state_passing.segments
        x, dt, B, C = (segments_to_batch(t, segments) for t in (x, dt, B, C))
        documents = None if documents is None else segments_to_batch(documents, segments)
    S, batch, _ = x.shape
    dtype = wide_dtype(x.dtype)
    if initial_state is None:
        initial_state = torch.zeros(batch, *A.shape, dtype=dtype, device=x.device)
    barrier = torch.zeros(S, batch, 1, 1, dtype=dtype, device=x.device)
    if documents is not None:
        new_document = documents[1:] != documents[:-1]
        barrier[1:].masked_fill_(new_document[..., None, None], -torch.inf)
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
        state_passing,
    )
    final = final.transpose(1, 2).contiguous()
    if state_passing is None:
        return y, final
    return batch_to_segments(y, segments), final.unflatten(0, (segments, -1))


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
