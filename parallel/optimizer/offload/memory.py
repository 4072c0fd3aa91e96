"""Memory of offloaded state: pinned slabs on the host, and what the device has free."""

import warnings
import weakref

import torch
from torch import Tensor

from colonnade.parallel.lanes.pinned import PinnedMemoryError

GIB = 2**30


class Slabs:
    """Slabs of bytes on the host, pinned if they are for a GPU, until their owner is gone.

    Copies of pinned memory run beside everything else. The memory is registered, not allocated by
    torch's pinned allocator, which rounds sizes up to a power of two.
    """

    def __init__(self, device: torch.device, pinned: str, owner: object) -> None:
        """
        Args:
            device: whose copies use the slabs; where it is the host itself, nothing is pinned.
            pinned: `require` refuses where memory cannot be pinned; `prefer` warns and goes on.
            owner: whose end unpins the slabs.
        """
        self.device, self.pinned = device, pinned
        self.registered: list[Tensor] = []
        weakref.finalize(owner, unpin, self.registered)

    def allocate(self, size: int) -> Tensor:
        """Allocates a slab of so many bytes.

        Raises:
            PinnedMemoryError: it cannot be pinned, and must be.
        """
        slab = torch.empty(size, dtype=torch.uint8, device="cpu")
        if self.device.type != "cuda" or not size:
            return slab
        status = int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), size, 0))
        if status == 0:
            self.registered.append(slab)
            return slab
        sentence = f"the host does not pin {size / GIB:.2f} GiB of optimizer state (CUDA error "
        sentence += f"{status}; see `ulimit -l` and the container's memory limit)"
        if self.pinned == "require":
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


def unpin(slabs: list[Tensor]) -> None:
    """Unpins slabs, which are freed afterwards."""
    for slab in slabs:
        torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())
    slabs.clear()


def free_bytes(device: torch.device) -> float:
    """Bytes that a new tensor may take on a device now: what the driver has free, and what torch's
    allocator holds and does not use. Infinite where the device is the host itself."""
    if device.type != "cuda":
        return float("inf")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
