"""Measures the rates of a rank's processor, and asks nvidia-smi for the state of a host's GPUs."""

import csv
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from colonnade.launcher.cluster.fabric.links import synchronize

SECONDS = 0.2  # for which a rate is measured
REPEATS = 3  # measurements at least
SMI_PATIENCE = 60  # seconds
# Of the square matrices; on a CPU a product of a millisecond, which others seldom interrupt.
WIDTH = {"cpu": 256, "cuda": 8192}
COPIED = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}  # bytes

SMI_FIELDS = (
    "index", "name", "temperature.gpu", "ecc.errors.uncorrected.volatile.total",
    "{reasons}.active", "pcie.link.width.current", "pcie.link.width.max",
)  # fmt: skip
REASONS = ("clocks_throttle_reasons", "clocks_event_reasons")  # older and newer drivers' name
# Bits of these reasons that are no part of normal work (nvml.h)
THROTTLED = {
    0x08: "hardware slowdown",
    0x20: "too hot (software)",
    0x40: "too hot (hardware)",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Rates:
    """What a processor does in a second.

    Attributes:
        product: FLOP/s of a matrix product, bf16 on a GPU and fp32 in one thread on a CPU.
        copy: bytes/s that a copy in its memory reads and writes.
        from_host: bytes/s of a copy from the host's pinned memory to a GPU; None on a CPU.
    """

    product: float
    copy: float
    from_host: float | None = None

    def merged(self, other: "Rates") -> "Rates":
        """The higher rates of two measurements: other load lowers them."""
        hosts = [r for r in (self.from_host, other.from_host) if r is not None]
        return Rates(
            max(self.product, other.product), max(self.copy, other.copy), max(hosts, default=None)
        )


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi says of a GPU; None: it does not say.

    Attributes:
        index: among those of the host.
        name: of the model.
        temperature: in degrees Celsius.
        ecc_errors: errors of memory that could not be corrected since the driver was loaded.
        throttled: why its clocks are lowered.
        pcie_width: lanes in use.
        pcie_width_max: lanes that card and slot have.
    """

    index: int
    name: str
    temperature: int | None
    ecc_errors: int | None
    throttled: tuple[str, ...]
    pcie_width: int | None
    pcie_width_max: int | None


def measure_rates(device: torch.device) -> Rates:
    """Measures the rates of this rank's processor, in about a second.

    On a CPU the product is that of one thread: with several, one that waits for another program
    would hold up all of them.
    """
    kind, threads = device.type, torch.get_num_threads()
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    a, b = (torch.randn(WIDTH[kind], WIDTH[kind], device=device, dtype=dtype) for _ in range(2))
    torch.set_num_threads(1)
    try:
        product = 2 * WIDTH[kind] ** 3 / seconds_of(lambda: a @ b, device)
    finally:
        torch.set_num_threads(threads)
    source = torch.zeros(COPIED[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * len(source) / seconds_of(lambda: target.copy_(source), device)
    if kind == "cpu":
        return Rates(product, copy)
    pinned = torch.zeros(64 * 2**20, dtype=torch.uint8, pin_memory=True)
    part = target[: len(pinned)]
    return Rates(product, copy, len(pinned) / seconds_of(lambda: part.copy_(pinned), device))


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """The time of an action, which is repeated for a while behind a first time.

    On a GPU it is the median; on a CPU the shortest, which other programs lengthen least.
    """
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) <= REPEATS or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) if device.type == "cuda" else min(times)


def gpus(program: str = "nvidia-smi") -> tuple[list[Gpu], str]:
    """Asks nvidia-smi for the GPUs of this host.

    Returns:
        the GPUs, and why nvidia-smi failed. Both are empty where it is not installed.
    """
    message = ""
    for reasons in REASONS:
        fields = ",".join(SMI_FIELDS).format(reasons=reasons)
        command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            finished = subprocess.run(command, capture_output=True, text=True, timeout=SMI_PATIENCE)
        except FileNotFoundError:
            return [], ""
        except subprocess.TimeoutExpired:
            return [], f"it has not answered in {SMI_PATIENCE} s"
        if finished.returncode == 0:
            rows = csv.reader(finished.stdout.splitlines(), skipinitialspace=True)
            return [parse_gpu(row) for row in rows], ""
        message = " ".join((finished.stdout + finished.stderr).split())
        if "not a valid field" not in message:
            break
    return [], message or f"status {finished.returncode}"


def parse_gpu(row: list[str]) -> Gpu:
    """Reads a line of nvidia-smi, in which `[N/A]` stands for what a GPU does not tell."""
    index, name, temperature, errors, throttled, width, width_max = row
    bits = int(throttled, 16) if throttled.startswith("0x") else 0
    return Gpu(
        int(index),
        name,
        _number(temperature),
        _number(errors),
        tuple(reason for bit, reason in THROTTLED.items() if bits & bit),
        _number(width),
        _number(width_max),
    )


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def gpu_faults(host: str, found: list[Gpu], failure: str) -> list[str]:
    """Says what is wrong with the GPUs of a host, of what `gpus` returned there."""
    faults = [f"nvidia-smi fails on {host}: {failure}"] if failure else []
    for gpu in found:
        name = f"GPU {gpu.index} of {host}"
        if gpu.ecc_errors:
            faults.append(
                f"{name} has {gpu.ecc_errors} uncorrected memory errors: drain the host, and reset "
                "or replace the GPU"
            )
        if gpu.throttled:
            hot = "" if gpu.temperature is None else f" at {gpu.temperature} °C"
            faults.append(f"{name} lowers its clocks{hot}: {', '.join(gpu.throttled)}")
        if gpu.pcie_width and gpu.pcie_width_max and gpu.pcie_width < gpu.pcie_width_max:
            faults.append(
                f"{name} uses {gpu.pcie_width} of {gpu.pcie_width_max} PCIe lanes: reseat the card"
            )
    return faults
