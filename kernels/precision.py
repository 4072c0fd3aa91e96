"""The dtype in which sensitive arithmetic is done: at least fp32."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in at least fp32."""
    return x.to(wide_dtype(x.dtype))
