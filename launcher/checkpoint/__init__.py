"""Checkpoints on disk: safetensors and JSON, committed atomically, loaded onto any layout.

A checkpoint is a folder `step-NNNNNNNN/`. It holds `rank-NNNNN.safetensors` from each rank that
writes, `tensors.json` (dtype, global shape and chunks of every tensor), `state.json` (the caller's
state) and `manifest.json` (sizes and checksums of the others). Nothing in it is pickled. A folder
of that name was always complete: it is written as `step-NNNNNNNN.partial` and renamed once all its
files are on the disk.

    saver = Saver(asynchronous=True)
    saver.begin(step_folder(run, step), tensors, {"step": step})
    ...  # the next step, up to its update
    saver.wait()
    ...
    saver.finish()
    state = load(newest(run), tensors)

folders   names, the atomic commit, what is deleted
plan      which rank writes which chunk
copies    of what a rank writes, in the host's memory
saver     writes, at once or in a thread
manifest  sizes and checksums
catalog   dtype, shape and chunks of every tensor
check     whether tensors can be saved, and fit a checkpoint
read      chunks, for PyTorch's loader
write     a safetensors file
loader    checks and loads
"""

from pathlib import Path
from typing import Any

from colonnade.launcher.checkpoint.folders import (
    is_checkpoint,
    newest,
    prune,
    set_aside,
    step_folder,
)
from colonnade.launcher.checkpoint.loader import Choice, choose, load, read_state, verify
from colonnade.launcher.checkpoint.plan import Tensors
from colonnade.launcher.checkpoint.saver import Save, Saver

__all__ = [
    "Choice",
    "Save",
    "Saver",
    "choose",
    "is_checkpoint",
    "load",
    "newest",
    "prune",
    "read_state",
    "save",
    "set_aside",
    "step_folder",
    "verify",
]


def save(folder: Path, tensors: Tensors, state: dict[str, Any]) -> None:
    """Writes one checkpoint at once; the arguments and errors are those of `Saver.begin`."""
    Saver().begin(folder, tensors, state)
