"""What the program knows of accelerators by name: their memory and their peak."""

import re
from dataclasses import dataclass

from colonnade.launcher.errors import UserError

MIB, GIB = 2**20, 2**30
# Of a device's memory, what a plan leaves to the CUDA context, the buffers of NCCL and of cuBLAS,
# and to fragmentation. It is a choice: nothing here was measured on a device.
RESERVE = 0.08


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        name: by which people call it.
        memory: bytes.
        driver_name: a part of the name that its driver gives; empty for one that is a size alone.
        peak_flops: dense products in bf16, FLOP/s; None where it is unknown.
    """

    name: str
    memory: int
    driver_name: str = ""
    peak_flops: float | None = None

    @property
    def usable(self) -> int:
        """The bytes that a rank may hold."""
        return int(self.memory * (1 - RESERVE))


# Memory is the total that the driver reports; peaks are the vendor's data sheets, without sparsity.
# Where one driver name is a part of another's, the longer one stands first.
DEVICES = (
    Device("a100-40gb", 40960 * MIB, "A100-SXM4-40GB", 312e12),
    Device("a100-80gb", 81920 * MIB, "A100", 312e12),
    Device("h100", 81559 * MIB, "H100 80GB HBM3", 989e12),
    Device("h200", 143771 * MIB, "H200", 989e12),
    Device("b200", 183359 * MIB, "B200", 2250e12),
)


def parse_device(text: str) -> Device:
    """Returns the device of a name of DEVICES, or one with a size such as `80GiB` or `24GB`.

    Raises:
        UserError: it is neither.
    """
    for device in DEVICES:
        if device.name == text.lower():
            return device
    if size := re.fullmatch(r"(\d+(?:\.\d+)?) ?(gib|gb)", text.lower()):
        memory = int(float(size[1]) * (GIB if size[2] == "gib" else 10**9))
        if memory:
            return Device(text, memory)
    names = ", ".join(device.name for device in DEVICES)
    raise UserError(f"--device {text}: give one of {names}, or its memory, such as 80GiB")


def peak_flops(driver_name: str) -> float | None:
    """Returns the bf16 peak of a GPU in FLOP/s, None for one that is not in DEVICES."""
    for device in DEVICES:
        if re.search(rf"\b{re.escape(device.driver_name)}\b", driver_name):
            return device.peak_flops
    return None
