"""Checkpoints on disk: safetensors and JSON, committed atomically, loaded onto any layout.

A checkpoint is a folder `step-NNNNNNNN/`: `rank-NNNNN.safetensors` from each rank that writes,
`tensors.json` (dtype, global shape and chunks of every tensor) and `state.json` (the caller's
state). Nothing in it is pickled. A folder of that name is complete: it is written as
`step-NNNNNNNN.partial` and renamed when all of it is on the disk.

    save(step_folder(run, step), tensors, {"step": step})
    state = load(newest(run), tensors)
"""

import errno
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from colonnade.launcher.checkpoint import catalog, folders
from colonnade.launcher.checkpoint.check import fits, savable
from colonnade.launcher.checkpoint.folders import is_complete, newest, prune, step_folder
from colonnade.launcher.checkpoint.storage import SafetensorsReader, SafetensorsWriter
from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero
from colonnade.launcher.errors import UserError

__all__ = ["is_complete", "load", "newest", "prune", "read_state", "save", "step_folder"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save(folder: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint; collective over the default process group, if there is one.

    Args:
        folder: where it will be (`step_folder(run, step)`), on a disk that all ranks share. A
            complete checkpoint of that name is replaced, and kept until the new one is complete.
        tensors: by name, plain tensors or DTensors of any dtype, mesh and placement but Partial.
            What several ranks hold is written by the lowest of them. Ranks may hold different
            names (stages of a pipeline). What a rank writes is copied to its host's memory.
        state: what else to keep, as JSON (finite numbers only); rank 0's is written.

    Raises UserError, the same on every rank, where the disk refuses: `folder.partial` is removed
    and the complete checkpoints are as they were.
    """
    on_all_ranks(lambda: savable(tensors))
    writer = SafetensorsWriter(folders.partial(folder))
    try:
        text = on_rank_zero(lambda: _prepare(folder, state))
        with _quiet(), torch.no_grad():
            planner = dcp.DefaultSavePlanner(
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
                dedup_save_to_lowest_rank=True,
            )
            dcp.save(dict(tensors), storage_writer=writer, planner=planner)
        on_rank_zero(lambda: _commit(folder, text))
    except (OSError, CheckpointException) as error:
        failure = _os_error(error)
        raise UserError(on_rank_zero(lambda: _failed(folder, failure, writer.needed))) from None
    on_rank_zero(lambda: folders.restore(folder))


def load(folder: Path, tensors: dict[str, torch.Tensor], partial: bool = False) -> dict[str, Any]:
    """Fill `tensors` in place, whatever their placement now, and return the state; collective.

    The names, global shapes and dtypes, over all ranks, must be those that were saved; `partial`
    leaves saved tensors that are not asked for alone. UserError, the same on every rank, where
    they are not (nothing is changed then), or where a file is missing or damaged (some tensors
    may be filled then).
    """
    listed, state = on_rank_zero(lambda: (catalog.read(folder), read_state(folder)))
    on_all_ranks(lambda: savable(tensors))
    fits(folder, listed, tensors, partial)
    reader = SafetensorsReader(folder, listed)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _quiet(), torch.no_grad():
            dcp.load(dict(tensors), storage_reader=reader, planner=planner)
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, UserError):
                raise failure from None
        raise RuntimeError(str(error)) from error
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """The state that the checkpoint `folder` was saved with; UserError if it cannot be read."""
    try:
        state = json.loads(catalog.text(folder, folders.STATE))
    except json.JSONDecodeError as error:
        raise catalog.damaged(folder / folders.STATE, str(error)) from None
    if not isinstance(state, dict):
        raise catalog.damaged(folder / folders.STATE, "not a JSON object")
    return state


def _prepare(folder: Path, state: dict[str, Any]) -> str:
    text = json.dumps(state, allow_nan=False)
    folders.prepare(folder)
    return text


def _commit(folder: Path, state: str) -> None:
    folders.write(folders.partial(folder) / folders.STATE, state)
    folders.commit(folder)


def _os_error(error: OSError | CheckpointException) -> OSError:
    """What the disk said; any other failure is a defect of the program and raised as it is."""
    if isinstance(error, OSError):
        return error
    for failure, _ in error.failures.values():
        if isinstance(failure, OSError):
            return failure
    raise RuntimeError(str(error)) from error


def _failed(folder: Path, failure: OSError, needed: int) -> str:
    """Clear up after a failed save, and say what the user can do (rank 0)."""
    folders.restore(folder)
    if folders.partial(folder).exists():
        shutil.rmtree(folders.partial(folder))
    run = next(path for path in folder.absolute().parents if path.exists())
    if failure.errno in _FULL:
        free = shutil.disk_usage(run).free
        room = (
            f" It needs more than {_size(needed)}, {_size(free)} are free there." if needed else ""
        )
        remedy = f"Free space on the disk of {run}, or lower checkpoint.keep"
    else:
        room = ""
        remedy = f"See that {run} can be written to, from every node"
    last = folders.newest(folder.parent)
    good = f"The last good checkpoint, {last}, is intact." if last else "There is none before it."
    return (
        f"could not save the checkpoint {folder}: {failure.strerror} ({failure.filename})."
        f"{room} {good} {remedy}, then resume."
    )


def _size(count: int) -> str:
    """`count` bytes for people."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is no process group: one process is a layout like others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
