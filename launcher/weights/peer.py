"""transformers as a peer, in plain PyTorch: without the packages that it prefers and need a GPU.

Imports no torch.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

GPU_ONLY = ("mamba_ssm", "causal_conv1d", "fla")


@contextmanager
def without_gpu_packages() -> Iterator[None]:
    """Within it the packages of `GPU_ONLY` cannot be imported, unless they have been before."""
    hidden = [name for name in GPU_ONLY if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # makes imports fail
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
