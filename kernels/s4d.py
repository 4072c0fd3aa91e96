"""S4D, the diagonal linear state space (arXiv:2206.11893): products by chunk, and a recurrence.

Shape letters: S sequence, B batch, C channels, N complex state pairs, n chunks of Q tokens, P
pieces, W channels of a block. Complex states and factors are real tensors, their last dimension 2.

A channel's system is the same at every token, so a chunk's outputs are one product with a Toeplitz
matrix of its kernel, and so are what its tokens write into the state and what they read of it. A
piece is what a chunk holds of one document. Each piece is a row of these products, zero outside its
document, so that no masks and no differences are needed: a chunk within one document is one row,
and every document that begins within a chunk adds one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.precision import wide, wide_dtype
from colonnade.kernels.segments import Chunking, StatePassing, Wait

# Elements of a block of channels, for each of a few tensors that live at the same time.
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
    """What a chunk of Q tokens is multiplied by; all real."""

    kernel: Tensor  # [W, Q] of the convolution, the direct path D in it
    write: Tensor  # [W, Q, 2N] from each token to the state after Q tokens
    read: Tensor  # [W, Q, 2N] from the state before a chunk to each token's output
    factors: Tensor  # [2, W, 1, N, 2] of the state, over Q tokens and over the last chunk's


def _tables(p: _Parameters, Q: int, length: int) -> _Tables:
    """The tables of a block of channels, whose last chunk has `length` tokens.

    Powers are made of real functions, faster on CPU than PyTorch's complex exponential.
    """
    step, B = _zero_order_hold(p)
    exponents = torch.arange(Q + 1, device=step.device)[:, None]
    size, angle = (exponents * part[:, None] for part in (step.real, step.imag))
    powers = torch.polar(size.exp(), angle)  # [W, Q + 1, N]
    C = 2 * torch.complex(p.C_real, p.C_imag)[:, None]
    written = B[:, None] * powers[:, :Q]
    kernel = (C * written).sum(-1).real + F.pad(p.D[:, None], (0, Q - 1))
    read = (C * powers[:, 1:]).conj().resolve_conj()
    write, read = (torch.view_as_real(t).flatten(2) for t in (written.flip(1), read))
    factors = torch.view_as_real(torch.stack([powers[:, Q, None], powers[:, length, None]]))
    return _Tables(kernel, write, read, factors)


def _zero_order_hold(p: _Parameters) -> tuple[Tensor, Tensor]:
    """Δ A and B̄ = (exp(Δ A) − 1) / A, `[W, N]`, complex.

    PyTorch takes expm1's derivative for expm1 + 1, which is noise where the exponential vanishes.
    """
    A = torch.complex(p.A_real, p.A_imag)
    step = p.dt[:, None] * A
    return step, torch.where(step.real < -1, step.exp() - 1, step.expm1()) / A


@dataclass(frozen=True)
class _Pieces:
    """How tokens `[n, Q, B]` stand in pieces: rows `[P, Q]`, each at its position in the chunk.

    Rows 0 to n·B are the pieces with which chunks begin, the others begin within a chunk. None for
    `at` and `last`: every chunk is one piece.

    Attributes:
        length: tokens of the last chunk; those behind them are zeros.
        count: pieces P.
        at: `[n·B·Q]` index of each token in `[P·Q]`.
        last: `[n·B]` the piece with which each chunk ends.
        enters: `[n, B, 1]` 1 where the document before a chunk goes on in it, else 0.
        stays: `[n, B, 1]` 1 where a chunk is one piece, else 0.
    """

    n: int
    Q: int
    B: int
    length: int
    count: int
    enters: Tensor
    stays: Tensor
    at: Tensor | None = None
    last: Tensor | None = None

    def rows(self, t: Tensor) -> Tensor:
        """`[n, Q, B, W]` -> `[W, P, Q]`, wide, with zeros where a piece has no token."""
        t = wide(t.permute(3, 0, 2, 1).contiguous()).view(t.shape[-1], -1)
        if self.at is not None:
            spread = t.new_zeros(len(t), self.count * self.Q)
            t = spread.index_copy_(1, self.at, t)
        return t.view(len(t), self.count, self.Q)

    def tokens(self, t: Tensor) -> Tensor:
        """Back: `[W, P, Q]` -> `[n, Q, B, W]`."""
        t = t.flatten(1) if self.at is None else t.flatten(1).index_select(1, self.at)
        return t.view(-1, self.n, self.B, self.Q).permute(1, 3, 2, 0)

    def ends(self, t: Tensor) -> Tensor:
        """Of pieces `[W, P, Q]` those that end chunks, `[W, n·B, Q]`, their last token last."""
        ends = t if self.last is None else t.index_select(1, self.last)
        return self.shifted(ends, self.Q - self.length)

    def add_ends(self, pieces: Tensor, t: Tensor) -> None:
        """The transpose of `ends`: add `[W, n·B, Q]` to pieces `[W, P, Q]`."""
        t = self.shifted(t, self.length - self.Q)
        if self.last is None:
            pieces.add_(t)
        else:
            pieces.index_add_(1, self.last, t)

    def shifted(self, t: Tensor, by: int) -> Tensor:
        """`[W, n·B, Q]` with the rows of the last chunk rolled."""
        if by == 0:
            return t
        t = t.clone()
        t[:, -self.B :] = t[:, -self.B :].roll(by, -1)
        return t


def _pieces(n: int, Q: int, B: int, length: int, documents: Tensor | None, like: Tensor) -> _Pieces:
    """Pieces of tokens whose documents are `[n, Q, B]`; masks are of the dtype of `like`."""
    if documents is None:
        ones = like.new_ones(n, B, 1)
        return _Pieces(n, Q, B, length, n * B, ones, ones)
    d = documents.transpose(1, 2)  # [n, B, Q]
    begins = F.pad(d[..., 1:] != d[..., :-1], (1, 0))
    number, begun = begins.cumsum(-1), begins.flatten().cumsum(0).view_as(begins)
    goes_on = F.pad(d[1:, :, 0] == d[:-1, :, -1], (0, 0, 1, 0), value=True)
    enters, stays = (t[..., None].to(like.dtype) for t in (goes_on, number[..., -1] == 0))
    count = n * B + int(begun[-1, -1, -1])
    if count == n * B:
        return _Pieces(n, Q, B, length, count, enters, stays)
    first = torch.arange(n * B, device=d.device).view(n, B, 1)
    piece = torch.where(number == 0, first, n * B - 1 + begun)
    at = (piece * Q + torch.arange(Q, device=d.device)).flatten()
    return _Pieces(n, Q, B, length, count, enters, stays, at, piece[..., -1].flatten())


def _toeplitz(kernel: Tensor) -> Tensor:
    """`[W, Q]` -> `[W, Q, Q]`: from token s (rows) to token t the kernel at t − s, 0 where t < s.

    Rows of the kernel and Q zeros, laid end to end, are read in rows that are shorter by one.
    """
    W, Q = kernel.shape
    laid = F.pad(kernel, (0, Q))[:, None].expand(W, Q, 2 * Q).flatten(1)
    return laid[:, :-Q].view(W, Q, 2 * Q - 1)[..., :Q]


def _of_diagonals(t: Tensor) -> Tensor:
    """The transpose of `_toeplitz`: sums over the diagonals of `[W, Q, Q]`, `[W, Q]`."""
    W, Q, _ = t.shape
    laid = F.pad(F.pad(t, (0, Q - 1)).flatten(1), (0, Q))
    return laid.view(W, Q, 2 * Q).sum(1)[:, :Q]


def _states(
    arrived: Tensor, tables: _Tables, pieces: _Pieces, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, `[W, n, B, N, 2]`, and after the last one, `[W, B, N, 2]`.

    `arrived` `[W, n·B, 2N]` is what each chunk's last piece writes; `initial` `[W, B, N, 2]`.
    """
    arrived = arrived.view(-1, pieces.n, *initial.shape[1:])
    before, state = torch.empty_like(arrived), torch.view_as_complex(initial)
    writes, kept = (torch.view_as_complex(t).unbind(1) for t in (arrived, before))
    whole, rest = torch.view_as_complex(tables.factors)
    for i in range(pieces.n):
        torch.mul(state, pieces.enters[i], out=kept[i])
        factor = rest if i == pieces.n - 1 else whole
        state = torch.addcmul(writes[i], kept[i] * pieces.stays[i], factor)
    return before, torch.view_as_real(state)


def _states_back(
    read: Tensor, tables: _Tables, pieces: _Pieces, dfinal: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the state after each chunk, `[W, n, B, N, 2]`, and before the first.

    `read` `[W, n·B, 2N]` is that of the state before each chunk through its own outputs; `dfinal`
    that of the state after the last one.
    """
    read = read.view(-1, pieces.n, *dfinal.shape[1:])
    after, grad = torch.empty_like(read), torch.view_as_complex(dfinal)
    reads, kept = (torch.view_as_complex(t).unbind(1) for t in (read, after))
    whole, rest = torch.view_as_complex(tables.factors).conj()
    for i in reversed(range(pieces.n)):
        kept[i].copy_(grad)
        factor = rest if i == pieces.n - 1 else whole
        back = torch.addcmul(reads[i], grad * pieces.stays[i], factor)
        grad = back * pieces.enters[i]
    return after, torch.view_as_real(grad)


def _of_factors(before: Tensor, after: Tensor, pieces: _Pieces) -> Tensor:
    """Gradient of the table `factors`, from states and their gradients `[W, n, B, N, 2]`."""
    kept, grad = torch.view_as_complex(before), torch.view_as_complex(after)
    each = (grad * pieces.stays * kept.conj()).sum(2, keepdim=True)
    return torch.view_as_real(torch.stack([each[:, :-1].sum(1), each[:, -1]]))


class _S4D(torch.autograd.Function):
    """Keeps its inputs and the state before each chunk; backward computes the rest again.

    What meets tokens has its gradient by hand, because autograd would keep every product's factors.
    The tables, which no token changes, are differentiated by autograd within backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [n, Q, B, C]
        initial: Tensor,  # [C, B, N, 2]
        pieces: _Pieces,
        state_passing: StatePassing | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        system = _Parameters(*parameters)
        if state_passing is not None:
            left = torch.empty_like(initial)
            for c, block in _blocks(system, pieces):
                tables = _tables(block, pieces.Q, pieces.length)
                arrived = torch.bmm(pieces.ends(pieces.rows(x[..., c])), tables.write)
                left[c] = _states(arrived, tables, pieces, torch.zeros_like(initial[c]))[1]
            kept = _transition(system, pieces)
            initial = _exchanged(state_passing.launch, state_passing.segments, left, kept)
        y, final = x.new_empty(x.shape), torch.empty_like(initial)
        before = initial.new_empty(len(initial), pieces.n, *initial.shape[1:])
        for c, block in _blocks(system, pieces):
            tables, rows = _tables(block, pieces.Q, pieces.length), pieces.rows(x[..., c])
            arrived = torch.bmm(pieces.ends(rows), tables.write)
            before[c], final[c] = _states(arrived, tables, pieces, initial[c])
            out = torch.bmm(rows, _toeplitz(tables.kernel))
            entered = before[c].flatten(1, 2).flatten(2)
            out[:, : entered.shape[1]].baddbmm_(entered, tables.read.mT)
            y[..., c] = pieces.tokens(out)
        ctx.save_for_backward(x, before, *parameters)
        ctx.pieces, ctx.state_passing = pieces, state_passing
        if state_passing is not None:
            ctx.mark_non_differentiable(final)  # backward then gets zeros for its gradient
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, before, *parameters = ctx.saved_tensors
        pieces: _Pieces = ctx.pieces
        system, entering = _Parameters(*parameters), pieces.n * pieces.B
        if ctx.state_passing is not None:
            through = torch.zeros_like(dfinal)
            for c, block in _blocks(system, pieces):
                tables = _tables(block, pieces.Q, pieces.length)
                read = torch.bmm(pieces.rows(dy[..., c])[:, :entering], tables.read)
                through[c] = _states_back(read, tables, pieces, through[c])[1]
            launch, kept = ctx.state_passing.launch_backward, _transition(system, pieces)
            dfinal = _exchanged(launch, ctx.state_passing.segments, through, kept)
        dx, dinitial = x.new_empty(x.shape), torch.empty_like(dfinal)
        dsystem = _Parameters(*(torch.empty_like(p) for p in system))
        for c, block in _blocks(system, pieces):
            with torch.enable_grad():
                leaves = _Parameters(*(p.detach().requires_grad_() for p in block))
                graph = _tables(leaves, pieces.Q, pieces.length)
            tables = _Tables(*(t.detach() for t in graph))
            rows, drows = pieces.rows(x[..., c]), pieces.rows(dy[..., c])
            first, entered = drows[:, :entering], before[c].flatten(1, 2).flatten(2)
            read = torch.bmm(first, tables.read)
            after, dinitial[c] = _states_back(read, tables, pieces, dfinal[c])
            written = after.flatten(1, 2).flatten(2)
            back = torch.bmm(drows, _toeplitz(tables.kernel).mT)
            pieces.add_ends(back, torch.bmm(written, tables.write.mT))
            dx[..., c] = pieces.tokens(back)
            dkernel = _of_diagonals(torch.bmm(rows.mT, drows))
            dwrite, dread = torch.bmm(pieces.ends(rows).mT, written), torch.bmm(first.mT, entered)
            dtables = dkernel, dwrite, dread, _of_factors(before[c], after, pieces)
            found = torch.autograd.grad(graph, leaves, dtables)
            for whole, part in zip(dsystem, found, strict=True):
                whole[c] = part
        return dx, dinitial, None, None, *dsystem


def _blocks(p: _Parameters, pieces: _Pieces) -> Iterator[tuple[slice, _Parameters]]:
    """Ranges of channels that are worked on together, with their parameters."""
    channels, N = p.A_real.shape
    width = max(1, BLOCK // (pieces.Q * max(pieces.count, pieces.Q, 2 * N)))
    for start in range(0, channels, width):
        c = slice(start, min(start + width, channels))
        yield c, _Parameters(*(t[c] for t in p))


def _transition(p: _Parameters, pieces: _Pieces) -> Tensor:
    """What each row's tokens make of the state before them: `[B, C·N, 2, 2]`, from the left.

    A product with a + bi is one with the matrix of rows (a, −b) and (b, a).
    """
    tokens = (pieces.n - 1) * pieces.Q + pieces.length
    factor = torch.exp(_zero_order_hold(p)[0] * tokens).flatten()
    a, b = factor.real, factor.imag
    goes_on = (pieces.enters * pieces.stays).prod(0)  # [B, 1]
    return torch.stack([a, -b, b, a], -1).view(-1, 2, 2) * goes_on[..., None, None]


def _exchanged(
    launch: Callable[[Tensor, Tensor, bool], Wait], segments: int, state: Tensor, transition: Tensor
) -> Tensor:
    """What segments, rows of the batch, get for their states `[C, B, N, 2]` and transitions."""
    C, B, N, _ = state.shape
    sent = state.transpose(0, 1).reshape(segments, -1, C * N, 2, 1)
    found = launch(sent, transition.unflatten(0, (segments, -1)), True)()
    return found.reshape(B, C, N, 2).transpose(0, 1).contiguous()


# The tables are complex and the pieces' number depends on the documents: neither can be compiled.
@torch.compiler.disable
def s4d(
    x: Tensor, dt: Tensor, A_real: Tensor, A_imag: Tensor, C_real: Tensor, C_imag: Tensor,
    D: Tensor, *, chunk: int, documents: Tensor | None = None,
    initial_state: Tensor | None = None, state_passing: StatePassing | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """state_t = Ā state_{t-1} + B̄ x_t;  y_t = 2 Re(Σ_n C_n state_{t,n}) + D x_t, by chunks.

    A, C and states are complex; Ā = exp(dt A) and B̄ = (Ā − 1) / A, the zero-order hold of a system
    with B = 1 (arXiv:2206.11893, section 3). The factor 2 stands for the conjugate of each pair.
    Work and memory are linear in S; backward keeps the inputs and one state per chunk. Everything
    inside is in at least fp32, whatever the inputs' dtype.

    Args:
        x: `[S, B, C]`, fp64, fp32 or bf16. S need not be a multiple of the chunk.
        dt: `[C]`, step sizes, not negative.
        A_real, A_imag: `[C, N]`, real part, negative, and imaginary part of A.
        C_real, C_imag: `[C, N]`, weights of the states in the output.
        D: `[C]`, weight of the direct path.
        chunk: tokens per chunk, at least 1; changes speed and memory, not the function.
        documents: `[S, B]` integers, constant within a document. No state crosses from one
            document into another. Work and memory grow by a chunk's for every document that begins
            within a chunk.
        initial_state: `[B, C, N, 2]`, real and imaginary part, before the first token, of its
            document; None: zeros.
        state_passing: the tokens are its `segments` equal segments, not neighbours of each other,
            and it gives the state before each, of its first token's document. States are computed
            twice: from zeros, and from the true state. None: one segment.

    Returns:
        y `[S, B, C]` in x's dtype, and the state after the last token, `[B, C, N, 2]` in at least
        fp32; with state_passing those after each segment, `[segments, B, C, N, 2]`, without
        gradient.

    Raises:
        ValueError: chunk < 1, S tokens are no equal segments, or initial_state comes together with
            state_passing, which gives the states.
    """
    if chunk < 1:
        raise ValueError(f"s4d: chunks of {chunk} tokens")
    chunks = Chunking("s4d", len(x), chunk, state_passing, initial_state)
    dtype, rows = wide_dtype(x.dtype), chunks.segments * x.shape[1]
    parameters = _Parameters(*(t.to(dtype) for t in (dt, A_real, A_imag, C_real, C_imag, D)))
    if initial_state is None:
        initial_state = torch.zeros(rows, *A_real.shape, 2, dtype=dtype, device=x.device)
    ids = None if documents is None else chunks.to_chunks(documents, repeat_last=True)
    pieces = _pieces(chunks.n, chunks.Q, rows, chunks.Q - chunks.padding, ids, parameters.dt)
    start = initial_state.to(dtype).transpose(0, 1).contiguous()
    y, final = _S4D.apply(chunks.to_chunks(x), start, pieces, state_passing, *parameters)
    final = final.transpose(0, 1).contiguous()
    if state_passing is not None:
        final = final.unflatten(0, (state_passing.segments, -1))
    return chunks.to_tokens(y), final


def s4d_recurrence(
    x: Tensor, dt: Tensor, A_real: Tensor, A_imag: Tensor, C_real: Tensor, C_imag: Tensor,
    D: Tensor, *, documents: Tensor | None = None, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`s4d` by its formula, token by token."""
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
