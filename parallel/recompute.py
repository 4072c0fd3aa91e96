"""Activation recomputation: backward runs a sub-block's halves again instead of saving tensors.

`torch.utils.checkpoint` wraps one call. A sub-block is three calls (its halves, and `receive`),
between which those of other sub-blocks may run. All have one frame, and backward runs them again
when it unpacks the first of their saved tensors. What ranks of the `tp`, `cp`, `ep` and `etp` axes
sent each other within the sub-block is saved, so that recomputation launches no collective.
"""

import weakref
from collections import deque
from collections.abc import Callable, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from colonnade.kernels.linear import ONEDNN_LINEAR
from colonnade.models.blocks.base import SubBlock
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.wiring import Halves
from colonnade.parallel.context.attention import CONTEXT_ATTENTION
from colonnade.parallel.context.halo import HALO_SEND_RECV

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
# Operators whose results `selective` saves: costly to compute again, and no larger than a
# sub-block's input or its inner width. Batched matrix products are not among them: they are within
# kernels, which choose themselves what they save.
COMPUTE_OPERATORS = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._grouped_mm.default,
}
if ONEDNN_LINEAR is not None:
    COMPUTE_OPERATORS.add(ONEDNN_LINEAR.default)
# Operators that communicate: their results are saved, so that nothing is sent twice.
COMMUNICATION_OPERATORS = {
    c10d.all_reduce.default,
    c10d.all_gather_into_tensor.default,
    c10d.all_to_all_single.default,
    CONTEXT_ATTENTION,
    HALO_SEND_RECV,
}

# The context managers around a forward pass, and around its recomputation in backward.
Modes = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def saving_modes(operators: Set[Any]) -> Modes:
    """Saves the results of these operators within the first mode, and takes them in the same order
    within the second.

    PyTorch's selective checkpointing counts every other operator as well, and refuses those that
    only the forward pass or only its recomputation runs, such as FSDP2's.
    """
    results: dict[Any, deque[Any]] = {operator: deque() for operator in operators}
    return SavingMode(results), TakingMode(results)


class SavingMode(TorchDispatchMode):
    """Saves the results of operators."""

    def __init__(self, results: dict[Any, deque[Any]]) -> None:
        super().__init__()
        self.results = results

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled graphs run as they are."""
        return True

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **kwargs or {})
        if operator in self.results:
            # Autograd will put its graph on the results themselves, and saves no more than these.
            self.results[operator].append(tree_map_only(Tensor, Tensor.detach, result))
        return result


class TakingMode(SavingMode):
    """Takes the saved results of operators instead of running them, and drops them at the end."""

    taken = False

    def __enter__(self) -> "TakingMode":
        if self.taken:
            raise RuntimeError(
                "recomputation: the graph of a sub-block was differentiated twice, and the results "
                "of operators that it saved are gone"
            )
        self.taken = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.results.clear()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operator not in self.results:
            return operator(*args, **kwargs or {})
        if not self.results[operator]:
            raise RuntimeError(
                f"recomputation: no result of {operator} is left; a sub-block must compute the "
                "same in backward"
            )
        return self.results[operator].popleft()


def recompute(model: Decoder, name: str, communicates: bool = False) -> None:
    """Makes backward recompute the activations of a model's sub-blocks.

    Args:
        model: whose sub-blocks save less for backward.
        name: `none` saves everything, `block` only the inputs of sub-blocks, `selective` their
            inputs and the results of matrix products and attention.
        communicates: whether ranks send each other anything within a sub-block, the results of
            which are then saved.
    """
    if name == "none":
        return
    saved_operators = COMPUTE_OPERATORS if name == "selective" else set()
    saved_operators = saved_operators | (COMMUNICATION_OPERATORS if communicates else set())

    def halves(block: SubBlock, context: Context) -> Halves:
        if not torch.is_grad_enabled():
            return Halves(block, context)
        plain: Modes = nullcontext(), nullcontext()
        modes = saving_modes(saved_operators) if saved_operators else plain
        return RecomputedHalves(block, context, modes)

    for wiring in model.wirings():
        wiring.halves = halves


class RecomputedHalves(Halves):
    """The halves of a sub-block of which only the input is saved: backward runs both again."""

    def __init__(self, block: SubBlock, context: Context, modes: Modes) -> None:
        super().__init__(block, context)
        self.forward_mode, recompute_mode = modes
        # Not `self`, which has the frame: a reference cycle would keep x alive.
        self.frame = Frame(lambda x: block(x, context), str(context.index), recompute_mode)

    def first(self, x: Tensor) -> Any:
        self.frame.begin(x)
        with self.frame.hooks(), self.forward_mode:
            return super().first(x)

    def second(self, carried: Any) -> Any:
        with self.frame.hooks(), self.forward_mode:
            return super().second(carried)

    def receive(self, output: Any) -> Tensor:
        with self.frame.hooks(), self.forward_mode:
            return super().receive(output)


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
    """The slots of all tensors that a sub-block saves for backward, in the order of saving.

    A slot holds a reference to the frame, and the frame only weak ones to its slots, so that memory
    is freed as soon as the graph drops it. A second backward pass over a retained graph runs the
    halves once more; a mode that saves results of operators (`selective`, and `block` too where
    ranks share a sub-block) returns them once, and refuses that.
    PyTorch's generators and autocast are not restored: sub-blocks use neither.
    """

    def __init__(
        self, forward: Callable[[Tensor], object], name: str, mode: AbstractContextManager[Any]
    ) -> None:
        """`forward` runs both halves of the sub-block `name`; `mode` is around a recomputation."""
        self.forward, self.name, self.mode = forward, name, mode
        self.slots: list[weakref.ref[Slot]] = []
        self.x: Tensor | None = None
        self.x_requires_grad = False

    def begin(self, x: Tensor) -> None:
        """Keeps the sub-block's input, without the graph that made it."""
        self.x, self.x_requires_grad = x.detach(), x.requires_grad

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
                        f"recomputation: saved tensor {number} of sub-block {self.name} was "
                        f"{slot.signature} and is {signature(saved)}; it must compute the same in "
                        "backward"
                    )
                slot.value = saved.detach()
            if count == len(self.slots):
                raise _SlotsFilledError

        x = self.x.detach().requires_grad_(self.x_requires_grad)
        try:
            with torch.enable_grad(), saved_tensors_hooks(pack, refuse_unpack), self.mode:
                self.forward(x)
        except _SlotsFilledError:
            return
        raise RuntimeError(
            f"recomputation: sub-block {self.name} saved {len(self.slots)} tensors, and {count} in "
            "backward; it must compute the same there"
        )


def refuse_unpack(saved: None) -> Tensor:
    """Refuses backward through the graph of a recomputation, which only fills slots."""
    raise RuntimeError("recomputation: its own graph was differentiated")


def signature(t: Tensor) -> tuple[Any, ...]:
    """Shape, dtype and device: what a recomputed tensor must share with the saved one."""
    return tuple(t.shape), t.dtype, t.device
