"""S4D, the diagonal linear state space (arXiv:2206.11893): a scan by chunks, and a recurrence.

Shape letters: S sequence, B batch, C channels, N complex state pairs, n chunks of Q tokens, P
spans, W channels of a block. Complex states and factors are real tensors, their last dimension 2.

A channel's system is the same at every token, so three matrix products compute a chunk: one with a
Toeplitz matrix of its kernel convolves the tokens, one adds them to the state, and one reads the
state before the chunk. A span is the tokens of one document in one chunk. Each span is a row of
these products, with zeros outside its document, so that no masks and no differences are needed: a
chunk within one document is one row, and every document that begins within a chunk adds one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.opaque import opaque
from colonnade.kernels.precision import wide, wide_dtype
from colonnade.kernels.segments import Chunking, StatePassing, Wait

# Elements of a block of channels in each of its largest tensors, of which a few live at once.
BLOCK = 2**20


class _Parameters(NamedTuple):
    """Real parameters of some channels, in at least fp32."""

    dt: Tensor  # [C]
    A_real: Tensor  # [C, N]
    A_imag: Tensor
    C_real: Tensor
    C_imag: Tensor
    D: Tensor  # [C]


class _Tables(NamedTuple):
    """The real factors of the matrix products of a chunk of Q tokens."""

    kernel: Tensor  # [W, Q] of the convolution, which includes the direct path D
    write: Tensor  # [W, Q, 2N] from each token to the state after Q tokens
    read: Tensor  # [W, Q, 2N] from the state before a chunk to each token's output
    factors: Tensor  # [2, W, 1, N, 2] of the state over Q tokens, and over the last chunk's tokens


def _tables(p: _Parameters, Q: int, length: int) -> _Tables:
    """Computes the tables of a block of channels, whose last chunk has `length` tokens.

    Powers use real functions, which are faster on CPU than PyTorch's complex exponential.
    """
    dt_A, B = _zero_order_hold(p)
    exponents = torch.arange(Q + 1, device=dt_A.device)[:, None]
    log_size, angle = (exponents * component[:, None] for component in (dt_A.real, dt_A.imag))
    powers = torch.polar(log_size.exp(), angle)  # [W, Q + 1, N]
    C = 2 * torch.complex(p.C_real, p.C_imag)[:, None]
    impulse = B[:, None] * powers[:, :Q]  # the state t tokens after an input of 1
    kernel = (C * impulse).sum(-1).real + F.pad(p.D[:, None], (0, Q - 1))
    read = (C * powers[:, 1:]).conj().resolve_conj()
    write, read = (torch.view_as_real(t).flatten(2) for t in (impulse.flip(1), read))
    factors = torch.view_as_real(torch.stack([powers[:, Q, None], powers[:, length, None]]))
    return _Tables(kernel, write, read, factors)


def _zero_order_hold(p: _Parameters) -> tuple[Tensor, Tensor]:
    """Computes Δ A and B̄ = (exp(Δ A) − 1) / A, `[W, N]`, complex.

    PyTorch's derivative of expm1 is expm1 + 1, which is noise where the exponential vanishes.
    """
    A = torch.complex(p.A_real, p.A_imag)
    dt_A = p.dt[:, None] * A
    return dt_A, torch.where(dt_A.real < -1, dt_A.exp() - 1, dt_A.expm1()) / A


@dataclass(frozen=True)
class _Spans:
    """Maps tokens `[n, Q, B]` to spans `[P, Q]`; a token keeps its position in the chunk.

    The first n·B spans begin chunks, the others begin within one. `index` and `last` are None where
    every chunk is one span.

    Attributes:
        length: tokens of the last chunk; zeros pad it to Q.
        count: spans P.
        continues: `[n, B, 1]` 1 where a chunk begins with the document of the token before, else 0.
        undivided: `[n, B, 1]` 1 where a chunk is one span, else 0.
        index: `[n·B·Q]` index of each token in `[P·Q]`.
        last: `[n·B]` index of the span that ends each chunk.
    """

    n: int
    Q: int
    B: int
    length: int
    count: int
    continues: Tensor
    undivided: Tensor
    index: Tensor | None = None
    last: Tensor | None = None

    def from_tokens(self, t: Tensor) -> Tensor:
        """`[n, Q, B, W]` -> `[W, P, Q]`, in at least fp32, zeros where a span has no token."""
        t = wide(t.permute(3, 0, 2, 1).contiguous()).view(t.shape[-1], -1)
        if self.index is not None:
            t = t.new_zeros(len(t), self.count * self.Q).index_copy_(1, self.index, t)
        return t.view(len(t), self.count, self.Q)

    def to_tokens(self, t: Tensor) -> Tensor:
        """`[W, P, Q]` -> `[n, Q, B, W]`."""
        t = t.flatten(1) if self.index is None else t.flatten(1).index_select(1, self.index)
        return t.view(-1, self.n, self.B, self.Q).permute(1, 3, 2, 0)

    def chunk_ends(self, t: Tensor) -> Tensor:
        """Selects from `[W, P, Q]` the span that ends each chunk: `[W, n·B, Q]`, padding first."""
        ends = t if self.last is None else t.index_select(1, self.last)
        return self.roll_last_chunk(ends, self.Q - self.length)

    def add_chunk_ends(self, spans: Tensor, t: Tensor) -> None:
        """The transpose of `chunk_ends`: adds `[W, n·B, Q]` to `spans` `[W, P, Q]`, in place."""
        t = self.roll_last_chunk(t, self.length - self.Q)
        if self.last is None:
            spans.add_(t)
        else:
            spans.index_add_(1, self.last, t)

    def roll_last_chunk(self, t: Tensor, shift: int) -> Tensor:
        """Rolls the last chunk of `[W, n·B, Q]` along Q, in a copy."""
        if shift == 0:
            return t
        t = t.clone()
        t[:, -self.B :] = t[:, -self.B :].roll(shift, -1)
        return t


def _spans(n: int, Q: int, B: int, length: int, documents: Tensor | None, like: Tensor) -> _Spans:
    """The spans of tokens whose documents are `[n, Q, B]`; masks have the dtype of `like`."""
    if documents is None:
        ones = like.new_ones(n, B, 1)
        return _Spans(n, Q, B, length, n * B, ones, ones)
    d = documents.transpose(1, 2)  # [n, B, Q]
    begins = F.pad(d[..., 1:] != d[..., :-1], (1, 0))
    number, begun = begins.cumsum(-1), begins.flatten().cumsum(0).view_as(begins)
    same = F.pad(d[1:, :, 0] == d[:-1, :, -1], (0, 0, 1, 0), value=True)
    continues, undivided = (t[..., None].to(like.dtype) for t in (same, number[..., -1] == 0))
    count = n * B + int(begun[-1, -1, -1])
    if count == n * B:
        return _Spans(n, Q, B, length, count, continues, undivided)
    first = torch.arange(n * B, device=d.device).view(n, B, 1)
    span = torch.where(number == 0, first, n * B - 1 + begun)  # [n, B, Q] of each token
    index = (span * Q + torch.arange(Q, device=d.device)).flatten()
    return _Spans(n, Q, B, length, count, continues, undivided, index, span[..., -1].flatten())


def _toeplitz(kernel: Tensor) -> Tensor:
    """`[W, Q]` -> `[W, Q, Q]`: from token s (rows) to token t the kernel at t − s, 0 where t < s.

    Concatenates Q rows, each the kernel and Q zeros, and views them as rows shorter by one element.
    """
    W, Q = kernel.shape
    flat = F.pad(kernel, (0, Q))[:, None].expand(W, Q, 2 * Q).flatten(1)
    return flat[:, :-Q].view(W, Q, 2 * Q - 1)[..., :Q]


def _diagonal_sums(t: Tensor) -> Tensor:
    """The transpose of `_toeplitz`: sums `[W, Q, Q]` over its diagonals, to `[W, Q]`."""
    W, Q, _ = t.shape
    flat = F.pad(F.pad(t, (0, Q - 1)).flatten(1), (0, Q))
    return flat.view(W, Q, 2 * Q).sum(1)[:, :Q]


def _states(
    inputs: Tensor, tables: _Tables, spans: _Spans, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the state before each chunk, `[W, n, B, N, 2]`, and after all, `[W, B, N, 2]`.

    `inputs` `[W, P, Q]`; `initial` `[W, B, N, 2]` is the state before the first chunk.
    """
    added = torch.bmm(spans.chunk_ends(inputs), tables.write)
    added = added.view(-1, spans.n, *initial.shape[1:])
    return _run(added, initial, tables.factors, spans.continues, spans.undivided)


@opaque("s4d_chunks", lambda added, initial, *_: (torch.empty_like(added), initial.clone()))
def _run(
    added: Tensor, initial: Tensor, factors: Tensor, continues: Tensor, undivided: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of `_states` over the chunks; `added` is what each adds to the state."""
    before, state = torch.empty_like(added), torch.view_as_complex(initial)
    additions, states = (torch.view_as_complex(t).unbind(1) for t in (added, before))
    full_chunk, last_chunk = torch.view_as_complex(factors)
    for i in range(len(states)):
        torch.mul(state, continues[i], out=states[i])
        factor = last_chunk if i == len(states) - 1 else full_chunk
        state = torch.addcmul(additions[i], states[i] * undivided[i], factor)
    return before, torch.view_as_real(state)


def _states_backward(
    first: Tensor, tables: _Tables, spans: _Spans, dfinal: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes gradients of the state after each chunk, `[W, n, B, N, 2]`, and before the first.

    `first` `[W, n·B, Q]` is the gradient of the outputs in spans that begin chunks, `dfinal`
    `[W, B, N, 2]` that of the state after the last chunk.
    """
    read = torch.bmm(first, tables.read).view(-1, spans.n, *dfinal.shape[1:])
    return _run_backward(read, dfinal, tables.factors, spans.continues, spans.undivided)


@opaque("s4d_chunks_backward", lambda read, dfinal, *_: (torch.empty_like(read), dfinal.clone()))
def _run_backward(
    read: Tensor, dfinal: Tensor, factors: Tensor, continues: Tensor, undivided: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of `_states_backward` over the chunks, from the last to the first."""
    after, grad = torch.empty_like(read), torch.view_as_complex(dfinal)
    reads, grads = (torch.view_as_complex(t).unbind(1) for t in (read, after))
    full_chunk, last_chunk = torch.view_as_complex(factors).conj()
    for i in reversed(range(len(grads))):
        grads[i].copy_(grad)
        factor = last_chunk if i == len(grads) - 1 else full_chunk
        grad = torch.addcmul(reads[i], grad * undivided[i], factor) * continues[i]
    return after, torch.view_as_real(grad)


def _factors_grad(before: Tensor, after: Tensor, spans: _Spans) -> Tensor:
    """The gradient of `factors`, from states before chunks and gradients of those after them."""
    state, grad = map(torch.view_as_complex, (before, after))
    each = (grad * spans.undivided * state.conj()).sum(2, keepdim=True)
    return torch.view_as_real(torch.stack([each[:, :-1].sum(1), each[:, -1]]))


class _S4D(torch.autograd.Function):
    """Saves its inputs and the state before each chunk; backward computes all else again.

    The products with tokens have gradients written by hand, because autograd would save their
    factors. The tables depend on no token, and autograd differentiates them within backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [n, Q, B, C]
        initial: Tensor,  # [C, B, N, 2]
        spans: _Spans,
        state_passing: StatePassing | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        system = _Parameters(*parameters)
        if state_passing is not None:
            from_zeros = torch.empty_like(initial)
            for c, block in _blocks(system, spans):
                tables = _tables(block, spans.Q, spans.length)
                inputs, zeros = spans.from_tokens(x[..., c]), torch.zeros_like(initial[c])
                from_zeros[c] = _states(inputs, tables, spans, zeros)[1]
            launch, transition = state_passing.launch, _transition(system, spans)
            initial = _exchanged(launch, state_passing.segments, from_zeros, transition)
        y, final = x.new_empty(x.shape), torch.empty_like(initial)
        before = initial.new_empty(len(initial), spans.n, *initial.shape[1:])
        for c, block in _blocks(system, spans):
            tables, inputs = _tables(block, spans.Q, spans.length), spans.from_tokens(x[..., c])
            before[c], final[c] = _states(inputs, tables, spans, initial[c])
            out = torch.bmm(inputs, _toeplitz(tables.kernel))
            states = before[c].flatten(1, 2).flatten(2)  # [W, n·B, 2N]
            out[:, : states.shape[1]].baddbmm_(states, tables.read.mT)  # spans that begin chunks
            y[..., c] = spans.to_tokens(out)
        ctx.save_for_backward(x, before, *parameters)
        ctx.spans, ctx.state_passing = spans, state_passing
        if state_passing is not None:
            ctx.mark_non_differentiable(final)  # backward then gets zeros for its gradient
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, before, *parameters = ctx.saved_tensors
        spans: _Spans = ctx.spans
        system, begin_chunks = _Parameters(*parameters), slice(spans.n * spans.B)
        if ctx.state_passing is not None:
            local = torch.zeros_like(dfinal)  # gradient through each segment's own outputs
            for c, block in _blocks(system, spans):
                tables = _tables(block, spans.Q, spans.length)
                first = spans.from_tokens(dy[..., c])[:, begin_chunks]
                local[c] = _states_backward(first, tables, spans, local[c])[1]
            launch, transition = ctx.state_passing.launch_backward, _transition(system, spans)
            dfinal = _exchanged(launch, ctx.state_passing.segments, local, transition)
        dx, dinitial = x.new_empty(x.shape), torch.empty_like(dfinal)
        dsystem = _Parameters(*(torch.empty_like(p) for p in system))
        for c, block in _blocks(system, spans):
            with torch.enable_grad():
                leaves = _Parameters(*(p.detach().requires_grad_() for p in block))
                graph = _tables(leaves, spans.Q, spans.length)
            tables = _Tables(*(t.detach() for t in graph))
            inputs, grads = spans.from_tokens(x[..., c]), spans.from_tokens(dy[..., c])
            first, states = grads[:, begin_chunks], before[c].flatten(1, 2).flatten(2)
            after, dinitial[c] = _states_backward(first, tables, spans, dfinal[c])
            dadded = after.flatten(1, 2).flatten(2)
            dinputs = torch.bmm(grads, _toeplitz(tables.kernel).mT)
            spans.add_chunk_ends(dinputs, torch.bmm(dadded, tables.write.mT))
            dx[..., c] = spans.to_tokens(dinputs)
            dkernel = _diagonal_sums(torch.bmm(inputs.mT, grads))
            dwrite = torch.bmm(spans.chunk_ends(inputs).mT, dadded)
            dread = torch.bmm(first.mT, states)
            dtables = dkernel, dwrite, dread, _factors_grad(before[c], after, spans)
            for d, grad in zip(dsystem, torch.autograd.grad(graph, leaves, dtables), strict=True):
                d[c] = grad
        return dx, dinitial, None, None, *dsystem


def _blocks(p: _Parameters, spans: _Spans) -> Iterator[tuple[slice, _Parameters]]:
    """Ranges of channels to process one after the other, with their parameters."""
    channels, N = p.A_real.shape
    width = max(1, BLOCK // (spans.Q * max(spans.count, spans.Q, 2 * N)))
    for start in range(0, channels, width):
        c = slice(start, min(start + width, channels))
        yield c, _Parameters(*(t[c] for t in p))


def _transition(p: _Parameters, spans: _Spans) -> Tensor:
    """Transitions of the segments, `[B, C·N, 2, 2]`: a factor a + bi has rows (a, −b), (b, a)."""
    tokens = (spans.n - 1) * spans.Q + spans.length
    factor = torch.exp(_zero_order_hold(p)[0] * tokens).flatten()
    a, b = factor.real, factor.imag
    one_document = (spans.continues * spans.undivided).prod(0)  # [B, 1]
    return torch.stack([a, -b, b, a], -1).view(-1, 2, 2) * one_document[..., None, None]


def _exchanged(
    launch: Callable[[Tensor, Tensor, bool], Wait], segments: int, state: Tensor, transition: Tensor
) -> Tensor:
    """Launches the exchange of states (or gradients) `[C, B, N, 2]` and transitions, in which
    segments are rows of the batch, and waits for its result, of the same shape."""
    C, B, N, _ = state.shape
    states = state.transpose(0, 1).reshape(segments, -1, C * N, 2, 1)
    before = launch(states, transition.unflatten(0, (segments, -1)), True)()
    return before.reshape(B, C, N, 2).transpose(0, 1).contiguous()


# The tables are complex and the number of spans depends on the documents: neither can be compiled.
@torch.compiler.disable
def s4d(
    x: Tensor, dt: Tensor, A_real: Tensor, A_imag: Tensor, C_real: Tensor, C_imag: Tensor,
    D: Tensor, *, chunk: int, documents: Tensor | None = None,
    initial_state: Tensor | None = None, state_passing: StatePassing | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scans by chunks: state_t = Ā state_{t-1} + B̄ x_t;  y_t = 2 Re(Σ_n C_n state_{t,n}) + D x_t.

    A, C and states are complex; Ā = exp(dt A) and B̄ = (Ā − 1) / A, the zero-order hold of a system
    with B = 1 (arXiv:2206.11893, section 3). The factor 2 stands for the conjugate of each pair.
    Work and memory are linear in S; the inputs and one state per chunk are saved for backward. All
    computation is in at least fp32, whatever the inputs' dtype.

    Args:
        x: `[S, B, C]`, fp64, fp32 or bf16. S need not be a multiple of the chunk.
        dt: `[C]`, step sizes, not negative.
        A_real, A_imag: `[C, N]`, real part, negative, and imaginary part of A.
        C_real, C_imag: `[C, N]`, weights of the states in the output.
        D: `[C]`, weight of the direct path.
        chunk: tokens per chunk, at least 1; changes speed and memory, not the function.
        documents: `[S, B]` integers, constant within a document; states do not cross documents.
            Every document that begins within a chunk adds the work and memory of one chunk.
        initial_state: `[B, C, N, 2]`, real and imaginary part, before the first token and of its
            document; None: zeros.
        state_passing: the tokens are `segments` equal segments, not adjacent to each other, and it
            gives the state before each, of its first token's document. States are computed twice:
            from zeros, and from the true initial state. None: one segment.

    Returns:
        y `[S, B, C]` in x's dtype, and the state after the last token, `[B, C, N, 2]` in at least
        fp32; with state_passing those after each segment, `[segments, B, C, N, 2]`, without
        gradient.

    Raises:
        ValueError: chunk < 1, S tokens are not equal segments, or initial_state and state_passing
            (which gives the states) are both given.
    """
    if chunk < 1:
        raise ValueError(f"s4d: chunks of {chunk} tokens")
    dtype = wide_dtype(x.dtype)
    parameters = _Parameters(*(t.to(dtype) for t in (dt, A_real, A_imag, C_real, C_imag, D)))
    if len(x) == 1 and state_passing is None:  # as in generation: a step has no chunks
        return s4d_recurrence(x, *parameters, initial_state=initial_state)
    chunks = Chunking("s4d", len(x), chunk, state_passing, initial_state)
    batch = chunks.segments * x.shape[1]
    if initial_state is None:
        initial_state = torch.zeros(batch, *A_real.shape, 2, dtype=dtype, device=x.device)
    ids = None if documents is None else chunks.to_chunks(documents, repeat_last=True)
    spans = _spans(chunks.n, chunks.Q, batch, chunks.Q - chunks.padding, ids, parameters.dt)
    initial = initial_state.to(dtype).transpose(0, 1).contiguous()
    y, final = _S4D.apply(chunks.to_chunks(x), initial, spans, state_passing, *parameters)
    final = final.transpose(0, 1).contiguous()
    if state_passing is not None:
        final = final.unflatten(0, (state_passing.segments, -1))
    return chunks.to_tokens(y), final


def s4d_recurrence(
    x: Tensor, dt: Tensor, A_real: Tensor, A_imag: Tensor, C_real: Tensor, C_imag: Tensor,
    D: Tensor, *, documents: Tensor | None = None, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes `s4d` by its formula, token by token."""
    batch, dtype = x.shape[1], A_real.dtype
    A, C = torch.complex(A_real, A_imag), torch.complex(C_real, C_imag)
    decay = torch.exp(dt[:, None] * A)
    B = (decay - 1) / A
    state = torch.zeros(batch, *A.shape, dtype=A.dtype, device=x.device)
    if initial_state is not None:
        state = torch.view_as_complex(initial_state.to(dtype))
    outputs = []
    for t, x_t in enumerate(wide(x).unbind()):
        if documents is not None and t > 0:
            same = documents[t] == documents[t - 1]
            state = torch.where(same[:, None, None], state, 0)
        state = decay * state + B * x_t[..., None]
        outputs.append(2 * (C * state).sum(-1).real + D * x_t)
    return torch.stack(outputs).to(x.dtype), torch.view_as_real(state)
