"""The frame of a part of the model that backward runs again, instead of saving its tensors.

`torch.utils.checkpoint` wraps one call. A sub-block is three calls (its halves, and `receive`),
between which those of other sub-blocks may run. All have one frame, and backward runs them again
when it unpacks the first of their saved tensors.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from colonnade.parallel.stash import Stash, Stashed


class Slot:
    """What a graph holds in place of a saved tensor; `value` is set from recomputation to use."""

    def __init__(self, frame: "Frame", saved: Tensor) -> None:
        self.frame, self.signature = frame, signature(saved)
        self.value: Tensor | None = None

    def unpack(self) -> Tensor:
        """Returns the tensor, recomputed if it is not there, and keeps no reference to it."""
        if self.value is None:
            self.frame.recompute()
        value, self.value = self.value, None
        assert value is not None
        return value


class _SlotsFilledError(Exception):
    """All slots are filled, so the rest of the halves need not run."""


class Frame:
    """The slots of all tensors that a sub-block or a norm saves for backward, in order of saving.

    A slot holds a reference to the frame, and the frame only weak ones to its slots, so that memory
    is freed as soon as the graph drops it. A second backward pass over a retained graph runs the
    halves once more; a mode that saves results of operators (`selective`, and `block` too where
    ranks share a sub-block) returns them once, and refuses that.
    PyTorch's generators and autocast are not restored: sub-blocks use neither.
    """

    def __init__(
        self, forward: Callable[[Tensor], object], name: str, mode: AbstractContextManager[Any]
    ) -> None:
        """`forward` runs what is called `name`: both halves of a sub-block, or a norm; `mode` is
        around a recomputation."""
        self.forward, self.name, self.mode = forward, name, mode
        self.slots: list[weakref.ref[Slot]] = []
        self.x: Tensor | Stashed | None = None
        self.x_requires_grad = False

    def begin(self, x: Tensor) -> None:
        """Keeps the input, without the graph that made it."""
        self.x, self.x_requires_grad = x.detach(), x.requires_grad

    def stash_input(self, stash: Stash, ends: bool) -> None:
        """Leaves the input to a stash as soon as backward will need it; `ends` as in `put`."""
        if self.slots and isinstance(self.x, Tensor):
            self.x = stash.put(self.x, ends)

    def hooks(self) -> saved_tensors_hooks:
        """A context manager within which autograd saves a slot in place of every tensor."""
        return saved_tensors_hooks(self.pack, Slot.unpack)

    def pack(self, saved: Tensor) -> Slot:
        """A new slot for a tensor."""
        slot = Slot(self, saved)
        self.slots.append(weakref.ref(slot))
        return slot

    def recompute(self) -> None:
        """Runs the halves again as far as their last saved tensor, and fills the slots.

        Raises:
            RuntimeError: they save other tensors than before.
        """
        assert self.x is not None
        count = 0

        def pack(saved: Tensor) -> None:
            nonlocal count
            slot, number = self.slots[count](), count
            count += 1
            if slot is not None:
                if signature(saved) != slot.signature:
                    raise RuntimeError(
                        f"recomputation: saved tensor {number} of {self.name} was "
                        f"{slot.signature} and is {signature(saved)}; it must compute the same in "
                        "backward"
                    )
                slot.value = saved.detach()
            if count == len(self.slots):
                raise _SlotsFilledError

        x = self.x.take() if isinstance(self.x, Stashed) else self.x
        x = x.detach().requires_grad_(self.x_requires_grad)
        try:
            with torch.enable_grad(), saved_tensors_hooks(pack, refuse_unpack), self.mode:
                self.forward(x)
        except _SlotsFilledError:
            return
        raise RuntimeError(
            f"recomputation: {self.name} saved {len(self.slots)} tensors, and {count} in "
            "backward; it must compute the same there"
        )


def refuse_unpack(saved: None) -> Tensor:
    """Refuses backward through the graph of a recomputation, which only fills slots."""
    raise RuntimeError("recomputation: its own graph was differentiated")


def signature(t: Tensor) -> tuple[Any, ...]:
    """Shape, dtype and device: what a recomputed tensor must share with the saved one."""
    return tuple(t.shape), t.dtype, t.device
