"""`bench convert`: an 8B Llama in bf16 to our format and back, beside plain reads and writes.

In one run, of the same bytes: plain writes, synced, and reads from the disk, through the system's
cache and past it (O_DIRECT), whose sum is the floor of a conversion that reads, then writes;
`convert` from a Hugging Face folder, whose weights are random; and back from the checkpoint, whose
checksums are compared. What `convert` writes it also reads again from the disk, which is in the
floor `read twice` alone. Files that are read are forgotten by the system before. Needs 50 GB in the
working directory.
"""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colonnade.bench.checkpoint import plain_write
from colonnade.launcher.checkpoint.manifest import BLOCK
from colonnade.launcher.convert.huggingface.family import shapes_of
from colonnade.launcher.convert.huggingface.folder import in_files
from colonnade.launcher.weights.convert import FILE_BYTES, convert, write
from colonnade.launcher.weights.direct import bytes_of, memory, open_direct
from colonnade.launcher.weights.hf import HuggingFaceTarget
from colonnade.launcher.weights.progress import Progress
from colonnade.launcher.weights.source import Box, Weights
from colonnade.models.config import ModelConfig

MODEL = ModelConfig(
    pattern="*-", repeat=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256,
    rope_theta=500000.0,
)  # fmt: skip


class RandomWeights(Weights):
    """Weights of a model, each of which is the same random numbers."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder, self.config, self.shapes = folder, config, shapes_of(config)
        largest = max(shape.numel() for shape in self.shapes.values())
        self.numbers = torch.randn(largest).bfloat16()

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str, box: Box) -> Tensor:
        shape = [at.stop - at.start for at in box]
        return self.numbers[: torch.Size(shape).numel()].reshape(shape)


def silent(text: str) -> None:
    """Ignores a line of progress."""


def make_source(folder: Path, config: ModelConfig) -> int:
    """Writes a Hugging Face folder with random weights; returns the bytes of its tensors."""
    weights = RandomWeights(folder.parent, config)
    target = HuggingFaceTarget(weights, None)
    files = in_files(target.pieces(None), lambda piece: piece.bytes, FILE_BYTES)
    named = dict(zip(target.file_names(len(files)), files, strict=True))
    progress = Progress.open(folder, {})
    write(progress, named, target.metadata, silent)
    progress.complete(target, named)
    progress.rename(folder)
    return sum(piece.bytes for of_file in files for piece in of_file)


def drop_cached(path: Path) -> None:
    """Has the system forget what it holds of a file in memory, so that it is read from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def cold_read(path: Path) -> float:
    """Returns the seconds in which a file is read from the disk."""
    drop_cached(path)
    buffer = memoryview(bytearray(1 << 24))
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def direct_rates(path: Path, size: int) -> tuple[float, float]:
    """Returns the seconds of a write of `size` bytes past the system's cache, and of a read."""
    block, total = bytes_of(memory(BLOCK)), -(-size // BLOCK) * BLOCK
    start = time.perf_counter()
    descriptor = open_direct(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for offset in range(0, total, BLOCK):
        os.pwrite(descriptor, block, offset)
    os.fsync(descriptor)
    written = time.perf_counter()
    for offset in range(0, total, BLOCK):
        os.preadv(descriptor, [block], offset)
    read = time.perf_counter()
    os.close(descriptor)
    path.unlink()
    return written - start, read - written


def anonymous_memory() -> int:
    """Returns the bytes of this process's memory that are of no file."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yields a list whose only number is, at the end, the growth of anonymous memory."""
    before, done = anonymous_memory(), threading.Event()
    peak = [0]

    def sample() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous_memory() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def timed(source: Path, destination: Path, to: str) -> tuple[float, int]:
    """Returns the seconds of a conversion whose source is only on the disk, and its memory."""
    for path in source.rglob("*.safetensors"):
        drop_cached(path)
    with peak_memory() as peak:
        seconds = convert(source, destination, to, report=silent).seconds
    return seconds, peak[0]


def run() -> dict[str, Any]:
    """Seconds, rates and memory of conversions in the working directory, and ratios to the disk."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        return measure(Path(folder), MODEL)


def measure(folder: Path, model: ModelConfig) -> dict[str, Any]:
    """Measures conversions of a model with random weights."""
    size = make_source(folder / "hf", model)
    seconds = {"plain write": plain_write(folder, size), "plain read": cold_read(folder / "plain")}
    (folder / "plain").unlink()
    direct = direct_rates(folder / "plain", size)
    seconds["direct write"], seconds["direct read"] = direct
    to_native, native_memory = timed(folder / "hf", folder / "native", "native")
    shutil.rmtree(folder / "hf")
    to_hf, hf_memory = timed(folder / "native", folder / "back", "hf")
    seconds["to native"], seconds["to hf"] = to_native, to_hf
    plain = seconds["plain write"] + seconds["plain read"]
    return {
        "bytes": size,
        **{f"{name} s": value for name, value in seconds.items()},
        **{f"{name} GB/s": size / 1e9 / value for name, value in seconds.items()},
        "plain write / to native": seconds["plain write"] / to_native,
        "plain write / to hf": seconds["plain write"] / to_hf,
        "plain / to native": plain / to_native,
        "plain / to hf": plain / to_hf,
        "direct / to native": sum(direct) / to_native,
        "direct / to hf": sum(direct) / to_hf,
        "direct, read twice / to native": (direct[0] + 2 * direct[1]) / to_native,
        "direct, read twice / to hf": (direct[0] + 2 * direct[1]) / to_hf,
        "to native, anonymous bytes": native_memory,
        "to hf, anonymous bytes": hf_memory,
    }
