"""AdamW over host memory (arXiv:1711.05101, algorithm 2), for optimizer state that stays there: one
interface, and three kernels behind it. One compiles itself and makes one pass, one is PyTorch's
fused operator between two more passes (the reference), one is DeepSpeed's."""

import ctypes
import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from colonnade.kernels.native import NativeError, compile_source

SOURCE = Path(__file__).with_name("host_adamw.cpp")
MASTERS = (torch.float32, torch.float64)
WEIGHTS = (torch.bfloat16, torch.float16, *MASTERS)
SLICE = 2**18  # elements of temporary copies of bf16 moments
ALIGNED = 64  # elements: threads begin at multiples of it, which are cache lines of every dtype
ONE_THREAD = 2**18  # up to so many elements, about 0.2 ms of work, waking a thread does not pay


@dataclass(frozen=True)
class AdamWStep:
    """The settings of one update.

    Attributes:
        step: the number of this update of these tensors, from 1, for the bias corrections.
        lr: the learning rate.
        beta1, beta2: of the moving averages of the gradient and of its square.
        eps: is added to the root of the second moment.
        weight_decay: is multiplied by `lr`.
        scale: gradients are multiplied by it first; it clips them.
    """

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    scale: float

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"step = {self.step}: updates are counted from 1")


class HostKernel(Protocol):
    """One update of AdamW on tensors in host memory."""

    name: str

    def __call__(
        self,
        master: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        weight: Tensor | None,
        step: AdamWStep,
    ) -> None:
        """Updates `master` and both moments, and writes the new master to `weight`.

        All are contiguous, in host memory, with the same number of elements.

        Args:
            master: fp32 or fp64.
            grad: dtype of `master`, or bf16; may be overwritten.
            exp_avg, exp_avg_sq: dtype of `master`, or both bf16, which is inexact.
            weight: receives `master` rounded to its dtype (bf16, fp16, fp32, fp64), to nearest
                even, where NaN stays NaN; None: nothing is written.

        Raises:
            ValueError: a tensor is none of these.
        """


def check_tensors(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None,
    by_pointer: bool = False,
) -> None:
    """Raises ValueError for tensors that no host kernel takes.

    A kernel that reads memory `by_pointer` takes no DTensor and no fake tensor, which have none.
    """
    kept = {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    named = {"master": master, **kept} | ({} if weight is None else {"weight": weight})
    for name, tensor in named.items():
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{name} is not a contiguous tensor in host memory")
        if by_pointer and type(tensor) not in (Tensor, nn.Parameter):
            raise ValueError(f"{name} is a {type(tensor).__name__}: take a plain tensor")
        if tensor.numel() != master.numel():
            raise ValueError(f"{name} has {tensor.numel()} elements, master has {master.numel()}")
    if master.dtype not in MASTERS:
        raise ValueError(f"master is in {master.dtype}: the master weight is fp32 or fp64")
    for name, tensor in kept.items():
        if tensor.dtype not in (master.dtype, torch.bfloat16):
            raise ValueError(f"{name} is in {tensor.dtype}: take that of master, or bf16")
    if exp_avg.dtype != exp_avg_sq.dtype:
        raise ValueError(f"moments are in {exp_avg.dtype} and {exp_avg_sq.dtype}: take one dtype")
    if weight is not None and weight.dtype not in WEIGHTS:
        raise ValueError(f"weight is in {weight.dtype}: take bf16, fp16, fp32 or fp64")


class TorchKernel:
    """PyTorch's fused AdamW, between a pass that scales the gradient and one that casts the weight.

    It is the reference: bit for bit what torch.optim.AdamW(fused=True) computes. bf16 moments, and
    their gradients, go through copies of SLICE elements in the dtype of the master weight. Else all
    elements go in one call, since the last bits of the operator's result depend on where a tensor
    is cut; bf16 gradients are then copied as a whole.
    """

    name = "torch"

    @torch.no_grad()
    def __call__(
        self,
        master: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        weight: Tensor | None,
        step: AdamWStep,
    ) -> None:
        check_tensors(master, grad, exp_avg, exp_avg_sq, weight)
        count, copied = master.numel(), exp_avg.dtype != master.dtype
        flat = [t.view(-1) for t in (master, grad, exp_avg, exp_avg_sq)]
        for start in range(0, count, SLICE if copied else max(count, 1)):
            p, g, *moments = (t[start : start + SLICE] for t in flat) if copied else flat
            wide = [moment.to(master.dtype) for moment in moments]  # those of its dtype themselves
            fused_adamw([p], [g.to(master.dtype)], [wide[0]], [wide[1]], step)
            if copied:
                torch._foreach_copy_(moments, wide)
        if weight is not None:
            weight.view(-1).copy_(flat[0])


def fused_adamw(
    masters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: AdamWStep,
) -> None:
    """Updates tensors of one dtype by PyTorch's fused AdamW, from gradients that are multiplied by
    `step.scale` first, in place. On any device."""
    if step.scale != 1.0:
        torch._foreach_mul_(gradients, step.scale)
    count = torch.full((), float(step.step), device=masters[0].device)
    torch._fused_adamw_(
        masters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        [count.clone() for _ in masters],
        lr=step.lr,
        beta1=step.beta1,
        beta2=step.beta2,
        weight_decay=step.weight_decay,
        eps=step.eps,
        amsgrad=False,
        maximize=False,
    )


class _Constants(ctypes.Structure):
    """`Constants` of the source: each is computed in fp64 and rounded once."""

    _fields_ = tuple(
        (name, ctypes.c_float)
        for name in ("scale", "lerp", "beta2", "square", "correction", "eps", "rate", "decay")
    )

    @classmethod
    def of(cls, step: AdamWStep) -> "_Constants":
        return cls(
            scale=step.scale,
            lerp=1 - step.beta1,
            beta2=step.beta2,
            square=1 - step.beta2,
            correction=(1 - step.beta2**step.step) ** -0.5,
            eps=step.eps,
            rate=step.lr / (1 - step.beta1**step.step),
            decay=step.lr * step.weight_decay,
        )


def compile_library(folder: Path, compiler: str) -> Path:
    """Compiles the source of `CompiledKernel`, which takes about a second; see `compile_source`."""
    return compile_source(SOURCE, folder, compiler)


def shares(count: int, threads: int) -> Iterator[tuple[int, int]]:
    """Divides elements among threads, at multiples of ALIGNED; yields start and end of each."""
    length = max(1, -(-count // (threads * ALIGNED))) * ALIGNED
    for start in range(0, count, length):
        yield start, min(start + length, count)


class SharePool:
    """Runs an action on shares of elements, in this thread and others of its own, which suits
    actions that release the GIL."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count(), "shares")  # starts threads when needed

    def run(self, action: Callable[[int, int], None], count: int) -> None:
        """Calls `action(start, end)` for the share of each of torch.get_num_threads() threads."""
        threads = torch.get_num_threads() if count > ONE_THREAD else 1
        first, *others = [*shares(count, threads)] or [(0, 0)]
        # the futures hold what the action needs, should this thread be interrupted meanwhile
        futures = [self._pool.submit(action, *share) for share in others]
        action(*first)
        for future in futures:
            future.result()


class CompiledKernel:
    """AdamW in one pass, by a compiled function on torch.get_num_threads() threads.

    Every operation is correctly rounded, so that results are the same bits on all processors, for
    any number of threads and any cut of the tensors. It serves fp32 master weights with bf16, fp32
    or no weight; others go to `TorchKernel`.
    """

    name = "compiled"

    def __init__(self, library: Path) -> None:
        """Loads what `compile_library` made.

        Raises:
            OSError: it cannot be loaded.
        """
        self._library = ctypes.CDLL(str(library))  # whose calls release the GIL
        self._other = TorchKernel()
        self._pool = SharePool()

    def __call__(
        self,
        master: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        weight: Tensor | None,
        step: AdamWStep,
    ) -> None:
        written = torch.float32 if weight is None else weight.dtype
        if master.dtype != torch.float32 or written not in (torch.float32, torch.bfloat16):
            return self._other(master, grad, exp_avg, exp_avg_sq, weight, step)
        check_tensors(master, grad, exp_avg, exp_avg_sq, weight, by_pointer=True)
        tensors = (master, grad, exp_avg, exp_avg_sq, weight)
        self._pool.run(partial(self._update, tensors, _Constants.of(step)), master.numel())

    def _update(
        self, tensors: tuple[Tensor | None, ...], constants: _Constants, start: int, end: int
    ) -> None:
        """Updates the elements from `start` to `end`."""
        names = ["none" if t is None else str(t.dtype).removeprefix("torch.") for t in tensors]
        function = self._library[f"adamw_{names[1]}_{names[2]}_{names[4]}"]
        function.restype = None
        pointers = [
            ctypes.c_void_p(None if t is None else t.data_ptr() + start * t.element_size())
            for t in tensors
        ]
        function(*pointers, ctypes.c_size_t(end - start), ctypes.byref(constants))


class DeepSpeedKernel:
    """The operator of DeepSpeedCPUAdam (arXiv:2101.06840), between a pass that scales the gradient
    and one that casts the weight; DeepSpeed compiles it at first use, for about a minute.

    It serves fp32 master weights and moments; others go to `TorchKernel`. It holds the GIL. Moments
    that an infinite gradient made infinite stay so, where the others make them NaN.
    """

    name = "deepspeed"

    def __init__(self) -> None:
        """Imports DeepSpeed, and compiles or loads its operator.

        Raises:
            NativeError: DeepSpeed is not installed, or cannot compile or load it.
        """
        try:
            adam = importlib.import_module("deepspeed.ops.adam")
        except ImportError as error:
            raise NativeError(f"DeepSpeed cannot be imported: {error}") from error
        try:
            # an optimizer without use, which creates and destroys the state of its operator
            self._optimizer: Any = adam.DeepSpeedCPUAdam([torch.zeros(1)], adamw_mode=True)
        except Exception as error:  # its builder raises errors of many classes
            cause = error.__cause__ or error
            reason = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise NativeError(f"DeepSpeedCPUAdam cannot be compiled or loaded: {reason}") from error
        self._other = TorchKernel()

    @torch.no_grad()
    def __call__(
        self,
        master: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        weight: Tensor | None,
        step: AdamWStep,
    ) -> None:
        if master.dtype != torch.float32 or exp_avg.dtype != torch.float32:
            return self._other(master, grad, exp_avg, exp_avg_sq, weight, step)
        check_tensors(master, grad, exp_avg, exp_avg_sq, weight, by_pointer=True)
        grad = grad.to(master.dtype)
        if step.scale != 1.0:
            grad.mul_(step.scale)
        self._optimizer.ds_opt_adam.adam_update(
            self._optimizer.opt_id,
            step.step,
            step.lr,
            step.beta1,
            step.beta2,
            step.eps,
            step.weight_decay,
            True,  # bias corrections
            master,
            grad,
            exp_avg,
            exp_avg_sq,
        )
        if weight is not None:
            weight.view(-1).copy_(master.view(-1))
