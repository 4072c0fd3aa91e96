"""Matrix products of linear layers, by the faster of two libraries.

On x86 CPUs PyTorch calls MKL for fp32 products. oneDNN, which PyTorch ships and uses for bf16, can
compute them too: on some processors it is twice as fast, on others slower, and that varies with the
operands' layout and size. So the library is chosen for each class of products (`prefer`) by
measurements that the launcher makes. EXPERIMENTS.md has the figures.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.deferred import PutOff, put_off
from colonnade.kernels.opaque import opaque

# The operator, or None in builds of PyTorch without oneDNN.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

LAYOUTS = ("forward", "input gradient", "weight gradient")  # which operands are transposed
SIZES = {"small": 2**25, "medium": 2**29, "large": None}  # FLOPs, below
CLASSES = tuple(f"{layout}, {size}" for layout in LAYOUTS for size in SIZES)


def usual_choice() -> dict[str, bool]:
    """The choice without measurements: oneDNN where the processor has AVX-512, MKL elsewhere."""
    avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return dict.fromkeys(CLASSES, avx512)


_ON_ONEDNN = usual_choice()


def prefer(choice: Mapping[str, bool]) -> None:
    """From now on uses oneDNN for those of `CLASSES` that are true, PyTorch's default for others.

    Raises:
        KeyError: a class is missing.
    """
    _ON_ONEDNN.update({name: choice[name] for name in CLASSES})


def preferred() -> dict[str, bool]:
    """The choice in force."""
    return dict(_ON_ONEDNN)


@torch.compiler.assume_constant_result  # Dynamo does not trace these look-ups
def _onednn_is_on() -> bool:
    mkldnn = torch.backends.mkldnn
    return bool(ONEDNN_LINEAR and mkldnn.is_available() and mkldnn.enabled)


def has_onednn(x: Tensor) -> bool:
    """Whether oneDNN can compute products of this tensor: fp32 on an x86 CPU, oneDNN enabled."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and _onednn_is_on()


def class_of(a: Tensor, b: Tensor) -> str:
    """The class of `CLASSES` to which the product of `[..., K]` and `[N, K]` belongs."""
    if a.stride(-1) != 1:
        layout = "weight gradient"
    else:
        layout = "forward" if b.stride(-1) == 1 else "input gradient"
    flops = 2 * a.numel() * b.shape[0]
    size = next(name for name, limit in SIZES.items() if limit is None or flops < limit)
    return f"{layout}, {size}"


@opaque("onednn_product", lambda a, b: a.new_empty(*a.shape[:-1], b.shape[0]))
def onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ by oneDNN. Opaque: Inductor supports this operator for packed weights only."""
    assert ONEDNN_LINEAR is not None
    return ONEDNN_LINEAR(a, b, None, "none", [], "")


def product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ, without gradient.

    Args:
        a: `[..., K]`, any strides.
        b: `[N, K]`, any strides, dtype of `a`.

    Returns:
        `[..., N]`.
    """
    if _use_onednn(a, b):
        return onednn_product(a, b)
    return a @ b.T


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a bᵀ, without gradient, fused with the product where the library can do that.

    Args:
        total: `[M, N]`, dtype of `a` or wider.
        a, b: `[M, K]` and `[N, K]`, of one dtype, any strides.
    """
    if total.dtype == a.dtype and not _use_onednn(a, b):
        torch.addmm(total, a, b.T, out=total)
    else:
        total += product(a, b)


def _use_onednn(a: Tensor, b: Tensor) -> bool:
    return has_onednn(a) and a.numel() > 0 and b.numel() > 0 and _ON_ONEDNN[class_of(a, b)]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, defer: PutOff | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.defer = defer
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        d_x = product(grad, weight.T) if ctx.needs_input_grad[0] else None
        if ctx.defer is not None:
            ctx.defer(lambda: weight_gradient(grad, x))
        return d_x, weight_gradient(grad, x) if ctx.needs_input_grad[1] else None, None


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient `[O, I]` of the weight of `linear`, from that of its output `[..., O]` and its
    input `[..., I]`."""
    return product(grad.reshape(-1, grad.shape[-1]).T, x.reshape(-1, x.shape[-1]).T)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ.

    Args:
        x: `[..., I]`.
        weight: `[O, I]`, dtype of `x`.

    Returns:
        `[..., O]`.
    """
    weight, defer = put_off(weight, x)
    if defer is not None or (has_onednn(x) and any(_ON_ONEDNN.values())):
        return _Linear.apply(x, weight, defer)
    return F.linear(x, weight)
