"""`bench offload`: optimizer state in the host's memory, in parts that run one by one.

host_adamw     the host's kernel, beside DeepSpeed's and three passes
offload_clock  whole steps of devices that are not present, on a simulated clock; draws them
offload_gpu    whole steps on one GPU, where there is one
"""

from typing import Any

from colonnade.bench import host_adamw, offload_clock, offload_gpu


def run() -> dict[str, Any]:
    """The figures of all parts."""
    return {
        **host_adamw.run(),
        **offload_clock.run(),
        **offload_clock.flat({"one GPU": offload_gpu.run()}),
    }
