"""Activation recomputation: backward runs a sub-block's halves again instead of saving tensors.

All halves of a sub-block have one frame (`parallel.frame`). What ranks of the `tp`, `cp`, `ep` and
`etp` axes sent each other within the sub-block is saved, so that recomputation launches no
collective. With a stash (`parallel.stash`) the input of a frame is in the host's memory meanwhile;
norms of the stream then have frames of their own, so that these save no more than their input.
"""

from collections import deque
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from colonnade.kernels.linear import ONEDNN_LINEAR
from colonnade.models.blocks.base import SubBlock
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.wiring import Halves, Wiring
from colonnade.parallel.context.attention import CONTEXT_ATTENTION
from colonnade.parallel.context.halo import HALO_SEND_RECV
from colonnade.parallel.frame import Frame
from colonnade.parallel.stash import Stash

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


def recompute(
    model: Decoder, name: str, communicates: bool = False, stash: Stash | None = None
) -> None:
    """Makes backward recompute the activations of a model's sub-blocks.

    Args:
        model: whose sub-blocks save less for backward.
        name: `none` saves everything, `block` only the inputs of sub-blocks, `selective` their
            inputs and the results of matrix products and attention.
        communicates: whether ranks send each other anything within a sub-block, the results of
            which are then saved.
        stash: takes these inputs, and those of the norms beside sub-blocks, to the host.
    """
    if name == "none":
        return
    saved_operators = COMPUTE_OPERATORS if name == "selective" else set()
    saved_operators = saved_operators | (COMMUNICATION_OPERATORS if communicates else set())
    for wiring in model.wirings():
        wiring.halves = Recomputation(saved_operators, stash)
        if stash is not None:
            recompute_norms(wiring, stash)


def stash_of(model: Decoder) -> Stash | None:
    """Returns the stash of a model, if it has one."""
    halves = model.wiring.halves
    return halves.stash if isinstance(halves, Recomputation) else None


def recompute_norms(wiring: Wiring, stash: Stash) -> None:
    """Makes backward recompute the norms before and after sub-blocks from their stashed inputs."""

    def recomputed(forward: Callable[[Tensor], Tensor], name: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return forward(x)
            frame = Frame(forward, name, nullcontext())
            frame.begin(x)
            with frame.hooks():
                output = forward(x)
            frame.stash_input(stash, ends=False)
            return output

        return run

    for where, norms in (("before", wiring.norms), ("after", wiring.after)):
        for index, norm in norms.items():
            name = f"the norm {where} sub-block {wiring.start + int(index)}"
            norm.forward = recomputed(norm.forward, name)


@dataclass(frozen=True)
class Recomputation:
    """Returns the halves of sub-blocks, which save the results of some operators; a stash takes
    their inputs."""

    saved_operators: Set[Any]
    stash: Stash | None

    def __call__(self, block: SubBlock, context: Context) -> Halves:
        if not torch.is_grad_enabled():
            return Halves(block, context)
        plain: Modes = nullcontext(), nullcontext()
        modes = saving_modes(self.saved_operators) if self.saved_operators else plain
        return RecomputedHalves(block, context, modes, self.stash)


class RecomputedHalves(Halves):
    """The halves of a sub-block of which only the input is saved: backward runs both again."""

    def __init__(
        self, block: SubBlock, context: Context, modes: Modes, stash: Stash | None
    ) -> None:
        super().__init__(block, context)
        self.stash = stash
        self.forward_mode, recompute_mode = modes
        # Not `self`, which has the frame: a reference cycle would keep x alive.
        name = f"sub-block {context.index}"
        self.frame = Frame(lambda x: block(x, context), name, recompute_mode)

    def first(self, x: Tensor) -> Any:
        self.frame.begin(x)
        with self.saving():
            return super().first(x)

    def second(self, carried: Any) -> Any:
        with self.saving():
            return super().second(carried)

    def receive(self, output: Any) -> Tensor:
        with self.saving():
            return super().receive(output)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A context manager around a part of the forward pass."""
        with self.frame.hooks(), self.forward_mode:
            yield
        if self.stash is not None:
            self.frame.stash_input(self.stash, ends=True)
