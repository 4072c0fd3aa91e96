"""A recurrence over segments of a sequence that run at once: states are passed between segments.

A recurrence is linear in its state: a segment turns the state S before it into T S + E, where E is
the state after its tokens when they start from zeros, and T, the segment's transition, is the
product of its tokens' transitions. So all segments first run from zeros, at once. One exchange of
(E, T) then gives each segment its true initial state, and in backward one of (G, T), G being the
gradient of a segment's initial state through its own outputs, gives each the gradient of its final
state:

    segment             0                1             2
    forward             E0, T0           E1, T1        E2, T2          each from zeros, at once
    state before        0            ->  E0        ->  E1 + T1 E0      `states_before`
    backward            G0               G1            G2              own outputs only, at once
    gradient after      G1 + T1'G2   <-  G2        <-  0               `grads_after`
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Wait = Callable[[], Tensor]


class StatePassing(Protocol):
    """Gives a device's segments the states before them, and the gradients after them.

    A kernel calls `launch` once in forward and `launch_backward` once in backward, and calls what
    each returns once. Until it has called that, it does not change the tensors that it passed.

    Attributes:
        segments: how many segments this device holds: equal ones, one after the other along the
            local tokens.
    """

    @property
    def segments(self) -> int: ...

    def launch(self, state: Tensor, transition: Tensor, matrix: bool) -> Wait:
        """Starts the all-gather of the local segments' final states and transitions.

        Args:
            state: `[segments, B, ...]`, at least fp32: the state after each segment's tokens, when
                they start from zeros. Any strides.
            transition: factors that broadcast to `state`, of the same `[segments, B]`; or, with
                `matrix`, `[segments, B, H, P, P]`, matrices that multiply states
                `[segments, B, H, P, V]` from the left.

        Returns:
            a function that waits and returns the true state before each segment, of the shape of
            `state`.
        """
        ...

    def launch_backward(self, grad: Tensor, transition: Tensor, matrix: bool) -> Wait:
        """Starts the all-gather of the gradients of the states before the local segments.

        Args:
            grad: `[segments, B, ...]`, gradient of the state before each segment through the
                segment's own outputs only.
            transition: as in `launch`.

        Returns:
            a function that waits and returns the gradient of the state after each segment, through
            the outputs of all later segments.
        """
        ...


def states_before(
    states: Tensor, transitions: Tensor, same_document: Tensor | None, matrix: bool
) -> Tensor:
    """The state before every segment; zeros before the first.

    Args:
        states: `[n, B, ...]`, the final states of all n segments of the sequence, in order, when
            each starts from zeros.
        transitions: as in `StatePassing.launch`, for n segments.
        same_document: `[n - 1, B]`, whether a segment's last and the next one's first token are of
            the same document; None: always.
    """
    before = torch.zeros_like(states)
    for j in range(1, len(states)):
        _advance(before[j], states[j - 1], transitions[j - 1], before[j - 1], matrix)
        _zero_at_document_ends(before[j], same_document, j - 1)
    return before


def grads_after(
    grads: Tensor, transitions: Tensor, same_document: Tensor | None, matrix: bool
) -> Tensor:
    """The gradient of the state after every segment; zeros after the last.

    Args:
        grads: `[n, B, ...]`, gradient of the state before each segment through its own outputs.
        transitions, same_document: as in `states_before`.
    """
    after = torch.zeros_like(grads)
    for j in reversed(range(len(grads) - 1)):
        transition = transitions[j + 1].mT if matrix else transitions[j + 1]
        _advance(after[j], grads[j + 1], transition, after[j + 1], matrix)
        _zero_at_document_ends(after[j], same_document, j)
    return after


def _advance(
    out: Tensor, from_zeros: Tensor, transition: Tensor, state: Tensor, matrix: bool
) -> None:
    """Writes from_zeros + transition · state into `out`."""
    if matrix:
        torch.add(from_zeros, transition @ state, out=out)
    else:
        torch.addcmul(from_zeros, transition, state, out=out)


def _zero_at_document_ends(t: Tensor, same_document: Tensor | None, boundary: int) -> None:
    """Zeros the samples `t[b]` whose document ends at the boundary between two segments."""
    if same_document is not None:
        ends = ~same_document[boundary]
        t.masked_fill_(ends.view(-1, *[1] * (t.dim() - 1)), 0)


class LocalStatePassing:
    """State passing where this device holds all segments of the sequence, in order."""

    def __init__(self, segments: int, documents: Tensor | None = None) -> None:
        """`documents` `[S, B]` number the whole sequence's tokens; None: one document a sample."""
        self.segments = segments
        self.same_document: Tensor | None = None
        if documents is not None:
            by_segment = documents.unflatten(0, (segments, -1))
            self.same_document = by_segment[1:, 0] == by_segment[:-1, -1]

    def launch(self, state: Tensor, transition: Tensor, matrix: bool) -> Wait:
        before = states_before(state, transition, self.same_document, matrix)
        return lambda: before

    def launch_backward(self, grad: Tensor, transition: Tensor, matrix: bool) -> Wait:
        after = grads_after(grad, transition, self.same_document, matrix)
        return lambda: after


# Kernels take the segments of a device as rows of the batch.


def segments_to_batch(t: Tensor, segments: int) -> Tensor:
    """`[segments · L, B, ...]` -> `[L, segments · B, ...]`, a view where B or `segments` is 1."""
    return t.unflatten(0, (segments, -1)).transpose(0, 1).flatten(1, 2)


def batch_to_segments(t: Tensor, segments: int) -> Tensor:
    """`[L, segments · B, ...]` -> `[segments · L, B, ...]`."""
    return t.unflatten(1, (segments, -1)).transpose(0, 1).flatten(0, 1)


def check_segments(
    kernel: str, S: int, state_passing: StatePassing, initial_state: Tensor | None
) -> None:
    """Raises ValueError where S tokens are not equal segments, or there is an initial state too."""
    if S == 0 or S % state_passing.segments:
        raise ValueError(f"{kernel}: {S} tokens in {state_passing.segments} equal segments")
    if initial_state is not None:
        raise ValueError(
            f"{kernel}: initial_state together with state_passing, which gives the states"
        )


class Chunking:
    """Converts tokens `[S, B, ...]` to chunks, `[n, Q, segments · B, ...]`, and back.

    Each segment is padded at its end with zeros, which neither write nor decay a state, in the
    document of its last token. Without state passing there is one segment, and nothing is copied
    except to pad.
    """

    def __init__(
        self,
        kernel: str,
        S: int,
        chunk: int,
        state_passing: StatePassing | None,
        initial_state: Tensor | None,
    ) -> None:
        self.segments, self.length, self.Q = 1, S, max(1, min(chunk, S))
        if state_passing is not None:
            check_segments(kernel, S, state_passing, initial_state)
            self.segments = state_passing.segments
            self.length = S // self.segments
            # The shortest chunks of which there are no more: little or no padding.
            self.Q = -(-self.length // -(-self.length // chunk))
        self.n = -(-self.length // self.Q)
        self.padding = self.n * self.Q - self.length

    def to_chunks(self, t: Tensor, repeat_last: bool = False) -> Tensor:
        """The chunks of a tensor, padded with zeros, or with copies of its last row."""
        if self.segments > 1:
            t = segments_to_batch(t, self.segments)
        if self.padding and repeat_last:
            t = torch.cat([t, t[-1:].expand(self.padding, *t.shape[1:])])
        elif self.padding:
            t = F.pad(t, (*[0, 0] * (t.dim() - 1), 0, self.padding))
        return t.unflatten(0, (self.n, self.Q))

    def to_tokens(self, t: Tensor) -> Tensor:
        """Chunks back to tokens, without the padding."""
        t = t.flatten(0, 1)
        t = t[: self.length] if self.padding else t
        return batch_to_segments(t, self.segments) if self.segments > 1 else t
