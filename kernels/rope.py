"""Rotary position embeddings, with frequency scalings for sequences beyond the trained length."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from colonnade.kernels.precision import wide, wide_dtype


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change for sequences longer than the model was trained on.

    Attributes:
        kind: `linear`: position interpolation (arXiv:2306.15595), which divides every frequency by
            `factor`. `ntk`: a larger base, theta · factor^(P/(P−2)), which does not change the
            highest frequency and divides the lowest by `factor`. `yarn`: high frequencies are
            unchanged and low ones divided by `factor`, with a ramp between (arXiv:2309.00071).
            `llama3`: the same idea with a ramp over wavelengths (Llama 3.1).
        factor: how much longer than `original` sequences may become.
        original: length in tokens on which the model was trained; `yarn` and `llama3`.
        low, high: `llama3`: a frequency is divided by the whole factor up to `low` turns within
            `original`, and unchanged from `high` turns on.
        fast, slow: `yarn`: a frequency is unchanged from `fast` turns within `original` on, and
            divided by the whole factor up to `slow` turns.
        mscale, mscale_all: `yarn`: weights of the attention factor (DeepSeek's); 0: not set.
        attention_factor: `yarn`: the attention factor itself; None: computed from `factor`,
            `mscale` and `mscale_all`.
        truncate: `yarn`: whether the ends of the ramp are rounded to whole channel pairs.
    """

    kind: Literal["linear", "ntk", "yarn", "llama3"]
    factor: float
    original: int
    low: float = 1.0
    high: float = 4.0
    fast: float = 32.0
    slow: float = 1.0
    mscale: float = 0.0
    mscale_all: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's attention factor for sequences longer by `factor`: 0.1 · weight · ln(factor) + 1
    (arXiv:2309.00071).

    DeepSeek-V3 also multiplies the scale of its scores by yarn_mscale(factor, mscale_all)².
    """
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_frequencies(
    width: int,
    theta: float,
    scaling: RopeScaling | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, float]:
    """Angle per position of each pair of channels, theta^(−2i/P) before scaling.

    Args:
        width: number of rotated channels P, even.

    Returns:
        `[P/2]` in fp64, and the factor that multiplies cosine and sine (1 except for `yarn`).

    Raises:
        ValueError: an unknown kind of scaling.
    """
    if scaling is not None and scaling.kind == "ntk":
        theta = theta * scaling.factor ** (width / (width - 2))
    exponent = torch.arange(0, width, 2, device=device, dtype=torch.float64) / width
    frequency = theta**-exponent
    if scaling is None:
        return frequency, 1.0
    match scaling.kind:
        case "ntk":
            return frequency, 1.0
        case "linear":
            return frequency / scaling.factor, 1.0
        case "yarn":
            unscaled = _yarn_unscaled(frequency, width, theta, scaling)
            return _blend(frequency, unscaled, scaling), _yarn_attention_factor(scaling)
        case "llama3":
            turns = scaling.original * frequency / (2 * math.pi)
            unscaled = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
            return _blend(frequency, unscaled, scaling), 1.0
        case other:
            raise ValueError(f"rope scaling {other!r} is not one of linear, ntk, yarn, llama3")


def _blend(frequency: Tensor, unscaled: Tensor, scaling: RopeScaling) -> Tensor:
    """Interpolates each frequency between itself (`unscaled` 1) and itself / factor (0)."""
    return frequency * (unscaled + (1 - unscaled) / scaling.factor)


def _yarn_unscaled(frequency: Tensor, width: int, theta: float, scaling: RopeScaling) -> Tensor:
    """YaRN's ramp over channel pairs, `[P/2]`: 1 for unchanged frequencies, 0 for divided ones."""

    def pair_with(turns: float) -> float:
        """Index of the pair that makes `turns` turns within the trained length; a real number."""
        wavelength = scaling.original / turns
        return width * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(scaling.fast), pair_with(scaling.slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    pair = torch.arange(width // 2, device=frequency.device, dtype=frequency.dtype)
    return 1 - ((pair - first) / (last - first)).clamp(0, 1)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all:
        divisor = yarn_mscale(scaling.factor, scaling.mscale_all)
        return yarn_mscale(scaling.factor, scaling.mscale) / divisor
    return yarn_mscale(scaling.factor)


def rope_table(
    positions: Tensor,
    width: int,
    theta: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotary angle (arXiv:2104.09864, eq. 15).

    Angles are taken in fp64: in fp32, that of position 10^6 is off by up to 0.06 radians.

    Args:
        positions: `[S, B]` integers, counted from each document's start.
        width: number of rotated channels P, even.
        dtype: of the activations.

    Returns:
        two `[S, B, 1, P/2]` tensors in at least fp32.
    """
    frequency, factor = rope_frequencies(width, theta, scaling, positions.device)
    angle = positions[:, :, None, None] * frequency
    cos, sin = angle.cos() * factor, angle.sin() * factor
    return cos.to(wide_dtype(dtype)), sin.to(wide_dtype(dtype))


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pairs (x_i, x_{i+w/2}) of the first w channels by the table's angles.

    Args:
        x: `[S, B, H, P]`; channels from w on are unchanged (partial rotary).
        table: cosine and sine, `[S, B, 1, w/2]`, from `rope_table`; they get no gradient.

    Returns:
        `[S, B, H, P]`, dtype of `x`.
    """
    return _Rotate.apply(x, *table)


class _Rotate(torch.autograd.Function):
    """Backward rotates the gradient back; autograd would save the products instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        # Laid out with heads before the sequence: attention's products read rows of one head.
        out = _copy(x.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)
        return _rotate_into(out, x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate_into(_copy(grad), grad, cos, -sin), None, None


def _copy(x: Tensor) -> Tensor:
    """Contiguous, in at least fp32."""
    return x.to(wide_dtype(x.dtype), memory_format=torch.contiguous_format, copy=True)


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `out`, a copy of `x`, in place: sums and a concatenation would take more passes."""
    half = cos.shape[-1]
    sizes = [half, half, x.shape[-1] - 2 * half]
    (a, b, _), (rotated_a, rotated_b, _) = wide(x).split(sizes, -1), out.split(sizes, -1)
    rotated_a.mul_(cos).addcmul_(b, sin, value=-1)
    rotated_b.mul_(cos).addcmul_(a, sin)
    return out.to(x.dtype)
