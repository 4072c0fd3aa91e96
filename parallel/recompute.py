"""Activation recomputation: backward runs a sub-block's halves again instead of keeping tensors.

`torch.utils.checkpoint` wraps one call. A sub-block is two calls, between which other sub-blocks'
halves may run. Both have one frame, and backward runs both again at the first tensor it asks for.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from colonnade.kernels.linear import ONEDNN_LINEAR
from colonnade.models.blocks.base import SubBlock
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.wiring import Halves
from colonnade.parallel.context.attention import CONTEXT_ATTENTION
from colonnade.parallel.context.halo import HALO_SEND_RECV

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
# Costly to compute again, and no larger than a sub-block's input or its inner width. Batched
# products are not: they stand inside kernels, which choose themselves what they keep.
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._grouped_mm.default,
}
if ONEDNN_LINEAR is not None:
    KEPT.add(ONEDNN_LINEAR.default)
# What another rank has sent is never asked for twice.
SENT = {
    c10d.all_reduce.default,
    c10d.all_gather_into_tensor.default,
    c10d.all_to_all_single.default,
    CONTEXT_ATTENTION,
    HALO_SEND_RECV,
}

# Around a forward pass, and around that pass again in backward.
Modes = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def recompute(model: Decoder, name: str, ranks: int = 1) -> None:
    """Have backward compute a model's activations again.

    Args:
        model: whose sub-blocks keep less for backward.
        name: `none` keeps everything, `block` only the inputs of sub-blocks, `selective` products
            as well.
        ranks: how many share a sub-block; what they send each other within it is kept.
    """
    if name == "none":
        return
    operators = (KEPT if name == "selective" else set()) | (SENT if ranks > 1 else set())

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operator in operators
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    selecting: Callable[[], Modes] = partial(create_selective_checkpoint_contexts, policy)
    modes = selecting if operators else lambda: (nullcontext(), nullcontext())

    def halves(block: SubBlock, context: Context) -> Halves:
        kept = torch.is_grad_enabled()
        return Recomputed(block, context, modes()) if kept else Halves(block, context)

    for wiring in model.wirings():
        wiring.halves = halves


class Recomputed(Halves):
    """Halves of which backward has no more than the input, and runs both again from it."""

    def __init__(self, block: SubBlock, context: Context, modes: Modes) -> None:
        super().__init__(block, context)
        self.forward_mode, again_mode = modes
        whole = Halves(block, context)  # not `self`, which has the frame: a cycle would keep x
        self.frame = Frame(lambda x: whole.second(whole.first(x)), str(context.index), again_mode)

    def first(self, x: Tensor) -> Any:
        self.frame.begin(x)
        with self.frame.saving(), self.forward_mode:
            return super().first(x)

    def second(self, carried: Any) -> Tensor:
        with self.frame.saving(), self.forward_mode:
            return super().second(carried)


class Slot:
    """What a graph holds in place of a saved tensor; `value` is there between making and use."""

    def __init__(self, frame: "Frame", saved: Tensor) -> None:
        self.frame, self.kind = frame, kind(saved)
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        """The tensor, made again if need be; it is the caller's alone."""
        if self.value is None:
            self.frame.fill()
        value, self.value = self.value, None
        assert value is not None
        return value


class _FilledError(Exception):
    """All slots are filled, so the rest of the halves need not run."""


class Frame:
    """The slots of all tensors that a sub-block saves for backward, in the order of saving.

    Slots hold the frame and the frame no slot, so that what a graph lets go is freed. A second
    backward pass over a retained graph runs the halves once more; a mode that keeps results gives
    them once, and refuses it. PyTorch's generators and autocast are not restored: sub-blocks use
    neither.
    """

    def __init__(
        self, again: Callable[[Tensor], object], name: str, mode: AbstractContextManager[Any]
    ) -> None:
        self.again, self.name, self.mode = again, name, mode
        self.slots: list[weakref.ref[Slot]] = []
        self.x: Tensor | None = None
        self.differentiated = False

    def begin(self, x: Tensor) -> None:
        """Keep the sub-block's input, without the graph behind it."""
        self.x, self.differentiated = x.detach(), x.requires_grad

    def saving(self) -> saved_tensors_hooks:
        """Within, a slot is saved in place of every tensor."""
        return saved_tensors_hooks(self.pack, Slot.take)

    def pack(self, saved: Tensor) -> Slot:
        """A new slot for a tensor."""
        slot = Slot(self, saved)
        self.slots.append(weakref.ref(slot))
        return slot

    def fill(self) -> None:
        """Run the halves again as far as their last saved tensor, and fill the slots.

        Raises:
            RuntimeError: they save other tensors than before.
        """
        assert self.x is not None
        made = 0

        def pack(saved: Tensor) -> None:
            nonlocal made
            slot, number = self.slots[made](), made
            made += 1
            if slot is not None:
                if kind(saved) != slot.kind:
                    raise RuntimeError(
                        f"recomputation: saved tensor {number} of sub-block {self.name} was "
                        f"{slot.kind} and is {kind(saved)}; it must compute the same in backward"
                    )
                slot.value = saved.detach()
            if made == len(self.slots):
                raise _FilledError

        x = self.x.detach().requires_grad_(self.differentiated)
        try:
            with torch.enable_grad(), saved_tensors_hooks(pack, unusable), self.mode:
                self.again(x)
        except _FilledError:
            return
        raise RuntimeError(
            f"recomputation: sub-block {self.name} saved {len(self.slots)} tensors, and {made} in "
            "backward; it must compute the same there"
        )


def unusable(saved: None) -> Tensor:
    """The graph of a recomputation is for no backward pass."""
    raise RuntimeError("recomputation: its own graph was differentiated")


def kind(t: Tensor) -> tuple[Any, ...]:
    """What a saved tensor must have in common with the one it is replaced by."""
    return tuple(t.shape), t.dtype, t.device
