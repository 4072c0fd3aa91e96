"""Memory of offloaded state: pinned slabs on the host, and what the device has free."""

import warnings

import torch
from torch import Tensor

from colonnade.parallel.lanes.pinned import PinnedMemoryError, pinned_bytes

GIB = 2**30


def slab_of(size: int, device: torch.device, pinned: str) -> Tensor:
    """Allocates a slab of bytes on the host, pinned if it is for a GPU.

    Args:
        size: of the slab.
        device: whose copies use it; where it is the host itself, nothing is pinned.
        pinned: `require` refuses where memory cannot be pinned; `prefer` warns and goes on.

    Raises:
        PinnedMemoryError: it cannot be pinned, and must be.
    """
    if device.type != "cuda" or not size:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    slab, status = pinned_bytes(size)
    if status == 0:
        return slab
    sentence = f"the host does not pin {size / GIB:.2f} GiB of optimizer state (CUDA error "
    sentence += f"{status}; see `ulimit -l` and the container's memory limit)"
    if pinned == "require":
        raise PinnedMemoryError(
            f"optimizer.pinned = require: {sentence}; raise the limit, use more ranks, or set "
            "optimizer.pinned to prefer, with which copies are two to three times as slow and "
            "block the host"
        )
    warnings.warn(
        f"offload: {sentence}: it stays pageable, so copies are two to three times as slow and "
        "block the host",
        stacklevel=2,
    )
    return slab


def free_bytes(device: torch.device) -> float:
    """Bytes that a new tensor may take on a device now: what the driver has free, and what torch's
    allocator holds and does not use. Infinite where the device is the host itself."""
    if device.type != "cuda":
        return float("inf")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
