"""The precision of sensitive arithmetic: its dtype, at least fp32, and the bound of log-decays."""

import torch
from torch import Tensor

# exp of anything below is 0 in fp32 and fp64 alike, so clamping log-decays changes no result;
# it keeps their cumulative sums small enough for their differences to be precise.
LOG_ZERO = -1000.0


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in at least fp32."""
    return x.to(wide_dtype(x.dtype))
