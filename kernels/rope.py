"""Rotary positions, with the scalings that stretch them beyond the trained length."""

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
        kind: `linear`: position interpolation (arXiv:2306.15595), every frequency divided.
            `ntk`: a larger base, theta · factor^(P/(P−2)), which leaves the highest frequency as it
            is and divides the lowest by `factor`. `yarn`: frequencies that turn often are kept,
            those that turn seldom divided, a ramp between (arXiv:2309.00071). `llama3`: the same
            idea with a ramp over wavelengths (Llama 3.1).
        factor: how much longer sequences may become.
        original: length in tokens that the model was trained on; `yarn` and `llama3`.
        low, high: `llama3`: turns within `original` up to which a frequency is divided in full, and
            from which it is kept.
        fast, slow: `yarn`: turns within `original` from which a frequency is kept, and up to which
            it is divided in full.
        mscale, mscale_all: `yarn`: weights of the attention factor (DeepSeek's); 0 is not given.
        attention_factor: `yarn`: that factor itself; None: from the three fields above.
        truncate: `yarn`: whether the ramp begins and ends at whole channels.
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
    """How much sharper attention gets when sequences grow by `factor` (arXiv:2309.00071).

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
        width: channels that are rotated P, even.

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
            kept = _yarn_kept(frequency, width, theta, scaling)
            return _blend(frequency, kept, scaling), _yarn_attention_factor(scaling)
        case "llama3":
            turns = scaling.original * frequency / (2 * math.pi)
            kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
            return _blend(frequency, kept, scaling), 1.0
        case other:
            raise ValueError(f"rope scaling {other!r} is not one of linear, ntk, yarn, llama3")


def _blend(frequency: Tensor, kept: Tensor, scaling: RopeScaling) -> Tensor:
    """Each frequency, in part kept and in part divided by the factor."""
    return frequency * (kept + (1 - kept) / scaling.factor)


def _yarn_kept(frequency: Tensor, width: int, theta: float, scaling: RopeScaling) -> Tensor:
    """The part of each frequency that YaRN keeps: 1 up to a pair, 0 from a later one."""

    def pair_with(turns: float) -> float:
        """Index of the pair that turns so often within the trained length; not a whole number."""
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
        over_all = yarn_mscale(scaling.factor, scaling.mscale_all)
        return yarn_mscale(scaling.factor, scaling.mscale) / over_all
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
        width: channels that are rotated P, even.
        dtype: of the activations.

    Returns:
        two `[S, B, 1, P/2]` tensors in at least fp32.
    """
    frequency, factor = rope_frequencies(width, theta, scaling, positions.device)
    angle = positions[:, :, None, None] * frequency
    cos, sin = angle.cos() * factor, angle.sin() * factor
    return cos.to(wide_dtype(dtype)), sin.to(wide_dtype(dtype))


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (x_i, x_{i+w/2}) of the first w channels by the table's angles.

    Args:
        x: `[S, B, H, P]`; channels from w on stay as they are (partial rotary).
        table: cosine and sine, `[S, B, 1, w/2]`, from `rope_table`; they get no gradient.

    Returns:
        `[S, B, H, P]`, dtype of `x`.
    """
    return _Rotate.apply(x, *table)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the gradient rotated back; autograd would keep products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        # in memory heads come before the sequence: attention's products read rows of one head
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
    """`out`, which holds `x`, rotated in place: sums and a concatenation would take more passes."""
    half = cos.shape[-1]
    sizes = [half, half, x.shape[-1] - 2 * half]
    (a, b, _), (turned_a, turned_b, _) = wide(x).split(sizes, -1), out.split(sizes, -1)
    turned_a.mul_(cos).addcmul_(b, sin, value=-1)
    turned_b.mul_(cos).addcmul_(a, sin)
    return out.to(x.dtype)
