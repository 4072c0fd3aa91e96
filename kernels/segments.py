"""Segments of a sequence, each run from the state that the one before it leaves: what passes on.

A recurrence is linear in its state: a segment turns the state S before it into T S + E, where E is
what its tokens leave when they start from zeros and T, its transition, what they keep. So all
segments run at once from zeros, one exchange of (E, T) tells each its true start, and its mirror
tells each, backwards, the gradient of the state that it leaves.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Wait = Callable[[], Tensor]


class Passing(Protocol):
    """How the segments that are here learn the states before them, and the gradients after them.

    A kernel calls `launch` once in forward, `launch_back` once in backward, and what they return
    once each. Until then it leaves the tensors that it gave as they are.

    Attributes:
        parts: segments that are here: equal ones, one after the other along the local tokens.
    """

    @property
    def parts(self) -> int: ...

    def launch(self, state: Tensor, transition: Tensor, matrix: bool) -> Wait:
        """Sends what the segments here leave and keep.

        Args:
            state: `[parts, B, ...]`, at least fp32: after each segment's tokens, which started from
                zeros. Any strides.
            transition: factors that broadcast to `state`, of the same `[parts, B]`; or `matrix`:
                `[parts, B, H, P, P]`, which multiply a state `[parts, B, H, P, V]` from the left.

        Returns:
            What waits, and returns the true state before each segment, of the shape of `state`.
        """
        ...

    def launch_back(self, grad: Tensor, transition: Tensor, matrix: bool) -> Wait:
        """Sends the gradients that the segments here have for the states before them.

        Args:
            grad: `[parts, B, ...]`, gradient of the state before each segment through the
                segment's own outputs alone.
            transition: as in `launch`.

        Returns:
            What waits, and returns the gradient of the state after each segment, through the
            outputs of all later ones.
        """
        ...


def states_before(states: Tensor, transitions: Tensor, same: Tensor | None, matrix: bool) -> Tensor:
    """The state before every segment; zeros before the first.

    Args:
        states: `[n, B, ...]`, what all n segments leave when they start from zeros, in their order.
        transitions: as in `Passing.launch`, with n for parts.
        same: `[n - 1, B]`, whether the document goes on from a segment into the next; None: always.
    """
    before = torch.zeros_like(states)
    for j in range(1, len(states)):
        _through(before[j], states[j - 1], transitions[j - 1], before[j - 1], matrix)
        _stop(before[j], same, j - 1)
    return before


def grads_after(grads: Tensor, transitions: Tensor, same: Tensor | None, matrix: bool) -> Tensor:
    """The gradient of the state after every segment; zeros after the last.

    Args:
        grads: `[n, B, ...]`, gradient of the state before each segment through its own outputs.
        transitions, same: as in `states_before`.
    """
    after = torch.zeros_like(grads)
    for j in reversed(range(len(grads) - 1)):
        transition = transitions[j + 1].mT if matrix else transitions[j + 1]
        _through(after[j], grads[j + 1], transition, after[j + 1], matrix)
        _stop(after[j], same, j)
    return after


def _through(out: Tensor, own: Tensor, transition: Tensor, state: Tensor, matrix: bool) -> None:
    """own + transition · state."""
    if matrix:
        torch.add(own, transition @ state, out=out)
    else:
        torch.addcmul(own, transition, state, out=out)


def _stop(t: Tensor, same: Tensor | None, boundary: int) -> None:
    """Zeros in the rows whose document ends at the boundary."""
    if same is not None:
        t.masked_fill_(~same[boundary].view(-1, *[1] * (t.dim() - 1)), 0)


class Here:
    """All segments of the sequence, in order, on this device: what ranks do together, plainly."""

    def __init__(self, parts: int, documents: Tensor | None = None) -> None:
        """`documents` `[S, B]` number the whole sequence's tokens; None: it is one document."""
        self.parts = parts
        self.same: Tensor | None = None
        if documents is not None:
            segments = documents.unflatten(0, (parts, -1))
            self.same = segments[1:, 0] == segments[:-1, -1]

    def launch(self, state: Tensor, transition: Tensor, matrix: bool) -> Wait:
        before = states_before(state, transition, self.same, matrix)
        return lambda: before

    def launch_back(self, grad: Tensor, transition: Tensor, matrix: bool) -> Wait:
        after = grads_after(grad, transition, self.same, matrix)
        return lambda: after


# In a kernel the segments that are here are rows of its batch.


def beside(t: Tensor, parts: int) -> Tensor:
    """`[parts · L, B, ...]` -> `[L, parts · B, ...]`, a view where B or parts is 1."""
    return t.unflatten(0, (parts, -1)).transpose(0, 1).flatten(1, 2)


def in_line(t: Tensor, parts: int) -> Tensor:
    """`[L, parts · B, ...]` -> `[parts · L, B, ...]`."""
    return t.unflatten(1, (parts, -1)).transpose(0, 1).flatten(0, 1)


def check(kernel: str, S: int, passing: Passing, initial_state: Tensor | None) -> None:
    """Raises ValueError where S tokens are no equal segments, or start from a state given."""
    if S == 0 or S % passing.parts:
        raise ValueError(f"{kernel}: {S} tokens in {passing.parts} equal segments")
    if initial_state is not None:
        raise ValueError(f"{kernel}: initial_state beside passing, which gives the states")


class Chunking:
    """Tokens `[S, B, ...]` as chunks, `[n, Q, parts · B, ...]`, and back.

    Each segment is filled up at its end with zeros, which neither write nor forget, in its last
    document. Without passing there is one segment, and nothing is copied but to fill it up.
    """

    def __init__(
        self, kernel: str, S: int, chunk: int, passing: Passing | None, initial: Tensor | None
    ) -> None:
        self.parts, self.length, self.Q = 1, S, max(1, min(chunk, S))
        if passing is not None:
            check(kernel, S, passing, initial)
            self.parts = passing.parts
            self.length = S // self.parts
            # The shortest chunks that are no more of them: little or nothing to fill up.
            self.Q = -(-self.length // -(-self.length // chunk))
        self.n = -(-self.length // self.Q)
        self.fill = self.n * self.Q - self.length

    def cut(self, t: Tensor, last: bool = False) -> Tensor:
        """The chunks of a tensor, filled up with zeros, or with its last row."""
        if self.parts > 1:
            t = beside(t, self.parts)
        if self.fill and last:
            t = torch.cat([t, t[-1:].expand(self.fill, *t.shape[1:])])
        elif self.fill:
            t = F.pad(t, (*[0, 0] * (t.dim() - 1), 0, self.fill))
        return t.unflatten(0, (self.n, self.Q))

    def whole(self, t: Tensor) -> Tensor:
        """Back from chunks to the tokens."""
        t = t.flatten(0, 1)
        t = t[: self.length] if self.fill else t
        return in_line(t, self.parts) if self.parts > 1 else t
