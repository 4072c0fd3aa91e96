"""Memory of the host for copies of a GPU: pinned, so that they run beside everything else."""

import errno
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor


class PinnedMemoryError(RuntimeError):
    """The host refuses to pin memory."""


def pinned_bytes(size: int, cudart: Any = None) -> tuple[Tensor, int]:
    """Allocates pages of the host, and pins them until they are freed.

    The memory is registered with CUDA, not allocated by torch's pinned allocator, which rounds
    sizes up to a power of two; and asked for in huge pages, with which the host's updates are 5 to
    10% faster.

    Args:
        size: bytes, at least one.
        cudart: CUDA's functions; None: those of torch.

    Returns:
        the bytes, `[size]`, and CUDA's error code; where it is not 0 they are not pinned.
    """
    cuda = torch.cuda.cudart() if cudart is None else cudart
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel that has none
                raise
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    status = int(cuda.cudaHostRegister(memory.data_ptr(), size, 0))
    if status == 0:
        # The pages are freed after the last tensor that has them, and after this has run.
        ended = weakref.finalize(pages, cuda.cudaHostUnregister, memory.data_ptr())
        ended.atexit = False  # CUDA may be gone by then
    elif torch.cuda.is_available():
        clear_error()
    return memory, status


def clear_error() -> None:
    """Takes CUDA's last error away, which torch would report at its next kernel."""
    try:
        torch.zeros(1, device="cuda").add_(1)
    except RuntimeError as error:
        if "CUDA" not in str(error):
            raise
