"""What the program knows of accelerators by name: their memory, that of their hosts, their peak."""

import math
import re
from dataclasses import dataclass, replace

from colonnade.launcher.errors import UserError

MIB, GIB = 2**20, 2**30
# Of a device's memory, what a plan leaves to the CUDA context, the buffers of NCCL and of cuBLAS,
# and to fragmentation. It is a choice: nothing here was measured on a device.
RESERVE = 0.08
# Of a host's memory, what a plan leaves to the system, the ranks' programs, data and buffers of
# communication. It is a choice as well.
HOST_RESERVE = 0.1


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        name: by which people call it.
        memory: bytes.
        driver_name: a part of the name that its driver gives; empty for one that is a size alone.
        peak_flops: dense products in bf16, FLOP/s; None where it is unknown.
        host_memory: bytes of the host's memory for each of its devices; None where it is unknown.
    """

    name: str
    memory: int
    driver_name: str = ""
    peak_flops: float | None = None
    host_memory: int | None = None

    @property
    def usable(self) -> int:
        """The bytes that a rank may hold."""
        return int(self.memory * (1 - RESERVE))

    @property
    def usable_of_host(self) -> int | None:
        """The bytes of the host's memory that a rank may hold; None where they are unknown."""
        return None if self.host_memory is None else int(self.host_memory * (1 - HOST_RESERVE))


# Memory is the total that the driver reports; peaks are the vendor's data sheets, without sparsity.
# That of hosts is an eighth of the system memory of the vendor's servers with eight devices, by
# their user guides: DGX A100 320 GB 1 TB, DGX A100 640 GB, H100 and H200 2 TB, DGX B200 2 TB, which
# can be upgraded to 4. Other servers have less or more.
# Where one driver name is a part of another's, the longer one stands first.
DEVICES = (
    Device("a100-40gb", 40960 * MIB, "A100-SXM4-40GB", 312e12, 128 * GIB),
    Device("a100-80gb", 81920 * MIB, "A100", 312e12, 256 * GIB),
    Device("h100", 81559 * MIB, "H100 80GB HBM3", 989e12, 256 * GIB),
    Device("h200", 143771 * MIB, "H200", 989e12, 256 * GIB),
    Device("b200", 183359 * MIB, "B200", 2250e12, 256 * GIB),
)


def parse_device(text: str | None, host_memory: float | None = None) -> Device | None:
    """Returns the device of a name of DEVICES, or one with a size such as `80GiB` or `24GB`; None:
    any device.

    Args:
        host_memory: GiB of its host's memory for each device; None: that of DEVICES.

    Raises:
        UserError: it is neither, or the memory of a host of no device, or no amount.
    """
    if host_memory is None:
        return None if text is None else known_device(text)
    if not 0 < host_memory < math.inf:
        raise UserError(
            f"--host-memory {host_memory:g}: give GiB of a host's memory for each device, above 0"
        )
    if text is None:
        names = ", ".join(device.name for device in DEVICES)
        raise UserError(
            f"--host-memory {host_memory:g}: without --device nothing is compared with it; add "
            f"--device: one of {names}, or its memory, such as 80GiB"
        )
    return replace(known_device(text), host_memory=int(host_memory * GIB))


def known_device(text: str) -> Device:
    """Returns the device of a name or a size."""
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
