"""`bench checkpoint`: a checkpoint saved while a step runs, beside `torch.save` and plain writes.

In each round, of the same state (parameters and AdamW's moments): `torch.save` to a file; a save of
ours by a thread, begun before a step's passes and awaited before its update; one that training
waits for; a plain write of as many bytes, synced, which is the floor; and the check of a
checkpoint by one thread, beside a plain read. Blocked is the time for which training waits: until
`begin` returns, and for the copies before the update.
"""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from colonnade.bench.stages import gradients, recipe_of
from colonnade.bench.timing import median_ratio
from colonnade.launcher.checkpoint import Saver, step_folder
from colonnade.launcher.checkpoint.manifest import block_faults, blocks, read_manifest
from colonnade.launcher.checkpoint.tensors import changing_names, named_tensors
from colonnade.launcher.train.job import build_engine
from colonnade.models.config import ModelConfig
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.engine import Engine
from colonnade.parallel.world import World, open_world

MODEL = ModelConfig(
    pattern="*-", repeat=12, hidden=768, heads=12, ffn=2048, vocab=16384, residual="standard"
)
SEQ_LEN, MICRO_BATCHES = 512, 2


def torch_save(engine: Engine, folder: Path) -> float:
    """Returns the seconds of `torch.save`, which does not wait for the disk."""
    tensors = named_tensors(engine.model, engine.optimizer)
    start = time.perf_counter()
    torch.save(tensors, folder / "state.pt")
    return time.perf_counter() - start


def threaded(saver: Saver, engine: Engine, folder: Path, seq_len: int) -> tuple[float, float]:
    """Saves while a step runs; returns the seconds blocked, and those in all."""
    tensors, changing = named_tensors(engine.model, engine.optimizer), changing_names(engine.model)
    save = saver.begin(folder, tensors, {}, changing=changing)
    report = gradients(engine, seq_len, MICRO_BATCHES)
    saver.wait()
    blocked = save.blocked
    engine.update(report, 1e-4, 1.0)
    saver.finish()
    return blocked, save.seconds


def waited_for(engine: Engine, folder: Path) -> float:
    """Returns the seconds of a save that training waits for."""
    tensors = named_tensors(engine.model, engine.optimizer)
    return Saver().begin(folder, tensors, {}).seconds


def plain_write(folder: Path, size: int) -> float:
    """Returns the seconds in which `size` bytes are written to a file, and are on the disk."""
    piece = memoryview(os.urandom(1 << 24))
    start = time.perf_counter()
    with (folder / "plain").open("wb", buffering=0) as file:
        for offset in range(0, size, len(piece)):
            file.write(piece[: size - offset])
        os.fsync(file.fileno())
    return time.perf_counter() - start


def plain_read(folder: Path) -> float:
    """Returns the seconds in which all files of a checkpoint are read, from memory where they are
    cached there."""
    buffer = memoryview(bytearray(1 << 20))
    start = time.perf_counter()
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def check(folder: Path) -> float:
    """Returns the seconds in which one thread checks all files of a checkpoint."""
    start = time.perf_counter()
    faults = list(block_faults(folder, list(blocks(read_manifest(folder))), threads=1))
    assert not faults, faults
    return time.perf_counter() - start


def run() -> dict[str, Any]:
    """Seconds and rates of saves and checks in the working directory, medians over rounds, and
    ratios to their floors."""
    with (
        open_world(0, 1, torch.device("cpu")) as world,
        tempfile.TemporaryDirectory(dir=".") as folder,
    ):
        return measure(world, Path(folder), MODEL, SEQ_LEN, rounds=5)


def measure(
    world: World, folder: Path, model: ModelConfig, seq_len: int, rounds: int
) -> dict[str, Any]:
    """Measures saves and checks of a model's state in a folder."""
    seconds: dict[str, list[float]] = {}

    def measured(**found: float) -> None:
        for name, value in found.items():
            seconds.setdefault(name, []).append(value)

    size, engine = 0, build_engine(recipe_of(model, seq_len, ParallelConfig()), world)
    with Saver(asynchronous=True) as saver:
        engine.update(gradients(engine, seq_len, MICRO_BATCHES), 1e-4, 1.0)
        threaded(saver, engine, step_folder(folder, 0), seq_len)  # plans, and allocates copies
        shutil.rmtree(step_folder(folder, 0))
        for number in range(1, rounds + 1):
            step = step_folder(folder, number)
            measured(torch_save=torch_save(engine, folder))
            blocked, in_all = threaded(saver, engine, step, seq_len)
            measured(blocked=blocked, thread=in_all)
            size = sum(path.stat().st_size for path in step.iterdir())
            measured(plain_write=plain_write(folder, size))
            measured(check=check(step), plain_read=plain_read(step))
            shutil.rmtree(step)
            measured(waited_for=waited_for(engine, step))
            shutil.rmtree(step)
    return figures(seconds, size, len(named_tensors(engine.model, engine.optimizer)))


def figures(seconds: dict[str, list[float]], size: int, tensors: int) -> dict[str, Any]:
    """Returns medians, rates and ratios of what was measured in every round."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    timed = ("thread", "waited_for", "plain_write", "check", "plain_read")
    rates = {name: size / 1e9 / medians[name] for name in timed}
    written = seconds["plain_write"]
    return {
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "state": f"{size:,} bytes in {tensors} tensors",
        **{f"{name.replace('_', ' ')} s": value for name, value in medians.items()},
        "torch.save / blocked": median_ratio(seconds["torch_save"], seconds["blocked"]),
        **{f"{name.replace('_', ' ')} GB/s": value for name, value in rates.items()},
        "plain write / thread": median_ratio(written, seconds["thread"]),
        "plain write / waited for": median_ratio(written, seconds["waited_for"]),
    }
